"""Files of results: rows with a key each; a newer row takes the place of the older one with its key, others stay."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine import ops
from engine.demo.closing import processor
from engine.run.session import versions

Row = dict[str, Any]
KEY = ("workload", "sequences", "context", "dtype", "peer", "peer_dtype")


def key(row: Row) -> tuple[Any, ...]:
    """What makes two rows the same measurement; what a row does not have is None."""
    return tuple(row.get(name) for name in KEY)


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Old rows in their places, replaced where there is a newer one; then the others."""
    rows = {key(row): row for row in old}
    rows.update((key(row), row) for row in new)
    return list(rows.values())


def rounded(value: Any) -> Any:
    """Four digits are more than any of these figures has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    return value


def header(limits: Row) -> Row:
    """What the last run was made with."""
    return {
        "cpu_class": ops.cpu_class(),
        "machine": {"processor": processor(), **limits},
        "versions": versions(),
    }


def write(path: Path, rows: list[Row], limits: Row) -> None:
    """Machine and versions are those of the last run; every row has the commit and the day it was measured on."""
    head = header(limits)
    commit = head["versions"].get("commit", "unknown")
    stamp = {"commit": commit, "date": datetime.now(UTC).date().isoformat()}
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    result = {**head, "rows": merged(old, [{**rounded(row), **stamp} for row in rows])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")
