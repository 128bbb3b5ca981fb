"""The prompt pipeline of the paper as functions [InstructGPT 3.2, A.2, A.3].

    dedup by long common prefix -> cap per user or organization -> split by user or organization
    -> personal data out of the training split -> length filter

Thresholds the paper does not give are ours and say so. Rows are the objects of the input with all
their columns; every function is pure and gives positions or new rows.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.data.chat import Talk, TextEncoder, check_prompt, replace_text
from engine.data.rows import BadRow, BadRows, Columns, Dataset, DataSource, Row, collect, row_source
from engine.data.split import assign_split
from engine.data.statistics import PromptRecord, statistics
from engine.errors import DataError

PIIFilter = Callable[[str], str | None]


@dataclass(frozen=True)
class PrepareSettings:
    """What the pipeline does to the rows."""

    min_prefix: int = 128
    """Prompts that share so many first characters are duplicates, and equal ones (our value)."""
    cap: int = 200
    """Most prompts of one user or organization [InstructGPT 3.2]."""
    validation: float = 0.1
    """Share of users whose prompts are validation."""
    test: float = 0.0
    """Share of users whose prompts are the test set."""
    seed: int = 0
    """Keys the split."""
    user_column: str = "user_id"
    organization_column: str = "org_id"
    use_case_column: str = "use_case"
    pii: str | None = None
    """``module:function``, see :func:`apply_pii`."""
    max_tokens: int = 1024
    """Longest prompt, in tokens of the tokenizer [InstructGPT C]."""
    bad_rows: BadRows = "error"
    """A row that cannot be read or encoded is an error, or is left out and counted."""

    def __post_init__(self) -> None:
        for name in ("min_prefix", "cap", "max_tokens"):
            if getattr(self, name) < 1:
                raise DataError(name, f"got {getattr(self, name)}; want at least 1")
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            given = f"validation {self.validation} and test {self.test}"
            raise DataError(
                "split shares", f"got {given}; want shares >= 0 that leave some to train"
            )

    @property
    def shares(self) -> dict[str, float]:
        """The splits in order, with their shares."""
        train = 1.0 - self.validation - self.test
        return {"train": train, "validation": self.validation, "test": self.test}


@dataclass(frozen=True)
class PromptRow:
    """One row of the pipeline: its columns as read, and its prompt."""

    columns: Columns
    talk: Talk
    source: str
    where: str


@dataclass(frozen=True)
class Prepared:
    """The splits, what each step left out, and the statistics of what is left."""

    splits: Mapping[str, tuple[PromptRow, ...]]
    removed: Mapping[str, int]
    statistics: Mapping[str, Any]


def read_prompts(
    sources: Sequence[DataSource | str], bad_rows: BadRows = "error"
) -> Dataset[PromptRow]:
    """Rows with ``prompt`` or ``messages``, all columns kept."""

    def parse(row: Row) -> PromptRow:
        talk = check_prompt(row.columns, "prompt")
        return PromptRow(row.columns, talk, row_source(row), row.where)

    return collect(sources, parse, bad_rows)


def prepare(rows: Sequence[PromptRow], settings: PrepareSettings, tokenizer: Any) -> Prepared:
    """The whole pipeline. The result is a function of rows, settings and tokenizer alone.

    Raises:
        DataError: the PII filter is not there or gives something else than text or ``None``, or a
            row that the tokenizer's template refuses with ``bad_rows="error"``.
    """
    removed: Counter[str] = Counter()
    rows = narrow(rows, distinct_prompts(texts_of(rows), settings.min_prefix), removed, "duplicate")
    groups = owner_groups(rows, settings)
    kept = capped(groups, settings.cap)
    rows = narrow(rows, kept, removed, "over the cap of its user or organization")
    groups = [groups[i] for i in kept]
    splits: dict[str, list[PromptRow]] = {name: [] for name in settings.shares}
    for row, group in zip(rows, groups, strict=True):
        splits[assign_split(group, settings.shares, settings.seed)].append(row)
    if settings.pii is not None:
        cleaned = apply_pii(splits["train"], load_function(settings.pii))
        removed["personal data"] += len(splits["train"]) - len(cleaned)
        splits["train"] = cleaned
    encoder = TextEncoder(tokenizer)
    records: dict[str, list[PromptRecord]] = {}
    for name, part in splits.items():
        encoded, lengths = token_lengths(part, encoder, settings.bad_rows, removed)
        fits = [i for i, length in enumerate(lengths) if length <= settings.max_tokens]
        splits[name] = narrow(encoded, fits, removed, "too long")
        owners = owner_groups(splits[name], settings)
        records[name] = [
            record_of(row, lengths[i], owner, settings)
            for i, row, owner in zip(fits, splits[name], owners, strict=True)
        ]
    parts = {name: tuple(part) for name, part in splits.items()}
    return Prepared(parts, dict(removed), statistics(records))


def token_lengths(
    rows: Sequence[PromptRow], encoder: TextEncoder, bad_rows: BadRows, removed: Counter[str]
) -> tuple[list[PromptRow], list[int]]:
    """The rows that the tokenizer's template takes, and their lengths in tokens.

    Raises:
        DataError: the template refuses a row, with ``bad_rows="error"``.
    """
    encoded, lengths = [], []
    for row in rows:
        try:
            lengths.append(len(encoder.prompt(row.talk)))
            encoded.append(row)
        except BadRow as bad:
            if bad_rows == "error":
                raise DataError(row.where, str(bad), bad.kind) from bad
            removed[bad.kind] += 1
    return encoded, lengths


def texts_of(rows: Sequence[PromptRow]) -> list[str]:
    return [row.talk.plain for row in rows]


def narrow(
    rows: Sequence[PromptRow], kept: Sequence[int], removed: Counter[str], reason: str
) -> list[PromptRow]:
    """The rows kept by a step; the others are counted under its reason."""
    removed[reason] += len(rows) - len(kept)
    return [rows[i] for i in kept]


def distinct_prompts(texts: Sequence[str], min_prefix: int = 128) -> list[int]:
    """Positions of the prompts left after removing duplicates, the first of each kept.

    Two prompts are duplicates when they share a prefix of at least ``min_prefix`` characters, or
    are equal; white space around a prompt does not count. So "Write" takes no "Write a poem" with
    it. The paper says "prompts that share a long common prefix" [3.2]; the threshold is ours.
    """
    first: dict[str, int] = {}
    for position, text in enumerate(texts):
        first.setdefault(text.strip()[:min_prefix], position)
    return list(first.values())


def owner_groups(rows: Sequence[PromptRow], settings: PrepareSettings) -> list[str]:
    """The owner of each row: users and organizations that share a row are one owner.

    A user of two organizations joins them, so that neither spans two splits. A row that names
    nobody is its own owner, keyed by its prompt. The name of an owner does not depend on the order
    of rows: it is the smallest of the names it joins.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    named = []
    for row in rows:
        names = [
            f"{kind}:{row.columns[column]}"
            for kind, column in (
                ("organization", settings.organization_column),
                ("user", settings.user_column),
            )
            if row.columns.get(column) not in (None, "")
        ]
        names = names or [f"prompt:{row.talk.plain}"]
        named.append(names[0])
        first, *others = sorted({root(name) for name in names})
        for other in others:
            parent[other] = first
    return [root(name) for name in named]


