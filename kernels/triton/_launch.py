"""How a Triton kernel is started: one place, so that benches can record, count and time every launch.

Block sizes, warps and stages come from tables in `kernels/configs/<op>.json`, by architecture and size; nothing is
tuned at an import or a call (`python -m engine.tune` rewrites the tables, on a GPU).
"""

import functools
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from . import _interpreter

TABLES = Path(__file__).parents[1] / "configs"
# The newest first: a GPU that has no column takes that of the nearest older one of its make.
NVIDIA = ("sm_100", "sm_90", "sm_80")
AMD = ("gfx942",)
INTERPRETED = "sm_90"  # whose blocks the interpreter runs

if _interpreter.active():
    _interpreter.patch()


@dataclass(frozen=True)
class Config:
    """What is tuned about a launch: the kernel's block sizes (its constexpr names), warps and pipeline stages."""

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, as an observer sees it."""

    kernel: Any  # what @triton.jit made
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]  # constexpr that follow from the shapes
    config: Config


# For benches, unset in a run: sees each launch first and says whether it runs; and the column of the tables to read.
observer: ContextVar[Callable[[Launch], bool] | None] = ContextVar("observer", default=None)
column: ContextVar[str | None] = ContextVar("column", default=None)


@functools.cache
def table(op: str) -> dict[str, list[dict[str, Any]]]:
    """architecture -> rows {"up_to": size or null, "num_warps", "num_stages", block sizes ...}, smallest size first."""
    loaded: dict[str, list[dict[str, Any]]] = json.loads((TABLES / f"{op}.json").read_text())
    return loaded


@functools.cache
def architecture(device: torch.device) -> str:
    """The column of the tables that a device reads."""
    if device.type != "cuda":
        return INTERPRETED
    if torch.version.hip:
        return AMD[0]
    major, minor = torch.cuda.get_device_capability(device)
    older = [name for name in NVIDIA if int(name[3:]) <= 10 * major + minor]
    if not older:
        raise RuntimeError(
            f"GPU {torch.cuda.get_device_name(device)}: compute capability {major}.{minor}, want 8.0 or newer;"
            " use ENGINE_BACKEND=reference"
        )
    return older[0]


def config(op: str, size: int, device: torch.device) -> Config:
    """The row of the op's table whose size bucket holds `size` (what it measures is the op's, named in its file)."""
    for row in table(op)[column.get() or architecture(device)]:
        if row["up_to"] is None or size <= row["up_to"]:
            known = ("up_to", "num_warps", "num_stages")
            blocks = {name: value for name, value in row.items() if name not in known}
            return Config(blocks, row["num_warps"], row["num_stages"])
    raise RuntimeError(
        f"{op}.json: no row for size {size}; end each column with one whose up_to is null"
    )


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constants: Any
) -> None:
    """Runs `kernel` on `grid` programs; `constants` are constexpr that follow from the shapes.

    An empty grid is nothing to do. The first argument is a tensor: its device is the one that runs.
    """
    if 0 in grid:
        return
    watch = observer.get()
    if watch is not None and not watch(Launch(kernel, grid, arguments, constants, config)):
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](
            *arguments,
            **constants,
            **config.blocks,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return triton.next_power_of_2(n)
