"""The README's tables of training, from DIR/ppo-<class>.json and DIR/train-<class>.json of each class; see table.py."""

from __future__ import annotations

import json
from pathlib import Path

from bench.ppo_phases import PHASES
from bench.table import CLASSES, DTYPE, NONE, Row, figure, markdown, ratio

UNASKED = "–"  # a memory ratio where both sides are one process
LINES = {  # (workload, peer): what it says, in the order of the table
    ("ppo", "trl"): ("PPO, 32 episodes of 64 + 64 tokens", "TRL"),
    ("ppo-ragged", "trl"): ("PPO, 24 real prompts, answers of at most 128 tokens", "TRL"),
    ("ppo-update", "hf"): ("PPO's update, 32 episodes of 64 + 64 tokens", "transformers"),
    ("sft", "hf"): ("SFT step, 16 rows of 128 tokens", "transformers"),
    ("sft-ragged", "hf"): ("SFT steps, 64 real demonstrations", "transformers"),
    ("rm", "hf"): ("reward model, 2 prompts with 4 answers each", "transformers"),
    ("rm-repeated", "prompts repeated"): ("the same", "itself, prompts repeated"),
    ("linear_logprob", "torch"): ("`linear_logprob_loss`, 2048 × 49152", "the best of torch"),
}
SEQUENCES = {"ppo": 32, "ppo-ragged": 24, "ppo-update": 32, "sft": 16, "sft-ragged": 64, "rm": 2}
SEQUENCES |= {"rm-repeated": 2, "linear_logprob": 2048}
OPS = {
    "gae": "`gae`",
    "kl_reward": "`kl_reward`",
    "whiten": "`whiten`",
    "ranking_loss": "`ranking_loss`, best answers first",
    "ranking_loss-any-order": "`ranking_loss`, answers in any order",
}
PASS = "one pass over its bytes"


def load(folder: Path) -> dict[str, list[Row]]:
    """Rows by class, of the files that are there."""
    found: dict[str, list[Row]] = {}
    for name in CLASSES:
        for path in (folder / f"ppo-{name}.json", folder / f"train-{name}.json"):
            if path.exists():
                found.setdefault(name, []).extend(json.loads(path.read_text())["rows"])
    return found


def find(rows: list[Row], workload: str, peer: str | None, sequences: int) -> Row | None:
    """The row; of several dtypes of the peer the one that is its best."""
    found = [
        row
        for row in rows
        if (row["workload"], row.get("peer"), row["sequences"]) == (workload, peer, sequences)
        and row["dtype"] == DTYPE
    ]
    return min(found, key=lambda row: row.get("ratio", 0.0), default=None)


def seconds(value: float) -> str:
    """In seconds from a tenth on, else in milliseconds."""
    return f"{figure(value)} s" if value >= 0.1 else f"{figure(value * 1e3)} ms"


def against(rows: list[Row]) -> list[list[str]]:
    """Cells of one class, a line a workload."""
    lines = []
    for (workload, peer), (text, name) in LINES.items():
        row = find(rows, workload, peer, SEQUENCES[workload])
        if row is None:
            lines.append([text, name, NONE, NONE, NONE])
            continue
        memory = UNASKED if row["memory_ratio"] is None else figure(row["memory_ratio"])
        if "peer_dtype" in row:
            name += f" in {row['peer_dtype']}"
        lines.append([text, name, seconds(row["seconds"]), ratio(row), memory])
    return lines


def comparisons(found: dict[str, list[Row]]) -> str:
    head = ["class", "workload", "against", "the engine takes", "× faster", "× its peak memory"]
    lines = []
    for name in CLASSES:
        if name not in found:
            lines.append([f"`{name}`", "all", *[NONE] * 4])
            continue
        lines += [[f"`{name}`", *cells] for cells in against(found[name])]
    return markdown(head, lines)


def part(phase: Row) -> str:
    """`12 s (21 %), 0.85 of the peak`"""
    told = f"{seconds(phase['seconds'])} ({phase['share'] * 100:.0f} %)"
    if "of_peak" in phase:
        return told + f", {figure(phase['of_peak'])} of peak"
    return told + (f", {figure(phase['of_copy'])} of copy" if "of_copy" in phase else "")


def by_phase(found: dict[str, list[Row]]) -> str:
    """A PPO iteration's phases, and what the small ops take in passes over their bytes."""
    names = [name for name in CLASSES if name in found]
    rows = {name: find(found[name], "phases", None, SEQUENCES["ppo"]) for name in names}
    ops = {name: {op: find(found[name], op, PASS, 512) for op in OPS} for name in names}
    lines = []
    for phase in PHASES:
        cells = [rows[n]["phases"][phase] if rows[n] is not None else None for n in names]  # type: ignore[index]
        lines.append([phase, *(NONE if cell is None else part(cell) for cell in cells)])
    for op, text in OPS.items():
        told = [
            NONE if ops[n][op] is None else f"{figure(ops[n][op]['ratio'])} passes" for n in names
        ]  # type: ignore[index]
        lines.append([f"{text}, 512 × 1024 tokens", *told])
    return markdown(["the engine alone", *(f"`{n}`" for n in names)], lines) if names else ""


def versions(found: dict[str, list[Row]]) -> str:
    """One line a class: the peers' versions."""
    lines = []
    for name, rows in found.items():
        told = dict.fromkeys(
            f"{package} {version}"
            for row in rows
            if row["workload"] in SEQUENCES
            for package, version in row.get("peer_versions", {}).items()
        )
        if told:
            lines.append(f"- `{name}`: " + ", ".join(told))
    return "\n".join(lines)


def render(folder: Path) -> str:
    found = load(folder)
    parts = [comparisons(found), versions(found), by_phase(found)]
    return "\n\n".join(text for text in parts if text)
