"""Every field of every API that clients may send is read, harmless with a reason, or refused by name; none is dropped.

The fields of OpenAI's and Anthropic's APIs are those of their installed clients. Those of vLLM are in
vllm/entrypoints/openai/*/protocol.py of its repository (commit 002032ee), those of llama-server in
tools/server/server-task.cpp and README.md of llama.cpp's (commit 00efb3e1).
"""

import typing

import anthropic.types.beta.message_count_tokens_params
import anthropic.types.beta.message_create_params
import anthropic.types.message_create_params
import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import openai.types.embedding_create_params
import openai.types.responses.response_create_params
import pytest

from gguflora.server import anthropic as messages
from gguflora.server import responses
from gguflora.server.fields import HARMLESS, NO_EFFECT
from gguflora.server.schemas import ChatBody, CompletionBody
from support import serving
from support.serving import PROMPT, QUESTION

USER = [{"role": "user", "content": QUESTION}]
LIMIT = {"max_tokens": 3}
CHAT = ("/v1/chat/completions", {"messages": USER, **LIMIT})
TEXT = ("/v1/completions", {"prompt": PROMPT, **LIMIT})
NATIVE = ("/completion", {"prompt": PROMPT, "n_predict": 3})
ANSWER = ("/v1/responses", {"input": QUESTION, "max_output_tokens": 3})
MESSAGE = ("/v1/messages", {"messages": USER, **LIMIT})
EMBED = ("/v1/embeddings", {"input": QUESTION})


def fields_of(kind: type) -> list[str]:
    return sorted(typing.get_type_hints(kind))


OPENAI_CHAT = fields_of(openai.types.chat.completion_create_params.CompletionCreateParamsBase)
VLLM_SAMPLING = [
    "use_beam_search",
    "top_k",
    "min_p",
    "repetition_penalty",
    "watermarking",
    "length_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "prompt_logprobs",
    "logprob_token_ids",
    "allowed_token_ids",
    "bad_words",
    "add_special_tokens",
    "structured_outputs",
    "priority",
    "request_id",
    "session_id",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "routed_experts_prompt_start",
    "return_token_offsets",
    "return_prompt_text",
    "return_mm_kwargs",
    "cache_salt",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "repetition_detection",
    "stream_interval",
    "thinking_token_budget",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "logits_processors",
    "best_of",
]
VLLM_CHAT = [
    "include_reasoning",
    "echo",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "reasoning_effort",
]
VLLM_TEXT = ["prompt_embeds", "response_format", "suffix"]
LLAMA_SERVER = [
    "timings_per_token",
    "stream",
    "stream_options",
    "cache_prompt",
    "return_tokens",
    "return_progress",
    "max_tokens",
    "max_completion_tokens",
    "n_predict",
    "n_indent",
    "n_keep",
    "n_discard",
    "n_cmpl",
    "n",
    "n_cache_reuse",
    "t_max_predict_ms",
    "response_fields",
    "top_k",
    "top_p",
    "min_p",
    "top_n_sigma",
    "xtc_probability",
    "xtc_threshold",
    "typical_p",
    "temperature",
    "dynatemp_range",
    "dynatemp_exponent",
    "repeat_last_n",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
    "adaptive_target",
    "adaptive_decay",
    "seed",
    "n_probs",
    "min_keep",
    "backend_sampling",
    "post_sampling_probs",
    "speculative.n_min",
    "speculative.n_max",
    "speculative.p_min",
    "speculative.type",
    "speculative.ngram_size_n",
    "speculative.ngram_size_m",
    "speculative.ngram_m_hits",
    "logprobs",
    "lora",
    "json_schema",
    "grammar",
    "grammar_lazy",
    "grammar_triggers",
    "preserved_tokens",
    "chat_format",
    "reasoning_format",
    "reasoning_in_content",
    "thinking_forced_open",
    "thinking_budget_tokens",
    "parse_tool_calls",
    "logit_bias",
    "ignore_eos",
    "samplers",
    "stop",
    "id_slot",
    "image_data",
    "penalize_nl",
    "sse_ping_interval",
]
LLAMA_CHAT = [
    "chat_template_kwargs",
    "reasoning_format",
    "enable_thinking",
    "add_generation_prompt",
    "parse_tool_calls",
]
SGLANG = [
    "regex",
    "ebnf",
    "no_stop_trim",
    "stop_regex",
    "session_params",
    "separate_reasoning",
    "stream_reasoning",
    "custom_logit_processor",
    "custom_params",
    "return_hidden_states",
    "rid",
    "lora_path",
    "extra_key",
    "bootstrap_host",
    "data_parallel_rank",
    "input_ids",
]
LORAX = [
    "adapter_id",
    "adapter_source",
    "adapter_parameters",
    "api_token",
    "return_k_alternatives",
    "do_sample",
    "max_new_tokens",
    "decoder_input_details",
    "details",
    "return_full_text",
    "top_n_tokens",
    "truncate",
    "watermark",
    "ignore_eos_token",
    "apply_chat_template",
    "inputs",
    "parameters",
]

