"""`python -m bench.rollout --model M [--prompts FILE] [--peers DIR]`: rollouts of the engine alone, then against peers.

Both sides do the same work in alternation on the same machine; the peer is stopped while the engine
runs. What counts is the ratio, its median and its spread over the pairs. Before any timing, the
engine's log-probs of what it samples are checked against its training forward (equal to the bit) and,
in fp32, against transformers.

DIR holds the peers (opponent.py says how); one that is not there is skipped, and said so. `--sides`
and `--only` choose among sides and workloads. Rows go to bench/results/rollout-<class>.json after
each side; rows with the same key are replaced, others kept.

    rollout  1, 16, 64 sequences of 64 random prompt tokens, 64 new ones each
    ragged   256 real prompts, at most 128 new tokens each, stopped at the end of sequence; its ratio
             is of seconds a new token, since each side draws its own lengths
    step     a decode step against its matrix products alone     phases   a decode step by phase
    scale    decoding over batch and context, with memory        shared   K samples that share prompts
    start    a process that loads the model and draws one token
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import engine
from bench import decode, machine, records, workloads
from bench.opponent import NAMES, Missing, Opponent, add_dtype_flag, opponent
from engine import ops

Row = dict[str, Any]
WORKLOADS = ("rollout", "ragged", "step", "phases", "scale", "shared", "start")


def check(model: engine.HybridEngine) -> None:
    """The sampler's log-probs are the training forward's; raises AssertionError where not."""
    prompts = workloads.random_prompts(4, 64)
    out = model.generate(prompts, max_new_tokens=16, seed=1)
    again = model.logprobs([[*o.prompt_tokens, *o.tokens] for o in out])
    for o, logprobs in zip(out, again, strict=True):
        assert torch.equal(logprobs[-len(o.tokens) :], o.logprobs), "sampled != scored"


def check_against_transformers(folder: str) -> None:
    """fp32 log-probs within 1e-4 of transformers' in fp64 (design.md section 5): its fp32 can be 2e-4 off."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(workloads.random_prompts(2, 96))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logprobs = theirs(ids[:, :-1]).logits.log_softmax(-1)
    want = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    ours = engine.HybridEngine.from_pretrained(folder, dtype="float32")
    for got, row in zip(ours.logprobs(ids.tolist()), want, strict=True):
        torch.testing.assert_close(got.double(), row, rtol=0, atol=1e-4)


Sample = tuple[float, int]  # seconds, new tokens


def alternate(
    ours: Callable[[], Sample], theirs: Callable[[], Sample], repeats: int
) -> tuple[Row, float]:
    """Seconds a new token of both sides in turns, as a row; and our median seconds a token."""
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    costs = [tuple(seconds / tokens for seconds, tokens in pair) for pair in pairs]
    own, other = (statistics.median(side) for side in zip(*costs, strict=True))
    row = {
        **workloads.spread([theirs / ours for ours, theirs in costs]),
        "tokens_per_s": 1.0 / own,
        "peer_tokens_per_s": 1.0 / other,
        "tokens": statistics.median(ours[1] for ours, _ in pairs),
        "peer_tokens": statistics.median(theirs[1] for _, theirs in pairs),
        "repeats": repeats,
    }
    return row, own


def against(
    case: workloads.Case, model: engine.HybridEngine, peer: Opponent, repeats: int, limits: Row
) -> Row:
    """One workload on both sides.

    Raises RuntimeError where a peer that was to stop nowhere has done other work than asked.
    """

    def ours() -> Sample:
        return workloads.run(model, case)

    def theirs() -> Sample:
        with peer.awake():
            seconds, tokens = peer.run(case)
        want = case.sequences * case.max_new_tokens
        if not case.stop and tokens != want:
            raise RuntimeError(
                f"{case.name}: the peer {peer.name} gave {tokens} tokens, want {want}"
            )
        return seconds, tokens

    if not case.stop:
        ours(), theirs()  # to warm up; a ragged run is long enough without
    row, own = alternate(ours, theirs, repeats)
    return {
        "workload": case.name,
        "sequences": case.sequences,
        "peer": peer.name,
        "peer_dtype": peer.dtype,
        "peer_versions": peer.versions,
        **row,
        "floor_ratio": own / workloads.floor_a_token(model, case, row["tokens"], limits),
    }


