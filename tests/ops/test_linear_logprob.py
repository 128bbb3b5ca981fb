"""linear_logprob: golden numbers, the float64 definition, extremes, bits that depend on the row alone, memory."""

from pathlib import Path

import pytest
import torch
from compare import assert_close
from golden_cases import golden_cases
from gradients import equal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.linear import PackedWeight, pack_weight
from engine.kernels.linear_logprob import linear_logprob, linear_logprob_reference

STORAGES = [torch.float32, torch.bfloat16]
SHAPES = [  # N, V, H
    (1, 1, 1), (2, 2, 3), (3, 97, 5), (17, 577, 33), (5, 1025, 576), (33, 256, 64), (40, 2311, 31),
]  # fmt: skip


def run(hidden: Tensor, weight: Tensor | PackedWeight, targets: Tensor, temperature: float,
        bias: Tensor | None, master: Tensor | None, grads: Tensor, op=linear_logprob) -> list[Tensor]:  # fmt: skip
    """logprob, entropy and the gradients of hidden, bias and the weight or its master."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, bias) if t is not None]
    learned = (weight if master is None else master).detach().clone().requires_grad_()
    used = learned if master is None else weight
    results = op(leaves[0], used, targets, temperature, *leaves[1:],
                 **({} if master is None else {"master": learned}))  # fmt: skip
    torch.autograd.backward(results, [g.to(r.dtype) for g, r in zip(grads, results, strict=True)])
    return [r.detach() for r in results] + [leaf.grad for leaf in (*leaves, learned)]


def check_golden(precision, case, run_ours=run):
    """A row of logits is the column of a weight (V, 1) that a hidden state of 1 picks."""
    dtype, temperature = precision.dtype, case["inputs"]["temperature"]
    rows = torch.tensor(case["inputs"]["logits"], dtype=dtype).flatten(0, 1)
    labels = torch.tensor(case["inputs"]["labels"]).flatten()
    want = {k: torch.tensor(v, dtype=dtype).flatten(0, 1) for k, v in case["outputs"].items()}
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        logprob, entropy, _, gradient = run_ours(
            torch.ones(1, 1, dtype=dtype), row[:, None], label[None], temperature, None, None,
            torch.tensor([[1.0], [0.0]]),
        )  # fmt: skip
        precision.assert_close(logprob[0], want["logprob"][i], case["name"])
        precision.assert_close(entropy[0], want["entropy"][i], case["name"])
        precision.assert_close(gradient[:, 0], want["grad_logprob_wrt_logits"][i], case["name"])


@golden_cases("token_logprob_entropy")
def test_golden(precision, case):
    check_golden(precision, case)


def check_against_float64(
    cpu_class, shape, storage, temperature=1.0, with_bias=True, plain=False, run_ours=run
):
    n, v, h = shape
    hidden, bias, grads = torch.randn(n, h), torch.randn(v), torch.randn(2, n)
    master, targets = torch.randn(v, h) * 3 * h**-0.5, torch.randint(v, (n,))
    tiles = cpu_class == "amx" and storage == torch.bfloat16
    if tiles:
        hidden = hidden.bfloat16().float()
    dense = master.to(storage)
    weight, own = (dense, None) if plain else (pack_weight(master, storage), master)
    bias = bias if with_bias else None
    ours = run_ours(hidden, weight, targets, temperature, bias, own, grads)
    reference = linear_logprob_reference
    # The gradient of the logits is an operand of two products: on tiles it is bfloat16.
    rough = [torch.bfloat16 if tiles else torch.float32] * 3
    torch_ = run(hidden, dense.float(), targets, temperature, bias, None, grads, reference)
    wide = None if bias is None else bias.double()
    truth = run(hidden.double(), dense.double(), targets, temperature, wide, None, grads, reference)
    dtypes = [torch.float32, torch.float32, *rough]
    names = ["logprob", "entropy", "dhidden", *(["dbias"] if with_bias else []), "dweight"]
    assert len(ours) == len(names) and ours[-1].dtype == (storage if plain else torch.float32)
    # The roundings of one chain of sums grow with the root of its depth: the logits', then the product's.
    depths = {"dhidden": v, "dbias": n, "dweight": n}
    for i, name in enumerate(names):
        bound = torch_[i].to(storage if plain and name == "dweight" else dtypes[i])
        # The logarithm of a sum of 1 and more: of a row that is nearly certain, that sum's rounding is all there is.
        beside = 1.0 if name == "entropy" else 0.0
        assert_close(
            ours[i].double() + beside,
            bound + beside,
            truth[i] + beside,
            f"{name} of {shape}",
            units=8 + h**0.5 + depths.get(name, 0) ** 0.5,
        )


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(cpu_class, storage, shape):
    check_against_float64(cpu_class, shape, storage)
    check_against_float64(cpu_class, shape, storage, temperature=0.7, with_bias=False)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_plain_weight_gets_its_own_gradient(cpu_class, storage):
    check_against_float64(cpu_class, (9, 300, 40), storage, temperature=1.6, plain=True)


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(1, 600), st.integers(1, 70)),
    storage=st.sampled_from(STORAGES),
    temperature=st.floats(0.3, 3),
    with_bias=st.booleans(),
)
def test_ragged_shapes_against_float64(cpu_class, shape, storage, temperature, with_bias):
    check_against_float64(cpu_class, shape, storage, temperature, with_bias)


@pytest.mark.parametrize("storage", STORAGES)
def test_more_rows_than_one_piece(cpu_class, storage):
    check_against_float64(cpu_class, (2100, 40, 7), storage)


def test_gradients_of_the_logits_sum_to_zero(cpu_class):
    """p sums to 1, for the log-probability's part and for the entropy's."""
    hidden, weight, bias = torch.randn(4, 9), torch.randn(700, 9), torch.zeros(700)
    for grads in (torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])):
        *_, dbias, _ = run(hidden[:1], weight, torch.tensor([3]), 0.8, bias, None, grads)
        assert abs(float(dbias.sum())) < 2e-6 and float(dbias.abs().sum()) > 0.1


def test_masked_and_extreme_logits(cpu_class):
    """-inf adds nothing; a whole block of -inf, or one 1e4 below the rest, changes nothing."""
    v, targets = 1000, torch.tensor([5, 600, 999])
    hidden, weight = torch.randn(3, 8), torch.randn(v, 8)
    bias = torch.randn(v)
    bias[:3], bias[256:512], bias[700:720] = -torch.inf, -torch.inf, -1e4
    grads = torch.randn(2, 3)
    ours = run(hidden, weight, targets, 1.0, bias, None, grads)
    truth = run(*(t.double() for t in (hidden, weight)), targets, 1.0, bias.double(), None, grads)
    kept = torch.isfinite(bias)
    alone = run(hidden, weight[kept], kept.cumsum(0)[targets] - 1, 1.0, bias[kept], None, grads)
    for name, o, t, a in zip(
        ("logprob", "entropy", "dh", "db", "dw"), ours, truth, alone, strict=True
    ):
        assert torch.isfinite(o).all(), name
        torch.testing.assert_close(o.double(), t, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(o[kept] if name in ("db", "dw") else o, a, rtol=2e-5, atol=2e-6)
    assert ours[3][~kept].eq(0).all() and ours[4][~kept].eq(0).all()
    for shift in (-1e4, 1e4):
        logprob, entropy = linear_logprob(hidden, weight, targets, 1.0, bias + shift)
        torch.testing.assert_close(logprob, ours[0], rtol=0, atol=2e-2)
        torch.testing.assert_close(entropy, ours[1], rtol=0, atol=2e-2)
    logprob, _ = linear_logprob(hidden[:1], weight, torch.tensor([0]), 1.0, bias)
    assert logprob.item() == -torch.inf


def test_without_any_probability_it_is_nan_as_in_torch(cpu_class):
    weight = torch.full((300, 1), -torch.inf)
    for op in (linear_logprob, linear_logprob_reference):
        results = op(torch.ones(1, 1), weight, torch.tensor([2]))
        assert all(torch.isnan(r).all() for r in results)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_knows_nothing_of_the_others(cpu_class, storage):
    n, v, h = 130, 1025, 96
    hidden, targets = torch.randn(n, h), torch.randint(v, (n,))
    weight, bias = pack_weight(torch.randn(v, h), storage), torch.randn(v)
    before, wholes = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        whole = linear_logprob(hidden, weight, targets, 0.9, bias)
        wholes.append(whole)
        for first in (0, 1, 64):
            for rows in (1, 2, 3, 5, 16, 17, 33, 60):
                cut = slice(first, first + rows)
                part = linear_logprob(hidden[cut], weight, targets[cut], 0.9, bias)
                assert equal(part, [r[cut] for r in whole]), (first, rows)
    torch.set_num_threads(before)
    assert equal(*wholes)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(70, 2311, 64), (2100, 33, 5)])
def test_gradients_do_not_depend_on_the_threads(cpu_class, storage, shape):
    n, v, h = shape
    hidden, targets, grads = torch.randn(n, h), torch.randint(v, (n,)), torch.randn(2, n)
    master, bias = torch.randn(v, h), torch.randn(v)
    weight, before, results = pack_weight(master, storage), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(hidden, weight, targets, 1.0, bias, master, grads))
    torch.set_num_threads(before)
    assert equal(*results)


def test_only_what_is_wanted_gets_a_gradient(cpu_class):
    master, targets = torch.randn(50, 6), torch.tensor([1, 2])
    weight, hidden = pack_weight(master, torch.float32), torch.randn(2, 6, requires_grad=True)
    logprob, entropy = linear_logprob(hidden, weight, targets)
    logprob.sum().backward()
    assert hidden.grad.abs().sum() > 0 and not weight.dense.requires_grad
    learned = master.clone().requires_grad_()
    linear_logprob(hidden.detach(), weight, targets, master=learned)[1].sum().backward()
    assert learned.grad.abs().sum() > 0
    assert not linear_logprob(hidden.detach(), weight, targets)[0].requires_grad


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters")
def test_the_logits_never_exist():
    def peak_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0])

    n, v, h = 600, 80_000, 8
    hidden, targets = torch.randn(n, h, requires_grad=True), torch.randint(v, (n,))
    weight = torch.randn(v, h, requires_grad=True)
    run_once = linear_logprob(hidden[:2], weight, targets[:2])
    sum(r.sum() for r in run_once).backward()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = peak_kib()
    results = linear_logprob(hidden, weight, targets)
    sum(r.sum() for r in results).backward()
    assert (peak_kib() - before) * 1024 < n * v * 4 / 8


def test_gradcheck_of_the_definition():
    hidden, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (6, 4), (6,))
    )
    targets = torch.tensor([0, 5, 2])
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_logprob(x, w, targets, 0.7, b), (hidden, weight, bias)
    )


@pytest.mark.parametrize("storage", STORAGES)
def test_opcheck(cpu_class, storage):
    ops, dense, targets = torch.ops.engine, torch.randn(40, 5).to(storage), torch.tensor([1, 39, 7])
    hidden, bias = torch.randn(3, 5, requires_grad=True), torch.randn(40, requires_grad=True)
    data, master = ops.pack_weight(dense), torch.randn(40, 5, requires_grad=True)
    forward = (hidden, dense, data, targets, 0.8, bias, master)
    torch.library.opcheck(ops.linear_logprob.default, forward)
    _, entropy, row_max, log_sum = (t.detach() for t in ops.linear_logprob(*forward))
    arguments = (torch.randn(3), torch.randn(3), hidden.detach(), dense, data, targets, 0.8,
                 bias.detach(), row_max, log_sum, entropy, True, True, False)  # fmt: skip
    torch.library.opcheck(ops.linear_logprob_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_fit_is_named(dtype):
    hidden, weight, targets = (
        torch.zeros(2, 3, dtype=dtype),
        torch.zeros(7, 3, dtype=dtype),
        torch.tensor([0, 1]),
    )
    for bad, name in ((7, "7"), (-100, "-100")):
        with pytest.raises(
            ValueError, match=rf"targets\[1\]: got {name}, want a token in \[0, 7\)"
        ):
            linear_logprob(hidden, weight, torch.tensor([0, bad]))
    with pytest.raises(ValueError, match=r"hidden: got shape \(2, 4\), want \(N, 3\)"):
        linear_logprob(torch.zeros(2, 4, dtype=dtype), weight, targets)
    with pytest.raises(ValueError, match=r"bias: got shape \(3,\), want \(7,\)"):
        linear_logprob(hidden, weight, targets, 1.0, torch.zeros(3))
    with pytest.raises(ValueError, match="temperature: got 0.0, want a number above 0"):
        linear_logprob(hidden, weight, targets, 0.0)
    with pytest.raises(ValueError, match="targets: got"):
        linear_logprob(hidden, weight, targets.int())
    with pytest.raises(ValueError, match="targets: got"):
        linear_logprob(hidden, weight, targets[:1])
    with pytest.raises(ValueError, match="master: got one beside a plain weight"):
        linear_logprob(hidden, weight, targets, master=weight)
