"""Computing with adapters: combine, resize, extract, export, compare; in numpy, without torch."""
