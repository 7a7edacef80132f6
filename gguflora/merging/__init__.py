"""Merge adapters into quantized weights; write the result as a new file, as a patch, or into the base itself."""
