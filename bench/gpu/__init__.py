"""The work that each Triton kernel is measured on: `bench/gpu/<op>.py` has CASES, one list for everything.

Compiling ahead of time, counting traffic, the ledger, tuning and `make gpu-check` all read these lists, so that a
kernel is compiled, counted and timed on the same shapes. VARIATIONS are the other ways through its kernels, which are
compiled only: their time would say little that a case's does not. Importing both needs no triton and no GPU.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One call of an op on one shape.

    `make(device, dtype, **shape)` gives the arguments; on the device "meta" they are shapes only. `run(*arguments)`
    calls the functions of kernels/triton/<op>.py (imported inside, so that this list needs no triton); it reads no
    value of a tensor. Work is a function of (element size in bytes, **shape): the compulsory bytes (each input read
    once, each output written once), the FLOPs of products, and the exponentials.
    """

    op: str
    name: str  # "forward", "backward", "forward, shared prefix", ...
    make: Callable[..., tuple[Any, ...]]
    run: Callable[..., Any]
    full: dict[str, int]  # the shape that is compiled, predicted and timed
    small: dict[str, int]  # the shape that the interpreter counts
    bytes: Callable[..., float]
    flops: Callable[..., float] = lambda size, **shape: 0.0
    exponentials: Callable[..., float] = lambda size, **shape: 0.0
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    most_traffic: float = 1.05  # counted bytes over compulsory bytes, at most, on the small shape
    why: str = ""  # where most_traffic is above 1.05


@dataclass(frozen=True)
class Variation:
    """A call that takes another way through an op's kernels than its cases do: compiled ahead of time in one dtype and
    held to the gates. What it has in common with a Case has its meaning there."""

    op: str
    name: str
    make: Callable[..., tuple[Any, ...]]
    run: Callable[..., Any]
    full: dict[str, int]
    dtype: str = "bfloat16"

    @property
    def dtypes(self) -> tuple[str, ...]:
        return (self.dtype,)


def _modules() -> list[Any]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"bench.gpu.{name}") for name in names]


def cases() -> list[Case]:
    """All, by op."""
    return [case for module in _modules() for case in module.CASES]


def variations() -> list[Variation]:
    """All, by op; an op whose cases go every way has none."""
    return [one for module in _modules() for one in getattr(module, "VARIATIONS", [])]