def own_rows(model: engine.HybridEngine, args: argparse.Namespace, limits: Row) -> Iterator[Row]:
    repeats, only = args.repeats, args.only
    for case in workloads.cases(args, model):
        yield workloads.alone(case, model, repeats_of(case, args), limits)
    if "step" in only:
        yield from (decode.step_against_products(model, n, repeats, limits) for n in decode.ROWS)
    if "phases" in only:
        yield from (decode.phases(model, n, repeats, limits) for n in decode.ROWS)
    if "scale" in only:
        longest = model.model.architecture.max_positions
        for rows, context in decode.scale_sizes(longest):
            yield decode.scale(model, rows, context, repeats, limits)
    if "shared" in only:
        yield workloads.shared_prompts(model, repeats, limits)
    if "start" in only:
        yield workloads.start_up(args)


def peer_rows(
    name: str, model: engine.HybridEngine, args: argparse.Namespace, limits: Row
) -> Iterator[Row]:
    cases = workloads.cases(args, model)
    if not cases:
        return
    if args.peers is None:
        print(f"bench.rollout: {name} is skipped: no --peers DIR")
        return
    try:
        peer = opponent(name, args.peers, args.model, args.peer_dtype, args.threads)
    except Missing as reason:
        print(f"bench.rollout: {name} is skipped: {reason}")
        return
    with peer:
        for case in cases:
            if peer.can(case):
                yield against(case, model, peer, repeats_of(case, args), limits)


def repeats_of(case: workloads.Case, args: argparse.Namespace) -> int:
    return args.ragged_repeats if case.stop else args.repeats


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sides = ("alone", *NAMES)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument(
        "--prompts", type=Path, help="JSONL with `prompt` or `messages`, for ragged"
    )
    parser.add_argument("--peers", type=Path, help="folder with hf, vllm, llama")
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides, metavar="SIDE")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=WORKLOADS, metavar="NAME")
    parser.add_argument("--sequences", nargs="+", type=int, default=(1, 16, 64), help="of rollout")
    parser.add_argument("--dtype", default="bfloat16", help="the engine's storage dtype")
    add_dtype_flag(parser)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--ragged_repeats", type=int, default=1, help="minutes each for a slow peer"
    )
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    args = parser.parse_args(words)
    for name in ("repeats", "ragged_repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, want 1 or more")
    return args


def shown(row: Row) -> str:
    """A row without what is the same in all of them."""
    hidden = ("ratio_is", "peer_versions", "dtype")
    return json.dumps({k: v for k, v in records.rounded(row).items() if k not in hidden})


def main() -> None:
    args = parsed()
    if ops.cpu_class() == "reference":
        sys.exit("bench.rollout: the C++ kernels are not built here; want them, see engine.ops")
    torch.set_num_threads(args.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no peer outlives this
    limits = machine.limits(args.threads)
    model = engine.HybridEngine.from_pretrained(args.model, dtype=args.dtype)
    check(model)
    check_apart = f"from bench import rollout; rollout.check_against_transformers({args.model!r})"
    # In a process of its own: the memory of two float32 models would be counted as this one's.
    subprocess.run([sys.executable, "-c", check_apart], check=True)
    path = args.results / f"rollout-{ops.cpu_class()}.json"
    for side in args.sides:
        found = own_rows if side == "alone" else lambda *given, n=side: peer_rows(n, *given)
        for row in found(model, args, limits):
            row = {**row, "dtype": args.dtype}
            print(shown(row), flush=True)
            records.write(path, [row], limits)  # at once: what is measured outlives a stop


if __name__ == "__main__":
    main()
