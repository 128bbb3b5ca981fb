"""The demo's flow, each step a use of the package as a user would make it:

    model -> SFT -> samples of it, ranked by the labeler -> reward model -> PPO-ptx -> before against after

Every phase is recorded when it is done. A run that was killed skips those, and the stage that was running goes on
from its newest checkpoint.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
from engine.demo import closing, compare, model
from engine.demo.plan import Plan
from engine.errors import EngineError
from engine.run.log import read_records
from engine.sample import sample

Facts = dict[str, Any]
RANKING_SEEDS = (1, 2)  # of the samples to train on and to check with; apart from each other's
EVALUATION_SEED = 3


def run(plan: Plan, tell: Callable[[str], None] = print) -> Facts:
    """Run what is left of the demo and return the closing facts, which are also in `demo.json`.

    Raises:
        EngineError: a package that is missing, an output folder of a run with other settings.
    """
    plan.claim()
    phases = (
        ("model", unpack),
        ("sft", sft),
        ("rankings", rankings),
        ("rm", reward_model),
        ("ppo", ppo),
        ("evaluation", evaluation),
    )
    journal = Journal(plan.output / "phases.json")
    for name, phase in phases:
        if journal.is_done(name):
            tell(f"{name}: done before")
        else:
            tell(f"{name} ...")
            journal.start(name)
            began = time.perf_counter()
            facts = phase(plan)
            journal.finish(name, {"seconds": time.perf_counter() - began, **facts})
        drop_checkpoints(plan.output / name)
        gc.collect()  # a stage's models go before the next one's come
    results = closing.results(plan, journal.phases)
    closing.write(plan, results)
    return results


class Journal:
    """Which phases are done, what came out, and how often each was started."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.phases: dict[str, Facts] = {}
        if path.exists():
            self.phases = json.loads(path.read_text(encoding="utf-8"))

    def is_done(self, name: str) -> bool:
        return "seconds" in self.phases.get(name, {})

    def start(self, name: str) -> None:
        self._write(name, {"starts": self.phases.get(name, {}).get("starts", 0) + 1})

    def finish(self, name: str, facts: Facts) -> None:
        self._write(name, {**self.phases[name], **facts})

    def _write(self, name: str, facts: Facts) -> None:
        self.phases[name] = facts
        aside = self.path.with_suffix(".partial")
        aside.write_text(json.dumps(self.phases, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.path)


def drop_checkpoints(folder: Path) -> None:
    """A finished stage needs none; they are gigabytes."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def unpack(plan: Plan) -> Facts:
    """The pretrained model, unless it is there."""
    return {"unpacked": model.prepare(plan.model)}


def sft(plan: Plan) -> Facts:
    """Demonstrations teach the task: a short review, neither kind nor unkind on the whole."""
    folder = engine.train_sft(plan.sft_config())
    records = metrics(folder)
    return {
        "tokens": last(records, "num_tokens"),
        "steps": last(records, "step"),
        "loss": last(records, "eval/loss"),
    }


def rankings(plan: Plan) -> Facts:
    """K samples of the SFT model for each prompt, ranked; ties stay ties."""
    made = (
        ("prompts.jsonl", plan.ranked_prompts, "rankings.jsonl"),
        ("prompts_heldout.jsonl", plan.ranked_heldout, "rankings_heldout.jsonl"),
    )
    tokens = 0
    for (prompts, count, output), seed in zip(made, RANKING_SEEDS, strict=True):
        path = sample(plan.sample_config(prompts, count, output, seed))
        tokens += sum(len(t) for row in compare.read_column(path, "tokens") for t in row)
    return {"tokens": tokens}


def reward_model(plan: Plan) -> Facts:
    """One epoch on the rankings; its accuracy is that on samples for held-out prompts."""
    records = metrics(engine.train_reward_model(plan.rm_config()))
    return {
        "tokens": last(records, "num_tokens"),
        "steps": last(records, "step"),
        "accuracy": last(records, "eval/accuracy"),
        "accuracy_stderr": last(records, "eval/accuracy_stderr"),
        "pairs": last(records, "eval/num_pairs"),
    }


def ppo(plan: Plan) -> Facts:
    """The policy learns what the reward model rewards, kept near SFT by the KL term and to prose by ptx."""
    records = metrics(engine.train_ppo(plan.ppo_config()))
    steps = [r for r in records if "timing/iteration" in r]
    tokens = sum(r["perf/tokens_per_s"] * r["timing/iteration"] for r in steps)
    return {
        "tokens": round(tokens),
        "iterations": len(steps),
        "episodes": last(records, "episode"),
        "score_before": steps[0]["objective/raw_scores"],
        "score_after": steps[-1]["objective/raw_scores"],
        "parity_max_abs_logprob_diff": max(r["parity/max_abs_logprob_diff"] for r in steps),
    }


def evaluation(plan: Plan) -> Facts:
    """The labeler judges SFT and the final policy on every held-out prompt; both read held-back prose."""
    prompts = compare.read_column(plan.data / "prompts_heldout.jsonl", "prompt")
    prose = compare.read_column(plan.data / "prose_heldout.jsonl", "text")
    length = plan.ppo["response_length"]
    before = engine.HybridEngine.from_pretrained(plan.path("sft"), dtype=plan.dtype)
    after = engine.HybridEngine.from_pretrained(plan.path("ppo"), dtype=plan.dtype)
    old = compare.answers(before, prompts, length, EVALUATION_SEED)
    new = compare.answers(after, prompts, length, EVALUATION_SEED)
    kl = compare.sequence_kl(new, before)
    rows = [
        {"prompt": o.prompt, "before": o.text, "after": n.text, "score_before": o.score,
         "score_after": n.score, "kl": k}
        for o, n, k in zip(old, new, kl, strict=True)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (plan.output / "answers.jsonl").write_text(text, encoding="utf-8")
    return {
        "tokens": sum(len(a.logprobs) for a in [*old, *new]),
        "perplexity_before": compare.perplexity(before, prose),
        "perplexity_after": compare.perplexity(after, prose),
    }


def metrics(folder: Path) -> list[Facts]:
    """The records of a finished stage."""
    return read_records(folder / "metrics.jsonl")[0]


def last(records: list[Facts], name: str) -> float:
    """The newest value of a metric."""
    for record in reversed(records):
        if name in record:
            return float(record[name])
    raise EngineError(
        f"demo: the stage logged no {name}: its data define none (an accuracy needs pairs that are "
        "not ties, its error two prompts with such pairs). Give it more rows or samples"
    )
