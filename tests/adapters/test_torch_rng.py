"""`gguflora.adapters.numerics.torch_rng` against torch."""

import numpy as np
import pytest
import torch

from gguflora.adapters.numerics.torch_rng import TorchGenerator

SEEDS = (0, 1, 777, 2**31 + 5, 2**32 - 1, 2**40 + 3)


def theirs(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_has_torchs_bits(seed):
    expected = torch.empty(64, 33).uniform_(-0.3, 0.7, generator=theirs(seed)).numpy()
    np.testing.assert_array_equal(TorchGenerator(seed).uniform((64, 33), -0.3, 0.7), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_kaiming_uniform_has_torchs_bits_and_goes_on(seed):
    """VeRA's two projections come from one generator."""
    ours, generator = TorchGenerator(seed), theirs(seed)
    for shape in ((16, 97), (160, 16)):
        expected = torch.nn.init.kaiming_uniform_(torch.empty(shape), generator=generator).numpy()
        np.testing.assert_array_equal(ours.kaiming_uniform(shape), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 2, 10, 1000, 4097])
def test_randperm_is_torchs(seed, n):
    np.testing.assert_array_equal(TorchGenerator(seed).randperm(n), torch.randperm(n, generator=theirs(seed)))


@pytest.mark.parametrize("seed", SEEDS)
def test_first_numbers_of_randperm(seed):
    expected = torch.randperm(1_000_000, generator=theirs(seed))[:300]
    np.testing.assert_array_equal(TorchGenerator(seed).randperm(1_000_000, 300), expected)


@pytest.mark.full
@pytest.mark.parametrize("n", [214_748_364, 214_748_370])
def test_randperm_of_a_large_weight(n):
    """Torch shuffles in another way from (2**32 - 1) / 20 numbers on."""
    expected = torch.randperm(n, generator=theirs(5))[:200].clone()
    np.testing.assert_array_equal(TorchGenerator(5).randperm(n, 200), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1,), (3,), (15,), (16,), (17,), (5, 7), (64, 2, 2), (13, 3, 3)])
def test_normal_is_torchs_but_for_rounding(seed, shape):
    expected = torch.normal(mean=0.1, std=0.7, size=shape, generator=theirs(seed)).numpy()
    np.testing.assert_allclose(TorchGenerator(seed).normal(shape, 0.1, 0.7), expected, rtol=2e-6, atol=2e-7)
