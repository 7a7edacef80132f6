"""What differs between operating systems: CPUs a process may use, file locks, optional system calls."""
