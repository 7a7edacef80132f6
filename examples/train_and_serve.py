"""From a training run to a served GGUF: train a LoRA with PEFT, convert it, serve it, ask it.

    pip install 'gguflora[server]' torch transformers peft openai
    python train_and_serve.py base.gguf examples.txt --ask "Q: What does the fox eat?"

The base is any GGUF file of an architecture that transformers can read; it dequantizes the weights for the training, so
no other copy of the model is needed. The examples are texts with blank lines between them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import openai
import peft
import torch
import transformers

import gguflora


def main() -> None:
    """Do it all; the adapter and its GGUF file stay."""
    options = read_options()
    adapter, lora = options.out / "adapter", options.out / "tuned.gguf"
    train(options.base, options.examples, adapter, steps=options.steps, rank=options.rank)
    report = gguflora.convert(adapter, options.base, lora, force=True)
    print(f"wrote {report.output}: {report.tensors} tensors of rank {report.ranks[1]}")
    with Server(options.base, lora) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        for model in ("base", "tuned"):
            answer = client.completions.create(model=model, prompt=options.ask, max_tokens=40, temperature=0)
            print(f"{model}: {answer.choices[0].text.strip()!r}")
        if options.stay:
            input(f"serving at {url}; Enter ends it")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a LoRA on a GGUF model's own weights, convert it, serve it.")
    parser.add_argument("base", type=Path, help="base model, a GGUF file")
    parser.add_argument("examples", type=Path, help="texts with blank lines between them")
    parser.add_argument("--ask", default="Hello", help="prompt for the base and for the adapter")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--stay", action="store_true", help="serve until Enter is pressed")
    return parser.parse_args()


def train(base: Path, examples: Path, out: Path, *, steps: int, rank: int) -> None:
    """A plain training loop; any trainer that saves a PEFT adapter will do."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.parent, gguf_file=base.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    texts = [text.strip() for text in examples.read_text(encoding="utf-8").split("\n\n") if text.strip()]
    batches = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    end = torch.tensor([[tokenizer.eos_token_id]])
    for step in range(steps):
        tokens = torch.cat([batches[step % len(batches)], end], dim=1)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained {steps} steps on {len(texts)} texts, loss {loss.item():.3f}")
    model.save_pretrained(out)


class Server:
    """``gguflora serve`` with one adapter, on a free port, while the block runs."""

    def __init__(self, base: Path, lora: Path) -> None:
        command = [sys.executable, "-m", "gguflora", "serve", str(base), "--lora", f"tuned={lora}", "--port", "0"]
        self.process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> str:
        """The address, as soon as requests are taken."""
        assert self.process.stdout
        ready = self.process.stdout.readline()
        if not ready:
            raise SystemExit(f"the server did not start: exit code {self.process.wait()}")
        return str(json.loads(ready)["url"])

    def __exit__(self, *_: object) -> None:
        """End it as Ctrl+C would: running answers are finished first."""
        self.process.terminate()
        self.process.wait()


if __name__ == "__main__":
    main()
