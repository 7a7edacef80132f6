"""Does it work here, and how well: doctor, demo and compare."""
