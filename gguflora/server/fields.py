"""The base of all bodies of requests: a field is read, listed here as harmless, or refused by name."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from gguflora.server.bodies import stop_at_first_error

_WHO: Final = "says who asks, and how the request is routed, billed or stored"
_SPEED: Final = "changes how fast an answer comes, or in what pieces, and not what it says"

HARMLESS: Final[dict[str, str]] = {
    # OpenAI
    "metadata": _WHO,
    "prediction": _SPEED,
    "prompt_cache_key": _SPEED,
    "prompt_cache_options": _SPEED,
    "prompt_cache_retention": _SPEED,
    "safety_identifier": _WHO,
    "service_tier": _WHO,
    "store": _WHO,
    "user": _WHO,
    # llama-server
    "backend_sampling": _SPEED,
    "cache_prompt": _SPEED,
    "id_slot": _SPEED,
    "n_cache_reuse": _SPEED,
    "return_progress": "adds events to a stream that clients must be able to do without",
    "slot_id": _SPEED,
    "speculative.n_max": _SPEED,
    "speculative.n_min": _SPEED,
    "speculative.ngram_m_hits": _SPEED,
    "speculative.ngram_size_m": _SPEED,
    "speculative.ngram_size_n": _SPEED,
    "speculative.p_min": _SPEED,
    "speculative.type": _SPEED,
    "sse_ping_interval": _SPEED,
    "timings_per_token": "adds timings to the events of a stream; the last one has them",
    # vLLM
    "cache_salt": "keeps prompts of others out of the cache; --private-cache does so for each key",
    "guided_decoding_backend": "says which program builds a grammar",
    "priority": _SPEED,
    "request_id": _WHO,
    "session_id": _WHO,
    "stream_interval": _SPEED,
}
"""Fields of other servers that never change an answer, with the reasons. They are accepted and not read."""

NO_EFFECT: Final[dict[str, tuple[object, ...]]] = {
    "adapter_parameters": ({},),
    "adapter_source": ("local",),
    "adaptive_decay": (),
    "adaptive_target": (-1,),
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_format": (),
    "chat_template": ("",),
    "decoder_input_details": (False,),
    "detokenize": (True,),
    "do_sample": (),
    "documents": ([],),
    "early_stopping": (False,),
    "ec_transfer_params": ({},),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "image_data": ([],),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logit_bias_type": ("input_ids",),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "media_io_kwargs": ({},),
    "min_keep": (0,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "n_discard": (0,),
    "n_indent": (0,),
    "n_keep": (0,),
    "n_probs": (0,),
    "parallel_tool_calls": (True, False),
    "parse_tool_calls": (True,),
    "penalize_nl": (False,),
    "post_sampling_probs": (False,),
    "preserved_tokens": ([],),
    "prompt_embeds": (),
    "reasoning_in_content": (False,),
    "repetition_detection": (),
    "response_fields": ([],),
    "return_full_text": (False,),
    "return_mm_kwargs": (True,),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "samplers": ([], ""),
    "skip_special_tokens": (True,),
    "smoothing_factor": (0,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "t_max_predict_ms": (0,),
    "tfs_z": (1,),
    "thinking_budget_tokens": (-1,),
    "thinking_forced_open": (False,),
    "thinking_token_budget": (-1,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_a": (0,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "verbose": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "watermark": (False,),
    "watermarking": (False,),
    "web_search_options": (),
}
"""Known fields that are not supported, and the values that ask for nothing. Null asks for nothing everywhere."""


class Body(BaseModel):
    """A JSON object of a request. Null means that a field was left out, and an unknown field is an error."""

    model_config = ConfigDict(allow_inf_nan=False, extra="ignore")
    harmless: ClassVar[frozenset[str]] = frozenset()
    """Further fields that this object may have and that are not read."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:  # noqa: ANN401
        """Let lists stop at their first error, so that a long one costs no memory."""
        schema: CoreSchema = stop_at_first_error(handler(source))
        return schema

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, body: Any) -> Any:  # noqa: ANN401  (any JSON value)
        if not isinstance(body, dict):
            return body
        renamed = cls.rename(body)
        known = {field.alias or name for name, field in cls.model_fields.items()} | cls.harmless
        for name, value in renamed.items():
            if value is None or name in known:
                continue
            no_effect = cls._without_effect(name)
            if no_effect is None:
                raise refusal(name, "{name} is not a field that this server knows; the list is in docs/server.md")
            if value not in no_effect:
                raise refusal(name, "{name} is not supported by this server")
        return renamed

    @classmethod
    def rename(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body with other servers' names of its fields replaced by the names of this class."""
        return body

    @classmethod
    def _without_effect(cls, name: str) -> tuple[object, ...] | None:
        """Return the values of a field that have no effect; None if the field is unknown."""
        return None


class RequestBody(Body):
    """The body of a request for an answer: fields of other servers that change nothing are accepted."""

    harmless = frozenset(HARMLESS)

    @classmethod
    def _without_effect(cls, name: str) -> tuple[object, ...] | None:
        return NO_EFFECT.get(name)


class ForeignBody(Body):
    """The body of another API, beside whose fields those of a completion may stand.

    Attributes:
        others: the fields that are not the API's own; the body of the completion decides about them.
    """

    others: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def rename(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Keep the fields that are not this API's own apart."""
        own = cls.model_fields.keys() - {"others"}
        others = {name: value for name, value in body.items() if name not in own and not cls.is_void(name, value)}
        return {**{name: value for name, value in body.items() if name in own}, "others": others}

    @classmethod
    def is_void(cls, name: str, value: Any) -> bool:  # noqa: ANN401  (any JSON value)
        """Return whether a field of this API that is not read asks for nothing."""
        return False


def refusal(name: str, message: str) -> PydanticCustomError:
    """Return the error about one field; ``{name}`` in the message becomes its quoted name."""
    return PydanticCustomError("refused_field", message.replace("{name}", repr(name[:80])), {"field": name[:80]})


def take_alias(body: dict[str, Any], alias: str, name: str) -> dict[str, Any]:
    """Return the body with the field ``alias`` under its other name.

    Raises:
        PydanticCustomError: if both names are given with different values.
    """
    if alias not in body:
        return body
    rest = {key: value for key, value in body.items() if key != alias}
    if body[alias] is None:
        return rest
    if rest.get(name) not in (None, body[alias]):
        raise refusal(alias, f"{{name}} and {name!r} mean the same; they are given with different values")
    return {**rest, name: body[alias]}
