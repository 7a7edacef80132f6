"""Commands that make or describe a LoRA: convert, combine, resize, extract, export, inspect, diff."""
