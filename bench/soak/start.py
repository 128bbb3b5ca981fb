"""One start of a run, `python -m engine.train`, watched from outside: its records, its memory, its end.

Nothing here is an expectation of how long something takes: on a busy machine any process may stand still for minutes.
A run counts as stuck after `STUCK_POLLS` looks, which are made only while this process runs itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

from bench.soak import ROOT, SoakError
from bench.soak.setting import Setting
from bench.soak.system import Sample, sample
from engine.run import checkpoint

POLL_S = 0.03
STUCK_POLLS = round(1800 / POLL_S)
TAIL = 1 << 16  # bytes of metrics.jsonl that surely hold a whole line
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
LIBC = ctypes.CDLL(None, use_errno=True)


def give_up_rights() -> None:
    """A superuser's run heeds the rights of files like anybody's."""
    if os.geteuid() == 0 and LIBC.prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_CAPBSET_DROP")


def in_the_child(heeds_rights: bool) -> None:
    """Between fork and exec. A shell's job in the background ignores Ctrl-C, and what it starts would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if heeds_rights:
        give_up_rights()


def last_step(metrics: Path) -> int:
    """The step of the last whole line; 0 without one."""
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0


def newest(out: Path) -> tuple[Path | None, int]:
    """The newest whole checkpoint and its step, 0 without one."""
    path, _ = checkpoint.newest_whole(out)
    return path, int(checkpoint.verify(path)["step"]) if path else 0


def read_from(path: Path, offset: int) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")


class Start:
    """A context manager: what is left of it at the end is killed."""

    def __init__(
        self,
        setting: Setting,
        out: Path,
        number: int | str,
        fault: dict[str, Any] | None = None,
        flags: tuple[str, ...] = (),
        heeds_rights: bool = False,
    ) -> None:
        self.out, self.metrics = out, out / "metrics.jsonl"
        self.came_from, self.base = newest(out)
        self._events_at = self._size(out / "events.jsonl")
        self._file = self._inode()
        self.log = setting.folder / "logs" / f"{number}.log"
        with self.log.open("wb") as log:
            try:
                self.process = subprocess.Popen(
                    setting.words(out, flags),
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=setting.environment(fault or {}),
                    start_new_session=True,  # Ctrl-C is ours alone
                    preexec_fn=partial(in_the_child, heeds_rights),
                )
            except subprocess.SubprocessError as error:
                raise SoakError(
                    f"a superuser's run cannot be made to heed the rights of files ({error}); run this as an ordinary"
                    " user, or leave out the fault 'read-only folder' (--faults)"
                ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @staticmethod
    def _size(path: Path) -> int:
        return path.stat().st_size if path.exists() else 0

    def _inode(self) -> int | None:
        try:
            return self.metrics.stat().st_ino
        except FileNotFoundError:
            return None

    def step(self) -> int:
        """The last iteration on record; where this start went on until it has written one."""
        if self._inode() == self._file:  # still that of the start before: a resume writes it anew
            return self.base
        return max(self.base, last_step(self.metrics))

    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def watch(self, until: Callable[[int], bool], each: Callable[[int], None] | None = None) -> bool:
        """Until `until` of the step holds, or the run ends: False. `each` is called at every new step."""
        seen, quiet = -1, 0
        while True:
            alive, step = self.alive(), self.step()
            if step != seen:
                seen, quiet = step, 0
                if each is not None:
                    each(step)
            if until(step):
                return True
            if not alive:
                return False
            quiet += 1
            if quiet > STUCK_POLLS:
                raise SoakError(f"a run stands still at iteration {step} and does not end; it printed {self.log}")
            time.sleep(POLL_S)

    def wait_until(self, step: int) -> bool:
        return self.watch(lambda now: now >= step)

    def wait(self) -> int:
        """Its exit code, or minus the number of the signal that ended it."""
        self.watch(lambda _: False)
        return int(self.process.wait())

    def sampled(self) -> tuple[int, list[Sample]]:
        """Its exit code, and what it was like after each iteration that was seen."""
        samples: list[Sample] = []

        def look(step: int) -> None:
            found = sample(self.process.pid, step)
            if found is not None and step > self.base:
                samples.append(found)

        self.watch(lambda _: False, look)
        return int(self.process.wait()), samples

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def events(self) -> list[str]:
        """Sentences that this start wrote into the run's journal."""
        lines = read_from(self.out / "events.jsonl", self._events_at).split("\n")
        found = []
        for line in lines:
            try:
                found.append(str(json.loads(line)["text"]))
            except ValueError:  # cut by a kill
                continue
        return found
