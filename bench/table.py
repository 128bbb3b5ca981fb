"""`python -m bench.table [DIR]`: the README's tables, from DIR/*-<class>.json of each class.

Rollouts are made here, training in training_table.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CLASSES = ("amx", "avx512", "avx2")
PEERS = {"hf": "transformers", "vllm": "vLLM", "llama": "llama.cpp"}
VERSION_OF = {"hf": "transformers", "vllm": "vllm", "llama": "llama.cpp"}
WORKLOADS = {  # (workload, sequences): what it says
    ("rollout", 1): "1 sequence",
    ("rollout", 16): "16 sequences",
    ("rollout", 64): "64 sequences",
    ("ragged", 256): "256 real prompts",
}
DTYPE = "bfloat16"  # the engine's storage in these tables
NONE = "not measured"
CANNOT = "–"  # llama.cpp's bench stops nowhere


def load(folder: Path) -> dict[str, Row]:
    """Results by class, of the files that are there."""
    paths = {c: folder / f"rollout-{c}.json" for c in CLASSES}
    return {c: json.loads(path.read_text()) for c, path in paths.items() if path.exists()}


def find(rows: list[Row], workload: str, sequences: int, peer: str | None = None) -> Row | None:
    """The row; of several dtypes of the peer the one that is its best."""
    found = [
        row
        for row in rows
        if (row["workload"], row["sequences"], row.get("peer")) == (workload, sequences, peer)
        and row["dtype"] == DTYPE
    ]
    return min(found, key=lambda row: row.get("ratio", 0.0), default=None)


def figure(value: float) -> str:
    """Three digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"


def ratio(row: Row | None) -> str:
    """`2.10 (2.02 to 2.31)`; without the range where there was one pair."""
    if row is None:
        return NONE
    low, high = figure(row["ratio_min"]), figure(row["ratio_max"])
    return figure(row["ratio"]) + (f" ({low} to {high})" if low != high else "")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def rollouts(results: dict[str, Row]) -> str:
    """Tokens a second, and how many times each peer's, by class and workload."""
    head = ["class", "workload", "tokens/s", *(f"× {name}" for name in PEERS.values())]
    lines = []
    for name in CLASSES:
        if name not in results:
            lines.append([f"`{name}`", "all", *[NONE] * (1 + len(PEERS))])
            continue
        rows = results[name]["rows"]
        for (workload, sequences), text in WORKLOADS.items():
            own = find(rows, workload, sequences)
            cells = [NONE if own is None else figure(own["tokens_per_s"])]
            for peer in PEERS:
                cannot = peer == "llama" and workload == "ragged"
                cells.append(CANNOT if cannot else ratio(find(rows, workload, sequences, peer)))
            lines.append([f"`{name}`", text, *cells])
    return markdown(head, lines)


def alone(results: dict[str, Row]) -> str:
    """What only the engine can be measured in."""
    head = ["class", "decode step over its matrix products alone, 1 / 16 / 64 rows"]
    head += ["8 samples that share their prompt of 512 over not shared", "start to first token, s"]
    lines = []
    for name in CLASSES:
        rows = results[name]["rows"] if name in results else []
        steps = [find(rows, "step", n, "products alone") for n in (1, 16, 64)]
        start = find(rows, "start", 1)
        told = NONE
        if start is not None:
            own, whole = start["seconds_from_pretrained"], start["seconds_process"]
            told = f"{figure(own)}, whole process {figure(whole)}"
        said = [NONE if s is None else figure(s["ratio"]) for s in steps]
        products = NONE if set(said) == {NONE} else " / ".join(said)
        shared = ratio(find(rows, "shared", 64, "prompts not shared"))
        lines.append([f"`{name}`", products, shared, told])
    return markdown(head, lines)


def machines(results: dict[str, Row]) -> str:
    """One line a class: processor, threads, and the peers with their versions and dtypes."""
    lines = []
    for name, found in results.items():
        shown = [find(found["rows"], *case, peer) for peer in PEERS for case in WORKLOADS]
        peers = [
            f"{PEERS[row['peer']]} {row['peer_versions'][VERSION_OF[row['peer']]]} in {row['peer_dtype']}"
            for row in shown
            if row is not None
        ]
        machine = found["machine"]
        told = [f"{machine['processor']}, {machine['threads']} threads", *dict.fromkeys(peers)]
        lines.append(f"- `{name}`: " + "; ".join(told))
    return "\n".join(lines)


def render(folder: Path) -> str:
    results = load(folder)
    parts = [rollouts(results), machines(results), alone(results)]
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    from bench import training_table  # which has this module's figures

    default = Path(__file__).with_name("results")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    print(render(folder), training_table.render(folder), sep="\n\n")


if __name__ == "__main__":
    main()
