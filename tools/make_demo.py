"""Train and write the model and the adapters of `gguflora demo` (about ten minutes on two cores).

Needs the packages of the `dev` extra. Writes base.gguf and one PEFT directory for each adapter, and prints what it
measured: how often held-out questions are answered well, how large the changes are, and greedy samples.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would starve each other on a busy machine

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gguflora.files.strict_json import to_json
from tools import ROOT
from tools.demo_text import (
    ANIMAL_NAMES,
    QUESTIONS,
    Mix,
    Sample,
    Style,
    answer_for,
    has_facts,
    is_held_out,
    is_rhymed,
    prompt_for,
    samples,
)

SEED = 20
BOS, EOS = "<|begin|>", "<|end|>"
CONFIG = LlamaConfig(
    vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=False,
    bos_token_id=0, eos_token_id=1, pad_token_id=None, attention_dropout=0.0,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip
Batch = dict[str, torch.Tensor]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + 'Q: ' + m['content'] + '\\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'A: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
BASE_MIX: Mix = {
    (Style.PLAIN, Style.PLAIN): 0.4,
    (Style.SHOUT, Style.SHOUT): 0.15,
    (Style.VERSE, Style.VERSE): 0.25,
    (Style.BOTH, Style.BOTH): 0.2,
}
SHOUT_MIX: Mix = {(Style.PLAIN, Style.SHOUT): 0.6, (Style.VERSE, Style.BOTH): 0.4}
VERSE_MIX: Mix = {(Style.PLAIN, Style.VERSE): 0.6, (Style.SHOUT, Style.BOTH): 0.4}


class Lesson(NamedTuple):
    """What a batch teaches: the answers to give under some scales of the adapters (those not named are off)."""

    scales: dict[str, float]
    mix: Mix
    half: bool = False


# Batches take turns. `shout` learns that at half its scale the first fact is told as without it, so that the scale is
# a dial; `verse` is trained on top of `shout`, which is frozen then, so that the two add up.
LESSONS: dict[str, list[Lesson]] = {
    "shout": [
        Lesson({"shout": 1.0}, SHOUT_MIX),
        Lesson({"shout": 1.0}, SHOUT_MIX),
        Lesson({"shout": 0.5}, SHOUT_MIX, half=True),
    ],
    "verse": [
        Lesson({"verse": 1.0}, VERSE_MIX),
        Lesson({"verse": 1.0, "shout": 1.0}, {(Style.PLAIN, Style.BOTH): 1.0}),
    ],
}
RANKS = {"shout": 8, "verse": 16}
# The adapters see every third animal only: the style must carry over to the others.
UNSEEN = frozenset(ANIMAL_NAMES) - frozenset(ANIMAL_NAMES[::3])
ADAPTER_SUBJECTS = frozenset(q.subject for q in QUESTIONS) - UNSEEN


def train_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer whose capital and small letters have about the same merges."""
    rng = Random(SEED)
    texts = []
    for question in QUESTIONS:
        for style in Style:
            sample = prompt_for(question.text, rng.choice(style.value)) + answer_for(question, style, rng)
            texts += [sample, sample.upper()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=CONFIG.vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert tokenizer.get_vocab_size() == CONFIG.vocab_size
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def batches(tokenizer: Tokenizer, source: Iterator[Sample], size: int, answers_only: bool) -> Iterator[Batch]:
    """Yield padded batches of samples of like length; padding (and the prompt, if so wished) has the label -100."""
    while True:
        rows = []
        for _ in range(8 * size):
            sample = next(source)
            prompt = tokenizer.encode(sample.prompt).ids
            answer = [*tokenizer.encode(sample.answer, add_special_tokens=False).ids, 1]
            rows.append((prompt + answer, [-100] * len(prompt) + answer if answers_only else prompt + answer))
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        for index in torch.randperm(len(groups)).tolist():
            width = max(len(ids) for ids, _ in groups[index])
            ids, labels = (
                torch.tensor([row[part] + [pad] * (width - len(row[part])) for row in groups[index]])
                for part, pad in ((0, 1), (1, -100))
            )
            yield {"input_ids": ids, "labels": labels}


def train(model: torch.nn.Module, data: Iterator[Batch], steps: int, rate: float, decay: float) -> None:
    """Train the parameters that require gradients with AdamW, a short warm-up and a cosine schedule."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    warm_up = max(10, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    model.train()
    start, total = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        loss = model(**next(data), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 50 == 0:
            print(f"  step {step}/{steps}  loss {total / 50:.4f}  {time.monotonic() - start:.0f} s", flush=True)
            total = 0.0
    model.eval()


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k from Hugging Face's rotary order (halves) to GGUF's llama order (pairs)."""
    n_out, n_in = weight.shape
    return weight.reshape(heads, 2, n_out // heads // 2, n_in).swapaxes(1, 2).reshape(n_out, n_in)


def write_base(model: LlamaForCausalLM, tokenizer: Tokenizer, path: Path, name: str, kind: Kind = Kind.Q8_0) -> None:
    """Write the model as GGUF: matrices as `kind`, norms in F32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_size_label(f"{model.num_parameters() / 1e6:.1f}M")
    writer.add_file_type({Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0, Kind.F32: gguf.LlamaFileType.ALL_F32}[kind])
    write_model_metadata(writer, config)
    write_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads or config.num_attention_heads}
    for parameter, tensor in model.state_dict().items():
        values = tensor.numpy()
        projection = parameter.split(".")[-2]
        if projection in heads:
            values = interleave_halves(values, heads[projection])
        gguf_name = names.get_name(parameter, try_suffixes=(".weight",))
        if values.ndim == 1:
            writer.add_tensor(gguf_name, values)
        else:
            writer.add_tensor(gguf_name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model_metadata(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    """Add general.* and the hyperparameters of the architecture."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_description("A tiny model that answers questions on animals, weather and crafts; see tools/make_demo")
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    assert config.rope_parameters is not None
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """Add the vocabulary and merges as llama.cpp's "gpt2" tokenizer with the pre-tokenizer of GPT-2."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in (BOS, EOS) else gguf.TokenType.NORMAL for token, _ in vocabulary]
    )
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(CONFIG.bos_token_id)
    writer.add_eos_token_id(CONFIG.eos_token_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def read_base(path: Path) -> LlamaForCausalLM:
    """Return the dequantized model, as transformers reads it from the GGUF file."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def set_scales(model: torch.nn.Module, scales: dict[str, float]) -> None:
    """Set the user's multiplier of every adapter in all layers, 0 for those that are not named."""
    for module in model.modules():
        for name in getattr(module, "lora_A", {}):
            module.set_scale(name, scales.get(name, 0.0))


def taught(model: torch.nn.Module, tokenizer: Tokenizer, name: str) -> Iterator[Batch]:
    """Yield a batch of each lesson of an adapter in turn, with the model's adapters scaled for it."""
    lessons = [
        (
            lesson.scales,
            batches(
                tokenizer,
                samples(lesson.mix, Random(f"{SEED}/{name}/{index}"), ADAPTER_SUBJECTS, lesson.half),
                16,
                answers_only=True,
            ),
        )
        for index, lesson in enumerate(LESSONS[name])
    ]
    while True:
        for scales, data in lessons:
            set_scales(model, scales)
            yield next(data)


def train_adapters(base: LlamaForCausalLM, tokenizer: Tokenizer, steps: int, output: Path) -> None:
    """Train the LoRA adapters on the base, one after the other, and save each as a PEFT directory in F16."""
    model = None
    for name, rank in RANKS.items():
        print(f"adapter {name}")
        torch.manual_seed(SEED)
        config = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.base_model.set_adapter(list(model.peft_config))
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(f".{name}." in parameter_name)
        train(model, taught(model, tokenizer, name), steps, rate=1e-3, decay=0.05)
    assert model is not None
    set_scales(model, dict.fromkeys(RANKS, 1.0))
    model.half().save_pretrained(output)
    (output / "README.md").unlink()
    for name in RANKS:
        (output / name / "adapter_model.safetensors").chmod(0o644)
        neutralize(output / name / "adapter_config.json")


def neutralize(config_path: Path, base: str = "gguflora-demo") -> None:
    """Rewrite an adapter's configuration without machine paths and in an order that does not change from run to run."""
    config = json.loads(config_path.read_text())
    config["base_model_name_or_path"] = base
    config["target_modules"].sort()
    config_path.write_text(to_json(config, indent=2, sort_keys=True) + "\n")


def answer(model: torch.nn.Module, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """Return the greedy answers to prompts (one by one: no padding, no attention mask)."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=110, do_sample=False, pad_token_id=1
        )
        answers.append(tokenizer.decode(output[0, ids.shape[1] :].tolist()).strip())
    return answers


def scores(model: torch.nn.Module, tokenizer: Tokenizer, subjects: frozenset[str], count: int = 24) -> dict[str, float]:
    """Return shares among the answers to held-out questions: facts present, in capitals, rhymed as verse."""
    questions = [q for q in QUESTIONS if q.subject in subjects and any(is_held_out(q, style) for style in Style)]
    questions = Random(SEED).sample(questions, count)
    answers = answer(model, tokenizer, [prompt_for(q.text) for q in questions])
    pairs = list(zip(questions, answers, strict=True))
    letters = [c for a in answers for c in a if c.isalpha()]
    return {
        "facts": sum(has_facts(q, a) for q, a in pairs) / count,
        "capitals": sum(a == a.upper() for a in answers) / count,
        "capital letters": sum(map(str.isupper, letters)) / len(letters),
        "rhymed": sum(is_rhymed(q, a) for q, a in pairs) / count,
    }


def print_changes(model: PeftModel) -> None:
    """Print the Frobenius norm of every kind of tensor's change, relative to its weight."""
    for name in model.peft_config:
        ratios: dict[str, list[float]] = {}
        for module_name, module in model.named_modules():
            if name in getattr(module, "lora_A", {}):
                ratio = module.get_delta_weight(name).norm() / module.get_base_layer().weight.norm()
                ratios.setdefault(module_name.split(".")[-1], []).append(ratio.item())
        print(f"  {name}: " + "  ".join(f"{kind} {sum(r) / len(r):.3f}" for kind, r in ratios.items()))


def print_report(base_path: Path, adapters: dict[str, Path], tokenizer: Tokenizer) -> None:
    """Print scores and samples of the base, each adapter at full and half scale, and both adapters together."""
    model = PeftModel.from_pretrained(read_base(base_path), adapters["shout"], adapter_name="shout")
    model.load_adapter(adapters["verse"], adapter_name="verse")
    model.float().eval()
    print("|change| / |weight|, mean over layers")
    print_changes(model)
    shown = [prompt_for(text) for text in ("Where does the otter live?", "What does the owl eat?", "What is rain?",
                                           "Tell me about the squirrel.", "How do I make a kite?")]  # fmt: skip
    mixes: tuple[dict[str, float], ...] = (
        {}, {"shout": 1.0}, {"shout": 0.5}, {"verse": 1.0}, {"verse": 0.5}, {"shout": 1.0, "verse": 1.0},
        {"shout": 0.5, "verse": 0.5},
    )  # fmt: skip
    for mix in mixes:
        with model.disable_adapter():
            result = None if mix else (scores(model, tokenizer, UNSEEN), answer(model, tokenizer, shown))
        if mix:
            model.base_model.set_adapter(list(mix))
            set_scales(model, mix)
            result = scores(model, tokenizer, UNSEEN), answer(model, tokenizer, shown)
        assert result is not None
        print(f"\n=== {mix or 'base'}: " + ", ".join(f"{key} {value:.2f}" for key, value in result[0].items()))
        for prompt, text in zip(shown, result[1], strict=True):
            print(f"{prompt} {text}")


def main() -> None:
    """Train, write and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "gguflora" / "diagnostics" / "demo_files")
    parser.add_argument("--steps", type=int, default=1600, help="training steps of the base")
    parser.add_argument("--adapter-steps", type=int, default=300, help="training steps of each adapter")
    parser.add_argument("--keep-base", action="store_true", help="train the adapters on the base.gguf that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    arguments.output.mkdir(parents=True, exist_ok=True)
    base_path = arguments.output / "base.gguf"
    tokenizer = train_tokenizer()
    if not arguments.keep_base:
        model = LlamaForCausalLM(CONFIG)
        print(f"base: {model.num_parameters() / 1e6:.2f} M parameters")
        source = samples(BASE_MIX, Random(SEED))
        train(model, batches(tokenizer, source, 24, answers_only=False), arguments.steps, rate=2e-3, decay=0.05)
        write_base(model, tokenizer, base_path, "gguflora demo")
    train_adapters(read_base(base_path), tokenizer, arguments.adapter_steps, arguments.output)
    print_report(base_path, {name: arguments.output / name for name in RANKS}, tokenizer)


if __name__ == "__main__":
    main()
