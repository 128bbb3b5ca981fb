"""What bench.rollout runs: the same prompts for the engine and its peers, and the floors."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import engine
from bench import machine
from engine.generate.cache import PAGE, PageCache
from engine.generate.generator import generate
from engine.generate.sampling import Sampling
from engine.generate.steps import KernelSteps, Rows
from engine.kernels.linear import linear
from engine.model.transformer import Model

PROMPT, NEW = 64, 64  # tokens
RAGGED, RAGGED_NEW = 256, 128


@dataclass(frozen=True)
class Case:
    """One workload: sampled at temperature 1 without filters."""

    name: str
    prompts: list[list[int]]
    max_new_tokens: int
    stop: bool  # at the end-of-sequence token; otherwise every sequence has max_new_tokens

    @property
    def sequences(self) -> int:
        return len(self.prompts)


def random_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    draws = random.Random(seed)
    return [[draws.randint(100, 40000) for _ in range(length)] for _ in range(count)]


def cases(args: argparse.Namespace, model: engine.HybridEngine) -> list[Case]:
    found = [Case("rollout", random_prompts(n, PROMPT), NEW, False) for n in (1, 16, 64)]
    if args.prompts:
        found.append(Case("ragged", real_prompts(args.prompts, model), RAGGED_NEW, True))
    return found


def real_prompts(path: Path, model: engine.HybridEngine) -> list[list[int]]:
    with path.open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(RAGGED), strict=False)]
    return [model.encode(row.get("messages") or row["prompt"]) for row in rows]


def seconds_a_token(model: engine.HybridEngine, case: Case) -> float:
    """Prefill included. Without `stop` no token ends a sequence: the end-of-sequence tokens are taken away."""
    network, prompts = model.model, case.prompts
    eos = model.eos_ids if case.stop else frozenset[int]()
    began = time.perf_counter()
    out = generate(network, prompts, Sampling(case.max_new_tokens), eos)
    return (time.perf_counter() - began) / sum(len(o.tokens) for o in out)


def weight_bytes(model: Model) -> int:
    """Of the compute copy that a decode step reads: matrices; rows of embeddings are next to nothing."""
    names = [n for n, spec in model.weights.specs.items() if spec.kind == "matrix"]
    return sum(model.weights.packed(n).dense.numel() for n in names) * model.dtype.itemsize


def floor_seconds_a_token(model: engine.HybridEngine, case: Case, found: dict[str, Any]) -> float:
    """No step can be faster than reading the weights once and doing their products, nor prefill than its products."""
    size = weight_bytes(model.model)
    parameters = size // model.model.dtype.itemsize
    memory, products = machine.memory_rate(found), machine.product_rate(found)
    rows = min(case.sequences, model.limits.max_active)
    step = max(size / memory, 2 * parameters * rows / products)
    tokens = sum(map(len, case.prompts))
    return step / rows + 2 * parameters * tokens / products / (case.sequences * case.max_new_tokens)


def median_seconds(run: Callable[[], object], repeats: int, rounds: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(rounds):
            run()
        times.append((time.perf_counter() - began) / rounds)
    return statistics.median(times)


def step_against_products(model: engine.HybridEngine, rows: int, repeats: int) -> dict[str, Any]:
    """A decode step at a context of 128 against its matrix products alone."""
    network, a = model.model, model.model.architecture
    pages = (128 + PAGE - 1) // PAGE
    cache = PageCache(a.num_layers, rows * pages, a.num_kv_heads, a.head_dim, network.kv_dtype)
    table = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
    steps = KernelSteps(network, cache, Sampling(64), 128)
    batch = Rows(torch.arange(100, 100 + rows), torch.full((rows,), 127), table)
    uniform = torch.rand(rows, dtype=torch.float64)
    names = [n for n, spec in network.weights.specs.items() if spec.kind == "matrix"]
    weights = [network.weights.packed(n) for n in names]
    inputs = {w.cols: torch.randn(rows, w.cols).to(network.act_dtype) for w in weights}
    with torch.no_grad():
        step = median_seconds(lambda: steps.decode(batch, uniform), repeats, 10)
        alone = median_seconds(lambda: [linear(inputs[w.cols], w) for w in weights], repeats, 10)
    return {
        "workload": "step",
        "sequences": rows,
        "peer": "products alone",
        "ratio": step / alone,
        "step_ms": step * 1e3,
        "products_ms": alone * 1e3,
    }


def shared_prompts(model: engine.HybridEngine, repeats: int) -> dict[str, Any]:
    """K = 8 samples of each of 8 prompts of 512 tokens: prompts shared, against every prompt eight times."""
    prompts, new, k = random_prompts(8, 512), 64, 8
    limits, network = model.limits, model.model
    once = [p for p in prompts for _ in range(k)]

    def run(given: list[list[int]], n: int) -> float:
        began = time.perf_counter()
        generate(network, given, Sampling(new), frozenset(), n=n, limits=limits)
        return time.perf_counter() - began

    run(prompts[:1], k)
    pairs = [(run(prompts, k), run(once, 1)) for _ in range(repeats)]
    ratios = sorted(apart / shared for shared, apart in pairs)
    return {
        "workload": "shared",
        "sequences": len(once),
        "peer": "prompts not shared",
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "tokens_per_s": len(once) * new / statistics.median(s for s, _ in pairs),
    }
