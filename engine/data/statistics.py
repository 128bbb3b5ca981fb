"""Statistics of prompt sets in the form of the paper's tables 1, 6, 8, 9 and 10."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PromptRecord:
    """What is counted of one prompt."""

    length: int
    """Tokens."""
    source: str
    use_case: str | None
    customer: str | None
    """User or organization, if the row names one."""


@dataclass(frozen=True)
class Lengths:
    """Spread of a list of lengths; the standard deviation is over the population."""

    count: int
    mean: float
    std: float
    min: int
    quartile_25: float
    median: float
    quartile_75: float
    max: int


def lengths_of(values: Sequence[int]) -> Lengths | None:
    """The spread of ``values``; ``None`` without any."""
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    low, middle, high = (float(q) for q in np.percentile(array, [25, 50, 75]))
    mean, std = float(array.mean()), float(array.std())
    return Lengths(len(values), mean, std, min(values), low, middle, high, max(values))


def statistics(splits: Mapping[str, Sequence[PromptRecord]]) -> dict[str, Any]:
    """All tables as plain values, by split and over all of them ("all").

    Prompts that name no customer are left out of the prompts per customer, and those without a use
    case are counted as "(none)".
    """
    everything = [record for records in splits.values() for record in records]
    return {"splits": {name: of_split(r) for name, r in {**splits, "all": everything}.items()}}


def of_split(records: Sequence[PromptRecord]) -> dict[str, Any]:
    """The tables of one split."""
    by_use_case: dict[str, list[int]] = {}
    for record in records:
        by_use_case.setdefault(record.use_case or "(none)", []).append(record.length)
    per_customer = Counter(r.customer for r in records if r.customer is not None)
    return {
        "prompts": len(records),
        "by_source": dict(Counter(record.source for record in records).most_common()),
        "customers": len(per_customer),
        "prompts_per_customer": plain(lengths_of(list(per_customer.values()))),
        "prompt_tokens": plain(lengths_of([record.length for record in records])),
        "use_cases": {
            name: {"share": len(values) / len(records), **(plain(lengths_of(values)) or {})}
            for name, values in sorted(by_use_case.items(), key=lambda item: -len(item[1]))
        },
    }


def plain(lengths: Lengths | None) -> dict[str, float] | None:
    """A :class:`Lengths` as a mapping."""
    return None if lengths is None else asdict(lengths)


def tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as (title, header, rows of cells), one a table of the paper."""
    splits: Mapping[str, Any] = report["splits"]
    sources = sorted({source for part in splits.values() for source in part["by_source"]})
    sizes = [
        [source, *(str(part["by_source"].get(source, 0)) for part in splits.values())]
        for source in sources
    ]
    sizes.append(["all", *(str(part["prompts"]) for part in splits.values())])
    customers = [
        [name, str(part["customers"]), *spread(part["prompts_per_customer"])]
        for name, part in splits.items()
    ]
    lengths = [[name, *spread(part["prompt_tokens"])] for name, part in splits.items()]
    use_cases = [
        [name, str(case["count"]), f"{100 * case['share']:.1f} %", *spread(case)]
        for name, case in splits["all"]["use_cases"].items()
    ]
    header = ["mean", "std", "min", "25 %", "50 %", "75 %", "max"]
    return [
        ("Prompts by source and split", ["source", *splits], sizes),
        ("Prompts per customer", ["split", "customers", *header], customers),
        ("Prompt length in tokens", ["split", *header], lengths),
        (
            "Use cases, with their prompt lengths",
            ["use case", "prompts", "share", *header],
            use_cases,
        ),
    ]


def spread(lengths: Mapping[str, Any] | None) -> list[str]:
    """The cells of a :class:`Lengths`; dashes where nothing was counted."""
    if lengths is None:
        return ["–"] * 7
    keys = ("mean", "std", "min", "quartile_25", "median", "quartile_75", "max")
    return [
        f"{lengths[key]:.4g}" if isinstance(lengths[key], float) else str(lengths[key])
        for key in keys
    ]
