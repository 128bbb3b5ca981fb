"""The CUDA C++ kernels through the ops that use them, unforced: on a GPU, and without one on the emulated launchers.

The checks are those of the emulated kernels (test_cuda_kl_reward_gae.py, test_cuda_ranking_loss.py) and the golden
numbers of the ops, with the public op in the place of the driver; each call must have been answered by CUDA C++. The
emulated launchers take tensors on the CPU, so there a mode takes an op's call where a GPU's dispatcher would. They and
a GPU's library register the same names, and torch ends a process that loads both: run this file alone on a GPU, as
`make gpu-check` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import emulation
import pytest
import test_cuda_kl_reward_gae as advantages
import test_cuda_ranking_loss as rankings
import test_kl_reward_gae as advantages_op
import test_ranking_loss as rankings_op
import torch
from golden_cases import golden_cases
from test_cuda_launchers import ops as launchers  # noqa: F401  (a fixture)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels import _backend, _cuda
from engine.kernels.kl_reward import ESTIMATORS
from engine.kernels.kl_reward_gae import kl_reward_gae
from engine.kernels.ranking_loss import REDUCTIONS, ranking_loss

LAUNCHERS = "test_cuda_launchers.py"


def why_no_gpu() -> str:
    """Empty where the kernels can run on a GPU. Loads nothing."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return "AMD's GPUs run Triton's kernels"
    if _cuda.library() is None:
        return "the CUDA C++ kernels are not built: no engine/_cuda*.so"
    return ""