WALKS = {
    "OpenAI chat completions": (CHAT, OPENAI_CHAT),
    "OpenAI completions": (TEXT, fields_of(openai.types.completion_create_params.CompletionCreateParamsBase)),
    "OpenAI responses": (ANSWER, fields_of(openai.types.responses.response_create_params.ResponseCreateParamsBase)),
    "OpenAI embeddings": (EMBED, fields_of(openai.types.embedding_create_params.EmbeddingCreateParams)),
    "Anthropic messages": (MESSAGE, fields_of(anthropic.types.message_create_params.MessageCreateParamsBase)),
    "Anthropic beta": (MESSAGE, fields_of(anthropic.types.beta.message_create_params.MessageCreateParamsBase)),
    "Anthropic count_tokens": (
        ("/v1/messages/count_tokens", MESSAGE[1]),
        fields_of(anthropic.types.beta.message_count_tokens_params.MessageCountTokensParams),
    ),
    "vLLM chat completions": (CHAT, VLLM_SAMPLING + VLLM_CHAT),
    "vLLM completions": (TEXT, VLLM_SAMPLING + VLLM_TEXT),
    "llama-server completions": (TEXT, LLAMA_SERVER),
    "llama-server completion": (NATIVE, LLAMA_SERVER),
    "llama-server chat completions": (CHAT, LLAMA_SERVER + LLAMA_CHAT),
    "SGLang chat completions": (CHAT, SGLANG),
    "LoRAX and TGI completions": (TEXT, LORAX),
}
READ = {
    "/v1/chat/completions": {*ChatBody.model_fields, "n_predict", "n_cmpl", "repetition_penalty"},
    "/v1/completions": {*CompletionBody.model_fields, "n_predict", "n_cmpl", "repetition_penalty"},
    "/completion": {*CompletionBody.model_fields, "n_predict", "n_cmpl", "n_probs", "repetition_penalty"},
    "/v1/responses": {*ChatBody.model_fields, *responses.ResponsesBody.model_fields},
    "/v1/messages": {*ChatBody.model_fields, *messages.MessagesBody.model_fields},
    "/v1/messages/count_tokens": {*ChatBody.model_fields, *messages.MessagesBody.model_fields},
    "/v1/embeddings": {"model", "input", "encoding_format", "dimensions", "user"},
}
REASONS = {
    "/v1/responses": {**HARMLESS, **responses.HARMLESS},
    "/v1/messages": {**HARMLESS, **messages.HARMLESS},
    "/v1/messages/count_tokens": {**HARMLESS, **messages.HARMLESS},
    "/v1/embeddings": {"user": HARMLESS["user"]},
}
ALIASES = {
    "logprobs": "n_probs",
    "n_cmpl": "n",
    "thinking_budget_tokens": "thinking_token_budget",
    "n_predict": "max_tokens",
    "repetition_penalty": "repeat_penalty",
    "max_tokens": "n_predict",
}
ABSURD = {"absurd": [[{"nobody": "reads this"}]]}


@pytest.fixture(scope="module")
def http():
    with serving.serving(n_ctx=512) as client:
        yield client


@pytest.mark.parametrize("walk", WALKS)
def test_no_field_is_dropped(http, walk):
    """An absurd value is refused by name everywhere but in harmless fields: so every other field is looked at."""
    (path, body), fields = WALKS[walk]
    reasons = REASONS.get(path, HARMLESS)
    faults = []
    for field in fields:
        # any unknown keyword is part of a schema, so that a schema must be wrong in another way
        value = {"type": "absurd"} if field in {"guided_json", "json_schema"} else ABSURD
        reply = http.post(path, json={**body, field: value})
        error = reply.json().get("error") or {}
        names = {field, ALIASES.get(field, field), "absurd"}
        if field in reasons:
            is_right = reply.status_code == 200
        else:
            is_right = reply.status_code == 400 and any(
                name in f"{error.get('param')} {error['message']}" for name in names
            )
        if not is_right:
            faults.append((field, reply.status_code, error.get("param"), error.get("message")))
    assert faults == []


