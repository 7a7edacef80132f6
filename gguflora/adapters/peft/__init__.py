"""PEFT's methods, a module each, and what their checkpoints have in common; `registry` lists them by ``peft_type``."""
