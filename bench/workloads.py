"""What bench.rollout runs on both sides: the same prompts for the engine and its peers; and what only the engine does.

Steps of decoding alone are in decode.py.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine
from bench import floors
from engine.generate.generator import generate
from engine.generate.sampling import Sampling

PROMPT, NEW = 64, 64  # tokens
RAGGED, RAGGED_NEW = 256, 128

Row = dict[str, Any]
Encode = Callable[[Any], list[int]]


@dataclass(frozen=True)
class Case:
    """One workload: sampled at temperature 1 without filters."""

    name: str
    prompts: list[list[int]]
    max_new_tokens: int
    stop: tuple[int, ...]  # ids that end a sequence; empty: each has max_new_tokens

    @property
    def sequences(self) -> int:
        return len(self.prompts)


def random_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    draws = random.Random(seed)
    return [[draws.randint(100, 40000) for _ in range(length)] for _ in range(count)]


def real_prompts(path: Path, encode: Encode, count: int = RAGGED) -> list[list[int]]:
    """The first rows of a JSONL file: `messages`, or `prompt` as a user's message, through the chat template.

    Raises SystemExit on a file with fewer rows: another set would be another workload.
    """
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    if len(rows) < count:
        sys.exit(f"bench.rollout: {path}: got {len(rows)} rows, want {count}; give a larger file")
    return [encode(row.get("messages") or row["prompt"]) for row in rows]


def cases(args: argparse.Namespace, model: engine.HybridEngine) -> list[Case]:
    found = []
    if "rollout" in args.only:
        found = [Case("rollout", random_prompts(n, PROMPT), NEW, ()) for n in args.sequences]
    if "ragged" in args.only and args.prompts is None:
        print("bench.rollout: ragged is left out: it wants real prompts, --prompts FILE.jsonl")
    elif "ragged" in args.only:
        prompts = real_prompts(args.prompts, model.encode)
        found.append(Case("ragged", prompts, RAGGED_NEW, tuple(sorted(model.eos_ids))))
    return found


def run(model: engine.HybridEngine, case: Case) -> tuple[float, int]:
    """Seconds, prefill included, and new tokens."""
    settings = Sampling(case.max_new_tokens)
    began = time.perf_counter()
    out = generate(model.model, case.prompts, settings, frozenset(case.stop), limits=model.limits)
    return time.perf_counter() - began, sum(len(o.tokens) for o in out)


def floor_a_token(model: engine.HybridEngine, case: Case, new_tokens: float, limits: Row) -> float:
    """Seconds a new token that no engine on this machine can be below."""
    sizes, lengths = floors.Sizes.of(model.model), [len(p) for p in case.prompts]
    active = model.limits.max_active
    return floors.rollout_floor(limits, sizes, lengths, 1, new_tokens, active) / new_tokens


def alone(case: Case, model: engine.HybridEngine, repeats: int, limits: Row) -> Row:
    """The engine's tokens a second, and how far it is from the floor of its products and bytes."""
    if not case.stop:
        run(model, case)  # to warm up; a ragged run is long enough without
    times = [run(model, case) for _ in range(repeats)]
    rates = sorted(tokens / seconds for seconds, tokens in times)
    rate, tokens = statistics.median(rates), statistics.median(tokens for _, tokens in times)
    return {
        "workload": case.name,
        "sequences": case.sequences,
        "tokens_per_s": rate,
        "tokens_per_s_min": rates[0],
        "tokens_per_s_max": rates[-1],
        "floor_ratio": 1.0 / rate / floor_a_token(model, case, tokens, limits),
        "tokens": tokens,
    }


def spread(ratios: Sequence[float]) -> Row:
    """Median and range of the ratios of pairs that were measured one right after the other."""
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def shared_prompts(model: engine.HybridEngine, repeats: int, limits: Row) -> Row:
    """K = 8 samples of each of 8 prompts of 512 tokens: prompts shared, against every prompt eight times."""
    prompts, new, k = random_prompts(8, 512), 64, 8
    once = [p for p in prompts for _ in range(k)]

    def seconds(given: list[list[int]], n: int) -> float:
        began = time.perf_counter()
        generate(model.model, given, Sampling(new), frozenset(), n=n, limits=model.limits)
        return time.perf_counter() - began

    seconds(prompts[:1], k)
    pairs = [(seconds(prompts, k), seconds(once, 1)) for _ in range(repeats)]
    own, tokens = statistics.median(shared for shared, _ in pairs), len(once) * new
    lengths, sizes = [len(p) for p in prompts], floors.Sizes.of(model.model)
    least = floors.rollout_floor(limits, sizes, lengths, k, tokens, model.limits.max_active)
    return {
        "workload": "shared",
        "sequences": len(once),
        "peer": "prompts not shared",
        **spread([apart / shared for shared, apart in pairs]),
        "tokens_per_s": tokens / own,
        "peer_tokens_per_s": tokens / statistics.median(apart for _, apart in pairs),
        "floor_ratio": own / least,
    }


def start_up(args: argparse.Namespace) -> Row:
    """Seconds of a whole process that draws one token, and those from `from_pretrained` to that token.

    The second clock starts with torch imported, as in any trainer that calls us (``import engine`` alone leaves torch
    to the first use, so that ``--help`` is quick); torch's import is in the seconds of the process.
    """
    code = (
        "import time; import torch; import engine; began = time.perf_counter();"
        f" m = engine.HybridEngine.from_pretrained({args.model!r}, dtype={args.dtype!r});"
        " m.generate([[5, 6, 7]], max_new_tokens=1);"
        " print(time.perf_counter() - began)"
    )
    times = []
    for _ in range(args.repeats):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        times.append((time.perf_counter() - began, float(done.stdout.split()[-1])))
    return {
        "workload": "start",
        "sequences": 1,
        "seconds_process": statistics.median(whole for whole, _ in times),
        "seconds_from_pretrained": statistics.median(first for _, first in times),
    }
