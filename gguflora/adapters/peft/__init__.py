"""Readers of PEFT's methods, one module each. `registry` lists them by ``peft_type``."""
