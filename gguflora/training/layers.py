"""Modules of torch that compute with packed weights: products, embeddings, experts.

Nothing dequantized outlives a panel. A product dequantizes its matrix once forwards, and once more backwards for the
gradient of its input; the weights themselves have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from gguflora.system.processor import processor_flags, processor_vendor
from gguflora.training.packed import PackedMatrix

Change = Callable[[str, int, torch.Tensor], torch.Tensor]

DTYPES: Final = {"f32": torch.float32, "bf16": torch.bfloat16}


_HAS_FASTER_PRODUCT: Final = (
    processor_vendor() == "AuthenticAMD"
    and "avx512f" in processor_flags()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether oneDNN multiplies 32-bit matrices faster than MKL, which torch asks and which has its best code for Intel's
processors only. Measured on Zen 5, one core, 5632 x 2048 and 512 tokens: 0.051 s by oneDNN, 0.113 s by MKL."""


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x weight^T`` by oneDNN, in 32 bits; the operator that torch.compile calls for linear layers on processors."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    """``x W^T`` of a packed W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:  # noqa: ANN401
        ctx.matrix, ctx.dtype = matrix, dtype
        flat = x.reshape(-1, matrix.n_in).to(dtype)
        shaped = torch.empty(*x.shape[:-1], matrix.n_out)  # no view is returned: Falcon adds to it in place
        out = shaped.view(-1, matrix.n_out)
        for start, stop, panel in matrix.panels():
            if dtype != torch.float32:
                out[:, start:stop] = flat @ panel.to(dtype).t()
            elif _HAS_FASTER_PRODUCT:
                out[:, start:stop] = _linear(flat, panel)
            else:
                torch.mm(flat, panel.t(), out=out[:, start:stop])
        return shaped if matrix.place is None else shaped.index_select(-1, matrix.place)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:  # noqa: ANN401
        matrix, dtype = ctx.matrix, ctx.dtype
        flat = gradient.reshape(-1, matrix.n_out)
        if matrix.stored is not None:
            flat = flat.index_select(1, matrix.stored)
        flat = flat.to(dtype)
        out = torch.zeros(len(flat), matrix.n_in)
        for start, stop, panel in matrix.panels():
            if dtype != torch.float32:
                out += flat[:, start:stop] @ panel.to(dtype)
            elif _HAS_FASTER_PRODUCT:
                out += _linear(flat[:, start:stop], panel.t())
            else:
                out.addmm_(flat[:, start:stop], panel)
        return out.view(*gradient.shape[:-1], matrix.n_in), None, None


class PackedLinear(nn.Module):
    """A linear layer (or Conv1D) whose weight stays packed.

    Attributes:
        matrix: the weight.
        bias: (n_out,), or None.
        dtype: type in which products are computed.
    """

    def __init__(self, matrix: PackedMatrix, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype
        self.in_features, self.out_features = matrix.n_in, matrix.n_out
        self.register_buffer("bias", bias, persistent=False)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The weight times ``x`` (.., n_in), without the bias."""
        product: torch.Tensor = _Product.apply(x, self.matrix, self.dtype)
        return product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x W^T + bias``."""
        product = self.product(x)
        return product if self.bias is None else product + self.bias


class PackedEmbedding(nn.Module):
    """An embedding whose rows are dequantized as they are looked up.

    Attributes:
        matrix: (n_tokens, width).
        factor: multiplies the rows (Gemma 3).
    """

    def __init__(self, matrix: PackedMatrix, factor: float = 1.0) -> None:
        super().__init__()
        self.matrix, self.factor = matrix, factor
        self.num_embeddings, self.embedding_dim = matrix.n_out, matrix.n_in

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows (.., width) of tokens or positions."""
        numbers, inverse = np.unique(tokens.numpy(), return_inverse=True)
        rows = self.matrix.rows(numbers)[torch.from_numpy(inverse.reshape(-1))]
        if self.factor != 1.0:
            rows = rows * self.factor
        return rows.view(*tokens.shape, self.embedding_dim)


class PackedExperts(nn.Module):
    """The experts of one layer, as those of transformers' Mixtral, Qwen-MoE and OLMoE: ``down(act(gate) * up)``.

    Attributes:
        gate_up: one matrix for each expert, the rows of gate above those of up.
        down: one matrix for each expert.
    """

    def __init__(
        self, gate_up: list[PackedMatrix], down: list[PackedMatrix], activation: nn.Module, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation, self.dtype = gate_up, down, activation, dtype

    def stacks(self) -> dict[str, list[PackedMatrix]]:
        """The matrices of all experts by the name of transformers' parameter."""
        return {"gate_up_proj": self.gate_up, "down_proj": self.down}

    def forward(
        self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, change: Change | None = None
    ) -> torch.Tensor:
        """The experts' sum.

        Args:
            x: (n_tokens, width).
            chosen: (n_tokens, k) numbers of experts.
            shares: (n_tokens, k) of each.
            change: what a LoRA adds to a product: given the name of the stack, the expert, and its inputs.
        """
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, place = torch.where(chosen == expert)
            given = x[tokens]
            gate_up = _Product.apply(given, self.gate_up[expert], self.dtype)
            if change is not None:
                gate_up = gate_up + change("gate_up_proj", expert, given)
            gate, up = gate_up.chunk(2, dim=-1)
            inner = self.activation(gate) * up
            result = _Product.apply(inner, self.down[expert], self.dtype)
            if change is not None:
                result = result + change("down_proj", expert, inner)
            out = out.index_add(0, tokens, result * shares[tokens, place, None])
        return out
