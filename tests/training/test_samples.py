"""Token lists of chats by ten templates, each held against one written by hand."""

import gguf
import numpy as np
import pytest

from gguflora.engine.model import Model
from gguflora.errors import TrainingDataError, UsageError
from gguflora.training.rows import Row
from gguflora.training.samples import Sample, SampleMaker, fit

CONTROL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>",
    "<|system|>", "<|end|>", "<|endoftext|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>",
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "[gMASK]", "<sop>",
    "<think>", "</think>",
)  # fmt: skip
BYTES = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else None for b in range(256)]
for _number, _byte in enumerate([b for b in range(256) if BYTES[b] is None]):
    BYTES[_byte] = chr(256 + _number)
IDS = {text: 256 + number for number, text in enumerate(CONTROL)}

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # thoughts of earlier turns are left out, and the last answer has an empty one
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set said = m['content'].split('</think>')[-1].lstrip() %}"
    "<|im_start|>assistant\n{% if loop.last %}<think>\n"
    "{{ m['content'].split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m['content'] else '' }}"
    "\n</think>\n\n{% endif %}{{ said }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ m['role'] }}<|end_of_role|>{{ m['content'] }}<|end_of_text|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ '<|CHATBOT_TOKEN|>' if m['role'] == 'assistant' else '<|USER_TOKEN|>' }}{{ m['content'] }}<|END_OF_TURN_TOKEN|>"
    "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
