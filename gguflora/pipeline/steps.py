"""The models of a recipe's steps: the keys of each action, which are the keywords of its function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gguflora.files.remote import Kind, input_kinds
from gguflora.pipeline.commands import commands

Template = Annotated[str, Field(pattern=r"^\{\w+\}$")]
"""A variable of the matrix in place of a number."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")]
Whole = Annotated[int, Field(ge=0)] | Template
Count = Annotated[int, Field(ge=1)] | Template
Number = Annotated[float, Field(allow_inf_nan=False)] | Template
Share = Annotated[float, Field(gt=0, le=1)] | Template
"""A number above 0 and up to 1."""
OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"] | Template
Scalar = str | int | float


class Strict(BaseModel):
    """A table without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Limits(Strict):
    """Limits of a number in a step's report."""

    min: Annotated[float, Field(allow_inf_nan=False)] | None = None
    max: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Limits:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min is {self.min:g} and max {self.max:g}, so no number passes")
        return self


class AdapterUse(Strict):
    """An adapter and its scale (or weight)."""

    path: str
    scale: Number = 1.0


Adapters = Annotated[list[str | AdapterUse], Field(min_length=1)]


class Step(Strict):
    """The keys that all steps have.

    Attributes:
        name: name of the step.
        for_each: the matrix: for each variable a list of values, or ``sources.NAME`` or ``steps.NAME``.
        out: path of each output in the output folder; ``{variable}`` is replaced by a value, or by a file's stem.
        checks: limits of numbers in the report by path, such as ``errors.*``; see `gguflora.pipeline.checks`.
        memory: peak memory of one job in MB.
    """

    name: Name
    for_each: dict[Name, str | list[Scalar]] = Field(default={}, alias="for")
    out: str | None = Field(default=None, min_length=1)
    checks: dict[str, Limits] = {}
    memory: int = Field(default=1024, ge=1)

    @property
    def inputs(self) -> Mapping[str, Kind]:
        """The keys that name inputs, and the kind of each, which says what to fetch of a remote folder."""
        return input_kinds(commands()[self.model_dump(include={"action"})["action"]])

    def texts_of(self, name: str) -> list[str]:
        """Return the locations that a key of inputs names."""
        item = getattr(self, name)
        items = item if isinstance(item, list) else [item]
        return [entry if isinstance(entry, str) else entry.path for entry in items if entry is not None]

    @property
    def target(self) -> str:
        """The key that names the output."""
        return "out"


class OneOutput(Step):
    """A step that has nothing but ``out`` to name its output."""

    out: str = Field(min_length=1)


class Convert(OneOutput):
    """`gguflora.convert`."""

    action: Literal["convert"]
    adapter: str
    base: str
    outtype: OutType = "auto"
    rank: Count | None = None
    energy: Share | None = None
    scale: Number = 1.0
    text_only: bool = False
    trust_names: bool = False


class Merge(Step):
    """`gguflora.merge`, into a model (``out``) or into a patch (``patch``).

    Attributes:
        split: number of parts of the merge on a cluster, each done by one worker; the result is the same.
    """

    action: Literal["merge"]
    patch: str | None = Field(default=None, min_length=1)
    base: str
    adapters: Adapters
    rounding: Literal["adaptive", "nearest"] | Template = "adaptive"
    seed: Whole = 0
    base_f16: str | None = None
    outtype: str = "keep"
    type: dict[str, str] | None = None
    imatrix: str | None = None
    text_only: bool = False
    trust_names: bool = False
    quantize: str | None = None
    tensor_types: dict[str, str] | None = None
    pure: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    calibrate: bool = False
    calibration_text: str | list[str] | None = None
    moments: str | None = None
    split: int | None = Field(default=None, ge=2)
    threads: int | None = Field(default=None, ge=1)

    @property
    def target(self) -> str:
        """The key that names the output."""
        return "out" if self.patch is None else "patch"


class Quantize(OneOutput):
    """`gguflora.quantize`."""

    action: Literal["quantize"]
    base: str
    preset: str
    imatrix: str | None = None
    tensor_types: dict[str, str] | None = None
    pure: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    threads: int | None = Field(default=None, ge=1)


class Imatrix(OneOutput):
    """`gguflora.imatrix`."""

    action: Literal["imatrix"]
    base: str
    text: str | None = None
    ctx: Count = 512
    chunks: Count | None = None
    process_output: bool = False
    threads: int | None = Field(default=None, ge=1)


