"""Sampling with llama.cpp's sampler chain, and log probabilities of tokens."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from gguflora.engine.requests import Sampling, TokenLogprob

_PENALTY_WINDOW: Final = 64
_MIN_TEMPERATURE: Final = 1e-4
"""Temperatures below this count as 0, because dividing by them could overflow a 32-bit float."""

_MAX_BIAS: Final = 1e6
_MIN_LOGPROB: Final = -9999.0
"""OpenAI's log probability of an impossible token; JSON has no infinity."""


class Sampler:
    """A sampler chain of llama.cpp. The logits must be finite.

    Args:
        sampling: sampling parameters that have been checked.
        n_vocab: number of logits.
        prompt: tokens of the prompt; the last of them count for the penalties.
    """

    def __init__(self, sampling: Sampling, n_vocab: int, prompt: Sequence[int]) -> None:
        parameters = llama_cpp.llama_sampler_chain_default_params()
        parameters.no_perf = True
        self._chain: Any = llama_cpp.llama_sampler_chain_init(parameters)
        for part in _parts(sampling, n_vocab):
            llama_cpp.llama_sampler_chain_add(self._chain, part)
        for token in prompt[-_PENALTY_WINDOW:]:
            llama_cpp.llama_sampler_accept(self._chain, token)

    def sample(self, context: int, index: int) -> int:
        """Sample a token from the logits at ``index`` of the context's last batch, and record it for the penalties."""
        return int(llama_cpp.llama_sampler_sample(self._chain, context, index))

    def close(self) -> None:
        """Free the chain. Idempotent."""
        chain, self._chain = self._chain, None
        if chain is not None:
            llama_cpp.llama_sampler_free(chain)

    def __del__(self) -> None:
        self.close()


def _parts(sampling: Sampling, n_vocab: int) -> list[Any]:
    parts = []
    if sampling.logit_bias:
        biases = (llama_cpp.llama_logit_bias * len(sampling.logit_bias))()
        for entry, (token, bias) in zip(biases, sampling.logit_bias.items(), strict=True):
            entry.token, entry.bias = token, min(max(bias, -_MAX_BIAS), _MAX_BIAS)
        parts.append(llama_cpp.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
    penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    if penalties != (1, 0, 0):
        parts.append(llama_cpp.llama_sampler_init_penalties(n_vocab, _PENALTY_WINDOW, *penalties))
    if sampling.temperature < _MIN_TEMPERATURE:
        return [*parts, llama_cpp.llama_sampler_init_greedy()]
    seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
    return [
        *parts,
        llama_cpp.llama_sampler_init_top_k(sampling.top_k),
        llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1),
        llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1),
        llama_cpp.llama_sampler_init_temp(sampling.temperature),
        llama_cpp.llama_sampler_init_dist(seed % llama_cpp.LLAMA_DEFAULT_SEED),  # LLAMA_DEFAULT_SEED means random
    ]


def token_logprob(logits: NDArray[np.float32], token: int, n_top: int, text_of: Callable[[int], bytes]) -> TokenLogprob:
    """Compute the log probabilities of ``token`` and of the ``n_top`` most likely tokens, in double precision.

    Args:
        logits: finite logits (n_vocab,).
        token: the generated token.
        n_top: number of most likely tokens.
        text_of: returns the bytes of a token.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    np.maximum(wide, _MIN_LOGPROB, out=wide)
    top = np.argpartition(-wide, min(n_top, len(wide) - 1))[:n_top]
    ordered = top[np.lexsort((top, -wide[top]))]
    return TokenLogprob(
        token, text_of(token), float(wide[token]), tuple((int(t), text_of(int(t)), float(wide[t])) for t in ordered)
    )
