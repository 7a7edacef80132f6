"""Hidden states below the lowest adapted block: no step changes them, so they are computed once and kept in a file.

They lie in the run's state directory as float32 (n_positions, width), sample after sample. The system's cache of files
holds what memory has room for. All samples are computed in micro-batches that do not depend on the steps, so that a run
that goes on reads the same bits, whether the file is still there or is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np
import torch

from gguflora.errors import TrainingError
from gguflora.files.atomic import atomic_output
from gguflora.training.batches import Batches, MicroBatch
from gguflora.training.model import Below, PackedModel
from gguflora.training.samples import Sample

FILE: Final = "hidden.f32"
_FLOAT: Final = 4


class KeptStates:
    """The kept hidden states of all samples.

    Args:
        model: the model.
        samples: to learn.
        first: the lowest adapted block; the states are its input.
        path: the file.

    Attributes:
        n_bytes: size of the file.
    """

    def __init__(self, model: PackedModel, samples: Sequence[Sample], first: int, path: Path) -> None:
        self._model, self.first, self._path = model, first, path
        self._width = model.width
        sizes = [len(sample.tokens) * self._width * _FLOAT for sample in samples]
        self._offsets = [0, *accumulate(sizes)]
        self.n_bytes = self._offsets[-1]

    @property
    def is_there(self) -> bool:
        """Whether the file is there as a whole: it gets its name when it is complete."""
        return self._path.is_file() and self._path.stat().st_size == self.n_bytes

    def fill(self, batches: Batches) -> None:
        """Compute and write the states of all samples.

        Raises:
            OutputError: if the file cannot be written; then it is not there.
        """
        with atomic_output(self._path, force=True) as file:
            for micro in batches.all():
                states = self._model.states_below(self.first, micro.tokens, micro.positions).numpy()
                for place in micro.places:
                    file.seek(self._offsets[place.number])
                    file.write(np.ascontiguousarray(states[place.row, place.start : place.stop]).tobytes())

    def of(self, micro: MicroBatch) -> Below:
        """The states of a micro-batch; nothing where it is padded.

        Raises:
            TrainingError: if the file has gone or is too short.
        """
        states = torch.zeros(*micro.tokens.shape, self._width)
        for place in micro.places:
            count = (place.stop - place.start) * self._width
            try:
                values = np.fromfile(self._path, np.float32, count, offset=self._offsets[place.number])
            except OSError as error:
                raise TrainingError(f"{self._path}: cannot be read: {error}") from error
            if len(values) < count:
                raise TrainingError(f"{self._path}: is too short; go on with --resume, which computes it again")
            states[place.row, place.start : place.stop] = torch.from_numpy(values.reshape(-1, self._width))
        return Below(self.first, states)