def capped(groups: Sequence[str], cap: int = 200) -> list[int]:
    """Positions of the rows left when each owner keeps its first ``cap`` rows."""
    counts: Counter[str] = Counter()
    kept = []
    for position, group in enumerate(groups):
        counts[group] += 1
        if counts[group] <= cap:
            kept.append(position)
    return kept


def load_function(path: str) -> PIIFilter:
    """``module:function`` -> the function.

    Raises:
        DataError: it cannot be imported or called.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        reason = f"cannot be imported ({error}); want module:function on the Python path"
        raise DataError(path, reason) from error
    if not callable(function):
        raise DataError(path, f"is a {type(function).__name__}, want a function")
    return function  # type: ignore[no-any-return]


def apply_pii(rows: Sequence[PromptRow], function: PIIFilter) -> list[PromptRow]:
    """Run a filter for personal data over the prompts of the training split.

    ``function(text) -> str | None`` gets ``prompt`` and every message's content and returns the
    text to keep (masked or as it is), or ``None`` to leave the whole row out, as does a text of which
    nothing is left. Other columns are not looked at.

    Raises:
        DataError: it returns something else.
    """
    cleaned = []
    for row in rows:
        dropped = False

        def clean(text: str) -> str:
            nonlocal dropped
            result = function(text)
            if result is not None and not isinstance(result, str):
                kind = type(result).__name__
                raise DataError("PII filter", f"returned {kind}; want the text to keep or None")
            dropped = dropped or result is None or (not result and bool(text))
            return result or text

        changed = {
            key: replace_text(value, clean) if key in ("prompt", "messages") else value
            for key, value in row.columns.items()
        }
        if not dropped:
            talk = check_prompt(changed, "prompt")
            cleaned.append(replace(row, columns=changed, talk=talk))
    return cleaned


def record_of(row: PromptRow, length: int, owner: str, settings: PrepareSettings) -> PromptRecord:
    """What the statistics need to know of a row."""
    use_case = row.columns.get(settings.use_case_column)
    return PromptRecord(
        length=length,
        source=row.source,
        use_case=str(use_case) if use_case is not None else None,
        customer=None if owner.startswith("prompt:") else owner,
    )


def expand_few_shot(
    instruction: str, pairs: Sequence[tuple[str, str]], separator: str = "\n\n"
) -> list[dict[str, str]]:
    """K query/response pairs of one instruction -> K rows with K - 1 shots each [A.1, A.3].

    Row k asks query k after the instruction and the other pairs in their order; its completion is
    response k. Columns: ``prompt``, ``completion``.

    Raises:
        DataError: fewer than 2 pairs, or an empty query or response.
    """
    if len(pairs) < 2:
        raise DataError("few-shot prompt", f"got {len(pairs)} pairs; want at least 2")
    if not all(query.strip() and response.strip() for query, response in pairs):
        raise DataError("few-shot prompt", "a query or a response is empty")
    rows = []
    for number, (query, response) in enumerate(pairs):
        shots = [f"{q}\n{r}" for i, (q, r) in enumerate(pairs) if i != number]
        prompt = separator.join([instruction, *shots, query])
        rows.append({"prompt": prompt + "\n", "completion": response})
    return rows


def json_line(columns: Columns) -> str:
    """A row as a line; readable text where it can be, escapes where it holds half a surrogate."""
    line = json.dumps(columns, ensure_ascii=False, default=str)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(columns, default=str)
    return line + "\n"


def write_prepared(prepared: Prepared, folder: Path) -> list[Path]:
    """Write ``<split>.jsonl`` for each split with rows, and ``statistics.json``; returns the paths.

    Each file is written aside and renamed.

    Raises:
        DataError: one of them is there already.
    """
    texts = {
        f"{name}.jsonl": "".join(json_line(row.columns) for row in rows)
        for name, rows in prepared.splits.items()
        if rows
    }
    report = {"removed": dict(prepared.removed), **prepared.statistics}
    texts["statistics.json"] = json.dumps(report, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in texts]
    for path in paths:
        if path.exists():
            raise DataError(str(path), "is there already; give another --output or remove it")
    for path, text in zip(paths, texts.values(), strict=True):
        aside = path.with_name(path.name + ".part")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    return paths
