"""Checked access to GGUF and safetensors files."""
