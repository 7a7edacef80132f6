"""Check that gguflora works on this machine and how well: doctor, demo and compare."""
