"""python -m engine.demo model | run: the pretrained model as a folder; the whole of RLHF on it.

Exit codes: 0 done, 2 bad usage, 3 stopped on request and resumable, 1 failed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from engine.config import RunConfig
from engine.errors import EngineError
from engine.train import EXIT_FAILED, EXIT_STOPPED, settle_machine

MODEL, OUTPUT = Path("runs/model"), Path("runs/demo")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.demo",
        description="SFT, a reward model and PPO-ptx on a small pretrained model, in minutes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="model | run")
    unpack = commands.add_parser("model", help="write the pretrained model as a folder")
    unpack.add_argument("--output", type=Path, default=MODEL, help=f"default {MODEL}")
    run = commands.add_parser("run", help="the whole flow; goes on where it was stopped")
    run.add_argument("--output_dir", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    run.add_argument("--model", type=Path, default=MODEL, help=f"default {MODEL}")
    run.add_argument("--results", type=Path, help="copy demo.json to this file")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    run.add_argument("--threads", type=int, help="default: the cores this process may use")
    run.add_argument("--cpu_class", choices=("amx", "avx512", "avx2", "plain"))
    run.add_argument("--no_progress", action="store_true", help="no live display of the stages")
    parser.epilog = unpack.format_usage() + run.format_usage()
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; errors of the engine's own are one message, not a traceback."""
    args = build_parser().parse_args(argv)
    from engine.run.files import check_output_file, check_output_folder

    try:
        if args.command == "model":
            from engine.demo.model import prepare

            check_output_folder(args.output)
            made = prepare(args.output)
            print(f"model: {args.output}" + ("" if made else " (was there and is whole)"))
            return 0
        check_output_folder(args.output_dir, "output_dir")
        if args.results:
            check_output_file(args.results, "results")
        return run(args)
    except (EngineError, OSError) as error:
        sys.stderr.write(f"python -m engine.demo: {error}\n")
        return EXIT_FAILED


def run(args: argparse.Namespace) -> int:
    """The flow and its closing tables."""
    settle_machine(cast(RunConfig, args))  # reads keys that both have: threads, cpu_class
    from rich.console import Console

    from engine.demo import closing, flow, labeler
    from engine.demo.model import require
    from engine.demo.plan import Plan
    from engine.run.session import Stopped

    require("gguf", "accelerate", "vaderSentiment")
    console = Console()
    plan = Plan(
        output=args.output_dir,
        model=args.model,
        seed=args.seed,
        dtype=args.dtype,
        threads=args.threads,
        progress=not args.no_progress,
    )
    console.print(labeler.NOTE)
    try:
        found = flow.run(plan, tell=lambda line: console.print(f"demo: {line}", markup=False))
    except (Stopped, KeyboardInterrupt):
        console.print("stopped; the same command goes on where this one was")
        return EXIT_STOPPED
    closing.show(plan, found, console)
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.output_dir / "demo.json", args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
