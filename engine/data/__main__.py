"""python -m engine.data prepare: raw prompts -> training, validation and test split, with a report.

    python -m engine.data prepare --input raw.jsonl --output prompts/ --tokenizer MODEL_FOLDER

Duplicates by long common prefix go out, each user or organization keeps at most 200 prompts and is
in one split only, a filter for personal data runs over the training split, and long prompts are
left out [InstructGPT 3.2, A.2]. All columns are kept; user_id, org_id, use_case and source count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engine.data.prepare import PrepareSettings, prepare, read_prompts, write_prepared
from engine.data.rows import DataSource
from engine.data.statistics import tables
from engine.data.tokenizer import load_tokenizer
from engine.errors import DataError, EngineError
from engine.run.files import check_output_folder

EXIT_FAILED = 1


def parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of :class:`PrepareSettings`."""
    default = PrepareSettings()
    top = argparse.ArgumentParser(
        prog="python -m engine.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "prepare",
        help="raw prompts -> splits with a report",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    ).add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="JSONL (.gz), parquet, folder, hub id",
    )
    add("--dataset_split", default="train", help="split of a folder or hub data set")
    add("--output", required=True, type=Path, help="folder for the splits and statistics.json")
    add("--tokenizer", required=True, metavar="PATH", help="model folder or hub id: counts tokens")
    add("--max_tokens", type=int, default=default.max_tokens, help="longest prompt")
    add(
        "--min_prefix",
        type=int,
        default=default.min_prefix,
        help="so many shared first characters make a duplicate",
    )
    add("--cap", type=int, default=default.cap, help="most prompts of a user or organization")
    add("--validation", type=float, default=default.validation, help="share of users")
    add("--test", type=float, default=default.test, help="share of users")
    add("--seed", type=int, default=default.seed, help="of the split")
    add("--user_column", default=default.user_column, help="who sent the prompt")
    add("--organization_column", default=default.organization_column, help="whose user that is")
    add("--use_case_column", default=default.use_case_column, help="for the statistics")
    add("--pii", metavar="module:function", help="f(text) -> text to keep, or None to drop the row")
    add("--bad_rows", choices=("error", "skip"), default="error", help="what a broken row does")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; errors of the engine's own are one message, not a traceback."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except (EngineError, OSError) as error:
        sys.stderr.write(f"python -m engine.data: {error}\n")
        return EXIT_FAILED
    return 0


def run(args: argparse.Namespace) -> None:
    """Reads, prepares, writes and prints."""
    names = [name for name in PrepareSettings.__dataclass_fields__ if hasattr(args, name)]
    settings = PrepareSettings(**{name: getattr(args, name) for name in names})
    check_output(args.output, settings)
    console = Console(highlight=False)
    sources = [DataSource(path, args.dataset_split) for path in args.input]
    data = read_prompts(sources, settings.bad_rows)
    for line in data.report.lines():
        console.print(line, markup=False)
    tokenizer = load_tokenizer(args.tokenizer)
    prepared = prepare(data.items, settings, tokenizer)
    paths = write_prepared(prepared, args.output)
    for reason, count in prepared.removed.items():
        console.print(f"left out, {reason}: {count}", markup=False)
    for title, header, rows in tables(prepared.statistics):
        table = Table(*header, title=title, title_justify="left")
        for cells in rows:
            table.add_row(*cells)
        console.print(table)
    console.print("wrote " + ", ".join(str(path) for path in paths), markup=False)


def check_output(folder: Path, settings: PrepareSettings) -> None:
    """Whether the result can be written, before anything is read.

    Raises:
        OutputError: the folder cannot be written to.
        DataError: it has one of the files already.
    """
    check_output_folder(folder)
    splits = [f"{name}.jsonl" for name, share in settings.shares.items() if share > 0]
    for path in (folder / name for name in (*splits, "statistics.json")):
        if path.exists():
            raise DataError(str(path), "is there already; give another --output or remove it")


if __name__ == "__main__":
    raise SystemExit(main())