@pytest.mark.parametrize("walk", WALKS)
def test_null_is_no_field(http, walk):
    (path, body), fields = WALKS[walk]
    reply = http.post(path, json={**dict.fromkeys(set(fields) - set(body)), **body})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("walk", WALKS)
def test_fields_that_are_not_read_are_known(http, walk):
    """Values of fields of other servers that ask for nothing are accepted."""
    (path, body), fields = WALKS[walk]
    for field in set(fields) & NO_EFFECT.keys() - READ[path]:
        for value in NO_EFFECT[field]:
            assert http.post(path, json={**body, field: value}).status_code == 200, field


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),  # the template cannot think
        ({"thinking": {"type": "enabled", "budget_tokens": "many"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "loud"}}, "thinking.display"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "disabled", "depth": 3}}, "thinking.depth"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"output_config": {"verbosity": "low"}}, "output_config.verbosity"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "colour": 1}]}]}, "colour"),
        ({"messages": [{**USER[0], "mood": "good"}]}, "messages.mood"),
        ({"system": [{"type": "text", "text": "x", "colour": 1}]}, "system.colour"),
        ({"tools": [{"name": "f", "input_schema": {}, "defer_loading": True}]}, "tools.defer_loading"),
        ({"tools": [{"name": "f", "input_schema": {}, "input_examples": [{}]}]}, "tools.input_examples"),
        ({"tool_choice": {"type": "auto", "reason": "x"}}, "tool_choice.reason"),
    ],
    ids=str,
)
def test_fields_inside_of_anthropics(http, fields, named):
    reply = http.post("/v1/messages", json={**MESSAGE[1], **fields})
    assert (reply.status_code, named in reply.json()["error"]["message"]) == (400, True), reply.text


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "disabled"}},
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        {"output_config": {"effort": "high"}},
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"cache_control": {"type": "ephemeral"}},
        {"tools": [{"name": "f", "input_schema": {}, "allowed_callers": ["direct"], "strict": True}]},
    ],
    ids=str,
)
def test_fields_of_anthropics_that_ask_for_nothing(http, fields):
    plain = http.post("/v1/messages", json={**MESSAGE[1], "temperature": 0}).json()["content"]
    reply = http.post("/v1/messages", json={**MESSAGE[1], "temperature": 0, "tool_choice": {"type": "none"}, **fields})
    assert (reply.status_code, reply.json().get("content")) == (200, plain)


def test_failed_tools_say_so(http):
    """Anthropic's ``is_error`` reaches the model."""
    call = {"type": "tool_use", "id": "a", "name": "f", "input": {}}

    def tokens(**result):
        block = {"type": "tool_result", "tool_use_id": "a", **result}
        chat = [*USER, {"role": "assistant", "content": [call]}, {"role": "user", "content": [block]}]
        return http.post("/v1/messages/count_tokens", json={"messages": chat}).json()["input_tokens"]

    assert tokens(content="no disk", is_error=True) == tokens(content="Error: no disk")
    assert tokens(content="no disk", is_error=False) == tokens(content="no disk") < tokens(content="Error: no disk")
    assert tokens(content="ERROR 5", is_error=True) == tokens(content="ERROR 5")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"text": {"format": {"type": "text"}, "voice": "x"}}, "text.voice"),
        ({"text": {"format": {"type": "json_schema", "schema": {}, "colour": 1}}}, "text.format.colour"),
        ({"text": {"format": "text"}}, "text.format"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "allowed_tools"),
        ({"tools": [{"type": "function", "name": "f", "colour": 1}]}, "tools.colour"),
        ({"input": [{"role": "user", "content": "x", "mood": 1}]}, "input.mood"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "size": 1}]}]}, "input.size"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input.encrypted_content"),
    ],
    ids=str,
)
def test_fields_inside_of_responses(http, fields, named):
    reply = http.post("/v1/responses", json={**ANSWER[1], **fields})
    assert (reply.status_code, named in reply.json()["error"]["message"]) == (400, True), reply.text


def test_reasons_are_told():
    for name, reason in {**HARMLESS, **messages.HARMLESS, **responses.HARMLESS}.items():
        assert len(reason.split()) > 2, name
