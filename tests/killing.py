"""Runs of `engine.train` that die at a named point, each in a fork of one process that has imported everything.

    python tests/killing.py     reads one JSON request a line, answers each with the child's wait status:
        {"argv": [...], "log": file, "point": name, "count": n, "signal": 9}     at the n-th time at a point
        {"argv": [...], "log": file, "after_s": seconds, "signal": 9}            after a time
        {"argv": [...], "log": file}                                             never

The engine knows nothing of it: functions are wrapped in the child, after the fork.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Victims:
    """The process that forks; a context manager."""

    def __enter__(self) -> Victims:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def run(self, argv: list[str], log: Path, **kill: Any) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"argv": argv, "log": str(log), **kill}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


def half_of_the_file(call: Callable[..., Any], path: Callable[..., Path], die: Callable[[], None]):
    """What a kill in the middle of a write leaves."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        target = path(*arguments)
        before = target.stat().st_size if target.exists() else 0
        result = call(*arguments, **options)
        if die.is_due():  # type: ignore[attr-defined]
            os.truncate(target, (before + target.stat().st_size) // 2)
        die()
        return result

    return wrapped


class Die:
    """Sends the signal to this process at the n-th call."""

    def __init__(self, count: int, number: int) -> None:
        self.left, self.number = count, number

    def is_due(self) -> bool:
        return self.left == 1

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def before(owner: Any, name: str, die: Die) -> None:
    call = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        die()
        return call(*arguments, **options)

    setattr(owner, name, wrapped)


def after(owner: Any, name: str, die: Die) -> None:
    call = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        result = call(*arguments, **options)
        die()
        return result

    setattr(owner, name, wrapped)


def arm(point: str, die: Die) -> None:
    """Wraps the function that a point stands for."""
    import torch

    from engine.generate import generator
    from engine.model import weights
    from engine.run import checkpoint, files, log, optim, session

    if point == "half a tensor file":
        checkpoint.save_file = half_of_the_file(
            checkpoint.save_file, lambda t, path: Path(path), die
        )
    elif point == "half a line":
        files.append = half_of_the_file(files.append, lambda path, text: path, die)
    else:
        place, owner, name = {
            "before a backward pass": (before, torch.Tensor, "backward"),
            "before an optimizer step": (before, optim.Optimizer, "step"),
            "after an optimizer step": (after, optim.Optimizer, "step"),
            "while sampling": (before, generator._Run, "step"),
            "before a sync": (before, os, "fsync"),
            "before a rename": (before, Path, "rename"),
            "after a rename": (after, Path, "rename"),
            "before a replacement": (before, os, "replace"),
            "while a checkpoint is removed": (after, os, "unlink"),
            "before rotation": (before, checkpoint, "_rotate"),
            "before a line of metrics": (before, log.RunLog, "metrics"),
            "after a line of metrics": (after, log.RunLog, "metrics"),
            "before a save": (before, session.Session, "save"),
            "after a save": (after, session.Session, "save"),
            "while resuming": (after, log.RunLog, "resume"),
            "while the model is written": (after, weights, "_write_json"),
        }[point]
        place(owner, name, die)


POINTS = (
    "half a tensor file", "half a line", "before a backward pass", "before an optimizer step",
    "after an optimizer step", "while sampling", "before a sync", "before a rename", "after a rename",
    "before a replacement", "while a checkpoint is removed", "before rotation",
    "before a line of metrics", "after a line of metrics", "before a save", "after a save",
    "while resuming", "while the model is written",
)  # fmt: skip


def child(request: dict[str, Any]) -> int:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if "point" in request:
        arm(request["point"], Die(request["count"], request["signal"]))
    if "after_s" in request:
        clock = threading.Timer(request["after_s"], os.kill, (os.getpid(), request["signal"]))
        clock.daemon = True
        clock.start()
    from engine.train import main

    return main(request["argv"])


def serve() -> None:
    for name in ("torch._dynamo", "torch.utils.tensorboard", "transformers", "engine.stages.sft",
                 "engine.stages.rm", "engine.stages.ppo.loop", "engine.stages.select"):  # fmt: skip
        importlib.import_module(name)
    import torch
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from engine.train import parse

    assert (
        AutoTokenizer and PreTrainedTokenizerFast
    )  # transformers imports them when they are named
    parse(["--stage", "sft", "--model_name_or_path", "model", "--output_dir", "run"])
    torch.set_num_threads(1)  # a fork has only the thread that forked
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                code = child(json.loads(line))
                sys.stdout.flush()
            except SystemExit as stopped:
                code = int(stopped.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 70
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve()
