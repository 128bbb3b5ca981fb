"""Rows from JSON lines, parquet, local folders and the hub, read lazily and checked one by one.

A bad row is an error with file, line and reason, or is left out and counted by reason; nothing is
dropped without a count.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count
from math import floor, isfinite
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, TypeVar, cast

from engine.data.saved import is_saved, read_saved, split_names
from engine.errors import DataError

T = TypeVar("T")
S = TypeVar("S")
Columns = dict[str, Any]
BadRows = Literal["error", "skip"]

JSON_LINES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
SUFFIXES = (*JSON_LINES, ".parquet")
SPLIT_NAMES = ("train", "validation", "valid", "val", "eval", "test", "dev")
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # no rows in it
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
EXAMPLES_SHOWN = 5
LINE_BYTES = 2**26  # a longer line is no row; a file without line ends must not fill the memory
ARRAY_BYTES = 2**30  # a larger array is not read whole


@dataclass(frozen=True)
class DataSource:
    """One data set of a mixture."""

    path: str
    """JSONL (also .gz), parquet, a local folder, or a hub id."""
    split: str = "train"
    """Split of a hub data set or of a folder; a single file is read whole."""
    name: str | None = None
    """Configuration of a hub data set."""
    weight: float = 1.0
    """Share of the rows that one pass takes: 0.5 every other row, 2.0 every row twice."""

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight > 0):
            reason = f"weight: got {self.weight}; want a finite number above 0"
            raise DataError(self.path or "data source", reason)


@dataclass(frozen=True)
class Row:
    """One row and where it stands. A row that could not be read carries the reason instead."""

    where: str
    source: str
    columns: Columns
    problem: BadRow | None = None


class BadRow(Exception):
    """A row cannot be used. ``kind`` is the stable name it is counted under.

    ``filtered`` marks rows that a length filter takes out: counted, never an error.
    """

    def __init__(self, kind: str, reason: str, filtered: bool = False) -> None:
        super().__init__(reason)
        self.kind = kind
        self.filtered = filtered


@dataclass(frozen=True)
class Report:
    """What became of the rows of a data set."""

    read: int
    """Rows read."""
    kept: int
    """Items in the data set, rows taken twice counted twice."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    not_drawn: int = 0
    """Rows that a mixture weight below 1 leaves out."""
    truncated: int = 0
    """Rows cut at the maximal length."""
    examples: tuple[str, ...] = ()
    """The first rows left out as bad: file, line and reason."""

    def lines(self) -> list[str]:
        """The report as lines for a log."""
        lines = [f"{self.read} rows read, {self.kept} kept"]
        lines += [f"  left out, {kind}: {count}" for kind, count in sorted(self.skipped.items())]
        if self.not_drawn:
            lines.append(f"  left out by mixture weight: {self.not_drawn}")
        if self.truncated:
            lines.append(f"  cut at the maximal length: {self.truncated}")
        return lines + [f"  e.g. {example}" for example in self.examples]


@dataclass(frozen=True)
class Dataset(Sequence[T], Generic[T]):
    """The usable rows of one or more sources, in the order of the files."""

    items: tuple[T, ...]
    report: Report

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]


def collect(
    sources: Sequence[DataSource | str],
    parse: Callable[[Row], T],
    bad_rows: BadRows = "error",
    truncated: Callable[[], int] = lambda: 0,
) -> Dataset[T]:
    """Read all sources and parse every row; ``parse`` raises :class:`BadRow` for one it refuses.

    Raises:
        DataError: the first bad row with ``bad_rows="error"``; no usable row at all; no source.
    """
    if bad_rows not in ("error", "skip"):
        raise DataError("bad_rows", f"got {bad_rows!r}; want 'error' or 'skip'")
    given = [DataSource(source) if isinstance(source, str) else source for source in sources]
    if wrong := [str(source) for source in given if not isinstance(source, DataSource)]:
        raise DataError("data source", f"got {wrong[0]}; want a path or DataSource(path, split, name, weight)")
    items: list[T] = []
    skipped: Counter[str] = Counter()
    examples: list[str] = []
    read = not_drawn = 0
    for source in given:
        weight = Fraction(source.weight).limit_denominator(10**6)
        for number, row in enumerate(read_rows(source)):
            read += 1
            times = floor((number + 1) * weight) - floor(number * weight)
            if times == 0:
                not_drawn += 1
                continue
            try:
                if row.problem is not None:
                    raise row.problem
                items.extend([parse(row)] * times)
            except BadRow as bad:
                if bad_rows == "error" and not bad.filtered:
                    raise DataError(row.where, str(bad), bad.kind) from bad
                skipped[bad.kind] += 1
                if not bad.filtered and len(examples) < EXAMPLES_SHOWN:
                    examples.append(f"{row.where}: {bad}")
    report = Report(read, len(items), dict(skipped), not_drawn, truncated(), tuple(examples))
    if not items:
        where = ", ".join(source.path for source in given) or "data"
        raise DataError(where, "no usable row\n" + "\n".join(report.lines()), "no rows")
    return Dataset(tuple(items), report)


