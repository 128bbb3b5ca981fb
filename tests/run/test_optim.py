"""Adam against the golden numbers and a float64 loop; clip, guard, decay, state, threads."""

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from engine.errors import CheckpointError, ConfigError
from engine.run.optim import Optimizer, OptimizerConfig, decays, global_norm

SHAPES = {
    "layers.0.mlp.weight": (37, 21),
    "layers.0.mlp.bias": (37,),
    "norm.weight": (5,),
    "embed_tokens.weight": (40_003, 3),
}


def _parameters(seed: int = 0) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}


def _set_gradients(parameters: dict[str, Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=generator) * scale


def _adam_by_hand(
    weight: Tensor,
    gradients: list[Tensor],
    lr: float,
    eps: float,
    style: Literal["torch", "tf"],
    decay: float,
) -> Tensor:
    """The docstring's equations in float64."""
    b1, b2 = 0.9, 0.95
    w, m, v = weight.double(), torch.zeros(()).double(), torch.zeros(()).double()
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w * (1 - lr * decay)
        if style == "torch":
            w = w - lr / (1 - b1**t) * m / ((v / (1 - b2**t)).sqrt() + eps)
        else:
            w = w - lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (v.sqrt() + eps)
    return w


def test_golden(golden: dict[str, list[dict[str, Any]]]) -> None:
    assert {case["inputs"]["style"] for case in golden["adam"]} == {"torch", "tf"}
    for case in golden["adam"]:
        given = case["inputs"]
        weight = Parameter(torch.full((19,), given["w0"]))
        config = OptimizerConfig(
            betas=(given["beta1"], given["beta2"]), eps=given["eps"], eps_style=given["style"]
        )
        optimizer = Optimizer({"w": weight}, config)
        for gradient, want in zip(given["grads"], case["outputs"]["w"], strict=True):
            weight.grad = torch.full((19,), gradient)
            optimizer.step(given["lr"])
            # Of the distance moved, not of the weight: 1 - 1e-3 would hide an error of the step.
            assert (1 - weight).tolist() == pytest.approx([1 - want] * 19, rel=1e-3, abs=2e-7)


@pytest.mark.parametrize("style", ["torch", "tf"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_against_float64(style: Literal["torch", "tf"], decay: float) -> None:
    parameters = _parameters()
    start = {n: p.detach().clone() for n, p in parameters.items()}
    config = OptimizerConfig(eps=1e-3, eps_style=style, weight_decay=decay)
    optimizer = Optimizer(parameters, config)
    gradients: dict[str, list[Tensor]] = {n: [] for n in parameters}
    for step in range(5):
        _set_gradients(parameters, step, scale=1e-3)
        for n, p in parameters.items():
            assert p.grad is not None
            gradients[n].append(p.grad.clone())
        optimizer.step(0.01)
    for n, p in parameters.items():
        own_decay = decay if n == "layers.0.mlp.weight" else 0.0
        want = _adam_by_hand(start[n], gradients[n], 0.01, 1e-3, style, own_decay)
        torch.testing.assert_close(p.detach().double(), want, rtol=2e-6, atol=2e-6)


def test_decay_touches_matrices_only() -> None:
    matrix, vector = torch.zeros(3, 4), torch.zeros(3)
    assert decays("layers.3.attention.query.weight", matrix)
    assert decays("score.weight", torch.zeros(1, 4))
    assert not decays("layers.3.attention.query.bias", vector)
    for table in ("embed_tokens.weight", "embed_positions.weight"):
        assert not decays(table, matrix)


def test_global_norm_and_clip() -> None:
    parameters = _parameters()
    _set_gradients(parameters, 0)
    gradients = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    want = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
    assert global_norm(gradients.values()) == pytest.approx(want, rel=1e-6)
    assert global_norm([]) == 0.0 == global_norm([torch.zeros(0)])

    optimizer = Optimizer(parameters)
    assert optimizer.step(0.0, max_grad_norm=want * 2).grad_norm == pytest.approx(want, rel=1e-6)
    for n, p in parameters.items():
        assert p.grad is not None and torch.equal(
            p.grad, gradients[n]
        )  # below the limit: untouched
    result = optimizer.step(0.0, max_grad_norm=0.5)
    assert result.grad_norm == pytest.approx(want, rel=1e-6)  # the norm before the clip
    assert optimizer.grad_norm() == pytest.approx(0.5, rel=1e-5)
    for n, p in parameters.items():
        torch.testing.assert_close(p.grad, gradients[n] * (0.5 / want), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_moves_nothing_and_is_counted(bad: float) -> None:
    parameters = _parameters()
    optimizer = Optimizer(parameters)
    _set_gradients(parameters, 0)
    assert not optimizer.step(0.1, 1.0).skipped
    weights = {n: p.detach().clone() for n, p in parameters.items()}
    state = {n: t.clone() for n, t in optimizer.state().items()}
    _set_gradients(parameters, 1)
    table = parameters["embed_tokens.weight"].grad
    assert table is not None
    table[-1, -1] = bad
    result = optimizer.step(0.1, 1.0)
    assert result.skipped and not math.isfinite(result.grad_norm)
    assert all(torch.equal(p, weights[n]) for n, p in parameters.items())
    after = optimizer.state()
    assert after.pop("skipped") == 1 and state.pop("skipped") == 0
    assert all(torch.equal(after[n], t) for n, t in state.items())
    _set_gradients(parameters, 2)
    assert not optimizer.step(0.1, 1.0).skipped
    assert (optimizer.steps, optimizer.skipped) == (2, 1)


@pytest.mark.parametrize("style", ["torch", "tf"])
def test_saved_and_resumed_equals_never_stopped(style: Literal["torch", "tf"]) -> None:
    config = OptimizerConfig(eps=1e-5, eps_style=style, weight_decay=0.01)
    whole, half = _parameters(), _parameters()
    never_stopped, first = Optimizer(whole, config), Optimizer(half, config)

    def run(parameters: dict[str, Parameter], optimizer: Optimizer, steps: range) -> list[float]:
        norms = []
        for step in steps:
            _set_gradients(parameters, step)
            norms.append(optimizer.step(1e-3 / (step + 1), max_grad_norm=1.0).grad_norm)
        return norms

    norms = run(whole, never_stopped, range(6))
    run(half, first, range(3))
    saved = {n: t.clone() for n, t in first.state().items()}
    other = {n: Parameter(p.detach().clone()) for n, p in half.items()}
    second = Optimizer(other, config)
    second.load_state(saved)
    assert run(other, second, range(3, 6)) == norms[3:]
    assert all(torch.equal(whole[n], other[n]) for n in whole)
    final, resumed = never_stopped.state(), second.state()
    assert all(torch.equal(final[n], resumed[n]) for n in final)


def test_the_number_of_threads_changes_no_bit() -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            parameters = _parameters()
            optimizer = Optimizer(parameters)
            for step in range(3):
                _set_gradients(parameters, step)
                norm = optimizer.step(0.01, max_grad_norm=0.1).grad_norm
            results.append((norm, {n: p.detach().clone() for n, p in parameters.items()}))
        finally:
            torch.set_num_threads(before)
    for norm, weights in results[1:]:
        assert norm == results[0][0]
        assert all(torch.equal(weights[n], results[0][1][n]) for n in weights)


def test_misuse_is_named() -> None:
    with pytest.raises(ConfigError, match="w is torch.bfloat16, want float32"):
        Optimizer({"w": Parameter(torch.zeros(3, dtype=torch.bfloat16))})
    with pytest.raises(ConfigError, match="no parameters"):
        Optimizer({})
    parameters = _parameters()
    optimizer = Optimizer(parameters)
    _set_gradients(parameters, 0)
    parameters["norm.weight"].grad = None
    with pytest.raises(RuntimeError, match=r"1 of 4 .*norm.weight"):
        optimizer.step(0.1)
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters.values()) and optimizer.grad_norm() == 0.0
    state = optimizer.state()
    with pytest.raises(CheckpointError, match="lacks.*steps"):
        optimizer.load_state({n: t for n, t in state.items() if n != "steps"})
    with pytest.raises(CheckpointError, match="exp_avg.norm.weight is"):
        optimizer.load_state({**state, "exp_avg.norm.weight": torch.zeros(6)})
    for change in ({"eps": 0.0}, {"betas": (0.9, 1.0)}, {"eps_style": "x"}, {"weight_decay": -1.0}):
        with pytest.raises(ConfigError, match="optimizer: got"):
            OptimizerConfig(**change)  # type: ignore[arg-type]
