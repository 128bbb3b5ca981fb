"""Bytes that a run needs, by item, and bytes that there are.

    peak = max over phases of (process + weights + what the phase holds)

    weights      master 4, gradient 4, moments 8 a trained parameter; the compute copy, row-major and packed;
                 an average 4; a frozen model has the compute copy only
    activations  tokens of a micro-batch x (what is kept a layer x layers + what one layer works with)
    head         a slab of the vocabulary's gradients, and the gradients of its matrix on their way to the master
    cache        keys and values of running sequences

What is kept a token and layer (A bytes an activation, 4 a residual entry; H hidden, Q = Hq D, K = Hk D, F inner):

    full         4 H
    selective    4 H for each norm's input, A (2 Q) + kv (2 K) + A (gate, up) + statistics of norms and softmax
    none         the same with keys and values in A, and A H for each norm's output and A F behind the activation
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from engine.kernels.linear import packed_bytes
from engine.kernels.linear_logprob_loss import BLOCK, GROUPS, STRIDE, rows_of_piece

Mode = Literal["none", "selective", "full"]
Items = Mapping[str, float]
GB = 1e9
# Freed tensors that glibc's malloc keeps, as a share of the activations: measured 0.53 and 0.65 (docs/memory.md)
KEPT_BY_MALLOC = 0.6
_M_MMAP_THRESHOLD, _MAPPED_APART, _LARGEST_ON_HEAP = -3, 1 << 20, 32 << 20
_M_TRIM_THRESHOLD, _KEPT_FREE = -1, 64 << 20
HEAD_SLAB, HEAD_COLUMNS = 2048 * 800, 4128  # numbers of a slab of logits, and of a row's: csrc/cpu/linear_logprob.cpp


class Sizes(Protocol):
    """What is asked of a model's architecture."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def gated(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def parallel_residual(self) -> bool: ...


class Shaped(Protocol):
    """What is asked of a parameter's description."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class Dtypes:
    """Of the compute copy (and keys and values), and of activations between ops."""

    storage: torch.dtype
    activation: torch.dtype


@dataclass(frozen=True)
class Estimate:
    """Bytes by item, for each phase of a stage."""

    phases: Mapping[str, Items]

    @property
    def phase(self) -> str:
        """The one that needs the most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        return sum(self.phases[self.phase].values())

    def __str__(self) -> str:
        items = sorted(self.phases[self.phase].items(), key=lambda item: -item[1])
        parts = " + ".join(f"{name} {bytes_ / GB:.2f}" for name, bytes_ in items if bytes_ > 0)
        return f"{self.peak / GB:.2f} GB while it {self.phase} = {parts}"


def parameters(specs: Mapping[str, Shaped]) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())


def copy_bytes(
    specs: Mapping[str, Shaped], storage: torch.dtype, trainable: bool, packed: bool
) -> float:
    """Of the compute copy: row-major (in float32 it is the master's own memory) and, on a CPU, packed."""
    total = 0.0
    for spec in specs.values():
        dtype = torch.float32 if spec.kind in ("score", "vector") else storage
        shared = trainable and dtype == torch.float32 and spec.kind != "vector"
        total += 0 if shared else math.prod(spec.shape) * dtype.itemsize
        if packed and spec.kind in ("matrix", "score"):
            total += packed_bytes(spec.shape[0], spec.shape[1], dtype)
    return total


def training_bytes(specs: Mapping[str, Shaped], averaged: bool) -> dict[str, float]:
    """Of a trained model's float32 numbers; gradients apart, since they do not live all the time."""
    count = parameters(specs)
    return {"masters": 4 * count, "moments": 8 * count, "average": 4 * count * averaged}


def kept_bytes(a: Sizes, dtypes: Dtypes, mode: Mode) -> int:
    """A token and layer: what stays until the backward has passed."""
    act, hidden, inner = dtypes.activation.itemsize, a.hidden_size, a.intermediate_size
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    if mode == "full":
        return 4 * hidden
    norms = (4 if a.parallel_residual else 8) * hidden + 16
    heads = 2 * act * queries + 4 * a.num_heads
    if a.qk_norm:
        heads += act * (queries + keys) + 4 * (a.num_heads + a.num_kv_heads)
    kept = norms + heads + act * inner * (2 if a.gated else 1)
    if mode == "selective":
        return kept + 2 * dtypes.storage.itemsize * keys
    return kept + 2 * act * keys + act * (2 * hidden + inner)


