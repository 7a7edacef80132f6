"""PEFT's side of `tools.benchmarks.algebra`: ``python algebra_peft.py JOB``, where JOB is JSON.

The base has the shapes of a llama, but its weights are never touched and take no memory, so only the adapters count.
"""

from __future__ import annotations

import json
import sys

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Load two adapters, combine and save them."""
    job = json.loads(sys.argv[1])
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**job["config"]))
    model.to_empty(device="cpu")
    first, second = job["adapters"]
    combined = PeftModel.from_pretrained(model, first, adapter_name="one", low_cpu_mem_usage=True)
    combined.load_adapter(second, "two", low_cpu_mem_usage=True)
    options = {"density": job["density"]} if job["density"] else {}
    rank = {"svd_rank": job["rank"]} if job["method"].endswith("svd") else {}
    combined.add_weighted_adapter(["one", "two"], [1.0, 0.5], "sum", combination_type=job["method"], **options, **rank)
    combined.save_pretrained(job["out"], selected_adapters=["sum"])


if __name__ == "__main__":
    main()
