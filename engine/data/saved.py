"""A folder that `datasets` saved, read as what it is: Arrow streams that a JSON file names.

Read without that library, whose column types may open files that a row names; a row's values are data here, and the
files are those of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import DataError

SPLITS, STATE = "dataset_dict.json", "state.json"


def is_saved(folder: Path) -> bool:
    return (folder / SPLITS).is_file() or (folder / STATE).is_file()


def split_names(folder: Path) -> list[str] | None:
    """The splits of a saved dictionary of data sets; None of a single data set.

    Raises:
        DataError: the file that lists them is not what `datasets` writes.
    """
    if not (folder / SPLITS).is_file():
        return None
    return [plain_name(folder / SPLITS, name) for name in listed(folder / SPLITS, "splits")]


def read_saved(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of one saved data set, a batch of them in memory at a time.

    Raises:
        DataError: a file is missing or damaged, or is not in the folder.
    """
    import pyarrow as pa  # type: ignore[import-untyped]

    for entry in listed(folder / STATE, "_data_files"):
        path = folder / plain_name(
            folder / STATE, entry.get("filename") if isinstance(entry, dict) else entry
        )
        try:
            with path.open("rb") as file, pa.ipc.open_stream(file) as batches:
                for batch in batches:
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise DataError(str(path), f"not an Arrow stream: {error}", "broken file") from error


def listed(path: Path, key: str) -> list[Any]:
    """The list under a key of a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise DataError(
            str(path), f"not what `datasets` saves: {error!r}", "broken file"
        ) from error
    if not isinstance(value, list):
        raise DataError(str(path), f"{key} is a {type(value).__name__}, want a list", "broken file")
    return value


def plain_name(where: Path, name: Any) -> str:
    """A name in the same folder."""
    if not isinstance(name, str) or Path(name).name != name or name == ".." or "\0" in name:
        raise DataError(
            str(where), f"names {str(name)[:80]!r}, want names in the same folder", "broken file"
        )
    return name
