"""Sampling with llama.cpp's own samplers, in the order of its programs, and log probabilities of tokens."""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from gguflora.engine.constraints import CANDIDATE, Constraint, constraint
from gguflora.engine.requests import Sampling, TokenLogprob
from gguflora.errors import GenerationError

if TYPE_CHECKING:
    from gguflora.engine.model import Model

_MIN_TEMPERATURE: Final = 1e-4
"""Temperatures below this count as 0, because dividing by them could overflow a 32-bit float."""

_MAX_BIAS: Final = 1e6
_MIN_LOGPROB: Final = -9999.0
"""OpenAI's log probability of an impossible token; JSON has no infinity."""

_MIROSTAT_M: Final = 100
"""Number of tokens from which mirostat estimates the distribution, as in llama.cpp's programs."""


class Sampler:
    """A sampler chain of llama.cpp, and a grammar if there is one. The logits must be finite.

    Args:
        sampling: sampling parameters that have been checked.
        model: the model whose tokens are sampled.
        prompt: tokens of the prompt; the last of them count for the penalties.

    Raises:
        RequestError: if llama.cpp cannot read the grammar.
    """

    def __init__(self, sampling: Sampling, model: Model, prompt: Sequence[int]) -> None:
        self._chain: Any = None
        self._grammar: Constraint | None = None  # both are set first: `close` also runs if the grammar is refused
        self._grammar = None if sampling.grammar is None else constraint(sampling.grammar, model)
        self._n_vocab = model.n_vocab
        parameters = llama_cpp.llama_sampler_chain_default_params()
        parameters.no_perf = True
        self._chain = llama_cpp.llama_sampler_chain_init(parameters)
        self._held_back = sampling.min_tokens
        """Number of tokens to sample until the answer may end; until then, the chain begins with a bias."""
        if self._held_back:
            biases = dict.fromkeys([*model.end_tokens, *sampling.stop_token_ids], -_MAX_BIAS)
            llama_cpp.llama_sampler_chain_add(self._chain, _bias(biases, model.n_vocab))
        for part in _parts(sampling, model):
            llama_cpp.llama_sampler_chain_add(self._chain, part)
        window = _window(sampling, len(prompt))
        for token in prompt[-window:] if window else ():
            llama_cpp.llama_sampler_accept(self._chain, token)

    def sample(self, context: int, index: int) -> int:
        """Sample a token from the logits at ``index`` of the context's last batch, and record it for the penalties.

        Raises:
            GenerationError: if the grammar allows no token of this vocabulary.
        """
        if self._grammar is None:
            token = int(llama_cpp.llama_sampler_sample(self._chain, context, index))
        else:
            token = self._sample_by_grammar(self._grammar, context, index)
        self._count()
        return token

    def accept(self, token: int) -> int:
        """Record a token that was not sampled, and return it."""
        if self._grammar is not None:
            self._grammar.accept(token)
        llama_cpp.llama_sampler_accept(self._chain, token)
        self._count()
        return token

    def _count(self) -> None:
        if self._held_back:
            self._held_back -= 1
            if not self._held_back:
                llama_cpp.llama_sampler_free(llama_cpp.llama_sampler_chain_remove(self._chain, 0))

    def _sample_by_grammar(self, grammar: Constraint, context: int, index: int) -> int:
        candidates = np.zeros(self._n_vocab, CANDIDATE)
        candidates["id"] = np.arange(self._n_vocab)
        pointer = llama_cpp.llama_get_logits_ith(context, index)
        candidates["logit"] = np.ctypeslib.as_array(pointer, (self._n_vocab,))
        array = llama_cpp.llama_token_data_array(
            data=ctypes.cast(candidates.ctypes.data, ctypes.POINTER(llama_cpp.llama_token_data)),
            size=self._n_vocab,
            selected=-1,
            sorted=False,
        )
        grammar.apply(array, candidates)
        # llama.cpp aborts if it is told of a token that the grammar does not allow
        if not np.isfinite(candidates["logit"].max()):
            raise GenerationError("the grammar allows no token of this model's vocabulary here")
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        chosen = array.data[array.selected]
        if array.selected < 0 or not np.isfinite(chosen.logit):
            raise GenerationError("the samplers have left no token that the grammar allows")
        token = int(chosen.id)
        grammar.accept(token)
        llama_cpp.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        """Free the samplers. Idempotent."""
        chain, grammar, self._chain, self._grammar = self._chain, self._grammar, None, None
        if chain is not None:
            llama_cpp.llama_sampler_free(chain)
        if grammar is not None:
            grammar.close()

    def __del__(self) -> None:
        self.close()


