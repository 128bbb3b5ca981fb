"""Kernels that break a gate of bench/aot.py each, and their proper twins; printed as records in JSON.

Started by test_triton_code.py as a process of its own, since the tests' process interprets kernels and cannot compile.
"""

import json

import torch
import triton
import triton.language as tl

from bench import aot, aot_code, aot_plan
from engine.kernels.triton import _launch
from engine.kernels.triton._launch import Config, launch


@triton.jit
def _copy(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def _copy_renamed(source, target, count, BLOCK: tl.constexpr):
    # another name for everything, the same instructions
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + places, tl.load(source + places, mask=places < count), mask=places < count)


@triton.jit
def _copy_doubled(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def _running(x, out, n, rows, BLOCK: tl.constexpr):
    """BLOCK / threads accumulators live through a loop."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        total = total * 0.5 + tl.load(x + row * n + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=at < n)


@triton.jit
def _product(a, b, out, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for at in range(0, depth, K):
        left = tl.load(a + m[:, None] * depth + (at + k)[None, :])
        right = tl.load(b + n[:, None] * depth + (at + k)[None, :])
        total = tl.dot(left, right.T, total, input_precision="ieee")
    tl.store(out + m[:, None] * N + n[None, :], total)


@triton.jit
def _outer(a, b, out, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """The same product as a batch of one, for which Triton has no HGMMA."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([1, M, N], tl.float32)
    for at in range(0, depth, K):
        left = tl.load(a + m[None, :, None] * depth + (at + k)[None, None, :])
        right = tl.load(b + n[None, None, :] * depth + (at + k)[None, :, None])
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(out + m[None, :, None] * N + n[None, None, :], total)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def copy(kernel=_copy, shift=0, dtype=torch.bfloat16, warps=4):
    x, out = meta(8192 + shift, dtype=dtype)[shift:], meta(8192, dtype=dtype)
    launch(kernel, (8,), x, out, 8192, config=Config({"BLOCK": 1024}, num_warps=warps))


def running(block):
    x, out = meta(64, block), meta(block, dtype=torch.float32)
    launch(_running, (1,), x, out, block, 64, config=Config({"BLOCK": block}, num_warps=16))


def product(M, N, K, stages=2, warps=4, kernel=_product, dtype=torch.bfloat16):
    a, b, out = (
        meta(M, 4096, dtype=dtype),
        meta(N, 4096, dtype=dtype),
        meta(M, N, dtype=torch.float32),
    )
    config = Config({"M": M, "N": N, "K": K}, num_warps=warps, num_stages=stages)
    launch(kernel, (1,), a, b, out, 4096, config=config)


CASES = {
    "copy": ("sm_90", lambda: copy()),
    "copy renamed": ("sm_90", lambda: copy(_copy_renamed)),
    "copy doubled": ("sm_90", lambda: copy(_copy_doubled)),
    "copy unaligned": ("sm_90", lambda: copy(shift=1)),
    "copy on AMD": ("gfx942", lambda: copy(dtype=torch.float32)),
    "copy unaligned on AMD": ("gfx942", lambda: copy(shift=1, dtype=torch.float32)),
    "running": ("sm_90", lambda: running(8192)),
    "running, too wide": ("sm_90", lambda: running(65536)),
    "running, too wide, on AMD": ("gfx942", lambda: running(131072)),
    "product": ("sm_90", lambda: product(64, 64, 64)),
    "product on sm_80": ("sm_80", lambda: product(64, 64, 64)),
    "product on sm_100": ("sm_100", lambda: product(128, 64, 64)),
    "product on AMD": ("gfx942", lambda: product(64, 64, 64)),
    "product, small": ("sm_90", lambda: product(16, 64, 64)),
    "product in float32": ("sm_90", lambda: product(64, 64, 32, dtype=torch.float32)),
    "product without HGMMA": ("sm_90", lambda: product(64, 64, 64, kernel=_outer)),
    "product, too many stages": ("sm_90", lambda: product(128, 256, 64, stages=7, warps=8)),
}


def main() -> None:
    seen: list[_launch.Launch] = []
    _launch.observer.set(lambda launch: bool(seen.append(launch)))
    records, kernels = {}, {}
    for name, (arch, start) in CASES.items():
        start()
        variant = aot_plan.specialised(seen[-1], arch, "test", "bfloat16")
        kernels[name] = aot.assembled(variant)
        records[name] = {
            "op": "test",
            "kernel": variant.kernel,
            "arch": arch,
            "dtype": "bfloat16",
            "cases": [name],
            "types": variant.types,
            **aot.examined(variant),
        }
    print(json.dumps({"alone": records, "together": together(kernels), "cuobjdump": printed(kernels)}))


def on_hopper(kernels):
    return {name: kernel for name, kernel in kernels.items() if CASES[name][0] == "sm_90"}


def together(kernels):
    """The codes' hashes where one call reads all."""
    chosen = on_hopper(kernels)
    codes = aot_code.disassembled([kernel.asm["cubin"] for kernel in chosen.values()], "sm_90")
    return {name: code.hash for name, code in zip(chosen, codes, strict=True)}


def printed(kernels):
    """The codes' hashes from what cuobjdump prints of each."""
    texts = {
        name: aot_code.cuobjdump("--dump-sass", kernel.asm["cubin"])
        for name, kernel in on_hopper(kernels).items()
    }
    return {name: aot_code.sass(text).hash for name, text in texts.items()}


if __name__ == "__main__":
    main()