class Combine(OneOutput):
    """`gguflora.combine`."""

    action: Literal["combine"]
    adapters: Adapters
    method: str = "cat"
    rank: Count | None = None
    density: Share | None = None
    sign: Literal["total", "frequency"] | Template | None = None
    seed: Whole | None = None
    ties: Literal["peft", "mergekit"] | Template | None = None
    base: str | None = None
    outtype: OutType = "auto"


class Resize(OneOutput):
    """`gguflora.resize`."""

    action: Literal["resize"]
    adapter: str
    rank: Count | None = None
    energy: Share | None = None
    sv_ratio: Number | None = None
    sv_fro: Share | None = None
    max_loss: Number | None = None
    text: str | list[str] | None = None
    threads: int | None = Field(default=None, ge=1)
    base: str | None = None
    outtype: OutType = "auto"


class Extract(OneOutput):
    """`gguflora.extract`."""

    action: Literal["extract"]
    finetuned: str
    base: str
    rank: Count
    energy: Share | None = None
    iterations: Whole | None = None
    seed: Whole = 0
    outtype: OutType = "auto"
    threads: int | None = Field(default=None, ge=1)


class Export(OneOutput):
    """`gguflora.export`."""

    action: Literal["export"]
    lora: str
    base: str
    base_model_name: str | None = None


class Inspect(OneOutput):
    """`gguflora.inspect`; its report is the output, as JSON."""

    action: Literal["inspect"]
    adapter: str
    base: str | None = None
    ranks: bool = False
    text_only: bool = False
    trust_names: bool = False


class Compare(OneOutput):
    """`gguflora.compare`; its report is the output, as JSON."""

    action: Literal["compare"]
    base: str
    merged: str | list[str] = Field(default_factory=list)
    adapters: Adapters
    text: str | list[str] | None = None
    naive: bool = False
    all: bool = False
    calibration_text: str | list[str] | None = None
    n_ctx: Count = 512
    threads: int | None = Field(default=None, ge=1)


class Train(OneOutput):
    """`gguflora.train`; ``out`` names the PEFT directory, and a LoRA's GGUF file lies beside it."""

    action: Literal["train"]
    base: str
    data: str | list[str]
    valid: str | list[str] | None = None
    valid_split: Number = 0.05
    rank: Whole = 16
    alpha: Number | None = None
    dropout: Number = 0.0
    rslora: bool = False
    targets: str | list[str] | None = None
    layers: Whole | None = None
    epochs: Number = 3.0
    steps: Whole | None = None
    hours: Number | None = None
    batch: Whole = 8
    accumulate: Whole | Literal["auto"] = "auto"
    length: Whole | Literal["auto"] = "auto"
    lr: Number | None = None
    schedule: Literal["cosine", "linear", "constant"] | Template = "cosine"
    warmup: Number = 0.03
    weight_decay: Number = 0.01
    max_grad_norm: Number = 1.0
    loss: Literal["answers", "all"] | Template = "answers"
    eval_every: Whole | None = None
    patience: Whole = 3
    method: Literal["lora", "dora", "prompt"] | Template = "lora"
    init: Literal["default", "olora", "pissa"] | Template = "default"
    lora_plus_ratio: Number = 1.0
    from_adapter: str | None = None
    precision: Literal["auto", "f32", "bf16"] | Template = "auto"
    chat_template: str | None = None
    seed: Whole = 0
    check_merge: bool = False
    threads: int | None = Field(default=None, ge=1)


AnyStep = Annotated[
    Convert | Merge | Quantize | Imatrix | Combine | Resize | Extract | Export | Inspect | Compare | Train,
    Field(discriminator="action"),
]

META: Final = frozenset({"name", "for", "for_each", "action", "out", "checks", "memory", "split"})
"""Keys that are no keywords of a command."""

ACTIONS: Final[Mapping[str, type[Step]]] = {
    "convert": Convert,
    "merge": Merge,
    "quantize": Quantize,
    "imatrix": Imatrix,
    "combine": Combine,
    "resize": Resize,
    "extract": Extract,
    "export": Export,
    "inspect": Inspect,
    "compare": Compare,
    "train": Train,
}
"""The model of each action."""