def read_rows(source: DataSource) -> Iterator[Row]:
    """The rows of one source, lazily: a file, a folder, or a hub id through ``datasets``.

    Raises:
        DataError: nothing is there, or the file as a whole cannot be read.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        yield from read_file(path)
    elif path.is_dir():
        yield from read_folder(path, source)
    elif looks_local(source.path):
        raise DataError(source.path, f"no such file or folder; want {', '.join(SUFFIXES)}")
    else:
        yield from read_hub(source)


def looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as a file, not as a hub id."""
    return path.startswith((".", "/", "~")) or path.endswith(SUFFIXES) or not HUB_ID.fullmatch(path)


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a JSON-lines or parquet file, or of a file with one JSON array."""
    if path.suffix == ".json" and is_array(path):
        yield from read_json_array(path)
    elif path.name.endswith(JSON_LINES):
        yield from read_json_lines(path)
    elif path.suffix == ".parquet":
        yield from read_parquet(path)
    else:
        raise DataError(str(path), f"unknown kind of file; want one of {', '.join(SUFFIXES)}")


def read_json_lines(path: Path) -> Iterator[Row]:
    """One object a line; blank lines are no rows. A byte-order mark before a line is ignored."""
    with open_binary(path) as lines:
        for number in count(1):
            try:
                line = lines.readline(LINE_BYTES + 1)
                rest = line
                while len(rest) > LINE_BYTES:
                    rest = lines.readline(LINE_BYTES + 1)
            except (OSError, EOFError, zlib.error) as error:
                reason = f"the file breaks off here: {error}"
                raise DataError(f"{path}:{number}", reason, "broken file") from error
            if not line:
                return
            line = line.removeprefix(codecs.BOM_UTF8)  # not of the first alone: files are joined, marks and all
            if len(line) > LINE_BYTES:
                bad = BadRow("broken line", f"it has more than {LINE_BYTES} bytes")
                yield Row(f"{path}:{number}", source_label(path), {}, bad)
            elif line.strip():
                yield parse_line(line, f"{path}:{number}", source_label(path))


def open_binary(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def parse_line(line: bytes, where: str, source: str) -> Row:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Row(where, source, {}, BadRow("broken line", f"not UTF-8: {error}"))
    except (ValueError, RecursionError) as error:
        return Row(where, source, {}, BadRow("broken line", f"not JSON: {error}; want an object a line"))
    return row_of(value, "the line", where, source)


def row_of(value: Any, what: str, where: str, source: str) -> Row:
    if not isinstance(value, dict):
        reason = f"{what} holds a {type(value).__name__}; want an object {{column: value}}"
        return Row(where, source, {}, BadRow("broken line", reason))
    return Row(where, source, value)


def is_array(path: Path) -> bool:
    """Whether the file begins as a JSON array does: a line of JSON lines is an object."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def read_json_array(path: Path) -> Iterator[Row]:
    """The objects of a file that is one array of them.

    Raises:
        DataError: it is not JSON, or too large to be read whole.
    """
    if path.stat().st_size > ARRAY_BYTES:
        reason = f"one JSON array of more than {ARRAY_BYTES} bytes; write JSON lines, an object a line"
        raise DataError(str(path), reason, "broken file")
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = f"begins as one JSON array, but is none: {error}; want an array of objects, or an object a line"
        raise DataError(str(path), reason, "broken file") from error
    for number, item in enumerate(items, start=1):
        yield row_of(item, "the item", f"{path}:item {number}", source_label(path))


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a parquet file, a batch of them in memory at a time."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=512):
            for columns in batch.to_pylist():
                number += 1
                yield Row(f"{path}:row {number}", source_label(path), columns)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last three are Arrow's too
        raise DataError(str(path), f"not a parquet file: {error}", "broken file") from error


