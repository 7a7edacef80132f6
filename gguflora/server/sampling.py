"""Sampling fields of requests, with llama-server's, vLLM's and OpenAI's names."""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeAlias

from pydantic import BeforeValidator, Field

from gguflora.engine import Engine, Sampling
from gguflora.server.fields import RequestBody, take_alias

_ALIASES: Final = {
    "typical": "typical_p",
    "repetition_penalty": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
    "penalty_repeat": "repeat_penalty",
    "penalty_freq": "frequency_penalty",
    "penalty_present": "presence_penalty",
    "mirostat_mode": "mirostat",
    "mirostat_ent": "mirostat_tau",
    "mirostat_lr": "mirostat_eta",
}
"""Other servers' names of fields, and the name here."""

_NEVER: Final = -1e9
"""A bias that removes a token: llama-server's ``false``."""

LogitBias: TypeAlias = list[tuple[int | str, float]]


def _as_pairs(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    """Turn OpenAI's object and llama-server's list into pairs of a token, or a text, and its bias."""
    if isinstance(value, dict):
        value = [[int(key) if key.removeprefix("-").isdecimal() else key, bias] for key, bias in value.items()]
    if not isinstance(value, list):
        return value
    return [[item[0], _NEVER if item[1] is False else item[1]] if _is_pair(item) else item for item in value]


def _is_pair(item: Any) -> bool:  # noqa: ANN401
    return isinstance(item, list) and len(item) == 2


class SamplingFields(RequestBody):
    """How tokens are chosen; what is left out is as in `gguflora.engine.Sampling`."""

    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 30)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, ge=0, le=1)
    top_n_sigma: float | None = Field(None, ge=-1, le=1000)
    xtc_probability: float | None = Field(None, ge=0, le=1)
    xtc_threshold: float | None = Field(None, ge=0, le=1)
    dynatemp_range: float | None = Field(None, ge=0, le=100)
    dynatemp_exponent: float | None = Field(None, ge=0, le=100)
    mirostat: int | None = Field(None, ge=0, le=2)
    mirostat_tau: float | None = Field(None, ge=0, le=100)
    mirostat_eta: float | None = Field(None, ge=0, le=10)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    repeat_last_n: int | None = Field(None, ge=-1, le=1 << 16)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    dry_multiplier: float | None = Field(None, ge=0, le=1000)
    dry_base: float | None = Field(None, ge=1, le=1000)
    dry_allowed_length: int | None = Field(None, ge=0, le=1 << 16)
    dry_penalty_last_n: int | None = Field(None, ge=-1, le=1 << 16)
    dry_sequence_breakers: list[str] | None = Field(None, max_length=32)
    min_tokens: int | None = Field(None, ge=0, le=1 << 30)
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=256)
    logit_bias: Annotated[LogitBias, BeforeValidator(_as_pairs), Field(max_length=1024)] | None = None

    @classmethod
    def rename(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Read other servers' names of these fields."""
        if body.get("repetition_penalty") is not None and body.get("repeat_last_n") is None:
            body = {**body, "repeat_last_n": -1}  # vLLM's looks at all tokens
        for alias, name in _ALIASES.items():
            body = take_alias(body, alias, name)
        return body

    def sampling(self, engine: Engine) -> Sampling:
        """Return the sampling parameters, with the engine's defaults for those that are left out.

        Args:
            engine: splits the texts of ``logit_bias`` into tokens.
        """
        given = {name: value for name in SamplingFields.model_fields if (value := getattr(self, name)) is not None}
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        for name in ("dry_sequence_breakers", "stop_token_ids"):
            if name in given:
                given[name] = tuple(given[name])
        given["logit_bias"] = _bias_by_token(engine, self.logit_bias or [])
        return Sampling(**given)


def _bias_by_token(engine: Engine, pairs: LogitBias) -> dict[int, float]:
    """Return biases by token; a text's bias counts for each of its tokens, as in llama-server."""
    biases: dict[int, float] = {}
    for key, bias in pairs:
        tokens = [key] if isinstance(key, int) else engine.tokenize(key, add_bos=False, special=True)
        biases.update(dict.fromkeys(tokens, bias))
    return biases
