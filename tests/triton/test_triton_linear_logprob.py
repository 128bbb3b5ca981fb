"""linear_logprob's Triton kernels: the float64 definition, extremes, bits that depend on the row alone, memory."""

import math

import pytest
import torch
from compare import assert_close
from guards import guarded
from head_cases import blocks, exact, head
from launching import DEVICE, DTYPES, check_on_triton, gradients_on_triton, on_triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import aot_plan, gpu
from engine.kernels._backend import backend
from engine.kernels.linear import PackedWeight, pack_weight
from engine.kernels.linear_logprob import linear_logprob, linear_logprob_reference
from engine.kernels.triton import _head, _launch
from engine.kernels.triton import linear_logprob as kernels


def stacked(op, temperature=1.0):
    """logprob and entropy as one result (2, N), of tensors alone."""

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.stack(op(hidden, weight, targets, temperature, bias))

    return run


def check(
    n, v, h, dtype=torch.float32, temperature=1.0, with_bias=True, shift=0.0, dead=None, rise=0.0
):
    hidden, weight, bias = head(n, v, h, dtype)
    bias += shift
    bias[v // 2 :] += rise  # of the last tiles, so that the first sums are scaled down
    if dead is not None:
        bias[dead] = -torch.inf
    alive = torch.isfinite(bias).nonzero().squeeze(1)
    targets = alive[torch.randint(len(alive), (n,), device=DEVICE)]
    inputs = (hidden, weight, targets, *([bias] if with_bias else []))
    ours, truth = (stacked(op, temperature) for op in (linear_logprob, linear_logprob_reference))
    # float32: one chain of sums a product, whose roundings grow with the root of the depth
    units = 8 + h**0.5 + v**0.5 if dtype == torch.float32 else 4
    check_on_triton(ours, truth, inputs, torch.randn(2, n), units)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 9, 5), (1, 1, 1), (19, 75, 21)])
