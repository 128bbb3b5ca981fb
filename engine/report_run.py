"""A run folder read back: curves, samples, configuration, versions, journal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.run.log import EVENTS, METRICS, RESERVED, SAMPLES, read_records

COLORS = ("#2f6fb7", "#d0622b", "#2e8b6d", "#8659ad", "#b08a1e", "#c2476f", "#4f6272", "#5b9e2e")


@dataclass(frozen=True)
class Series:
    """One metric of one run: value against step, finite values only."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    times: NDArray[np.float64]

    def ends(self) -> tuple[float, float]:
        """Means over the first and the last twentieth of the points (at least one each)."""
        width = max(1, len(self.values) // 20)
        return float(self.values[:width].mean()), float(self.values[-width:].mean())


@dataclass(frozen=True)
class Run:
    """What the report shows of one run folder. `notes` says what could not be read or drawn."""

    name: str
    folder: Path
    color: str
    stage: str
    series: dict[str, Series]
    samples: tuple[dict[str, Any], ...]
    config: dict[str, str]
    versions: dict[str, str]
    events: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def last_step(self) -> int:
        return max(int(s.steps[-1]) for s in self.series.values())

    @property
    def seconds(self) -> float:
        """From the first record to the last, pauses between a stop and a resume included."""
        starts = [s.times[0] for s in self.series.values()]
        ends = [s.times[-1] for s in self.series.values()]
        return float(max(ends) - min(starts))

    def at_last(self, names: Sequence[str]) -> dict[str, float]:
        """Those of the metrics that are there at the last step of any of them: what one evaluation said."""
        found = {name: self.series[name] for name in names if name in self.series}
        last = max((series.steps[-1] for series in found.values()), default=None)
        return {name: float(series.values[-1]) for name, series in found.items() if series.steps[-1] == last}


def read_runs(folders: Sequence[Path | str]) -> list[Run]:
    """The runs, in the given order, with names that differ. Raises `EngineError` as `read_run`."""
    paths = [Path(folder).resolve() for folder in folders]
    return [
        read_run(path, name, COLORS[i % len(COLORS)])
        for i, (path, name) in enumerate(zip(paths, _names(paths), strict=True))
    ]


def read_run(folder: Path, name: str, color: str) -> Run:
    """Raises `EngineError` when there is no folder, or no metrics in it."""
    if not folder.is_dir():
        raise EngineError(f"{folder}: no such folder; want the output_dir of an engine.train run")
    path = folder / METRICS
    lines, broken = read_records(path) if path.is_file() else ([], 0)
    records = [line for line in lines if _is_step(line.get("step")) and _is_finite(line.get("time"))]
    notes = [f"{METRICS}: {broken} lines are not whole and were left out"] if broken else []
    if len(records) < len(lines):
        notes.append(f"{METRICS}: {len(lines) - len(records)} lines have no step or no time and were left out")
    series, non_finite = _series(records)
    if not series:
        what = "holds no record with a finite metric" if path.is_file() else "is missing"
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise EngineError(
            f"{folder}: {METRICS} {what}, so there is nothing to report (there is: {there}); "
            "want the output_dir of an engine.train run that has done at least one step"
        )
    if non_finite:
        shown = ", ".join(f"{name} ({count})" for name, count in sorted(non_finite.items()))
        notes.append(f"values that are not finite are not drawn: {shown}")
    samples, sample_notes = _samples(folder / SAMPLES)
    versions, version_notes = _versions(folder / "versions.json")
    config, config_notes = _config(folder / "config.yaml")
    events = read_records(folder / EVENTS)[0] if (folder / EVENTS).is_file() else []
    return Run(
        name=name,
        folder=folder,
        color=color,
        stage=versions.pop("stage", "run"),
        series=series,
        samples=tuple(samples),
        config=config,
        versions=versions,
        events=tuple(events),
        notes=(*notes, *sample_notes, *version_notes, *config_notes),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names; where two are the same, with as many parents as tell them apart."""
    for depth in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({i})" for i, path in enumerate(paths, start=1)]  # one folder given twice


def _is_step(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # false for nan too


def _series(records: Sequence[dict[str, Any]]) -> tuple[dict[str, Series], dict[str, int]]:
    """The metrics by name, and how often each was not finite."""
    points: dict[str, list[tuple[int, float, float]]] = {}
    non_finite: dict[str, int] = {}
    for record in records:
        named = record.get("non_finite")
        for name in map(str, named if isinstance(named, list) else ()):
            non_finite[name] = non_finite.get(name, 0) + 1
        for name, value in record.items():
            if name not in RESERVED and _is_finite(value):
                points.setdefault(name, []).append((record["step"], value, record["time"]))
    series = {}
    for name, found in points.items():
        steps, values, times = zip(*found, strict=True)
        series[name] = Series(
            np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64), np.array(times)
        )
    return series, non_finite


def _samples(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All sample rows by step; rows that are no samples are counted in a note."""
    rows: list[dict[str, Any]] = []
    bad = 0
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else []:
        match = re.fullmatch(r"([A-Za-z0-9_]+)-(\d+)", path.stem)
        found, broken = read_records(path)
        bad += broken
        for row in found:
            if match:
                row = {"step": int(match[2]), "phase": match[1]} | row
            if isinstance(row.get("completion"), str) and _is_step(row.get("step")):
                rows.append(row)
            else:
                bad += 1
    rows.sort(key=lambda row: int(row["step"]))
    return rows, [f"samples: {bad} rows are not samples and were left out"] if bad else []


def _mapping(path: Path, load: Callable[[str], object]) -> tuple[dict[Any, Any], list[str]]:
    """What a file of keys and values holds, and a note if that cannot be read: a copy may be damaged."""
    if not path.is_file():
        return {}, []
    try:
        found = load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        return {}, [f"{path.name}: cannot be read and was left out ({reason})"]
    if isinstance(found, dict):
        return found, []
    return {}, [f"{path.name}: holds no keys and values and was left out"]


def _versions(path: Path) -> tuple[dict[str, str], list[str]]:
    found, notes = _mapping(path, json.loads)
    return {str(key): str(value) for key, value in found.items()}, notes


def _config(path: Path) -> tuple[dict[str, str], list[str]]:
    """config.yaml with nested keys joined by dots, values as YAML writes them on one line."""
    flat: dict[str, str] = {}

    def add(prefix: str, value: object) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = value if isinstance(value, str) else json.dumps(value, default=str)

    found, notes = _mapping(path, yaml.safe_load)
    for key, value in found.items():
        add(str(key), value)
    return flat, notes
