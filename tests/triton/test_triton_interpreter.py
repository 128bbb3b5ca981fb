"""The patch of Triton's interpreter: bfloat16 and float16 arithmetic as torch's, asserts that assert."""

import pytest
import torch
import triton
import triton.language as tl
from compare import assert_close

from engine.kernels.triton import _interpreter
from engine.kernels.triton._launch import Config, launch

pytestmark = pytest.mark.skipif(
    not _interpreter.active(), reason="a GPU runs the kernels themselves"
)
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    3.3895e38,
    -3.3895e38,
    1e-40,
    1e-45,
    float("inf"),
    float("-inf"),
    float("nan"),
]


@triton.jit
def _cast(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _arithmetic(a, b, c, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < n
    x, y = tl.load(a + at, mask=inside, other=0.0), tl.load(b + at, mask=inside, other=1.0)
    z = tl.load(c + at, mask=inside, other=0.0)
    tl.store(out + at, x + y, mask=inside)
    tl.store(out + n + at, x - y, mask=inside)
    tl.store(out + 2 * n + at, x * y, mask=inside)
    tl.store(out + 3 * n + at, -x, mask=inside)
    tl.store(out + 4 * n + at, tl.maximum(x, y), mask=inside)
    tl.store(out + 5 * n + at, tl.where(x < y, x, y), mask=inside)
    tl.store(out + 6 * n + at, tl.abs(x), mask=inside)
    tl.store(out + 7 * n + at, tl.where(x == y, x, y), mask=inside)
    tl.store(out + 8 * n + at, x / y, mask=inside)
    tl.store(out + 9 * n + at, tl.minimum(x, y), mask=inside)
    tl.store(out + 10 * n + at, tl.fma(x, y, z), mask=inside)


@triton.jit
def _dot(a, b, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision="ieee"))


@triton.jit
def _sum(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))


@triton.jit
def _assert_small(x):
    value = tl.load(x)
    tl.device_assert(value < 3, "too large")


def run(kernel, *arguments, **constants):
    launch(kernel, (1,), *arguments, config=Config(), **constants)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_are_torchs(source, target):
    numbers = torch.cat(
        [torch.randn(2000) * 10.0 ** torch.randint(-6, 5, (2000,)), torch.tensor(SPECIAL)]
    )
    # halfway between two bfloat16, and one unit to either side of it
    halves = (
        torch.arange(0x3F80_0000, 0x3F84_0000, 0x800, dtype=torch.int32)[:, None]
        + torch.tensor([-1, 0, 1])
    ).int()
    x = torch.cat([numbers, halves.flatten().view(torch.float32)])
    x = (
        x.nan_to_num(0, 9, -9).clamp(-1e9, 1e9).to(source)
        if source == torch.int32
        else x.to(source)
    )
    out = torch.empty(len(x), dtype=target)
    run(_cast, x, out, len(x), BLOCK=4096)
    want = x.to(target)
    if source == torch.float32 and target == torch.float16:
        # the interpreter's own cast (not patched) is numpy's
        assert torch.equal(out.isnan(), want.isnan())
    keep = ~want.isnan()
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out[keep], want[keep])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_torchs(dtype):
    a, b = (
        torch.cat([torch.randn(300) * 5, torch.tensor(SPECIAL[:10])]).to(dtype) for _ in range(2)
    )
    b = b.flip(0)
    c = (torch.randn(len(a)) * 5).to(dtype)
    out = torch.empty(11, len(a), dtype=dtype)
    run(_arithmetic, a, b, c, out, len(a), BLOCK=512)
    want = [
        a + b,
        a - b,
        a * b,
        -a,
        torch.maximum(a, b),
        torch.where(a < b, a, b),
        a.abs(),
        torch.where(a == b, a, b),
        a / b,
        torch.minimum(a, b),
        (a.double() * b.double() + c.double()).to(dtype),  # an fma rounds once
    ]
    for i, (ours, theirs) in enumerate(zip(out, want, strict=True)):
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=0, equal_nan=True, msg=f"operation {i}: {{}}".format
        )


@pytest.mark.parametrize(
    "x, y, z, want",
    [
        (17, 19, 0, 324),  # 323 lies between 322 and 324; the even one
        (17, 19, -(2.0**-30), 322),  # lost in float32
        (17, 19, -(2.0**-90), 322),  # and in float64
        (-17, 19, 2.0**-90, -322),
        (17, 19, 2.0**-90, 324),
        (15, 23, 2.0**-90, 346),  # 345 between 344 and 346, of which 344 is even
        (2.0**-90, 2.0**-90, 1, 1),
        (1, 1, -1, 0),
        (2.0**100, 2.0**100, 1, torch.inf),
        (torch.inf, 0, 1, torch.nan),
    ],
)
def test_an_fma_of_bfloat16_rounds_once(x, y, z, want):
    given = (torch.tensor([float(a)], dtype=torch.bfloat16) for a in (x, y, z))
    bits = _interpreter._fma(*(a.view(torch.uint16).numpy() for a in given))
    ours = torch.from_numpy(bits).view(torch.bfloat16)
    torch.testing.assert_close(
        ours, torch.tensor([float(want)]).bfloat16(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot(dtype):
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    out = torch.empty(16, 32)
    run(_dot, a, b, out, M=16, K=64, N=32)
    assert_close(out, a.float() @ b.float(), a.double() @ b.double(), "dot")


def test_a_reduction_of_bfloat16_is_an_error_instead_of_a_wrong_number():
    with pytest.raises(Exception, match="cast to float32 first"):
        run(_sum, torch.ones(8, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16), N=8)
    out = torch.empty(1)
    run(_sum, torch.ones(8), out, N=8)
    assert out.item() == 8.0


def test_device_assert_asserts():
    run(_assert_small, torch.tensor([2]))
    with pytest.raises(Exception, match="too large"):
        run(_assert_small, torch.tensor([3]))


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _by_functions(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, _twice(_twice(tl.load(x + at))) + tl.zeros((BLOCK,), tl.float32))


def test_the_language_is_patched_once_a_launch(monkeypatch):
    """However often a kernel calls functions, of its own module and of triton's."""
    from triton.runtime import interpreter

    patched, original = [], interpreter._patch_lang_tensor
    monkeypatch.setattr(
        interpreter,
        "_patch_lang_tensor",
        lambda module, scope: (patched.append(module), original(module, scope)),
    )
    x, out = torch.ones(16), torch.empty(16)
    times = []
    for programs in (1, 1, 5):  # the first finds the functions' sources
        patched.clear()
        launch(_by_functions, (programs,), x, out, config=Config({"BLOCK": 16}))
        times.append(len(patched))
        assert torch.equal(out, 4 * x)
    assert times[1] == times[2] > 0
