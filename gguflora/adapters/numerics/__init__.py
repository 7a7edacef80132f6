"""Numerical functions for adapter methods: rotations, singular values, wavelets, torch's random numbers."""