def _window(sampling: Sampling, n_prompt: int) -> int:
    """Return how many tokens of the prompt count for the penalties."""
    lengths = [sampling.repeat_last_n, sampling.dry_penalty_last_n if sampling.dry_multiplier else 0]
    return n_prompt if -1 in lengths else max(lengths)


def _bias(biases: dict[int, float], n_vocab: int) -> Any:  # noqa: ANN401
    entries = (llama_cpp.llama_logit_bias * len(biases))()
    for entry, (token, bias) in zip(entries, biases.items(), strict=True):
        entry.token, entry.bias = token, min(max(bias, -_MAX_BIAS), _MAX_BIAS)
    return llama_cpp.llama_sampler_init_logit_bias(n_vocab, len(entries), entries)


def _parts(sampling: Sampling, model: Model) -> Iterator[Any]:
    """Yield the samplers in the order of llama.cpp's ``common_sampler_init``."""
    biases = dict(sampling.logit_bias)
    if sampling.ignore_eos:
        biases |= dict.fromkeys(model.end_tokens, -_MAX_BIAS)
    if biases:
        yield _bias(biases, model.n_vocab)
    seed = _seed(sampling)
    temperature = sampling.temperature
    if temperature < _MIN_TEMPERATURE or not sampling.mirostat:
        yield from _filters(sampling, model, seed, greedy=temperature < _MIN_TEMPERATURE)
        return
    yield llama_cpp.llama_sampler_init_temp(temperature)
    if sampling.mirostat == 1:
        tau, eta = sampling.mirostat_tau, sampling.mirostat_eta
        yield llama_cpp.llama_sampler_init_mirostat(model.n_vocab, seed, tau, eta, _MIROSTAT_M)
    else:
        yield llama_cpp.llama_sampler_init_mirostat_v2(seed, sampling.mirostat_tau, sampling.mirostat_eta)


def _filters(sampling: Sampling, model: Model, seed: int, *, greedy: bool) -> Iterator[Any]:
    penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    if penalties != (1, 0, 0) and sampling.repeat_last_n:
        last_n = model.n_ctx_train if sampling.repeat_last_n == -1 else sampling.repeat_last_n
        yield llama_cpp.llama_sampler_init_penalties(model.n_vocab, last_n, *penalties)
    if sampling.dry_multiplier:
        yield _dry(sampling, model)
    if greedy:
        yield llama_cpp.llama_sampler_init_greedy()
        return
    if sampling.top_n_sigma > 0:
        yield llama_cpp.llama_sampler_init_top_n_sigma(sampling.top_n_sigma)
    yield llama_cpp.llama_sampler_init_top_k(sampling.top_k)
    if sampling.typical_p < 1:
        yield llama_cpp.llama_sampler_init_typical(sampling.typical_p, 1)
    yield llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1)
    yield llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1)
    if sampling.xtc_probability:
        yield llama_cpp.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, 1, seed)
    yield llama_cpp.llama_sampler_init_temp_ext(
        sampling.temperature, sampling.dynatemp_range, sampling.dynatemp_exponent
    )
    yield llama_cpp.llama_sampler_init_dist(seed)


def _dry(sampling: Sampling, model: Model) -> Any:  # noqa: ANN401
    encoded = [text.encode() for text in sampling.dry_sequence_breakers]
    breakers = (ctypes.c_char_p * len(encoded))(*encoded)
    last_n = model.n_ctx_train if sampling.dry_penalty_last_n == -1 else sampling.dry_penalty_last_n
    return llama_cpp.llama_sampler_init_dry(
        model.vocabulary,
        sampling.dry_multiplier,
        sampling.dry_base,
        sampling.dry_allowed_length,
        last_n,
        breakers,
        len(breakers),
    )


def _seed(sampling: Sampling) -> int:
    """Return a seed for llama.cpp, which is never its LLAMA_DEFAULT_SEED: that means a random one there."""
    if sampling.has_random_seed:
        return secrets.randbelow(llama_cpp.LLAMA_DEFAULT_SEED)
    return int((sampling.seed or 0) % llama_cpp.LLAMA_DEFAULT_SEED)


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
