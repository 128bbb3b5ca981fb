"""Learning rates and the KL controllers against the golden numbers, and their edges."""

from typing import Any

import pytest

from engine.errors import ConfigError
from engine.run.kl_control import AdaptiveKL, FixedKL
from engine.run.schedule import constant_with_warmup, cosine_to_floor, linear

Golden = dict[str, list[dict[str, Any]]]


def test_cosine_golden(golden: Golden) -> None:
    case = golden["lr_schedule"][0]
    given = case["inputs"]
    rates = [
        cosine_to_floor(s, given["total_steps"], given["peak"], given["floor"])
        for s in given["steps"]
    ]
    assert rates == pytest.approx(case["outputs"]["lr"], rel=1e-10)


def test_constant_with_warmup_golden(golden: Golden) -> None:
    case = golden["lr_schedule"][1]
    given = case["inputs"]
    rates = [
        constant_with_warmup(i, given["peak"], given["warmup_iterations"], given["start_fraction"])
        for i in given["iterations"]
    ]
    assert rates == pytest.approx(case["outputs"]["lr"], rel=1e-10)


def test_linear() -> None:
    assert [linear(s, 4, 8.0) for s in range(6)] == [8.0, 6.0, 4.0, 2.0, 0.0, 0.0]
    assert linear(4, 4, 8.0, floor=0.25) == 2.0
    assert linear(2, 4, 8.0, floor=0.25) == 5.0


@pytest.mark.parametrize("schedule", [cosine_to_floor, linear])
def test_warmup_rises_without_a_zero_step_and_meets_the_peak(schedule: Any) -> None:
    rates = [schedule(s, 20, 1.0, warmup=4) for s in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(left > right for left, right in zip(rates[4:], rates[5:], strict=False))
    assert rates[20] == pytest.approx(0.1 if schedule is cosine_to_floor else 0.0)


def test_past_the_end_the_rate_stays() -> None:
    assert cosine_to_floor(99, 10, 2.0) == cosine_to_floor(10, 10, 2.0) == pytest.approx(0.2)
    assert constant_with_warmup(0, 3.0, warmup=0) == 3.0


@pytest.mark.parametrize(
    "arguments", [(-1, 10, 1.0), (0, 0, 1.0), (0, 10, -1.0), (0, 10, float("nan"))]
)
def test_bad_arguments_are_named(arguments: tuple[int, int, float]) -> None:
    with pytest.raises(ConfigError, match="learning rate: got"):
        cosine_to_floor(*arguments)
    with pytest.raises(ConfigError, match="warm-up"):
        linear(0, 10, 1.0, warmup=10)


def test_adaptive_kl_golden(golden: Golden) -> None:
    case = golden["adaptive_kl"][0]
    given = case["inputs"]
    control = AdaptiveKL(given["beta0"], given["target"], given["horizon"])
    betas = []
    for kl in given["kls"]:
        control = control.after(kl, given["n_steps"])
        betas.append(control.beta)
    assert betas == pytest.approx(case["outputs"]["beta_after"], rel=1e-10)


def test_adaptive_kl_rises_when_the_kl_is_too_high() -> None:
    control = AdaptiveKL(0.1, target=5.0)
    assert control.after(9.0, 64).beta > 0.1 > control.after(1.0, 64).beta
    assert control.after(5.0, 64) == control
    assert control.after(-3.0, 0) == control


def test_fixed_kl_stays() -> None:
    assert FixedKL(0.02).after(100.0, 512) == FixedKL(0.02)


@pytest.mark.parametrize("control", [FixedKL(0.02), AdaptiveKL(0.02)])
def test_a_kl_that_is_not_finite_is_refused(control: FixedKL | AdaptiveKL) -> None:
    with pytest.raises(ConfigError, match="nan"):
        control.after(float("nan"), 3)


def test_bad_controllers_are_refused() -> None:
    for make in (lambda: FixedKL(-0.1), lambda: AdaptiveKL(0.1, target=0.0)):
        with pytest.raises(ConfigError):
            make()
