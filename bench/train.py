"""`python -m bench.train --model M [--sft FILE] [--rankings FILE] [--peers DIR]`: training steps and ops against peers.

    sft             forward and backward of 16 rows of 128 random ids, every token a target; no optimizer step
    sft-ragged      64 demonstrations in batches of 16, their answers as targets; transformers pads to the longest row
                    of a batch; no optimizer step
    rm              2 prompts of about 700 tokens with 4 answers each, all pairs: transformers runs each pair as two
                    forwards without padding (what trainers on chosen and rejected do), the engine each prompt once
    rm-repeated     the engine against itself with each prompt repeated for each answer
    linear_logprob  2048 rows of a vocabulary of 49152, forward and backward, against the strongest of eager torch,
                    chunks of rows and torch.compile; with the memory that it takes, in a process of its own
    gae, kl_reward, whiten, ranking_loss, ranking_loss-any-order
                    512 x 1024 tokens, forward: `ratio` is how many times one pass over the bytes it takes; a prompt's
                    nine answers stand best rank first, as the reward model's stage has them, or in any order

Losses and gradient norms of both sides must agree before anything is timed. Rows go to bench/results/train-<class>.json
after each one; rows with the same key are replaced, others kept.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import machine, training, training_cases, training_kernels
from bench.training import Row, Setting
from bench.training_cases import Case
from bench.training_table import OPS
from bench.workloads import spread
from engine import ops

WORKLOADS = ("sft", "sft-ragged", "rm", "rm-repeated", "linear_logprob", *OPS)
PEERS = ("hf",)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    training.add_flags(parser, WORKLOADS, PEERS)
    parser.add_argument("--sft", type=Path, help="JSONL of demonstrations, for sft-ragged")
    parser.add_argument("--rankings", type=Path, help="JSONL of ranked answers, for rm")
    parser.add_argument("--rows", type=int, default=64, help="of sft-ragged")
    parser.add_argument("--groups", type=int, default=2, help="prompts of rm")
    args = parser.parse_args(words)
    training.check_flags(parser, args, "rows", "groups")
    return args


def given(args: argparse.Namespace, name: str, flag: str) -> bool:
    """Whether a workload was asked for and has its data; says so where the data is missing."""
    there = getattr(args, flag) is not None
    if name in args.only and not there:
        print(f"bench.train: {name} is left out: it wants --{flag} FILE.jsonl")
    return name in args.only and there


def cases(args: argparse.Namespace) -> Iterator[Case]:
    if "sft" in args.only:
        yield training_cases.sft(args)
    if given(args, "sft-ragged", "sft"):
        yield training_cases.sft_ragged(args)
    if given(args, "rm", "rankings"):
        yield training_cases.rm(args)


def repeated_prompts(args: argparse.Namespace, setting: Setting) -> Row:
    """The reward model's step, prompts shared against prompts repeated; losses must be the same."""
    case = training_cases.rm(args)
    with training.work_file(case) as work, training.own_side(case, work, setting) as ours:
        shared, apart = ({}, {"repeat": True})
        checks = [ours.turn({**order, "warm_up": True})["checks"] for order in (shared, apart)]
        wrong = training.differing(checks[0], checks[1], {"loss": 1e-5, "gradient norm": 1e-2})
        if wrong:
            raise RuntimeError(f"rm-repeated: prompts shared and repeated differ: {wrong}")
        pairs = [(ours.turn(shared), ours.turn(apart)) for _ in range(args.repeats)]
    seconds = [[answer["seconds"] for answer in pair] for pair in pairs]
    return {
        "workload": "rm-repeated",
        "sequences": case.sequences,
        "peer": "prompts repeated",
        **spread([other / own for own, other in seconds]),
        "memory_ratio": None,  # one process does both
        "seconds": statistics.median(own for own, _ in seconds),
        "peer_seconds": statistics.median(other for _, other in seconds),
        "tokens": pairs[0][0]["tokens"],
        "repeats": args.repeats,
    }


def rows(args: argparse.Namespace, limits: Row) -> Iterator[Row]:
    setting = Setting(args.model, args.dtype, args.peer_dtype, args.threads)
    yield from training.rows_against("bench.train", cases(args), args, setting)
    if args.peer is not None:
        return  # the rest has no peer in another environment
    if given(args, "rm-repeated", "rankings"):
        yield repeated_prompts(args, setting)
    if "linear_logprob" in args.only:
        yield training_kernels.linear_logprob(args.repeats, args.threads, setting.peer_dtype)
    yield from training_kernels.passes(args.only, args.repeats, limits)


def main() -> None:
    args = parsed()
    if ops.cpu_class() == "reference":
        sys.exit("bench.train: the C++ kernels are not built here; want them, see engine.ops")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no side outlives this
    limits = machine.limits(args.threads)
    path = args.results / f"train-{ops.cpu_class()}.json"
    training.keep(rows(args, limits), path, args.dtype, limits)


if __name__ == "__main__":
    main()