def read_folder(folder: Path, source: DataSource) -> Iterator[Row]:
    """A folder of data files, or one that ``datasets`` saved.

    Files whose name (or folder below ``folder``) names the split are read, sorted by path; if no
    file names any split, all of them are the train split. Hidden files and folders are nobody's data.

    Raises:
        DataError: no data file, none of the split, or one that names no split where others do.
    """
    if is_saved(folder):
        splits_there = split_names(folder)
        if splits_there is not None and source.split not in splits_there:
            raise no_split(str(folder), source.split, splits_there)
        rows = read_saved(folder if splits_there is None else folder / source.split)
        yield from number_rows(rows, f"{folder}[{source.split}]", folder.name)
        return
    if not (files := data_files(folder)):
        raise DataError(str(folder), f"no data files in this folder; want {', '.join(SUFFIXES)}")
    splits = {path: splits_of(path.relative_to(folder)) for path in files}
    named = set().union(*splits.values())
    chosen = [path for path in files if source.split in splits[path]]
    if not named and source.split == "train":
        chosen = files
    if not chosen:
        raise no_split(str(folder), source.split, sorted(named) or ["train"])
    if named and (unnamed := [path for path in files if not splits[path]]):
        reason = f"names no split, but other files of {folder} do ({', '.join(sorted(named))})"
        raise DataError(str(unnamed[0]), f"{reason}; rename it, move it out, or give the files one by one", "no split")
    for path in chosen:
        yield from read_file(path)


def data_files(folder: Path) -> list[Path]:
    """The files below ``folder`` that may hold rows, sorted by path."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES) and p.name not in METADATA)
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def splits_of(path: Path) -> set[str]:
    """The splits that a path names as a whole word: ``data/train-00000-of-00002.parquet``."""
    words = re.split(r"[^A-Za-z0-9]+", str(path).lower())
    return {name for name in SPLIT_NAMES if name in words}


def no_split(where: str, split: str, known: Sequence[str]) -> DataError:
    return DataError(where, f"no split {split!r}; there are {', '.join(known)}", "no split")


def read_hub(source: DataSource) -> Iterator[Row]:
    """A data set of the hub. Repositories that need their own code are refused."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(source.path, source.name, split=source.split)
    except (ValueError, OSError, RuntimeError, ImportError, DatasetsError) as error:
        hint = "give a file or folder that exists, or a hub id with its split and configuration"
        raise DataError(source.path, f"cannot be loaded from the hub ({error}); {hint}") from error
    where = f"{source.path}[{source.split}]"
    yield from number_rows(loaded, where, source.path.rpartition("/")[2])


def number_rows(rows: Any, where: str, source: str) -> Iterator[Row]:
    for number, columns in enumerate(rows, start=1):
        yield Row(f"{where}:row {number}", source, dict(columns))


def source_label(path: Path) -> str:
    """A file's name without its suffixes."""
    return next(path.name.removesuffix(s) for s in SUFFIXES if path.name.endswith(s))


def row_source(row: Row) -> str:
    """Where a row comes from: its own ``source`` column, or else the name of its data set."""
    value = row.columns.get("source")
    return value if isinstance(value, str) and value else row.source


def require_column(columns: Columns, *names: str) -> str:
    """The first of ``names`` that a row has with a value.

    Raises:
        BadRow: it has none of them; the message lists what it has.
    """
    for name in names:
        if columns.get(name) is not None:
            return name
    have = ", ".join(sorted(columns)) or "none"
    raise BadRow("missing column", f"no column {' or '.join(map(repr, names))}; it has {have}")


def check_text(value: Any, column: str) -> str:
    """A string that can be encoded.

    Raises:
        BadRow: another type, or half of a surrogate pair.
    """
    if not isinstance(value, str):
        reason = f"{column}: got {type(value).__name__} ({str(value)[:40]!r}), want a string"
        raise BadRow("not a string", reason)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("not a string", f"{column}: not valid Unicode: {error}") from error
    return value


def check_length(tokens: int, limit: int | None, what: str, filtered: bool = False) -> None:
    """Refuse more than ``limit`` tokens.

    Raises:
        BadRow: too long; with ``filtered`` it is counted and never an error.
    """
    if limit is not None and tokens > limit:
        reason = f"{what} has {tokens} tokens, more than the {limit} allowed"
        raise BadRow("too long", reason, filtered)
