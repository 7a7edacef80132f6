"""Check the options of a step before anything runs, with the checks of its command."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from gguflora.errors import GgufloraError
from gguflora.pipeline.recipe import RecipeFile
from gguflora.pipeline.steps import Combine, Convert, Merge, Quantize, Resize, Step, Train


def check_options(file: RecipeFile, index: int, step: Step) -> None:
    """Check the options of a step whose templates have been filled in.

    Raises:
        RecipeError: if the command would refuse them.
    """
    try:
        key, message = _problem(step)
    except GgufloraError as error:
        key, message = "", str(error)
    if message:
        words = [key] if key else [word.strip(":") for word in message.split()[:1]]
        known = [name for name in words if name in type(step).model_fields]
        raise file.error(("steps", index, *known), message)


def _problem(step: Step) -> tuple[str, str]:
    """Return the key and the message of a problem; empty if there is none."""
    if isinstance(step, Convert | Resize):
        if step.rank is not None and step.energy is not None:
            return "energy", f"rank is {step.rank} and energy {step.energy}, expected only one of them"
        if isinstance(step, Resize):
            _check_resize(step)
    elif isinstance(step, Merge):
        return _merge_problem(step)
    elif isinstance(step, Combine):
        from gguflora.lora.combine import check_options as check  # noqa: PLC0415  (loads numpy)

        check(**step.model_dump(include={"method", "rank", "density", "sign", "seed", "ties"}))  # no templates are left
    elif isinstance(step, Quantize):
        _check_preset(step.preset, step)
    elif isinstance(step, Train):
        _check_training(step)
    return "", ""


def _check_resize(step: Resize) -> None:
    from gguflora.lora.low_rank import RankRule  # noqa: PLC0415  (loads numpy)
    from gguflora.lora.resize import check_options as check  # noqa: PLC0415

    rule = RankRule(**step.model_dump(include={"rank", "energy", "sv_ratio", "sv_fro"}))  # no templates are left
    texts = [step.text] if isinstance(step.text, str) else step.text or []
    check(rule, step.model_dump()["max_loss"], [Path(text) for text in texts])


def _check_training(step: Train) -> None:
    from gguflora.training.options import TrainOptions  # noqa: PLC0415  (with the actions' other checks)

    known = {field.name for field in fields(TrainOptions)} - {"targets", "memory"}  # templates, and a key of all steps
    given = step.model_dump(exclude_unset=True, include=known)
    TrainOptions(**{name: value for name, value in given.items() if value != "auto" or name == "precision"}).check()


def _check_preset(preset: str, step: Quantize | Merge) -> None:
    from gguflora.merging.presets import preset_named  # noqa: PLC0415  (loads numpy)

    preset_named(
        preset,
        tensor_types=step.tensor_types,
        pure=step.pure,
        output_tensor_type=step.output_tensor_type,
        token_embedding_type=step.token_embedding_type,
    )


def _merge_problem(step: Merge) -> tuple[str, str]:
    from gguflora.merging.output_types import OutputTypes  # noqa: PLC0415  (loads numpy)

    if (step.out is None) == (step.patch is None):
        return "out", "give either out, for a model, or patch, for its difference from the base"
    if step.patch is not None and step.split:
        return "split", "a patch is not made in parts; leave split out"
    OutputTypes.from_names(step.outtype, step.type or {})
    if step.quantize is not None:
        _check_preset(step.quantize, step)
    return "", ""
