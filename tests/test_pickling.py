"""What crosses a process's border, whole: exceptions, reports, and the module that a notebook's functions use."""

import pickle
from multiprocessing import get_context

import cloudpickle
import pytest

import gguflora
from gguflora import errors
from support import builders
from support.builders import Adapter

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, gguflora.GgufloraError)]
OTHERS = {
    errors.MissingExtraError: ("drawing", "matplotlib", "plot"),
    errors.NonFiniteError: ("is not finite", 3, 4),
    errors.TrainingDataError: ("bad rows", ["a:1: empty"]),
}


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
@pytest.mark.parametrize("kind", ERRORS)
def test_exceptions(kind, pickler):
    error = kind(*OTHERS.get(kind, ("what failed",)))
    error.__notes__ = ["where"]
    again = pickle.loads(pickler.dumps(error))
    assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


def fail(_):
    raise errors.NonFiniteError("weight 3, 4 is not finite", 3, 4)


def test_a_pool_hears_of_it():
    with get_context("spawn").Pool(1) as pool, pytest.raises(errors.NonFiniteError) as caught:
        pool.map_async(fail, [1]).get(timeout=60)
    assert (caught.value.row, caught.value.column) == (3, 4)


def test_the_module():
    assert pickle.loads(pickle.dumps(gguflora)) is gguflora
    function = pickle.loads(cloudpickle.dumps(lambda: gguflora.__version__))
    assert function() == gguflora.__version__


def test_reports(tmp_path):
    base, adapter = builders.gguf_model("llama"), builders.adapter("llama", Adapter(targets=("q_proj",)))
    reports = [
        gguflora.convert(adapter, base, tmp_path / "lora.gguf"),
        gguflora.merge(base, [adapter], tmp_path / "merged.gguf"),
        gguflora.inspect(adapter, base),
        gguflora.resize(adapter, tmp_path / "small", rank=1),
        gguflora.combine([adapter, adapter], tmp_path / "both", method="linear"),
        gguflora.diff(adapter, adapter),
        gguflora.export(tmp_path / "lora.gguf", base, tmp_path / "peft"),
    ]
    for report in reports:
        for pickler in (pickle, cloudpickle):
            assert pickle.loads(pickler.dumps(report)).to_dict() == report.to_dict()
