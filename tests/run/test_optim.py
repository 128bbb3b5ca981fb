"""Adam against the golden numbers and a float64 loop; clip, guard, decay, state, threads."""

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from engine.errors import CheckpointError, ConfigError
from engine.kernels import adamw
from engine.kernels._backend import backend
from engine.kernels.linear import pack_weight
from engine.model.names import Kind, Spec
from engine.model.storage import StaleWeightsError, Weights
from engine.run.ema import EMA
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
    before = {n: t.clone() for n, t in optimizer.state().items()}
    result = optimizer.step(0.0, max_grad_norm=0.5)
    assert result.grad_norm == pytest.approx(want, rel=1e-6)  # the norm before the clip
    after = optimizer.state()
    for n, p in parameters.items():
        assert p.grad is not None and torch.equal(p.grad, gradients[n])  # it is a factor of the pass
        clipped = gradients[n] * (0.5 / want)
        moment = 0.9 * before[f"exp_avg.{n}"] + 0.1 * clipped
        torch.testing.assert_close(after[f"exp_avg.{n}"], moment, rtol=1e-5, atol=1e-8)


def test_a_gradient_that_float32_cannot_square_is_clipped_or_skipped() -> None:
    """Unclipped its second moment would be infinite, and the weight would never move again."""
    parameters = _parameters()
    optimizer = Optimizer(parameters)
    _set_gradients(parameters, 0, scale=1e25)
    assert optimizer.step(0.1).skipped and optimizer.skipped == 1
    assert not any(t.any() for n, t in optimizer.state().items() if n.startswith("exp_avg"))
    assert not optimizer.step(0.1, 1.0).skipped
    assert all(torch.isfinite(t).all() for t in optimizer.state().values())


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


KINDS: dict[str, Kind] = {
    "embed_positions.weight": "table",
    "mlp.weight": "matrix",
    "query.weight": "matrix",
    "key.weight": "matrix",
    "norm.weight": "vector",
    "score.weight": "score",
}


def _weights(dtype: torch.dtype) -> Weights:
    generator = torch.Generator().manual_seed(0)
    vector = {name: (37,) if kind == "vector" else (19, 37) for name, kind in KINDS.items()}
    specs = {name: Spec(vector[name], kind) for name, kind in KINDS.items()}
    weights = Weights(specs, lambda n: torch.randn(vector[n], generator=generator), dtype, True)
    weights.fuse(["query.weight", "key.weight"])
    return weights


def _copies(weights: Weights) -> dict[str, Tensor]:
    """All of the compute copy: as it is stored, and packed."""
    found = {n: weights.stored(n) for n in weights.masters}
    for name, kind in KINDS.items():
        data = weights.packed(name).data if kind in ("matrix", "score") else None
        found |= {} if data is None else {f"{name} packed": data}
    return found


def _places(weights: Weights) -> list[int]:
    packed = [weights.packed(n) for n, kind in KINDS.items() if kind in ("matrix", "score")]
    plain = [weights.vector(n) for n, kind in KINDS.items() if kind in ("vector", "table")]
    kept = [p.dense for p in packed] + [p.data for p in packed if p.data is not None] + plain
    return [t.data_ptr() for t in kept]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_leaves_compute_copy_and_average_new(dtype: torch.dtype) -> None:
    """As three passes do, to the bit: the step, a refresh, the average's update."""
    one, three = _weights(dtype), _weights(dtype)
    average, other = EMA(one.masters, 0.75), EMA(three.masters, 0.75)
    config = OptimizerConfig(weight_decay=0.1)
    in_one_pass = Optimizer(one.masters, config, one, average)
    alone = Optimizer(three.masters, config)
    places = _places(one)
    for step in range(3):
        _set_gradients(one.masters, step)
        _set_gradients(three.masters, step)
        assert in_one_pass.step(0.01, 1.0) == alone.step(0.01, 1.0)
        three.refresh()
        other.update()
        one.check()
        assert one.version == three.version == step + 1
        assert all(torch.equal(p, three.masters[n]) for n, p in one.masters.items())
        want = _copies(three)
        assert all(torch.equal(t, want[n]) for n, t in _copies(one).items())
        assert all(torch.equal(a, other.state()[n]) for n, a in average.state().items())
        for name, master in one.masters.items():
            assert torch.equal(one.stored(name), master.detach().to(one.stored(name).dtype))
        packed = one.packed("mlp.weight")
        again = pack_weight(one.masters["mlp.weight"].detach().clone(), dtype)
        assert packed.data is None or torch.equal(packed.data, again.data)
    assert places == _places(one)  # decode steps and their graphs hold these pointers


