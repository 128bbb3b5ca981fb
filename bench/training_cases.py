"""What bench.ppo and bench.train run on both sides, as token ids: the same rows for the engine and its peers."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.workloads import PROMPT, random_prompts
from engine.data.prompts import load_prompts
from engine.data.rankings import RankedGroup, load_rankings
from engine.data.text import load_sft
from engine.data.tokenizer import load_tokenizer
from engine.model.architectures import read_architecture
from engine.model.folder import read_json
from engine.model.heads import new_score_weight
from engine.model.weights import resolve_folder

Work = dict[str, Any]
NEW, RAGGED_NEW = 64, 128  # tokens of an answer: exactly; at most
MICRO_BATCH, RAGGED_MICRO_BATCH = (
    16,
    8,
)  # episodes of one of TRL's passes; more ragged ones need too much memory
SFT_ROWS, SFT_TOKENS = 16, 128
RAGGED_BATCH = 16
ANSWERS = 4
LONG_PROMPT = (500, 1000)  # tokens of a ranked prompt: about 700
HEAD_SEED = 0
# Relative, by the engine's storage. The peer may have the other dtype, and keys are rounded to the storage's. A ranking
# loss is of the difference of two scores that are near each other, so rounding shows more.
LOSS = {"bfloat16": 1e-2, "float32": 1e-3}
RANKING_LOSS = {"bfloat16": 3e-2, "float32": 1e-3}
NORM = {"bfloat16": 5e-2, "float32": 5e-3}


@dataclass(frozen=True)
class Case:
    """One workload against one peer."""

    name: str
    peer: str
    sequences: int
    work: Work
    agree: Mapping[str, float]
    """Numbers that both sides must give before anything is timed, and how near (relative)."""


def enough(what: Sequence[Any], count: int, path: Path, wanted: str) -> Sequence[Any]:
    """The first `count`. Raises SystemExit where there are fewer: another set would be another workload."""
    if len(what) < count:
        sys.exit(f"bench: {path}: got {len(what)} {wanted}, want {count}; give a larger file")
    return what[:count]


def multiple(flag: str, value: int, of: int) -> None:
    """Raises SystemExit where a number of episodes is not made of whole micro-batches."""
    if value % of and value > of:
        sys.exit(f"bench.ppo: {flag}: got {value}, want a multiple of {of}, TRL's micro-batch")


def ppo(args: argparse.Namespace) -> Case:
    """Random prompts of 64 tokens, answers of exactly 64: the end of sequence is a token like any other."""
    multiple("--episodes", args.episodes, MICRO_BATCH)
    work = {
        "prompts": random_prompts(args.episodes, PROMPT),
        "new_tokens": NEW,
        "stop": False,
        "micro_batch": min(MICRO_BATCH, args.episodes),
    }
    return Case("ppo", "trl", args.episodes, work, {"log-prob": LOSS[args.dtype]})


def ppo_ragged(args: argparse.Namespace) -> Case:
    """Real prompts, answers of at most 128 tokens that stop at the end of sequence."""
    count = args.ragged_episodes
    multiple("--ragged_episodes", count, RAGGED_MICRO_BATCH)
    found = load_prompts([str(args.prompts)], load_tokenizer(args.model))
    prompts = [list(p.tokens) for p in enough(found, count, args.prompts, "prompts")]
    work = {
        "prompts": prompts,
        "new_tokens": RAGGED_NEW,
        "stop": True,
        "micro_batch": min(RAGGED_MICRO_BATCH, count),
    }
    return Case("ppo-ragged", "trl", count, work, {"log-prob": LOSS[args.dtype]})


def ppo_update(args: argparse.Namespace) -> Case:
    """The two losses of an update on given episodes: what a loop over transformers' models does without TRL."""
    draws = random.Random(1)
    episodes = random_prompts(args.episodes, PROMPT + NEW)
    numbers = [[draws.gauss(0, 1) for _ in range(NEW)] for _ in range(2 * args.episodes)]
    work = {
        "episodes": episodes,
        "prompt": PROMPT,
        "micro_batch": min(MICRO_BATCH, args.episodes),
        "advantage": numbers[: args.episodes],
        "returns": numbers[args.episodes :],
        **head(args.model),
    }
    near = {name: LOSS[args.dtype] for name in ("policy loss", "value loss")}
    near |= {name: NORM[args.dtype] for name in ("policy gradient norm", "value gradient norm")}
    return Case("ppo-update", "hf", args.episodes, work, near)


def head(model: str) -> Work:
    """A scalar head's numbers, for a side that cannot draw them, and the seed that draws them."""
    hidden_size = read_architecture(read_json(resolve_folder(model) / "config.json")).hidden_size
    return {"seed": HEAD_SEED, "head": new_score_weight(hidden_size, HEAD_SEED)[0].tolist()}


def loss_and_norm(loss: Mapping[str, float], dtype: str) -> dict[str, float]:
    return {"loss": loss[dtype], "gradient norm": NORM[dtype]}


def sft(args: argparse.Namespace) -> Case:
    """16 rows of 128 random ids, every token but the first a target."""
    rows = [{"tokens": t, "start": 0} for t in random_prompts(SFT_ROWS, SFT_TOKENS)]
    work = {"batches": [rows], "warm_up": rows}
    return Case("sft", "hf", SFT_ROWS, work, loss_and_norm(LOSS, args.dtype))


def sft_ragged(args: argparse.Namespace) -> Case:
    """Demonstrations in the file's order, in batches of 16; their answers are the targets, as SFT has them."""
    found = load_sft([str(args.sft)], load_tokenizer(args.model))
    rows = [
        {"tokens": list(e.tokens), "start": e.response_start}
        for e in enough(found, args.rows, args.sft, "demonstrations")
    ]
    batches = [rows[i : i + RAGGED_BATCH] for i in range(0, len(rows), RAGGED_BATCH)]
    work = {"batches": batches, "warm_up": batches[0]}
    return Case("sft-ragged", "hf", args.rows, work, loss_and_norm(LOSS, args.dtype))


def is_long(group: RankedGroup) -> bool:
    """Four answers, no two of them equal in rank, to a prompt of about 700 tokens."""
    low, high = LONG_PROMPT
    return (
        len(group.responses) == len(set(group.ranks)) == ANSWERS
        and low <= len(group.prompt) <= high
    )


def plain(group: RankedGroup, answers: Sequence[int]) -> Work:
    return {
        "prompt": list(group.prompt),
        "responses": [list(group.responses[i]) for i in answers],
        "ranks": [group.ranks[i] for i in answers],
    }


def rm(args: argparse.Namespace) -> Case:
    """Groups of four answers, all six pairs of each; two answers of the first group to warm up."""
    found = load_rankings([str(args.rankings)], load_tokenizer(args.model))
    wanted = f"prompts of {LONG_PROMPT[0]} to {LONG_PROMPT[1]} tokens with {ANSWERS} answers without ties"
    groups = enough([g for g in found if is_long(g)], args.groups, args.rankings, wanted)
    work = {
        "batches": [[plain(group, range(ANSWERS)) for group in groups]],
        "warm_up": [plain(groups[0], range(2))],
        **head(args.model),
    }
    return Case("rm", "hf", args.groups, work, loss_and_norm(RANKING_LOSS, args.dtype))