class Emulated(TorchDispatchMode):
    """Takes the engine's ops to where a GPU's dispatcher would take them; it lies below autograd, as that does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "engine":
            return _backend._run_on_gpu(func._opname, *args)
        return func(*args, **(kwargs or {}))


class Machine:
    """Where the ops run, and which of them were answered by CUDA C++."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.ran: list[str] = []

    def answered(self, op: str, calls: int = 1) -> None:
        """`op` was, in every call since the last question."""
        assert self.ran == [op] * calls, f"CUDA C++ ran {self.ran}, want {op} {calls} times"
        self.ran.clear()

    def advantages(
        self, numbers: Sequence[float], estimator: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        logprob, ref_logprob, score, value, cu, bootstrap = (x.to(self.device) for x in tensors)
        found = kl_reward_gae(
            logprob, ref_logprob, score, value, cu, *numbers, bootstrap, estimator
        )
        self.answered("kl_reward_gae")
        assert all(x.device.type == self.device.type for x in found)
        assert all(x.dtype == torch.float32 and not x.requires_grad for x in found)
        return tuple(x.cpu() for x in found)

    def ranking(
        self, reduction: str, denominator: float | None, *tensors: Tensor, grad: float = 1.0
    ) -> rankings.Result:
        score, rank, cu = (x.to(self.device) for x in tensors)
        score = score.detach().requires_grad_()
        loss, *counts = ranking_loss(score, rank, cu, reduction, denominator=denominator)
        self.answered("ranking_loss")
        loss.backward(torch.full_like(loss, grad))
        assert loss.dtype == score.grad.dtype == torch.float32
        assert loss.device.type == score.grad.device.type == self.device.type
        return rankings.Result(loss.detach().cpu(), score.grad.cpu(), *map(int, counts))


@pytest.fixture(params=["gpu", "emulated"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """No backend asked for; Triton's kernels, which would answer else, are an error."""
    reason, emulated = why_no_gpu(), request.param == "emulated"
    if bool(reason) != emulated:
        pytest.skip(reason or "the GPU itself runs them")
    if emulated and (emulation.builder.compiler() is None or _backend.extension() is None):
        pytest.skip("no C++ compiler, or the C++ extension is not built")
    if not emulated and any(item.path.name == LAUNCHERS for item in request.session.items):
        pytest.skip(f"{LAUNCHERS} loads another library of these names; run this file alone")
    if emulated:
        request.getfixturevalue("launchers")
        monkeypatch.setattr(_cuda, "why_no_cuda", lambda: "")
    assert _cuda.why_no_cuda() == ""
    made, kernel = Machine("cpu" if emulated else "cuda"), _cuda.cuda_kernel

    def seen(op: str) -> Any:
        made.ran.append(op)
        return kernel(op)

    def triton(op: str, *arguments: Any) -> Any:
        raise AssertionError(f"{op} came to Triton")

    monkeypatch.delenv("ENGINE_BACKEND", raising=False)
    monkeypatch.setattr(_cuda, "cuda_kernel", seen)
    monkeypatch.setattr(_backend, "_run_triton", triton)
    with Emulated() if emulated else nullcontext():
        yield made
    assert not made.ran, f"nobody asked about {made.ran}"


@pytest.fixture
def instead(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The checks of the emulated kernels run the op on the machine in the place of a driver."""

    def of_advantages(program: Any, cases: Sequence, folder: Any) -> list[tuple[Tensor, ...]]:
        return [machine.advantages(n, ESTIMATORS[i[1]], *x) for _, i, n, *x in cases]

    def of_rankings(program: Any, cases: Sequence, folder: Any) -> list[rankings.Result]:
        return [machine.ranking(REDUCTIONS[i[0]], n[0] or None, *x) for _, i, n, *x in cases]

    monkeypatch.setattr(advantages, "outputs", of_advantages)
    monkeypatch.setattr(rankings, "outputs", of_rankings)
    monkeypatch.setattr(emulation, "driver", lambda name, checked=True: name)
    return machine


CHECKS = {
    check.__name__.removeprefix("test_")
    + f" of {module.__name__.removeprefix('test_cuda_')}": check
    for module, names in (
        (
            advantages,
            "a_long_segment_and_many_short_ones neighbours_and_place_do_not_change_a_bit"
            " infinities_stay_in_their_segment golden_gae golden_rewards golden_estimators",
        ),
        (
            rankings,
            "neighbours_and_place_do_not_change_a_bit micro_batches_add_up_to_the_batch"
            " a_nan_score_is_not_hidden_and_spares_the_other_prompts golden_prompts golden_batches",
        ),
    )
    for check in (getattr(module, f"test_{name}") for name in names.split())
}


@pytest.mark.parametrize("module", [advantages, rankings], ids=_cuda.OPS)
def test_against_float64(module, instead, tmp_path):
    """Forward and backward; ragged, empty, one token; twice the same to the bit."""
    module.check_all(module, tmp_path, module.FEW)


@pytest.mark.parametrize("check", CHECKS)
def test_what_holds_for_the_emulated_kernels(check, instead, tmp_path):
    if check.startswith("a_long") and instead.device.type == "cpu":
        pytest.skip("test_cuda_kl_reward_gae.py has it, in a program that is compiled for speed")
    CHECKS[check](tmp_path)


GOLDEN = SimpleNamespace(dtype=torch.float32, assert_close=rankings.close_to_golden)


@golden_cases("ppo_ptx_full_step")
def test_golden_advantages(case, machine):
    with machine.device:
        advantages_op.test_golden(case, GOLDEN)
    machine.answered("kl_reward_gae")


@golden_cases("pairwise_ranking_prompt")
def test_golden_prompt(case, machine):
    with machine.device:
        rankings_op.test_golden_prompt(case, GOLDEN)
    machine.answered("ranking_loss", len(REDUCTIONS))


@golden_cases("pairwise_ranking_batch")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_golden_batch(case, reduction, machine):
    with machine.device:
        rankings_op.test_golden_batch(case, reduction, GOLDEN)
    machine.answered("ranking_loss")


def test_a_gradient_that_is_not_one(machine):
    given = rankings.batch([4, 0, 1, 9])
    tensors = (given.score, given.rank, given.cu)
    once = machine.ranking(given.reduction, None, *tensors)
    scaled = machine.ranking(given.reduction, None, *tensors, grad=-2.5)
    assert once.grad.abs().max() > 0 and torch.equal(scaled.grad, -2.5 * once.grad)
    assert torch.equal(scaled.loss, once.loss)


@pytest.mark.parametrize("lengths", [[], [0], [1]])
def test_nothing_and_one_token(lengths, machine):
    one = advantages.batch(lengths)
    found = machine.advantages((0.3, 0.9, 0.8), "k1", *one.case()[3:])
    assert all(x.shape == one.value.shape for x in found)
    if lengths == [1]:
        reward = one.score - 0.3 * (one.logprob - one.ref_logprob)
        advantage = reward + 0.9 * one.bootstrap - one.value
        torch.testing.assert_close(found[2], reward)
        torch.testing.assert_close(found[0], advantage)
    given = rankings.batch(lengths)
    ranked = machine.ranking(given.reduction, None, given.score, given.rank, given.cu)
    assert ranked.loss == 0 and ranked[2:] == (0, 0) and not ranked.grad.any()
    assert ranked.grad.shape == given.score.shape


def test_in_torchs_stream_and_in_a_graph(machine):
    """The inputs come late, in a stream of their own; a replay reads what they hold then."""
    if machine.device.type != "cuda":
        pytest.skip("streams and graphs need a GPU")
    given = advantages.batch([300, 1, 0, 700])
    numbers, tensors = (0.3, 0.9, 0.8), given.case()[3:]
    want = machine.advantages(numbers, "k2", *tensors)
    ready = [x.cuda() for x in tensors]
    late = [torch.zeros_like(x) for x in ready]

    def run() -> tuple[Tensor, ...]:
        logprob, ref_logprob, score, value, cu, bootstrap = late
        return kl_reward_gae(logprob, ref_logprob, score, value, cu, *numbers, bootstrap, "k2")

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
        for to, x in zip(late, ready, strict=True):
            to.copy_(x)
        found = run()
    torch.cuda.synchronize()
    assert all(torch.equal(x.cpu(), y) for x, y in zip(found, want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for number in (2.0, 1.0):
        for to, x in zip(late, ready, strict=True):
            to.copy_(x * number if x.is_floating_point() else x)
        graph.replay()
        same = [torch.equal(x.cpu(), y) for x, y in zip(found, want, strict=True)]
        assert all(same) == (number == 1.0)
    machine.answered("kl_reward_gae", 2)
