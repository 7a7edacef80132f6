"""What differs between operating systems: files, locks, limits, memory and CPUs; and optional packages.

No module outside this package names a system call that some systems lack. Each has a fallback here that keeps what its
caller promises, and `tests/system/test_hidden_calls.py` runs the tests without all of them.
"""
