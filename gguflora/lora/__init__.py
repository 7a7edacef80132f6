"""Everything whose result is a LoRA: convert, combine, resize, extract, export; and inspect, diff."""