def test_small_blocks_against_float64(dtype, shape):
    with blocks():
        check(*shape, dtype, 0.7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_blocks_against_float64(dtype):
    check(5, 321, 576, dtype, 1.6, with_bias=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_vocabulary(dtype):
    with blocks(n=8192, k=32, slab=16384):
        check(2, 49157, 24, dtype)


def test_golden(golden):
    """A row of logits is the column of a weight (V, 1) that a hidden state of 1 picks."""
    grads = torch.tensor([[1.0], [0.0]], device=DEVICE)
    for case in golden["token_logprob_entropy"]:
        given, atol = case["inputs"], 1e-3 if case["name"].startswith("extreme_") else 2e-6
        rows = torch.tensor(given["logits"], device=DEVICE).flatten(0, 1)
        labels = torch.tensor(given["labels"], device=DEVICE).flatten()
        want = {k: torch.tensor(x).flatten(0, 1).to(DEVICE) for k, x in case["outputs"].items()}
        op, names = stacked(linear_logprob, given["temperature"]), ("logprob", "entropy")
        for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
            inputs = (torch.ones(1, 1, device=DEVICE), row[:, None], label[None])
            with blocks():
                out, _, grad = gradients_on_triton(op, inputs, grads)
            truth = torch.stack([want[name][i] for name in names])
            message = f"{case['name']}, row {i}: {{}}".format
            close = {"rtol": 2e-5, "atol": atol, "msg": message}
            torch.testing.assert_close(out[:, 0], truth, **close)
            torch.testing.assert_close(grad[:, 0], want["grad_logprob_wrt_logits"][i], **close)


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_masked_and_extreme_logits(shift):
    """-inf adds nothing, whole tiles of it neither; nor does what lies 1e4 below the rest."""
    n, v, h = 3, 120, 8
    hidden, weight, bias = head(n, v, h)
    bias[:3], bias[32:64], bias[70:75] = -torch.inf, -torch.inf, -1e4
    bias += shift
    targets = torch.tensor([5, 66, 119], device=DEVICE)
    kept = torch.isfinite(bias)
    moved, grad = kept.cumsum(0)[targets] - 1, torch.randn(2, n, device=DEVICE)
    op = stacked(linear_logprob)
    with blocks():
        ours = gradients_on_triton(op, (hidden, weight, targets, bias), grad)
        alone = gradients_on_triton(op, (hidden, weight[kept], moved, bias[kept]), grad)
        masked = on_triton(op)(hidden[:1], weight, torch.tensor([40], device=DEVICE), bias)
    assert ours[2][~kept].eq(0).all() and ours[3][~kept].eq(0).all()
    ours[2:] = [x[kept] for x in ours[2:]]
    for o, a in zip(ours, alone, strict=True):
        torch.testing.assert_close(o, a, rtol=2e-5, atol=2e-5)
    wide = [x.double() for x in (hidden, weight)]
    truth = torch.stack(linear_logprob_reference(*wide, targets, 1.0, bias.double()))
    torch.testing.assert_close(ours[0].double(), truth, rtol=2e-5, atol=2e-2 if shift else 2e-6)
    assert masked[0, 0] == -torch.inf and torch.isfinite(masked[1, 0])


def test_without_any_probability_it_is_nan_as_in_torch():
    weight = torch.full((40, 1), -torch.inf, device=DEVICE)
    arguments = (torch.ones(1, 1, device=DEVICE), weight, torch.tensor([2], device=DEVICE))
    for op in (on_triton(linear_logprob), linear_logprob_reference):
        assert all(torch.isnan(result).all() for result in op(*arguments))


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_ties(value):
    v = 48
    hidden, weight = torch.full((2, 1), value, device=DEVICE), torch.ones(v, 1, device=DEVICE)
    targets, grad = torch.tensor([0, 47], device=DEVICE), torch.tensor([[0.0] * 2, [1.0] * 2])
    with blocks():
        out, dh, dw = gradients_on_triton(
            stacked(linear_logprob), (hidden, weight, targets), grad.to(DEVICE)
        )
    log_v = torch.tensor(float(v)).log().to(DEVICE)
    torch.testing.assert_close(out, torch.stack([-log_v, log_v])[:, None].expand(2, 2))
    assert dh.abs().max() < 1e-5 and dw.abs().max() < 1e-5 * max(1.0, abs(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_a_tensor_lies_does_not_matter(dtype):
    hidden, weight, bias = head(5, 40, 7, dtype)
    targets, results = torch.tensor([0, 39, 7, 16, 15], device=DEVICE), []
    for shift in (0, 1):
        with guarded() as guards, backend("triton"), blocks():
            h, w, y, b = (guards.place(x, shift) for x in (hidden, weight, targets, bias))
            h, w = h.requires_grad_(), w.requires_grad_()
            out = stacked(linear_logprob)(h, w, y, b)
            out.sum().backward()
        results.append([out, h.grad, w.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_a_packed_weight_gives_its_gradient_to_the_master(storage):
    """Packed for this CPU or not packed at all; the gradient is float32, against the float64 one of the copy."""
    n, v, h = 9, 75, 21
    master, targets, grad = torch.randn(v, h), torch.randint(v, (n,)), torch.randn(2, n)
    hidden = torch.randn(n, h).to(storage)
    weights = [PackedWeight(master.to(storage), None, "reference"), pack_weight(master, storage)]
    gradients = []
    for weight in weights:
        dense = PackedWeight(weight.dense.to(DEVICE), weight.data, weight.cpu_class)
        learned = master.to(DEVICE, copy=True).requires_grad_()
        with backend("triton"), blocks():
            given = (hidden.to(DEVICE), dense, targets.to(DEVICE))
            results = linear_logprob(*given, 0.9, master=learned)
            torch.autograd.backward(results, list(grad.to(DEVICE)))
        gradients.append(learned.grad.cpu())
    copy = master.to(storage).double().requires_grad_()
    torch.autograd.backward(
        linear_logprob_reference(hidden.double(), copy, targets, 0.9), list(grad.double())
    )
    assert torch.equal(*gradients)
    assert_close(gradients[0], copy.grad.to(storage), copy.grad, "dmaster", 8)


def test_statistics_mean_what_the_cpu_says():
    """Forward here and backward there fit together."""
    hidden, weight, bias = (x.cpu() for x in head(7, 75, 21))
    data, targets = torch.ops.engine.pack_weight(weight), torch.randint(75, (7,))
    arguments = (hidden, weight, data, targets, 0.8, bias, None)
    theirs = torch.ops.engine.linear_logprob(*arguments)
    with blocks():
        ours = kernels.linear_logprob(
            *(x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments)
        )
    for o, t in zip(ours, theirs, strict=True):
        torch.testing.assert_close(o.cpu(), t, rtol=1e-5, atol=1e-5)


def test_a_row_knows_nothing_of_the_others(monkeypatch):
    n, v, h, dtype = 21, 130, 20, torch.bfloat16
    hidden, weight, targets = exact(n, h).to(dtype), exact(v, h).to(dtype), torch.randint(v, (n,))
    bias, targets = exact(v), targets.to(DEVICE)
    run = on_triton(linear_logprob)
    # one block of rows is joined by _merge, two are by their programs
    for tiles in ({"piece": 2, "many": 10}, {"n": 32, "k": 32, "t": 128, "r": 8, "many": 4}):
        with blocks(**tiles):
            whole = torch.stack(run(hidden, weight, targets, 0.7, bias))
            assert torch.equal(whole, torch.stack(run(hidden, weight, targets, 0.7, bias)))
            for first, rows in ((20, 1), (15, 2), (3, 18)):
                cut = slice(first, first + rows)
                part = torch.stack(run(hidden[cut], weight, targets[cut], 0.7, bias))
                assert torch.equal(part, whole[:, cut]), (first, rows)
    with blocks(**{**tiles, "m": 32}):
        monkeypatch.setattr(_head, "ROWS", 16)
        monkeypatch.setattr(_head, "HIDDEN_BYTES", 0)
        assert torch.equal(whole, torch.stack(run(hidden, weight, targets, 0.7, bias)))


@pytest.mark.parametrize("arch", [*_launch.NVIDIA, *_launch.AMD])
@pytest.mark.parametrize(
    "rows, vocabulary, joined",
    [(8192, 49152, True), (8192, 32000, True), (8192, 1000, False), (512, 49152, False), (1024, 128256, True)],
)
def test_tiles_are_joined_where_many_programs_stay(arch, rows, vocabulary, joined):
    case = next(case for case in gpu.cases() if case.op == "linear_logprob")
    shape = {"N": rows, "V": vocabulary, "H": 576}
    first, last = aot_plan.launches(case, arch, "bfloat16", shape=shape)
    tiles = 2048 // first.config.blocks["BLOCK_N"]  # of a piece
    assert first.constants["PIECE"] == (tiles if joined else 1)
    assert last.constants["JOIN"] == (1 if joined else 2 * tiles)  # halves
    assert not joined or math.prod(first.grid) >= (1000 if rows == 8192 else 500)


def test_rows_in_pieces_have_the_same_gradients(monkeypatch):
    n, v, h = 37, 75, 9
    inputs = (exact(n, h), exact(v, h), torch.randint(v, (n,), device=DEVICE), exact(v))
    results, grad = [], torch.randn(2, n, device=DEVICE)
    for rows in (4096, 16):
        monkeypatch.setattr(_head, "ROWS", rows)
        monkeypatch.setattr(_head, "HIDDEN_BYTES", 0)
        with blocks(n=32, slab=64):
            results.append(gradients_on_triton(stacked(linear_logprob, 0.8), inputs, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("rows, slabs", [(40, 5), (20, 3), (3, 1)])
def test_few_rows_have_wider_slabs(monkeypatch, rows, slabs):
    """75 columns in whole tiles of 16: 16 of 40 rows, 32 where 20 rows have 640 numbers, all of 3 rows."""
    widths, original = [], kernels.product

    def seen(a, b, out=None):
        widths.append(a.shape[0])
        return original(a, b, out)

    monkeypatch.setattr(kernels, "product", seen)
    hidden, weight, bias = exact(rows, 9), exact(75, 9), exact(75)
    inputs = (hidden, weight, torch.randint(75, (rows,), device=DEVICE), bias)
    grad, found = torch.randn(2, rows, device=DEVICE), []
    for gradients in (640, 1):
        with blocks(slab=16, gradients=gradients):
            found.append(gradients_on_triton(stacked(linear_logprob, 0.8), inputs, grad))
            assert len(widths) == (slabs if gradients > 1 else 5) and sum(widths) == 75
            widths.clear()
    for wide, narrow in zip(*found, strict=True):
        torch.testing.assert_close(wide, narrow, rtol=1e-5, atol=1e-5)


def test_only_what_is_wanted_gets_a_gradient():
    hidden, weight, _ = head(2, 50, 6)
    targets = torch.tensor([1, 2], device=DEVICE)
    none = weight.new_empty(0, dtype=torch.uint8)
    with blocks():
        _, entropy, row_max, log_sum = kernels.linear_logprob(
            hidden, weight, none, targets, 1.0, None, None
        )
        grads = (torch.ones_like(entropy), torch.zeros_like(entropy))
        rest = (hidden, weight, none, targets, 1.0, None, row_max, log_sum, entropy)
        whole = kernels.linear_logprob_backward(*grads, *rest, True, True, True)
        for wanted in range(8):
            flags = [bool(wanted & bit) for bit in (1, 2, 4)]
            parts = kernels.linear_logprob_backward(*grads, *rest, *flags)
            for part, all_, flag in zip(parts, whole, flags, strict=True):
                assert torch.equal(part, all_) if flag else part.shape == (0,)


def test_no_tensor_is_as_large_as_the_logits():
    n, v, h = 64, 900, 4
    hidden, weight, bias = head(n, v, h)
    targets = torch.randint(v, (n,), device=DEVICE)
    with guarded() as guards, backend("triton"), blocks(m=64, n=64, slab=64, t=16, r=64):
        h, w, b = (guards.place(x).requires_grad_() for x in (hidden, weight, bias))
        stacked(linear_logprob)(h, w, targets, b).sum().backward()
    assert max(size for _, size in guards._placed) <= n * v * 4 / 8


def test_no_value_is_read_on_the_host():
    """Shapes alone decide what is launched: tensors without values do."""
    seen = []
    token = _launch.observer.set(lambda launch: seen.append(launch.kernel.fn.__name__))
    try:
        h, w, y = (torch.empty(s, device="meta") for s in ((9, 40), (300, 40), (9,)))
        out = kernels.linear_logprob(h, w, w[:0], y.long(), 1.0, None, None)
        kernels.linear_logprob_backward(
            out[0], out[1], h, w, w[:0], y.long(), 1.0, None, *out[2:], out[1], True, True, True
        )
    finally:
        _launch.observer.reset(token)
    assert seen == ["_statistics", "_merge", "_slab_gradient"]


class OnGPU(Tensor):  # a CPU's that says it lies on a GPU
    is_cuda = True


class Overloads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return kwargs["out"]


def test_the_library_s_products_on_a_gpu():
    a, b = (torch.empty(s, dtype=torch.bfloat16).as_subclass(OnGPU) for s in ((9, 100), (100, 40)))
    total = torch.empty(9, 40)
    with Overloads() as overloads:
        _head.add_product(total, a, b)
        _head.product(a, b, out=total)
    assert overloads.seen == ["aten::addmm.dtype_out", "aten::mm.dtype_out"]


def test_a_vocabulary_without_tokens_is_named():
    hidden, weight, _ = head(1, 2, 4)
    rest = (weight[:0], weight[0, :0], torch.zeros(1, dtype=torch.int64), 1.0, None, None)
    with pytest.raises(ValueError, match="weight: got no rows, want a vocabulary of one token"):
        kernels.linear_logprob(hidden, *rest)


@pytest.mark.parametrize("rows", [4096, 2])
def test_a_target_outside_the_vocabulary_is_never_used(rows, monkeypatch):
    """The kernels give nan, which is seen; on the CPU the value is named before they start."""
    hidden, weight, _ = head(3, 20, 4)
    targets = torch.tensor([20, -100, 3], device=DEVICE)
    monkeypatch.setattr(_head, "ROWS", rows)
    with guarded() as guards, blocks():
        h, w, y = (guards.place(x) for x in (hidden, weight, targets))
        logprob, entropy, *_ = kernels.linear_logprob(h, w, w[:0], y, 1.0, None, None)
    assert logprob.isnan().tolist() == [True, True, False] and torch.isfinite(entropy).all()
    with (
        backend("triton"),
        pytest.raises(ValueError, match=r"targets\[0\]: got 20, want a token in \[0, 20\)"),
    ):
        linear_logprob(hidden.cpu(), weight.cpu(), targets.cpu())
