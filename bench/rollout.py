"""`python -m bench.rollout --model M [--peer hf|vllm|llama --peer_python PATH]`: rollouts against a peer.

Both sides do the same work in alternation on the same machine; the peer is stopped while the engine
runs. What counts is the ratio, its median and its spread over the repeats. Before any timing, the
engine's log-probs of what it samples are checked against its training forward (equal to the bit) and,
in fp32, against transformers.

Without --peer: the engine alone, with its distance to the machine's floor. Rows are added to
bench/results/rollout-<class>.json; rows of the same workload and peer are replaced.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import engine
from bench import machine, workloads
from bench.opponent import Llama, Opponent, Served
from engine import ops
from engine.run.session import versions

Row = dict[str, Any]


def check(model: engine.HybridEngine) -> None:
    """The sampler's log-probs are the training forward's; raises AssertionError where not."""
    prompts = workloads.random_prompts(4, 64)
    out = model.generate(prompts, max_new_tokens=16, seed=1)
    again = model.logprobs([[*o.prompt_tokens, *o.tokens] for o in out])
    for o, logprobs in zip(out, again, strict=True):
        assert torch.equal(logprobs[-len(o.tokens) :], o.logprobs), "sampled != scored"


def check_against_transformers(folder: str) -> None:
    """fp32 log-probs within 1e-4 of transformers' (design.md section 5)."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(workloads.random_prompts(2, 96))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = theirs(ids[:, :-1]).logits.double().log_softmax(-1)
    want = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    ours = engine.HybridEngine.from_pretrained(folder, dtype="float32")
    for got, row in zip(ours.logprobs(ids.tolist()), want, strict=True):
        torch.testing.assert_close(got.double(), row, rtol=0, atol=1e-4)


def alternate(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> Row:
    """Seconds of both, once to warm up and then in turns."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    ratios = sorted(peer / own for own, peer in pairs)
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "seconds": statistics.median(own for own, _ in pairs),
        "peer_seconds": statistics.median(peer for _, peer in pairs),
    }


def against(case: workloads.Case, model: engine.HybridEngine, peer: Opponent, repeats: int) -> Row:
    """One workload, seconds a token on both sides: with early stops each side draws its own lengths."""

    def ours() -> float:
        return workloads.seconds_a_token(model, case)

    def theirs() -> float:
        with peer.awake():
            seconds, tokens = peer.run(case)
        return seconds / tokens

    row = alternate(ours, theirs, repeats)
    row["tokens_per_s"] = 1.0 / row.pop("seconds")
    row["peer_tokens_per_s"] = 1.0 / row.pop("peer_seconds")
    return {"workload": case.name, "sequences": case.sequences, "peer": peer.name, **row}


def alone(case: workloads.Case, model: engine.HybridEngine, repeats: int, found: Row) -> Row:
    """One workload of the engine, and how far it is from the floor of its products and bytes."""
    workloads.seconds_a_token(model, case)
    seconds = [workloads.seconds_a_token(model, case) for _ in range(repeats)]
    floor = workloads.floor_seconds_a_token(model, case, found)
    return {
        "workload": case.name,
        "sequences": case.sequences,
        "peer": "",
        "tokens_per_s": 1.0 / statistics.median(seconds),
        "tokens_per_s_min": 1.0 / max(seconds),
        "tokens_per_s_max": 1.0 / min(seconds),
        "floor_ratio": statistics.median(seconds) / floor,
    }


def own_rows(model: engine.HybridEngine, args: argparse.Namespace, found: Row) -> list[Row]:
    rows = [alone(case, model, args.repeats, found) for case in workloads.cases(args, model)]
    rows += [workloads.step_against_products(model, n, args.repeats) for n in (16, 64)]
    rows.append(workloads.shared_prompts(model, args.repeats))
    rows.append(start_up(args))
    return rows


def start_up(args: argparse.Namespace) -> Row:
    """Seconds of a whole process that loads the model and draws one token, and of loading and drawing alone."""
    code = (
        "import time; began = time.perf_counter(); import engine; imported = time.perf_counter();"
        f" m = engine.HybridEngine.from_pretrained({args.model!r}, dtype={args.dtype!r});"
        " m.generate([[5, 6, 7]], max_new_tokens=1);"
        " print(imported - began, time.perf_counter() - imported)"
    )
    times = []
    for _ in range(args.repeats):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        loading = float(done.stdout.split()[-1])
        times.append((time.perf_counter() - began, loading))
    return {
        "workload": "start",
        "sequences": 1,
        "peer": "",
        "seconds_process": statistics.median(whole for whole, _ in times),
        "seconds_from_pretrained": statistics.median(loading for _, loading in times),
    }


def opponent(args: argparse.Namespace) -> Opponent | None:
    if args.peer is None:
        return None
    if args.peer_python is None:
        sys.exit(
            f"bench.rollout: --peer {args.peer} needs --peer_python, the program to run it with"
        )
    dtype = args.peer_dtype or ("float32" if ops.cpu_class() in ("avx2", "plain") else "bfloat16")
    if args.peer == "llama":
        return Llama(args.peer_python, args.gguf, args.threads)
    return Served(args.peer, args.peer_python, args.model, dtype, args.threads)


def write(path: Path, rows: list[Row], found: Row) -> None:
    """Rows by workload, sequences and peer; the newest one of each."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    keyed = {(r["workload"], r["sequences"], r["peer"]): r for r in [*old, *rows]}
    result = {"versions": versions(), "machine": found, "rows": list(keyed.values())}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--dtype", default="bfloat16", help="the engine's storage dtype")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--prompts", type=Path, help="JSONL with `prompt`: adds the ragged workload"
    )
    parser.add_argument("--peer", choices=["hf", "vllm", "llama"])
    parser.add_argument(
        "--peer_python", help="python of the peer's environment; llama: its llama-batched-bench"
    )
    parser.add_argument(
        "--peer_dtype", help="default: bfloat16, float32 where the CPU has no bf16 products"
    )
    parser.add_argument("--gguf", help="llama: the model as GGUF")
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = machine.limits(args.threads)
    model = engine.HybridEngine.from_pretrained(args.model, dtype=args.dtype)
    check(model)
    check_against_transformers(args.model)
    peer = opponent(args)
    rows: list[Row] = []
    if peer is None:
        rows = own_rows(model, args, found)
    else:
        with peer:
            cases = [c for c in workloads.cases(args, model) if peer.can(c)]
            rows = [against(case, model, peer, args.repeats) for case in cases]
    for row in rows:
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}))
    write(args.results / f"rollout-{ops.cpu_class()}.json", rows, found)


if __name__ == "__main__":
    main()
