"""The trainable numbers: LoRA and DoRA factors beside packed linear layers, or embeddings before the prompt.

Formulas and first values are PEFT's (``peft.tuners.lora``): ``y = W x + s B A x`` with s = alpha / rank, or alpha /
sqrt(rank) for rsLoRA (https://arxiv.org/abs/2312.03732). DoRA: https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from gguflora.architectures import aborts_at_run_time, ignored_at_run_time
from gguflora.errors import UsageError, listed
from gguflora.training.layers import PackedExperts, PackedLinear
from gguflora.training.model import PackedModel, embedding_width
from gguflora.training.options import LoraShape


class LoraLinear(nn.Module):
    """A packed linear layer with a LoRA beside it.

    Attributes:
        base: the layer.
        lora_a: (rank, n_in).
        lora_b: (n_out, rank).
        magnitude: of DoRA, (n_out,).
        start: of OLoRA and PiSSA: A and B before the first step, whose product is taken off.
        drops: whether inputs of A are dropped out now.
    """

    def __init__(self, base: PackedLinear, shape: LoraShape, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.shape, self.drops = base, shape, False
        a, b = torch.empty(shape.rank, base.in_features), torch.zeros(base.out_features, shape.rank)
        self.start: tuple[torch.Tensor, torch.Tensor] | None = None
        if shape.init == "default":
            bound = 1 / math.sqrt(base.in_features)  # kaiming_uniform_(a=sqrt(5))
            a.uniform_(-bound, bound, generator=generator)
        else:
            a, b = _factors_of_weight(base, shape)
            self.start = (a.clone(), b.clone())
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
        self.magnitude = nn.Parameter(self._lengths()) if shape.dora else None

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """What is trained, by PEFT's names."""
        named = {"lora_A.weight": self.lora_a, "lora_B.weight": self.lora_b, "lora_magnitude_vector": self.magnitude}
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """n_out and n_in of each adapted matrix."""
        return [(self.base.out_features, self.base.in_features)]

    def put(self, weight: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Begin with factors of a rank that is not higher; ``weight`` is ``weight``."""
        del weight
        with torch.no_grad():
            self.lora_a[: len(a)], self.lora_b[:, : len(a)] = a, b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output with the LoRA's added."""
        product = self.base.product(x)
        dropped = nn.functional.dropout(x, self.shape.dropout) if self.drops else x
        change = nn.functional.linear(nn.functional.linear(dropped, self.lora_a), self.lora_b) * self.shape.scaling
        if self.start is not None:
            a, b = self.start
            change = change - nn.functional.linear(nn.functional.linear(dropped, a), b) * self.shape.scaling
        out = product + change if self.magnitude is None else self._rescaled(product, change, dropped, x)
        return out if self.base.bias is None else out + self.base.bias

    def _rescaled(
        self, product: torch.Tensor, change: torch.Tensor, dropped: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        """DoRA; the lengths count as constants in the gradient, and dropout spares the base, as in PEFT."""
        assert self.magnitude is not None
        factors = self.magnitude / self._lengths()
        of_base = product if dropped is x else self.base.product(dropped)
        return product + (factors - 1) * of_base + factors * change

    @torch.no_grad()
    def _lengths(self) -> torch.Tensor:
        """L2 norms of the rows of ``W + s B A``."""
        matrix, scaling = self.base.matrix, self.shape.scaling
        b = self.lora_b if matrix.stored is None else self.lora_b.index_select(0, matrix.stored)
        lengths = torch.empty(matrix.n_out)
        for start, stop, panel in matrix.panels():
            torch.linalg.vector_norm(
                torch.addmm(panel, b[start:stop], self.lora_a, alpha=scaling), dim=1, out=lengths[start:stop]
            )
        return lengths if matrix.place is None else lengths.index_select(0, matrix.place)


class LoraExperts(nn.Module):
    """A layer's experts with a LoRA beside each matrix of each, as PEFT's ``target_parameters`` have it.

    Of E experts, A is (rank E, n_in) with the rows of each expert together, and B is (n_out, rank E) with the columns
    of each rank-one term together (``peft.tuners.lora.layer.ParamWrapper``).

    Attributes:
        base: the experts.
        start: None; their factors begin as PEFT's only.
        drops: without effect, because experts have no dropout.
    """

    def __init__(self, base: PackedExperts, shape: LoraShape, generator: torch.Generator) -> None:
        super().__init__()
        if shape.dropout or shape.dora or shape.init != "default":
            odd = "dropout" if shape.dropout else "DoRA" if shape.dora else f"init {shape.init!r}"
            raise UsageError(f"experts have no {odd}: PEFT cannot apply it to stacked experts; leave it or them out")
        self.base, self.shape, self.drops = base, shape, False
        self.start: tuple[torch.Tensor, torch.Tensor] | None = None
        self.factors = nn.ParameterDict()
        for name, stack in base.stacks().items():
            n_out, n_in, count = stack[0].n_out, stack[0].n_in, len(stack)
            bound = 1 / math.sqrt(n_in)
            a = torch.empty(shape.rank * count, n_in).uniform_(-bound, bound, generator=generator)
            self.factors[f"{name}_a"] = nn.Parameter(a)
            self.factors[f"{name}_b"] = nn.Parameter(torch.zeros(n_out, shape.rank * count))

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """What is trained, by PEFT's names: the wrapper of the last parameter is the outermost."""
        return {
            "base_layer.lora_A.weight": self.factors["gate_up_proj_a"],
            "base_layer.lora_B.weight": self.factors["gate_up_proj_b"],
            "lora_A.weight": self.factors["down_proj_a"],
            "lora_B.weight": self.factors["down_proj_b"],
        }

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """n_out and n_in of each adapted matrix."""
        return [(matrix.n_out, matrix.n_in) for stack in self.base.stacks().values() for matrix in stack]

    def put(self, weight: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Begin with factors of a rank that is not higher; ``weight`` is ``gate_up_proj.3``, say."""
        name, _, expert = weight.rpartition(".")
        own_a, own_b = self._of(name, int(expert))
        with torch.no_grad():
            own_a[: len(a)], own_b[:, : len(a)] = a, b

    def _of(self, name: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, n_in) and B (n_out, rank) of one matrix of an expert."""
        a, b, rank = self.factors[f"{name}_a"], self.factors[f"{name}_b"], self.shape.rank
        return a[expert * rank : (expert + 1) * rank], b.view(len(b), rank, -1)[:, :, expert]

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """The experts' sum with the LoRA's added; see `PackedExperts.forward`."""

        def change(name: str, expert: int, given: torch.Tensor) -> torch.Tensor:
            a, b = self._of(name, expert)
            return nn.functional.linear(nn.functional.linear(given, a), b) * self.shape.scaling

        out: torch.Tensor = self.base(x, chosen, shares, change)
        return out


LoraLayer = LoraLinear | LoraExperts


def _factors_of_weight(base: PackedLinear, shape: LoraShape) -> tuple[torch.Tensor, torch.Tensor]:
    """First A and B, as PEFT's, of PiSSA (https://arxiv.org/abs/2404.02948) or OLoRA (2406.01775)."""
    weight = base.matrix.rows(np.arange(base.out_features))
    if shape.init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[: shape.rank].contiguous(), q[:, : shape.rank].contiguous()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = torch.sqrt(s[: shape.rank] / shape.scaling)
    return (root[:, None] * vh[: shape.rank]).contiguous(), (u[:, : shape.rank] * root).contiguous()


class SoftPromptRows(nn.Module):
    """Prompt tuning (https://arxiv.org/abs/2104.08691): embeddings before the tokens.

    Attributes:
        rows: (n_virtual, width); at first those of some tokens.
    """

    def __init__(self, model: PackedModel, n_virtual: int, generator: torch.Generator) -> None:
        super().__init__()
        embed = model.backbone.get_input_embeddings()
        tokens = torch.randint(0, embed.num_embeddings, (n_virtual,), generator=generator)
        self.rows = nn.Parameter(embed(tokens).clone())
        if self.rows.shape[1] != embedding_width(model.packed):
            raise UsageError(f"{model.packed.path}: its embeddings are projected; prompt tuning is not possible")


def choose_modules(
    model: PackedModel, targets: Sequence[str], layers: int | None
) -> dict[str, PackedLinear | PackedExperts]:
    """The layers to adapt.

    Args:
        model: the model.
        targets: ``all`` linear layers, ``attention``, ``experts``, or globs of module names or of their ends.
        layers: only so many of the last blocks; None for all.

    Raises:
        UsageError: if a target matches nothing, or nothing is left.
    """
    everything: Mapping[str, PackedLinear | PackedExperts] = {**model.linears(), **model.experts()}
    known = {name: module for name, module in everything.items() if _can_be_served(model, name, module)}
    chosen: dict[str, PackedLinear | PackedExperts] = {}
    for target in targets:
        found = {name: module for name, module in known.items() if _matches(name, module, target)}
        if not found:
            kinds = {name.rpartition(".")[2] for name in known}
            raise UsageError(f"no linear layer matches the target {target!r}; the base has {listed(kinds, 16)}")
        chosen |= found
    if layers is not None:
        first = len(model.layers) - layers
        if not 0 < layers <= len(model.layers):
            raise UsageError(f"layers is {layers}, expected 1 to {len(model.layers)}")
        chosen = {name: module for name, module in chosen.items() if model.block_of(name) >= first}
    if not chosen:
        raise UsageError(f"the targets {', '.join(targets)} leave no layer to train")
    return {name: module for name, module in known.items() if name in chosen}


def _matches(name: str, module: PackedLinear | PackedExperts, target: str) -> bool:
    if target in {"all", "attention"} and isinstance(module, PackedExperts):
        return False  # many times the numbers of all other layers
    if target == "all":
        return True
    if target == "attention":
        return any("attn" in part or "attention" in part for part in name.split(".")[:-1])
    return fnmatch.fnmatchcase(name, target) or fnmatch.fnmatchcase(name, f"*.{target}")


def _can_be_served(model: PackedModel, name: str, module: PackedLinear | PackedExperts) -> bool:
    """Whether llama.cpp would multiply with a LoRA of this layer."""
    base = model.packed.base
    weights = ["weight"] if isinstance(module, PackedLinear) else [f"{stack}.0" for stack in module.stacks()]
    tensors = [each.tensor for weight in weights for each in model.packed.slices(f"{name}.{weight}")]
    return not any(ignored_at_run_time(base, tensor) or aborts_at_run_time(base, tensor) for tensor in tensors)


def add_loras(model: PackedModel, names: Sequence[str], shape: LoraShape, seed: int) -> dict[str, LoraLayer]:
    """Put a LoRA beside each of these layers."""
    generator = torch.Generator().manual_seed(seed)
    added: dict[str, LoraLayer] = {}
    for name in names:
        module = model.module.get_submodule(name)
        kind = LoraExperts if isinstance(module, PackedExperts) else LoraLinear
        layer = kind(module, shape, generator)
        model.module.set_submodule(name, layer)
        added[name] = layer
    return added
