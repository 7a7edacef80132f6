"""Read and write files: GGUF, safetensors, atomic output, remote stores. Nothing here knows about adapters."""
