"""The end of the demo: `demo.json`, the report, and the table on the terminal."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.demo import labeler
from engine.demo.compare import win_rate
from engine.demo.plan import Plan
from engine.report import write_report
from engine.run.console import printable
from engine.run.session import versions

SHOWN = 3  # answers before and after: the first ones of the held-out prompts, not chosen ones


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def results(plan: Plan, phases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What came out, as plain values. `seconds` of a phase that was stopped are those since it went on."""
    text = (plan.output / "answers.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    before, after = [r["score_before"] for r in rows], [r["score_after"] for r in rows]
    rate = win_rate(before, after)
    found = versions()
    seconds = {name: round(facts["seconds"], 1) for name, facts in phases.items()}
    return {
        "win_rate": rate.rate,
        "win_rate_ci95": list(rate.interval),
        "wins_ties_losses": [rate.wins, rate.ties, rate.losses],
        "reward_true_before": fmean(before),
        "reward_true_after": fmean(after),
        "kl": fmean(r["kl"] for r in rows),
        "rm_accuracy": phases["rm"]["accuracy"],
        "rm_accuracy_stderr": phases["rm"]["accuracy_stderr"],
        "perplexity_before": phases["evaluation"]["perplexity_before"],
        "perplexity_after": phases["evaluation"]["perplexity_after"],
        "seconds": seconds,
        "seconds_total": round(sum(seconds.values()), 1),
        "tokens_per_s": {
            name: round(facts["tokens"] / facts["seconds"], 1)
            for name, facts in phases.items()
            if "tokens" in facts
        },
        "went_on_after_a_stop": [n for n, facts in phases.items() if facts["starts"] > 1],
        "phases": {name: dict(facts) for name, facts in phases.items()},
        "labeler": labeler.NOTE,
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "cpu_class": found.pop("cpu_class"),
        },
        "commit": found.pop("commit", "unknown"),
        "versions": found,
        "seed": plan.seed,
        "examples": rows[:SHOWN],
    }


def write(plan: Plan, found: Mapping[str, Any]) -> None:
    """`demo.json` and the report of the three stages."""
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    (plan.output / "demo.json").write_text(text, encoding="utf-8")
    stages = [plan.output / name for name in ("sft", "rm", "ppo")]
    write_report(stages, plan.output / "report.html")


def show(plan: Plan, found: Mapping[str, Any], console: Console) -> None:
    """The closing tables, and where the report and the model are."""
    console.print(outcome(found))
    console.print(times(found))
    console.print(examples(found))
    console.print(labeler.NOTE)
    console.print(f"report: {plan.output / 'report.html'}", soft_wrap=True)
    console.print(f"numbers: {plan.output / 'demo.json'}", soft_wrap=True)
    console.print(f"final model: {plan.output / 'ppo'}", soft_wrap=True)


def outcome(found: Mapping[str, Any]) -> Table:
    """Before against after."""
    low, high = found["win_rate_ci95"]
    wins, ties, losses = found["wins_ties_losses"]
    table = Table(title=f"On {wins + ties + losses} prompts that training never saw")
    for name in ("", "SFT", "PPO-ptx"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row(
        "labeler's mean score",
        f"{found['reward_true_before']:+.3f}",
        f"{found['reward_true_after']:+.3f}",
    )
    table.add_row("win rate against SFT", "", f"{found['win_rate']:.3f} ({low:.3f} to {high:.3f})")
    table.add_row("wins, ties, losses", "", f"{wins}, {ties}, {losses}")
    table.add_row("KL(policy || SFT), nats a sequence", "0", f"{found['kl']:.2f}")
    table.add_row(
        "perplexity of held-back prose",
        f"{found['perplexity_before']:.2f}",
        f"{found['perplexity_after']:.2f}",
    )
    error = found["rm_accuracy_stderr"]
    table.add_row("reward model's pair accuracy", "", f"{found['rm_accuracy']:.3f} ± {error:.3f}")
    return table


def times(found: Mapping[str, Any]) -> Table:
    """Seconds and tokens a second, by phase."""
    machine = found["machine"]
    table = Table(title=f"{machine['cores']} cores, class {machine['cpu_class']}")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("tokens/s", justify="right")
    for name, seconds in found["seconds"].items():
        rate = found["tokens_per_s"].get(name)
        table.add_row(name, f"{seconds:.1f}", "" if rate is None else f"{rate:.0f}")
    table.add_row("all", f"{found['seconds_total']:.1f}", "", style="bold")
    return table


def examples(found: Mapping[str, Any]) -> Table:
    """The first answers before and after, with the labeler's scores."""
    table = Table(title="The first held-out prompts", show_lines=True)
    for name in ("prompt", "SFT", "PPO-ptx"):
        table.add_column(name, ratio=1)
    for row in found["examples"]:
        cells = [printable(row["prompt"])]
        for when in ("before", "after"):
            cells.append(f"{printable(row[when])} [{row[f'score_{when}']:+.2f}]")
        table.add_row(*(Text(cell) for cell in cells))  # Text: a model's brackets are no markup
    return table
