"""The benchmark of servers, in its smallest setting."""

import os

import pytest

from support import serving
from tools.benchmarks import serve as bench


@pytest.mark.parametrize(("clients", "adapters"), [(1, 1), (4, 2)])
def test_measure(clients, adapters):
    with serving.serving() as http:
        load = bench.Load(clients, adapters, requests=2, tokens=8)
        rates = bench.measure(bench.Server(bench.OURS, str(http.base_url), 2, os.getpid()), load, seed=1)
        assert http.engine.stats().requests == {"length": 2 * clients}
        assert (http.engine.stats().mixed_steps > 0) == (adapters > 1)
    assert rates.tokens == pytest.approx(8 * rates.requests)
    assert 0 < rates.first <= rates.first_worst
    assert 0 < rates.cpu < 1


def test_an_answer_that_is_too_short_is_no_measurement():
    with serving.serving() as http, pytest.raises(SystemExit, match="ended by 'stop'"):
        bench.ask(http, {"prompt": serving.PROMPT, "max_tokens": 200, "temperature": 0})


def test_medians():
    turns = [bench.Rates(1, 2, 3, 4, 9, 0), bench.Rates(5, 6, 7, 8, 8, 2), bench.Rates(3, 1, 5, 6, 7, 1)]
    assert bench._medians(turns) == bench.Rates(3, 2, 5, 6, 8, 1)


def test_loads_leave_no_adapter_without_a_client():
    assert [(load.clients, load.adapters) for load in bench._loads([1, 4], [1, 4], 1, 1)] == [(1, 1), (4, 1), (4, 4)]


def test_llama_cpps_own_gain():
    costs = bench.measure_batches(serving.demo.BASE, serving.lora_file("shout"), [4], 8, threads=1, repeats=3)
    assert costs.steps.keys() == {1, 4}
    assert 0 < costs.steps[1] < costs.steps[4]
    flat = bench.Costs(prompt=1.0, steps={1: 1.0, 4: 1.0})
    assert (flat.gain(4, 10, prompts=0), flat.gain(4, 10)) == (4, pytest.approx(4 * 11 / 14))
    assert len(bench._limits(costs, [1, 4], 8)) == 1
