"""What depends on the system: the CPUs a process may use, and optional packages."""