def working_bytes(a: Sizes, dtypes: Dtypes, mode: Mode) -> int:
    """A token: what the backward of one layer and of the head hold for a while."""
    act, hidden, inner = dtypes.activation.itemsize, a.hidden_size, a.intermediate_size
    queries = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    passing = act * (4 * inner + 2 * queries + 2 * hidden) + 4 * 4 * hidden
    passing += (
        2 * 4 + 4 * act
    ) * hidden + act * queries  # rows that are read, the last norm, the head's gradient
    again = kept_bytes(a, dtypes, "none") if mode == "full" else 0
    return passing + again


def token_bytes(a: Sizes, dtypes: Dtypes, mode: Mode, few_rows: bool = False) -> int:
    """A token of a micro-batch that is trained on. `few_rows`: the last layer's output is read at a few rows only."""
    layers = a.num_layers - few_rows
    return layers * kept_bytes(a, dtypes, mode) + working_bytes(a, dtypes, mode)


def scored_token_bytes(a: Sizes, dtypes: Dtypes) -> int:
    """A token of a forward without gradient: one layer's tensors."""
    act, hidden, inner = dtypes.activation.itemsize, a.hidden_size, a.intermediate_size
    queries = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    return 4 * 3 * hidden + act * (hidden + 3 * inner + 2 * queries)


def head_bytes(a: Sizes, tokens: int, scalar: bool) -> float:
    """A slab of the logits' gradients or the logits of some rows, whichever is more, and the gradients of the
    vocabulary's matrix: the head's and the table's. `scalar`: the head has one row, and the table's is all."""
    table = 4.0 * a.vocab_size * a.hidden_size
    slab = 4 * min(tokens * HEAD_COLUMNS, HEAD_SLAB)
    piece = min(tokens, rows_of_piece(tokens)) * (a.vocab_size * STRIDE / BLOCK + GROUPS * a.hidden_size) * 4
    return table if scalar else 2 * table + max(slab, piece)


def give_back_freed() -> bool:
    """From now on a freed tensor of 1 MiB or more goes back to the system at once; says whether the C library can.

    glibc raises the size from which it does so, up to 32 MiB, at each such free: tensors of a layer then lie on heaps
    with holes between them. Giving them back costs their page faults (docs/memory.md).
    """
    return _mallopt(_M_MMAP_THRESHOLD, _MAPPED_APART)


def keep_freed() -> bool:
    """From now on up to 64 MiB at the end of the heap stay when they are freed; says whether the C library can.

    glibc gives them back at once: a forward without gradient frees a layer's tensors and takes them again for the next
    layer, and the faults of their pages were 6 % of its time (bench/LOG.md). Asked for one of the two, it keeps to a
    size from which tensors are mapped apart that none of a layer is below, so both are set.
    """
    return _mallopt(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP) and _mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE)


def _mallopt(parameter: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(parameter, value))


def resident_bytes() -> int:
    """This process's memory now (Linux)."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The largest that this process's memory was. `ru_maxrss` would do, but counts the parent's before the exec too."""
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no line {name}; want a Linux kernel's")


def available_bytes(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Memory that this process may still take: what the system has, or what its control group leaves."""
    found = [
        int(line.split()[1]) * 1024
        for line in meminfo.read_text().splitlines()
        if line.startswith("MemAvailable:")
    ]
    for limit, used in (
        (cgroup / "memory.max", cgroup / "memory.current"),
        (
            cgroup / "memory" / "memory.limit_in_bytes",
            cgroup / "memory" / "memory.usage_in_bytes",
        ),
    ):
        if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
            found.append(max(int(limit.read_text()) - int(used.read_text()), 0))
    if not found:
        raise OSError(f"{meminfo} has no MemAvailable line; want a Linux kernel's")
    return min(found)
