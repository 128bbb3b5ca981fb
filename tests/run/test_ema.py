"""The running average against the golden numbers; swapping, state, threads."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from engine.errors import CheckpointError, ConfigError
from engine.run.ema import EMA


def test_golden(golden: dict[str, list[dict[str, Any]]]) -> None:
    case = golden["ema"][0]
    weight = Parameter(torch.full((3,), case["inputs"]["init"], dtype=torch.float64))
    ema = EMA({"w": weight}, case["inputs"]["decay"])
    for value, want in zip(case["inputs"]["weights"], case["outputs"]["ema"], strict=True):
        with torch.no_grad():
            weight.fill_(value)
        ema.update()
        assert ema.state()["w"].tolist() == pytest.approx([want] * 3, rel=1e-10)
    assert weight[0] == -1.0


def _random(seed: int) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 5), "b": (70_001,), "empty": (0, 3)}
    return {name: Parameter(torch.randn(s, generator=generator)) for name, s in shapes.items()}


def test_swapped_exchanges_and_restores_exactly_even_on_an_error() -> None:
    parameters = _random(0)
    ema = EMA(parameters, 0.5)
    start = {n: p.detach().clone() for n, p in parameters.items()}
    with torch.no_grad():
        for p in parameters.values():
            p.mul_(3.0)
    ema.update()
    trained = {n: p.detach().clone() for n, p in parameters.items()}
    averaged = {n: a.clone() for n, a in ema.state().items()}
    assert torch.allclose(averaged["a"], start["a"] * 2)
    with pytest.raises(ZeroDivisionError), ema.swapped():
        assert all(torch.equal(parameters[n], averaged[n]) for n in parameters)
        for use in (ema.update, ema.state, lambda: ema.load_state({}), ema.swapped().__enter__):
            with pytest.raises(RuntimeError, match="swapped"):
                use()
        raise ZeroDivisionError
    assert all(torch.equal(parameters[n], trained[n]) for n in parameters)
    assert all(torch.equal(ema.state()[n], averaged[n]) for n in parameters)


def test_state_round_trip_goes_on_with_the_same_bits() -> None:
    def drift(parameters: dict[str, Parameter], step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for p in parameters.values():
                p.add_(torch.randn(p.shape, generator=generator))

    parameters = _random(1)
    ema = EMA(parameters)
    for step in range(3):
        drift(parameters, step)
        ema.update()
    saved = {n: a.clone() for n, a in ema.state().items()}
    copy = {n: Parameter(p.detach().clone()) for n, p in parameters.items()}
    resumed = EMA(copy)
    resumed.load_state(saved)
    for step in range(3, 6):
        for each, average in ((parameters, ema), (copy, resumed)):
            drift(each, step)
            average.update()
    assert all(torch.equal(ema.state()[n], resumed.state()[n]) for n in parameters)


def test_the_number_of_threads_changes_no_bit() -> None:
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            parameters = _random(2)
            ema = EMA(_random(3))
            ema.parameters = parameters
            ema.update()
            results.append(ema.state()["b"].clone())
        finally:
            torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_state_of_another_model_is_refused() -> None:
    ema = EMA(_random(0))
    with pytest.raises(CheckpointError, match="lacks"):
        ema.load_state({"a": torch.zeros(7, 5)})
    wrong = {**ema.state(), "a": torch.zeros(5, 7)}
    with pytest.raises(CheckpointError, match=r"a is \(5, 7\).*want \(7, 5\)"):
        ema.load_state(wrong)
    with pytest.raises(ConfigError, match="decay"):
        EMA({}, 1.0)
