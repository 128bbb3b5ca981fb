"""One step of decoding taken apart: against its matrix products alone, by phase, and over batch and context.

Letters as in floors.py: R rows (sequences), C context.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import engine
from bench import floors
from bench.workloads import Row, random_prompts, spread
from engine.generate.cache import PageCache
from engine.generate.generator import generate
from engine.generate.sampling import Sampling
from engine.generate.scheduler import Limits
from engine.generate.steps import KernelSteps, Rows
from engine.kernels._memory import Slabs
from engine.kernels.attention_decode import PAGE
from engine.kernels.linear import PackedWeight, linear, pack_weight
from engine.kernels.transformer_step import PHASES, Network, TransformerStep
from engine.model.transformer import Model

CONTEXT = 128
ROWS = (1, 16, 64)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096)
OUTPUT_BYTES = (
    1 << 20
)  # of one call of the products alone: they stay in the cache, as the step's do
RATIO_IS = (
    "ratio: a whole step over the same products alone, through `linear`, with weights that read the same input put side"
    " by side so that no call's own cost counts; each the best of some rounds in turns, since `linear` cuts its work"
    " into equal parts before it starts and suffers more than the step when one core is taken away. ratio_inside: the"
    " mean step over products and head as timed inside it, its waiting at barriers and the head's statistics included"
)


class Recorder(TransformerStep):
    """A step that notes when each decode step's call began and ended, and adds up its phases."""

    def __init__(self, network: Network, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__(network, keys, values)
        self.phases = torch.zeros(len(PHASES), dtype=torch.float64)
        self.calls: list[tuple[float, float]] = []

    def __call__(self, *given: object, **named: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if len(given) < 5 or given[4] is None:  # no uniform numbers: a prefill
            return super().__call__(*given, **named)
        began = time.perf_counter()
        out = super().__call__(*given, **named, seconds=self.phases)
        self.calls.append((began, time.perf_counter()))
        return out

    def a_step(self) -> dict[str, float]:
        """Mean seconds of each phase; `call`: of the op around them; `python`: median from one call to the next."""
        out = dict(zip(PHASES, (self.phases / len(self.calls)).tolist(), strict=True))
        whole = statistics.fmean(end - begin for begin, end in self.calls)
        between = [b[0] - a[1] for a, b in zip(self.calls[:-1], self.calls[1:], strict=True)]
        return {**out, "call": whole - sum(out.values()), "python": statistics.median(between)}


def recorded(run: Callable[[], object]) -> Recorder:
    """Runs with the steps' op replaced by a recorder, and gives it."""
    made: list[Recorder] = []

    def make(*given: Any) -> Recorder:
        made.append(Recorder(*given))
        return made[-1]

    with mock.patch("engine.generate.steps.TransformerStep", make):
        run()
    return made[0]


def decode_step(model: Model, rows: int, context: int) -> tuple[Callable[[], object], PageCache]:
    """R sequences whose next key is number C, over a cache whose pages are all written.

    Pages that nobody has written all lie in one page of zeros, which would be read from the cache.
    """
    a, pages = model.architecture, -(-context // PAGE)
    cache = PageCache(a.num_layers, rows * pages, a.num_kv_heads, a.head_dim, model.kv_dtype)
    for pages_of_layer in (*cache.keys, *cache.values):
        pages_of_layer.copy_(torch.randn(pages_of_layer.shape[1:]))
    table = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
    steps = KernelSteps(model, cache, Sampling(1), context)
    batch = Rows(torch.arange(100, 100 + rows), torch.full((rows,), context - 1), table)
    uniform = torch.rand(rows, dtype=torch.float64)
    return lambda: steps.decode(batch, uniform), cache


def stacked_products(model: Model, rows: int) -> Callable[[], object]:
    """Every matrix product of a step over distinct packed weights, in as few calls as outputs of 1 MB allow."""
    names = [n for n, spec in model.weights.specs.items() if spec.kind == "matrix"]
    dense = [model.weights.packed(n).dense for n in names]
    width = max(OUTPUT_BYTES // (rows * model.act_dtype.itemsize) // 64 * 64, 64)
    weights: list[PackedWeight] = []
    slabs = Slabs()  # in large pages, as the step's
    for depth in sorted({d.shape[1] for d in dense}):
        whole = torch.cat([d for d in dense if d.shape[1] == depth])
        weights += [pack_weight(part, model.dtype, slabs) for part in whole.split(width)]
    inputs = {w.cols: torch.randn(rows, w.cols).to(model.act_dtype) for w in weights}

    def run() -> None:
        for weight in weights:
            linear(inputs[weight.cols], weight)

    return run


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def rounds_of(run: Callable[[], object], seconds: float = 0.5) -> int:
    """Warms up, and says how many rounds take about `seconds`: three or more."""
    run()
    return max(3, round(seconds / timed(run)))


@torch.no_grad()
def step_against_products(model: engine.HybridEngine, rows: int, repeats: int, limits: Row) -> Row:
    """A decode step at a context of 128 against its matrix products alone, in turns."""
    step: list[Callable[[], object]] = []
    recorder = recorded(lambda: step.append(decode_step(model.model, rows, CONTEXT)[0]))
    products = stacked_products(model.model, rows)
    rounds, _ = rounds_of(step[0]), products()
    recorder.phases.zero_(), recorder.calls.clear()
    turns = [[(timed(step[0]), timed(products)) for _ in range(rounds)] for _ in range(repeats)]
    best = [tuple(min(side) for side in zip(*some, strict=True)) for some in turns]
    mean = statistics.fmean(own for some in turns for own, _ in some)
    whole, alone = (statistics.median(side) for side in zip(*best, strict=True))
    phases, sizes = recorder.a_step(), floors.Sizes.of(model.model)
    return {
        "workload": "step",
        "sequences": rows,
        "context": CONTEXT,
        "peer": "products alone",
        **spread([own / other for own, other in best]),
        "ratio_inside": mean / (phases["products"] + phases["head"]),
        "ratio_is": RATIO_IS,
        "step_ms": whole * 1e3,
        "products_ms": alone * 1e3,
        "floor_ratio": whole / floors.step_floor(limits, sizes, rows, CONTEXT),
    }


def phases(model: engine.HybridEngine, rows: int, repeats: int, limits: Row) -> Row:
    """Where a decode step's time goes inside `generate`: prompts of 96, 64 new tokens, so context 128 on average."""
    prompts, settings = random_prompts(rows, CONTEXT - 32), Sampling(64)
    room = Limits(max_active=rows)

    def run() -> object:
        return generate(model.model, prompts, settings, frozenset(), limits=room)

    found = [recorded(run).a_step() for _ in range(repeats)]
    least = floors.phase_floors(limits, floors.Sizes.of(model.model), rows, CONTEXT)
    parts = {}
    for name in found[0]:
        seconds = statistics.median(one[name] for one in found)
        parts[name] = {"ms": seconds * 1e3}
        if name in least:  # the op's own set-up and Python have none: they could be nothing
            parts[name] |= {"floor_ms": least[name] * 1e3, "floor_ratio": seconds / least[name]}
    whole = statistics.median(sum(one.values()) for one in found)
    return {
        "workload": "phases",
        "sequences": rows,
        "context": CONTEXT,
        "step_ms": whole * 1e3,
        "tokens_per_s": rows / whole,
        "floor_ratio": whole / sum(least.values()),
        "phases": parts,
    }


def available_bytes() -> int:
    """Memory that can still be had without swapping, where the system tells it; else all there is."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Of this process now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def scale_sizes(longest: int) -> list[tuple[int, int]]:
    """(rows, context): batches at a context of 128, then contexts at 64 rows, up to what the model can read."""
    sizes = [(rows, CONTEXT) for rows in BATCHES]
    sizes += [(64, context) for context in CONTEXTS if context <= longest]
    return list(dict.fromkeys(sizes))


@torch.no_grad()
def scale(model: engine.HybridEngine, rows: int, context: int, repeats: int, limits: Row) -> Row:
    """Decoding alone: tokens a second of R sequences at context C, with the cache's and the process's memory."""
    sizes = floors.Sizes.of(model.model)
    row: Row = {"workload": "scale", "sequences": rows, "context": context}
    row["cache_gb"] = sizes.cache_bytes(rows, context) * 1e-9
    free = 0.8 * available_bytes() * 1e-9
    if row["cache_gb"] > free:
        return {**row, "left_out": f"its cache needs {row['cache_gb']:.1f} GB, {free:.1f} are free"}
    step, _cache = decode_step(model.model, rows, context)
    rounds = rounds_of(step)
    seconds = statistics.median(timed(step) for _ in range(rounds * repeats))
    return {
        **row,
        "tokens_per_s": rows / seconds,
        "step_ms": seconds * 1e3,
        "floor_ratio": seconds / floors.step_floor(limits, sizes, rows, context),
        "process_gb": resident_bytes() * 1e-9,
    }
