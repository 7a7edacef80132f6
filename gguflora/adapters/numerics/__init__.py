"""The mathematics that several adapter methods share: rotations, spectra, wavelets, random streams of torch."""
