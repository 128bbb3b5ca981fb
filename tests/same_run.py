"""Whether two run folders hold the same run: every file's bytes, times aside."""

from __future__ import annotations

import json
from pathlib import Path

KEPT_OUT = frozenset({"tensorboard", "events.jsonl", "config.yaml", ".lock"})  # times, or the folder's own name
MINE = ("timing/", "perf/")


def timeless(line: str) -> dict[str, object]:
    """A line of metrics.jsonl without what a clock said."""
    return {k: v for k, v in json.loads(line).items() if k != "time" and not k.startswith(MINE)}


def contents(folder: Path) -> dict[str, object]:
    """Every file of a run by its path: bytes, and metrics without times."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        if name.parts[0] in KEPT_OUT or name.parts[0].startswith("previous-"):
            continue
        if name.name == "metrics.jsonl":
            found[str(name)] = [timeless(line) for line in path.read_text().splitlines()]
        else:
            found[str(name)] = path.read_bytes()
    return found


def differences(folder: Path, whole: Path) -> list[str]:
    """What is in one of the folders only, or not the same in both; nothing where they hold the same run."""
    ours, theirs = contents(folder), contents(whole)
    found = [f"{name}: only in {folder}" for name in ours if name not in theirs]
    found += [f"{name}: only in {whole}" for name in theirs if name not in ours]
    both = [name for name in ours if name in theirs]
    return [*found, *(f"{name}: differs" for name in both if ours[name] != theirs[name])]


def assert_same(folder: Path, whole: Path) -> None:
    different = differences(folder, whole)
    assert not different, f"{folder}: not as in the undisturbed run: {different}"