def test_the_definition_does_the_same_through_the_front_door() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        with backend("reference"):
            weights = _weights(dtype)
            average = EMA(weights.masters, 0.75)
            optimizer = Optimizer(weights.masters, weights=weights, ema=average)
            start = average.state()["mlp.weight"].clone()
            _set_gradients(weights.masters, 0)
            optimizer.step(0.01)
        weights.check()
        master = weights.masters["mlp.weight"].detach()
        assert weights.version == 1 and torch.equal(weights.stored("mlp.weight"), master.to(dtype))
        torch.testing.assert_close(average.state()["mlp.weight"], 0.75 * start + 0.25 * master)


def test_a_skipped_step_counts_no_version() -> None:
    weights = _weights(torch.bfloat16)
    average = EMA(weights.masters, 0.75)
    optimizer = Optimizer(weights.masters, weights=weights, ema=average)
    before = {**_copies(weights), **{f"ema {n}": a.clone() for n, a in average.state().items()}}
    before = {n: t.clone() for n, t in before.items()}
    _set_gradients(weights.masters, 0, scale=math.inf)
    assert optimizer.step(0.01).skipped and weights.version == 0
    weights.check()
    after = {**_copies(weights), **{f"ema {n}": a for n, a in average.state().items()}}
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_a_master_written_by_hand_is_still_found() -> None:
    weights = _weights(torch.bfloat16)
    part = {n: p for n, p in weights.masters.items() if n != "key.weight"}
    optimizer = Optimizer(part, weights=weights)
    _set_gradients(part, 0)
    optimizer.step(0.01)
    weights.check()
    for name in ("mlp.weight", "key.weight"):  # one that steps move, one that they do not
        with torch.no_grad():
            weights.masters[name].mul_(1.5)
        with pytest.raises(StaleWeightsError, match=rf"{name}.*version"):
            weights.check()
        if name == "key.weight":
            optimizer.step(0.01)  # of the others: its copy is as old as before
            with pytest.raises(StaleWeightsError, match=name):
                weights.check()
        weights.refresh()
        weights.check()


def test_a_step_that_is_refused_moves_no_weight() -> None:
    weights = _weights(torch.bfloat16)
    optimizer = Optimizer(weights.masters, weights=weights)
    _set_gradients(weights.masters, 0)
    before = {name: master.detach().clone() for name, master in weights.masters.items()}
    optimizer._exp_avg["score.weight"] = torch.zeros(3)  # the last one
    with pytest.raises(ValueError, match="exp_avg: got shape"):
        optimizer.step(0.01)
    assert weights.version == 0
    weights.check()
    assert all(torch.equal(master, before[name]) for name, master in weights.masters.items())


def test_a_step_that_breaks_off_leaves_the_weights_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _weights(torch.bfloat16)
    optimizer = Optimizer(weights.masters, weights=weights)
    _set_gradients(weights.masters, 0)

    def breaks(*arguments: Any) -> None:
        raise MemoryError("in the middle")

    monkeypatch.setattr(adamw, "choose", lambda *tensors: "reference")
    monkeypatch.setattr(adamw, "adamw_step_reference", breaks)
    with pytest.raises(MemoryError):
        optimizer.step(0.01)
    assert weights.version == 0
    with pytest.raises(StaleWeightsError):
        weights.check()


def test_an_average_or_weights_of_others_are_refused() -> None:
    weights, other = _weights(torch.bfloat16), _weights(torch.bfloat16)
    with pytest.raises(ConfigError, match="got weights whose master is not embed_positions.weight"):
        Optimizer(weights.masters, weights=other)
    with pytest.raises(ConfigError, match="an average without embed_positions.weight"):
        Optimizer(weights.masters, ema=EMA(other.masters))
    average = EMA(weights.masters)
    optimizer = Optimizer(weights.masters, weights=weights, ema=average)
    _set_gradients(weights.masters, 0)
    with average.swapped(), pytest.raises(RuntimeError, match="EMA.within_step.*swapped"):
        optimizer.step(0.01)
