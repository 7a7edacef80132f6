"""Adapters for real models, trained with PEFT in some minutes each, and the texts that they are judged on.

Three adapters, each a LoRA of rank 16 on all linear layers: ``code`` continues sources of Python's standard library,
``chat`` answers what a function of it does (loss on the answers alone where the model has a chat template), and
``style`` writes telegrams: no lower case, and STOP for a full stop. All their texts come with Python.
"""

from __future__ import annotations

import importlib
import inspect
import pydoc_data.topics
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

ADAPTERS = ("code", "chat", "style")
TOKENS, TOGETHER, RATE = 192, 2, 5e-4
"""Of a training: tokens of a sample, samples of a step, and the highest learning rate."""
_MODULES = (
    *("argparse", "ast", "base64", "bisect", "calendar", "cmd", "codecs", "collections", "configparser", "contextlib"),
    *("copy", "csv", "dataclasses", "datetime", "difflib", "enum", "fileinput", "fnmatch", "fractions", "functools"),
    *("getopt", "gettext", "glob", "gzip", "heapq", "inspect", "ipaddress", "json.decoder", "locale", "logging"),
    *("mailbox", "mimetypes", "netrc", "os", "pathlib", "pickle", "platform", "plistlib", "pprint", "queue", "random"),
    *("sched", "shelve", "shlex", "shutil", "smtplib", "socketserver", "statistics", "string", "subprocess"),
    *("tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback", "types", "unittest.mock", "uuid"),
    *("wave", "weakref", "xmlrpc.client", "zipapp", "zipfile"),
)


def _held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % 4 == 0


def code(*, held_out: bool) -> list[str]:
    """Sources of modules."""
    chosen = [name for name in _MODULES if _held_out(name) == held_out]
    return [inspect.getsource(importlib.import_module(name)) for name in chosen]


def answers(*, held_out: bool) -> list[tuple[str, str]]:
    """Questions on functions of the modules, and the answers that their documentation gives."""
    found = []
    for name in _MODULES:
        for part, function in sorted(vars(importlib.import_module(name)).items()):
            text = inspect.getdoc(function) if inspect.isfunction(function) or inspect.isclass(function) else None
            if text and 60 < len(text) < 900 and not part.startswith("_") and _held_out(part) == held_out:
                found.append((f"What does {name}.{part} do?", text))
    return sorted(set(found))


def telegrams(*, held_out: bool) -> list[str]:
    """Chapters of Python's reference as telegrams."""
    topics = sorted(pydoc_data.topics.topics.items())
    return [_telegram(text) for name, text in topics if len(text) > 1500 and _held_out(name) == held_out]


def _telegram(text: str) -> str:
    return re.sub(r"[.:;](\s)", r" STOP\1", " ".join(re.sub(r"[^\w\s.,:;'-]", "", text).upper().split()))


def prompt_of(question: str) -> str:
    """What a model without a chat template is asked."""
    return f"Question: {question}\nAnswer: "


def held_out_text(adapter: str, tokenizer: Any, characters: int) -> str:
    """A text of the adapter's domain that it has not seen."""
    if adapter == "chat":
        pairs = answers(held_out=True)
        Random(1).shuffle(pairs)
        texts = ["".join(_chat(tokenizer, *pair)) for pair in pairs]
        return "\n\n".join(texts)[:characters]
    texts = (code if adapter == "code" else telegrams)(held_out=True)
    each = max(1500, characters // len(texts))
    return "\n\n".join(_middle(text, each) for text in texts)[:characters]


def _middle(text: str, size: int) -> str:
    start = max(0, (len(text) - size) // 2)
    return text[start : start + size]


def general_text(characters: int) -> str:
    """Prose of this repository's documentation, which no adapter has seen."""
    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    found = []
    for page in pages:
        parts = page.read_text(encoding="utf-8").split("```")[::2]  # without listings
        found += [part for text in parts for part in text.split("\n\n") if len(part) > 300 and "|" not in part]
    step = max(1, sum(map(len, found)) // characters)
    return "\n\n".join(found[::step])[:characters]


def _chat(tokenizer: Any, question: str, answer: str) -> tuple[str, str]:
    if not tokenizer.chat_template:
        return prompt_of(question), answer
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    start = whole.index(answer)
    return whole[:start], whole[start:]


def _samples(adapter: str, tokenizer: Any, rng: Random) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and labels without end; -100 labels what is not learned."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if adapter == "chat":
        pairs = answers(held_out=False)
        while True:
            question, answer = _chat(tokenizer, *rng.choice(pairs))
            asked, told = encode(question), encode(answer)
            learned = [-100] * len(asked) if tokenizer.chat_template else asked
            yield [*asked, *told][:TOKENS], [*learned, *told][:TOKENS]
    texts = [encode(text) for text in (code if adapter == "code" else telegrams)(held_out=False)]
    texts = [text for text in texts if len(text) > TOKENS]
    while True:
        (text,) = rng.choices(texts, [len(text) for text in texts])
        start = rng.randrange(len(text) - TOKENS)
        yield text[start : start + TOKENS], text[start : start + TOKENS]


def trained(model: Path, adapter: str, home: Path, steps: int) -> Path:
    """The folder of an adapter that PEFT trained for a GGUF model, dequantized; trained unless it is there."""
    import peft
    import torch
    import transformers

    folder = home / f"{model.stem}-{adapter}-{steps}"
    if (folder / "adapter_model.safetensors").exists():
        return folder
    print(f"training {folder}, some minutes", flush=True)
    torch.manual_seed(0)
    options = {"gguf_file": model.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.parent, **options)
    base = transformers.AutoModelForCausalLM.from_pretrained(model.parent, dtype=torch.float32, **options)
    projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=projections, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(base, config)
    tuned.train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], weight_decay=0.0)
    samples = _samples(adapter, tokenizer, Random(0))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 6) * (1 - 0.9 * step / steps)
        loss = 0.0
        for _ in range(TOGETHER):
            ids, labels = next(samples)
            part = tuned(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss / TOGETHER
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"{adapter}, step {step}: loss {loss:.3f}", flush=True)
    tuned.save_pretrained(str(folder))
    return folder
