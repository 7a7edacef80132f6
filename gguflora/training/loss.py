"""The loss of a batch: cross entropy in nats at the trained tokens only, the output layer in slices.

The hidden states of the trained positions are cut off from the graph; each slice of them goes through the output layer
and back at once, so that the logits of one slice are all that is ever held.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from gguflora.training.model import Below, PackedModel

SLICE: Final = 128
"""Positions that go through the output layer together."""


def _chosen(
    model: PackedModel,
    tokens: torch.Tensor,
    trained: torch.Tensor,
    prompt: torch.Tensor | None,
    positions: torch.Tensor | None = None,
    below: Below | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (n, width) that predict trained tokens, and those tokens (n,)."""
    if prompt is None:
        hidden = model.hidden(tokens, positions=positions, below=below)
    else:
        rows = prompt.expand(len(tokens), *prompt.shape)
        embeddings = torch.cat([rows, model.backbone.get_input_embeddings()(tokens)], dim=1)
        hidden = model.hidden(embeddings=embeddings)[:, len(prompt) :]
    wanted = trained[:, 1:]
    return hidden[:, :-1][wanted], tokens[:, 1:][wanted]


def backward_loss(
    model: PackedModel,
    tokens: torch.Tensor,
    trained: torch.Tensor,
    total: int,
    *,
    prompt: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    below: Below | None = None,
    slice_size: int = SLICE,
) -> float:
    """Add the gradients of a micro-batch's loss, divided by ``total``, to those of the factors.

    Args:
        model: the model.
        tokens: (n_samples, n_positions), shorter samples padded at their end: later positions change no earlier one.
        trained: which of them count; the first of a sample never does.
        total: trained tokens of the whole step.
        prompt: embeddings (n_virtual, width) before the tokens.
        positions: (n_samples, n_positions) numbers of the tokens in their samples, where several share a row.
        below: states in place of blocks below the lowest adapted one.
        slice_size: positions that go through the output layer together.

    Returns:
        sum of the losses of the trained tokens, in nats.
    """
    hidden, targets = _chosen(model, tokens, trained, prompt, positions, below)
    cut, loss = hidden.detach().requires_grad_(), 0.0
    for start in range(0, len(targets), slice_size):
        some = slice(start, start + slice_size)
        part = nn.functional.cross_entropy(model.logits(cut[some]), targets[some], reduction="sum")
        (part / total).backward()
        loss += part.item()
    if hidden.requires_grad and cut.grad is not None:
        hidden.backward(cut.grad)
    return loss


@torch.inference_mode()
def token_losses(
    model: PackedModel, tokens: torch.Tensor, trained: torch.Tensor, prompt: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss of each trained token, in nats, sample after sample: (n,)."""
    hidden, targets = _chosen(model, tokens, trained, prompt)
    parts = range(0, len(targets), SLICE)
    losses = [_losses(model.logits(hidden[at : at + SLICE]), targets[at : at + SLICE]) for at in parts]
    return torch.cat(losses) if losses else torch.zeros(0)


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, targets, reduction="none")
