"""`python -m bench.ppo --model M [--prompts FILE] [--peers DIR]`: PPO iterations against TRL's, and by phase.

    ppo         32 episodes of 64 random prompt tokens and exactly 64 new ones, four models, one optimizer step
    ppo-ragged  24 real prompts, at most 128 new tokens, stopped at the end of sequence; TRL pads as it does. Each
                side samples its own answers, so the ratio is of seconds a real token (prompts and answers)
    ppo-update  forward and backward of both losses on given episodes, against a loop over transformers' models
    phases      an iteration of `ppo` by phase: seconds, and FLOP a second over the machine's peak

One iteration is a rollout, the reward, reference and value passes, and one epoch of updates. Both sides do one to warm
up, with the same settings; TRL goes through its own trainer, the engine through `engine.PPO`. Rows go to
bench/results/ppo-<class>.json after each one; rows with the same key are replaced, others kept.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import machine, ppo_phases, training, training_cases
from bench.training import Row, Setting
from bench.training_cases import Case
from engine import ops

WORKLOADS = ("ppo", "ppo-ragged", "ppo-update", "phases")
PEERS = ("trl", "hf")
RAGGED_EPISODES = 24  # one of TRL's iterations stays within minutes


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    training.add_flags(parser, WORKLOADS, PEERS)
    parser.add_argument(
        "--prompts", type=Path, help="JSONL with `prompt` or `messages`, for ppo-ragged"
    )
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--ragged_episodes", type=int, default=RAGGED_EPISODES)
    args = parser.parse_args(words)
    training.check_flags(parser, args, "episodes", "ragged_episodes")
    return args


def cases(args: argparse.Namespace) -> Iterator[Case]:
    if "ppo" in args.only:
        yield training_cases.ppo(args)
    if "ppo-ragged" in args.only and args.prompts is None:
        print("bench.ppo: ppo-ragged is left out: it wants real prompts, --prompts FILE.jsonl")
    elif "ppo-ragged" in args.only:
        yield training_cases.ppo_ragged(args)
    if "ppo-update" in args.only:
        yield training_cases.ppo_update(args)


def phase_row(args: argparse.Namespace, setting: Setting, limits: Row) -> Row:
    """The engine alone, one iteration to warm up."""
    case = training_cases.ppo(args)
    with training.work_file(case) as work, training.own_side(case, work, setting) as ours:
        ours.turn({"warm_up": True})
        answers = [ours.turn({"phases": True}) for _ in range(args.repeats)]
    return {
        "workload": "phases",
        "sequences": case.sequences,
        "seconds": statistics.median(a["seconds"] for a in answers),
        "tokens": answers[0]["tokens"],
        "peak_memory_gb": max(a["peak_memory_gb"] for a in answers),
        "phases": ppo_phases.phases(answers, limits),
    }


def rows(args: argparse.Namespace, limits: Row) -> Iterator[Row]:
    setting = Setting(args.model, args.dtype, args.peer_dtype, args.threads)
    if "phases" in args.only and args.peer is None:
        yield phase_row(args, setting, limits)
    yield from training.rows_against("bench.ppo", cases(args), args, setting)


def main() -> None:
    args = parsed()
    if ops.cpu_class() == "reference":
        sys.exit("bench.ppo: the C++ kernels are not built here; want them, see engine.ops")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no side outlives this
    limits = machine.limits(args.threads)
    path = args.results / f"ppo-{ops.cpu_class()}.json"
    training.keep(rows(args, limits), path, args.dtype, limits)


if __name__ == "__main__":
    main()
