"""The ways to combine that `tools.bench combining` tries beside those of `gguflora combine`."""

import numpy as np
import pytest
import torch

from tools.benchmarks import combining

RNG = np.random.default_rng(0)
ONE, TWO = (RNG.standard_normal((40, 60)).astype(np.float32) for _ in range(2))


def test_della_keeps_large_values_more_often_and_the_mean():
    ones = np.ones((400, 60), np.float32) * np.linspace(0.1, 6, 60, dtype=np.float32)
    kept = combining.della([ones])
    assert kept.mean() == pytest.approx(ones.mean(), rel=0.03)
    often = (kept != 0).mean(axis=0)
    assert often[0] == pytest.approx(0.35, abs=0.08)
    assert often[-1] == pytest.approx(0.65, abs=0.08)


def test_breadcrumbs_drops_outliers_and_small_values():
    kept = combining.breadcrumbs([ONE])
    order = np.sort(np.abs(ONE), axis=None)
    used = np.abs(kept[kept != 0])
    assert used.max() < order[-20]
    assert used.min() >= order[int(0.48 * ONE.size)]
    assert (kept != 0).mean() == pytest.approx(0.5, abs=0.01)


def test_sce_weighs_what_agrees_by_squares():
    found = combining.sce([ONE, TWO], density=1.0)
    squares = [(delta**2).mean() for delta in (ONE, TWO)]
    sign = np.where(ONE + TWO >= 0, 1, -1)
    for at in np.ndindex(3, 3):
        parts = [(d[at], w) for d, w in zip((ONE, TWO), squares, strict=True) if np.sign(d[at]) == sign[at]]
        assert found[at] == pytest.approx(sum(v * w for v, w in parts) / sum(w for _, w in parts), rel=1e-5)
    selected = combining.sce([ONE, TWO], density=0.25) != 0
    spread = np.abs(ONE - TWO)
    assert spread[selected].min() >= np.quantile(spread, 0.74)


def test_slerp_is_half_the_arc():
    found = combining.slerp([ONE, 3 * TWO])
    assert np.linalg.norm(found) == pytest.approx((np.linalg.norm(ONE) + 3 * np.linalg.norm(TWO)) / 2, rel=1e-3)
    cosines = [np.vdot(found, d) / np.linalg.norm(found) / np.linalg.norm(d) for d in (ONE, TWO)]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-5)


def test_a_judge_puts_the_weights_back():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, 7, bias=False)

        def forward(self, ids):
            return type("Output", (), {"logits": self.head(torch.nn.functional.one_hot(ids % 4, 4).float())})

    model = Model()
    rows = [combining.Row([1, 2, 3, 4], 1), combining.Row([5, 6, 1], 2)]
    judge, before = combining.Judge(model, [rows, rows[:1]]), model.head.weight.detach().clone()
    plain = judge.losses({})
    changed = judge.losses({"head.weight": np.ones((7, 4), np.float32) * np.arange(7, dtype=np.float32)[:, None]})
    assert [task.shape for task in plain] == [(2,), (1,)]
    assert not np.allclose(plain[0], changed[0])
    assert torch.equal(model.head.weight, before)
    logits = before[:, [1, 2, 3]].T
    wanted = float(torch.nn.functional.cross_entropy(logits, torch.tensor([2, 3, 4])))
    assert plain[0][0] == pytest.approx(wanted, rel=1e-5)
    assert np.concatenate(combining._weighed(plain)).mean() == pytest.approx((plain[0].mean() + plain[1].mean()) / 2)
