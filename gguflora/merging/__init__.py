"""Merges: what makes merged weights and writes them, to a new file, a patch, or into the base itself."""
