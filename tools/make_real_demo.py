"""Train and write the adapters of ``tools/demo --real`` with PEFT: ``python -m tools.make_real_demo`` (some minutes).

They are LoRAs of rank 4 on the dequantized SmolLM2-135M-Instruct, trained on the little language of
`tools.demo_text`: *shout* answers in capitals, *verse* in rhymed couplets. Needs the packages of the `dev` extra.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tools.demo_text import QUESTIONS, Style, answer_for, is_held_out
from tools.make_demo import Batch, neutralize, read_base, train
from tools.real_demo import ADAPTERS, HERE, chat_prompt
from tools.real_models import real_model

SEED = 20
STYLES = {"shout": Style.SHOUT, "verse": Style.VERSE}
MODULES = ["q_proj", "v_proj", "o_proj"]


def rows(tokenizer: PreTrainedTokenizerBase, style: Style, rng: Random) -> Iterator[tuple[list[int], list[int]]]:
    """Yield token ids and labels of one question and its answer, without end; prompts have the label -100."""
    questions = [question for question in QUESTIONS if not is_held_out(question, style)]
    while True:
        question = rng.choice(questions)
        prompt = tokenizer(chat_prompt(question.text), add_special_tokens=False).input_ids
        answer = tokenizer(answer_for(question, style, rng).strip(), add_special_tokens=False).input_ids
        answer.append(tokenizer.eos_token_id)
        yield prompt + answer, [-100] * len(prompt) + answer


def batches(tokenizer: PreTrainedTokenizerBase, style: Style, size: int) -> Iterator[Batch]:
    """Yield padded batches without end."""
    source = rows(tokenizer, style, Random(f"{SEED}/{style.name}"))
    while True:
        batch = [next(source) for _ in range(size)]
        width = max(len(ids) for ids, _ in batch)
        ids, labels = (
            torch.tensor([row[part] + [pad] * (width - len(row[part])) for row in batch])
            for part, pad in ((0, tokenizer.eos_token_id), (1, -100))
        )
        yield {"input_ids": ids, "labels": labels}


def main() -> None:
    """Train and write the adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--steps", type=int, default=60, help="training steps of each adapter")
    parser.add_argument("--batch", type=int, default=4, help="questions in a step")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    base = real_model("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(base.parent, gguf_file=base.name)
    for name in ADAPTERS:
        print(f"adapter {name}", flush=True)
        torch.manual_seed(SEED)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, task_type="CAUSAL_LM")
        model = get_peft_model(read_base(base), config)
        train(model, batches(tokenizer, STYLES[name], arguments.batch), arguments.steps, rate=5e-3, decay=0.0)
        folder = arguments.output / name
        model.half().save_pretrained(folder)
        (folder / "README.md").unlink()
        (folder / "adapter_model.safetensors").chmod(0o644)
        neutralize(folder / "adapter_config.json", "HuggingFaceTB/SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