VICUNA = (  # no control tokens: the answer ends with the end of text
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
R1 = (  # the prompt opens a thought that the rendered answer does not have
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)

CHAT = (
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
)  # fmt: skip

H, E, IM = "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>"
EXPECTED = {
    "llama 3": (LLAMA3, [[
        (f"<s>{H}user{E}\n\nHi<|eot_id|>{H}assistant{E}\n\n", 0), ("Yes.<|eot_id|>", 1),
        (f"{H}user{E}\n\nWhy?<|eot_id|>{H}assistant{E}\n\n", 0), ("So.<|eot_id|>", 1)]]),
    "chatml": (CHATML, [[
        (f"{IM}user\nHi<|im_end|>\n{IM}assistant\n", 0), ("Yes.<|im_end|>", 1),
        (f"\n{IM}user\nWhy?<|im_end|>\n{IM}assistant\n", 0), ("So.<|im_end|>", 1)]]),
    "qwen 3": (QWEN3, [
        [(f"{IM}user\nHi<|im_end|>\n{IM}assistant\n", 0), ("<think>\n\n</think>\n\nYes.<|im_end|>", 1)],
        [(f"{IM}user\nHi<|im_end|>\n{IM}assistant\nYes.<|im_end|>\n{IM}user\nWhy?<|im_end|>\n{IM}assistant\n", 0),
         ("<think>\n\n</think>\n\nSo.<|im_end|>", 1)]]),
    "gemma": (GEMMA, [[
        ("<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", 0), ("Yes.<end_of_turn>", 1),
        ("\n<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n", 0), ("So.<end_of_turn>", 1)]]),
    "mistral": (MISTRAL, [[
        ("<s>[INST] Hi[/INST]", 0), (" Yes.</s>", 1), ("[INST] Why?[/INST]", 0), (" So.</s>", 1)]]),
    "phi 3": (PHI3, [[
        ("<|user|>\nHi<|end|>\n<|assistant|>\n", 0), ("Yes.<|end|>", 1),
        ("\n<|user|>\nWhy?<|end|>\n<|assistant|>\n", 0), ("So.<|end|>", 1)]]),
    "zephyr": (ZEPHYR, [[
        ("<|user|>\nHi</s>\n<|assistant|>\n", 0), ("Yes.</s>", 1), ("\n<|user|>\nWhy?</s>\n<|assistant|>\n", 0),
        ("So.</s>", 1)]]),
    "granite": (GRANITE, [[
        ("<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>", 0),
        ("Yes.<|end_of_text|>", 1),
        ("\n<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>", 0),
        ("So.<|end_of_text|>", 1)]]),
    "command r": (COMMAND_R, [[
        ("<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", 0),
        ("Yes.<|END_OF_TURN_TOKEN|>", 1),
        ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Why?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", 0),
        ("So.<|END_OF_TURN_TOKEN|>", 1)]]),
    "vicuna": (VICUNA, [
        [("USER: Hi\nASSISTANT: ", 0), ("Yes.</s>", 1)],
        [("USER: Hi\nASSISTANT: Yes.\nUSER: Why?\nASSISTANT: ", 0), ("So.</s>", 1)]]),
    "opened thought": (R1, [
        [("<|user|>Hi<|end|><|assistant|><think>\n", 0), ("Yes.<|end|>", 1)],
        [("<|user|>Hi<|end|><|assistant|>Yes.<|end|><|user|>Why?<|end|><|assistant|><think>\n", 0),
         ("So.<|end|>", 1)]]),
}  # fmt: skip


def by_hand(text):
    """Tokens of a text: control tokens, else bytes."""
    tokens = []
    while text:
        special = next((name for name in sorted(CONTROL, key=len, reverse=True) if text.startswith(name)), None)
        if special:
            tokens.append(IDS[special])
            text = text[len(special) :]
        else:
            tokens += list(text[0].encode())
            text = text[1:]
    return tokens


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A llama of hardly any weights with a byte-level vocabulary and the control tokens of all templates."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    model = Model(write_vocabulary(path), verbose=False)
    yield model
    model.free()


@pytest.fixture(scope="module")
def vocabulary_of_command_r(tmp_path_factory):
    """The same where the end of a turn is the end of a text."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    model = Model(write_vocabulary(path, eos="<|END_OF_TURN_TOKEN|>"), verbose=False)
    yield model
    model.free()


@pytest.fixture(params=EXPECTED)
def case(request, vocabulary, vocabulary_of_command_r):
    """A vocabulary, a template, and what is expected of it."""
    return vocabulary_of_command_r if request.param == "command r" else vocabulary, *EXPECTED[request.param]


def write_vocabulary(path, eos="</s>"):
    writer = gguf.GGUFWriter(path, "llama")
    size = 256 + len(CONTROL)
    for add, value in (
        (writer.add_context_length, 512), (writer.add_embedding_length, 32), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 32), (writer.add_head_count, 2), (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, size), (writer.add_rope_dimension_count, 16),
    ):  # fmt: skip
        add(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*BYTES, *CONTROL])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * len(CONTROL))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(IDS["<s>"])
    writer.add_eos_token_id(IDS[eos])
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (size, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.ffn_{name}": (32, 32) for name in ("gate", "up", "down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0.5, 0.2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hand_made(segments):
    tokens = [(token, bool(learned)) for text, learned in segments for token in by_hand(text)]
    return [token for token, _ in tokens], [learned for _, learned in tokens]


def test_every_answer_as_it_is_generated(case):
    vocabulary, template, expected = case
    samples = SampleMaker(vocabulary, template).make([Row("here:1", messages=CHAT)])
    found = [(list(sample.tokens), list(sample.trained)) for sample in samples]
    assert found == [hand_made(segments) for segments in expected]


def test_prompts_are_those_of_generation(case):
    """What comes before the last answer is what the model is given when it is asked."""
    vocabulary, template, _ = case
    sample = SampleMaker(vocabulary, template).make([Row("here:1", messages=CHAT)])[-1]
    asked = vocabulary.chat_text(CHAT[:-1], template=template)
    prompt = vocabulary.tokenize(asked, add_bos=False, special=True)
    assert list(sample.tokens[: len(prompt)]) == prompt
    assert all(sample.trained[len(prompt) :])
    assert vocabulary.is_end(sample.tokens[-1])


def test_thoughts_that_were_written_are_learned(vocabulary):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nwell\n</think>\n\nYes."}]
    [sample] = SampleMaker(vocabulary, QWEN3).make([Row("here:1", messages=tuple(chat))])
    assert list(sample.tokens) == by_hand(
        f"{IM}user\nHi<|im_end|>\n{IM}assistant\n<think>\nwell\n</think>\n\nYes.<|im_end|>"
    )


def test_completions_and_texts(vocabulary):
    completion, text = SampleMaker(vocabulary).make([Row("a:1", prompt="Q: hi A:", text=" yes"), Row("b", text="So.")])
    assert (list(completion.tokens), list(completion.trained)) == hand_made([("Q: hi A:", 0), (" yes</s>", 1)])
    assert (list(text.tokens), list(text.trained)) == hand_made([("So.</s>", 1)])


def test_all_tokens_are_learned_if_asked(vocabulary):
    [sample] = SampleMaker(vocabulary, CHATML, learn_all=True).make([Row("here:1", messages=CHAT)])
    assert all(sample.trained)


def test_a_chat_without_a_template(vocabulary):
    with pytest.raises(UsageError, match="--chat-template"):
        SampleMaker(vocabulary).make([Row("here:1", messages=CHAT)])


def test_rows_that_the_template_refuses_are_all_named(vocabulary):
    template = "{{ raise_exception('no') if messages[0]['content'] == 'Hi' }}{{ messages[0]['content'] }}"
    rows = [Row(f"here:{n}", messages=CHAT) for n in (3, 8)]
    with pytest.raises(TrainingDataError, match=r"2 rows(.|\n)*here:3(.|\n)*here:8") as caught:
        SampleMaker(vocabulary, template).make(rows)
    assert len(caught.value.problems) == 2


def test_what_does_not_fit_is_named():
    answer = Sample(tuple(range(10)), (False,) * 6 + (True,) * 4, "a:1")
    late = Sample(tuple(range(10)), (False,) * 9 + (True,), "a:2")
    text = Sample(tuple(range(10)), (True,) * 10, "b")
    found = fit([answer, late, text], 8)
    assert (found.cut, found.dropped) == (("a:1",), ("a:2",))
    assert [len(sample.tokens) for sample in found.samples] == [8, 8, 2]
    with pytest.raises(TrainingDataError, match="none of the 1 samples"):
        fit([late], 8)
