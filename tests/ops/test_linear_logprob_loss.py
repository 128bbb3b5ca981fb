"""linear_logprob_loss: linear_logprob's bits, the float64 gradients, pieces, threads, and what it must not do."""

from pathlib import Path

import pytest
import torch
from golden_cases import golden_cases
from gradients import equal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_linear_logprob import STORAGES, check_golden
from test_linear_logprob import check_against_float64 as check_logprob
from torch import Tensor

from engine.kernels import linear_logprob_loss as room
from engine.kernels.linear import PackedWeight, pack_weight
from engine.kernels.linear_logprob import linear_logprob
from engine.kernels.linear_logprob_loss import (
    linear_logprob_loss,
    linear_logprob_loss_reference,
    rows_of_piece,
)
from engine.kernels.ppo_policy_loss import ppo_policy_loss

SHAPES = [  # N, V, H
    (1, 1, 1), (2, 2, 3), (3, 97, 5), (17, 577, 33), (5, 1025, 576), (73, 256, 64), (150, 2311, 31), (145, 300, 16),
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_rows_in_pieces(monkeypatch):
    monkeypatch.setattr(room, "LEAST", 0)


def test_few_rows_do_not_go_in_pieces(monkeypatch):
    """Their logits would exist whole."""
    monkeypatch.undo()
    assert room.LEAST >= 3 * room.FEWEST
    with monkeypatch.context() as patch:
        patch.setattr(room._Pieces, "apply", lambda *_: pytest.fail("in pieces"))
        hidden, weight = torch.randn(room.LEAST - 1, 4, requires_grad=True), torch.randn(9, 4)
        targets, loss = torch.zeros(len(hidden), dtype=torch.int64), weighted(torch.ones(2, 999))
        linear_logprob_loss(hidden, weight, targets, loss)[0].backward()
    assert hidden.grad.any()


def weighted(slopes: Tensor):  # (2, N)
    """sum_n a_n logprob_n + b_n entropy_n."""

    def loss(logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        own = slopes[:, rows].to(logprob.dtype)
        return (own[0] * logprob).sum() + (own[1] * entropy).sum()

    return loss


def run(hidden: Tensor, weight: Tensor | PackedWeight, targets: Tensor, temperature: float,
        bias: Tensor | None, master: Tensor | None, loss, op=linear_logprob_loss) -> list[Tensor]:  # fmt: skip
    """loss, logprob, entropy and the gradients of hidden, bias and the weight or its master."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, bias) if t is not None]
    learned = (weight if master is None else master).detach().clone().requires_grad_()
    used = learned if master is None else weight
    results = op(leaves[0], used, targets, loss, temperature, *leaves[1:],
                 **({} if master is None else {"master": learned}))  # fmt: skip
    assert results[0].requires_grad and not any(r.requires_grad for r in results[1:])
    results[0].backward()
    return [r.detach() for r in results] + [leaf.grad for leaf in (*leaves, learned)]


def run_as_linear_logprob(*given) -> list[Tensor]:
    """Its results and gradients, of the loss with these slopes; the loss itself is compared to the bit below."""
    *inputs, slopes = given
    return run(*inputs, weighted(slopes))[1:]


def check_against_float64(*given, **options):
    check_logprob(*given, **options, run_ours=run_as_linear_logprob)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(cpu_class, storage, shape):
    check_against_float64(cpu_class, shape, storage)
    check_against_float64(cpu_class, shape, storage, temperature=0.7, with_bias=False)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_plain_weight_gets_its_own_gradient(cpu_class, storage):
    check_against_float64(cpu_class, (90, 300, 40), storage, temperature=1.6, plain=True)


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(0, 160), st.integers(1, 600), st.integers(1, 70)),
    storage=st.sampled_from(STORAGES),
    temperature=st.floats(0.3, 3),
    with_bias=st.booleans(),
)
def test_ragged_shapes_against_float64(cpu_class, shape, storage, temperature, with_bias):
    check_against_float64(cpu_class, shape, storage, temperature, with_bias)


@golden_cases("token_logprob_entropy")
def test_golden(precision, case):
    check_golden(precision, case, run_as_linear_logprob)


def case_of(n: int, v: int, h: int, storage: torch.dtype):
    master = torch.randn(v, h)
    return torch.randn(n, h), pack_weight(master, storage), torch.randint(v, (n,)), master


@pytest.mark.parametrize("storage", STORAGES)
def test_the_results_are_linear_logprobs_to_the_bit(cpu_class, storage):
    hidden, weight, targets, master = case_of(301, 1025, 96, storage)
    bias, slopes = torch.randn(1025), torch.randn(2, 301)
    ours = run(hidden, weight, targets, 0.9, bias, master, weighted(slopes))
    logprob, entropy = linear_logprob(hidden, weight, targets, 0.9, bias)
    assert equal(ours[:3], [weighted(slopes)(logprob, entropy, slice(0, 301)), logprob, entropy])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(70, 5311, 64), (1900, 33, 5)])
def test_gradients_do_not_depend_on_the_threads_nor_on_the_run(cpu_class, storage, shape):
    hidden, weight, targets, master = case_of(*shape, storage)
    bias, slopes = torch.randn(shape[1]), torch.randn(2, shape[0])
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(run(hidden, weight, targets, 1.0, bias, master, weighted(slopes)))
    torch.set_num_threads(before)
    assert equal(results[0], results[1]) and equal(results[1], results[2])


def test_masked_and_extreme_logits(cpu_class):
    """-inf adds nothing; a whole block of -inf, or one 1e4 below the rest, changes nothing."""
    v, targets = 1000, torch.tensor([5, 600, 999])
    hidden, weight, bias = torch.randn(3, 8), torch.randn(v, 8), torch.randn(1000)
    bias[:3], bias[256:512], bias[700:720] = -torch.inf, -torch.inf, -1e4
    loss = weighted(torch.randn(2, 3))
    ours = run(hidden, weight, targets, 1.0, bias, None, loss)
    truth = run(*(t.double() for t in (hidden, weight)), targets, 1.0, bias.double(), None, loss)
    for o, t in zip(ours, truth, strict=True):
        assert torch.isfinite(o).all()
        torch.testing.assert_close(o.double(), t, rtol=2e-5, atol=3e-6)
    masked = ~torch.isfinite(bias)
    assert ours[4][masked].eq(0).all() and ours[5][masked].eq(0).all()


@pytest.mark.parametrize("storage", STORAGES)
def test_ppos_loss_goes_through_in_pieces(cpu_class, storage):
    """Its slope at a log-probability follows from that log-probability; the number of tokens is known."""
    hidden, weight, targets, master = case_of(200, 700, 24, storage)
    assert rows_of_piece(200) < 200
    with torch.no_grad():
        old = linear_logprob(hidden, weight, targets)[0] + 0.3 * torch.randn(200)
    advantage = torch.randn(200)

    def clipped(logprob: Tensor, _entropy: Tensor, rows: slice) -> Tensor:
        return ppo_policy_loss(logprob, old[rows], advantage[rows], denominator=200.0)[0]

    ours = run(hidden, weight, targets, 1.0, None, master, clipped)
    whole = run(hidden, weight, targets, 1.0, None, master, clipped, linear_logprob_loss_reference)
    assert equal(ours[:3], whole[:3]) and float(whole[3].norm()) > 0
    for o, w in zip(ours[3:], whole[3:], strict=True):
        apart = 1e-2 if cpu_class == "amx" and storage == torch.bfloat16 else 1e-5
        assert float((o - w).norm() / w.norm()) < apart


def test_the_gradients_of_the_loss_are_scaled(cpu_class):
    hidden, weight, targets, master = case_of(5, 40, 6, torch.float32)
    loss = weighted(torch.ones(2, 5))
    once = run(hidden, weight, targets, 1.0, None, master, loss)
    h, m = hidden.clone().requires_grad_(), master.clone().requires_grad_()
    (linear_logprob_loss(h, weight, targets, loss, master=m)[0] * -4.0).backward()
    assert equal([h.grad, m.grad], [once[3] * -4.0, once[4] * -4.0])


def test_only_what_is_wanted_gets_a_gradient(cpu_class):
    hidden, weight, targets, master = case_of(80, 50, 6, torch.float32)
    loss = weighted(torch.ones(2, 80))
    h, m = hidden.clone().requires_grad_(), master.clone().requires_grad_()
    linear_logprob_loss(h, weight, targets, loss)[0].backward()
    linear_logprob_loss(hidden, weight, targets, loss, master=m)[0].backward()
    both = run(hidden, weight, targets, 1.0, None, master, loss)
    assert equal([h.grad, m.grad], both[3:])
    with torch.no_grad():
        given = linear_logprob_loss(h, weight, targets, loss, master=m)
    assert not given[0].requires_grad and equal(given, both[:3])
    assert not linear_logprob_loss(hidden, weight, targets, loss)[0].requires_grad


def test_a_loss_without_slopes_has_gradients_of_zero(cpu_class):
    hidden, weight, targets, master = case_of(80, 50, 6, torch.float32)
    constant = run(hidden, weight, targets, 1.0, None, master,
                   lambda lp, _entropy, _rows: 0.0 * lp.detach().sum() + lp.sum() * 0.0)  # fmt: skip
    assert not constant[3].any() and not constant[4].any()
    h = hidden.clone().requires_grad_()
    loss = linear_logprob_loss(h, weight, targets, lambda lp, *_: lp.detach().sum())[0]
    loss.backward()
    assert not h.grad.any()


def test_a_second_backward_is_refused(cpu_class):
    hidden, weight, targets, _ = case_of(3, 40, 6, torch.float32)
    loss, *_ = linear_logprob_loss(hidden.requires_grad_(), weight, targets, weighted(torch.ones(2, 3)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="its backward ran before"):
        loss.backward()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters")
def test_the_logits_never_exist():
    def peak_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0])

    n, v, h = 1200, 40_000, 8
    hidden, targets = torch.randn(n, h, requires_grad=True), torch.randint(v, (n,))
    weight, loss = torch.randn(v, h, requires_grad=True), weighted(torch.ones(2, n))
    linear_logprob_loss(hidden[:2], weight, targets[:2], loss)[0].backward()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = peak_kib()
    linear_logprob_loss(hidden, weight, targets, loss)[0].backward()
    assert (peak_kib() - before) * 1024 < n * v * 4 / 8


def test_gradcheck_of_the_definition():
    hidden, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (6, 4), (6,))
    )
    targets, loss = torch.tensor([0, 5, 2]), weighted(torch.randn(2, 3))
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_logprob_loss(x, w, targets, loss, 0.7, b)[0], (hidden, weight, bias)
    )


def test_what_does_not_fit_is_named(cpu_class):
    hidden, weight = torch.zeros(2, 3, requires_grad=True), torch.zeros(7, 3)
    targets, loss = torch.tensor([0, 1]), weighted(torch.ones(2, 2))
    for bad in (7, -100):
        want = rf"targets\[1\]: got {bad}, want a token in \[0, 7\)"
        with pytest.raises(ValueError, match=want):
            linear_logprob_loss(hidden, weight, torch.tensor([0, bad]), loss)
    with pytest.raises(ValueError, match=r"hidden: got shape \(2, 4\), want \(N, 3\)"):
        linear_logprob_loss(torch.zeros(2, 4), weight, targets, loss)
    with pytest.raises(ValueError, match=r"bias: got shape \(3,\), want \(7,\)"):
        linear_logprob_loss(hidden, weight, targets, loss, 1.0, torch.zeros(3))
    with pytest.raises(ValueError, match="temperature: got 0.0, want a number above 0"):
        linear_logprob_loss(hidden, weight, targets, loss, 0.0)
    with pytest.raises(ValueError, match="targets: got"):
        linear_logprob_loss(hidden, weight, targets[:1], loss)
