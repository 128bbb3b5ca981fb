"""What befalls a run, and what is expected of it then. One fault a start; a start without one runs to its end.

None of them changes the result: a skipped step, for one, would.
"""

from __future__ import annotations

import random
import re
import resource
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.soak import SoakError
from bench.soak.setting import KEEP, Setting
from bench.soak.start import Start, newest
from engine.run import checkpoint

KILLED, STOPPED, FAILED = -signal.SIGKILL, 3, 1
RESUMABLE = r"--resume_from_checkpoint true"
RARE = ("half a tensor file", "before a rename", "after a rename", "while a checkpoint is removed",
        "before rotation", "before a save", "after a save", "while resuming")  # fmt: skip
OFTEN = ("half a line", "before a backward pass", "before an optimizer step", "after an optimizer step",
         "while sampling", "before a sync", "before a replacement", "before a line of metrics",
         "after a line of metrics")  # fmt: skip


class Stage(Protocol):
    """What a fault may know of the disturbed side (play.py)."""

    setting: Setting
    out: Path
    rng: random.Random
    pace: int  # iterations a start should last
    start_s: float
    iteration_s: float

    def name(self, what: str) -> str: ...


@dataclass(frozen=True)
class Plan:
    """One occurrence: what is brought in from inside, flags, and what is done around the start."""

    inside: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    heeds_rights: bool = False
    damaged: Path | None = None


@dataclass(frozen=True)
class Fault:
    """`codes` a start may end with, besides 0 where it is all done; `says`, a pattern in what it printed; with `saves`
    no iteration is lost. `plan` gives None where the moment does not suit; `strike` acts while the run is alive."""

    name: str
    codes: tuple[int, ...]
    plan: Callable[[Stage], Plan | None]
    strike: Callable[[Stage, Start], None]
    says: str = ""
    saves: bool = False


def plain(stage: Stage) -> Plan:
    return Plan()


def after_some(stage: Stage, start: Start) -> bool:
    """A random moment of a random iteration; False where the run ended first."""
    if not start.wait_until(start.base + stage.rng.randint(1, 2 * stage.pace)):
        return False
    time.sleep(stage.rng.uniform(0, 1.5 * stage.iteration_s))
    return start.alive()


def while_starting(stage: Stage) -> None:
    time.sleep(stage.rng.uniform(0, stage.start_s))


def signalled(number: int) -> Callable[[Stage, Start], None]:
    def strike(stage: Stage, start: Start) -> None:
        if after_some(stage, start):
            start.send(number)

    return strike


def kill(stage: Stage, start: Start) -> None:
    if stage.rng.random() < 0.2:
        while_starting(stage)
    elif not after_some(stage, start):
        return
    start.kill()


def early_signal(stage: Stage, start: Start) -> None:
    while_starting(stage)
    number = stage.rng.choice([signal.SIGTERM, signal.SIGINT])
    start.send(number)
    if start.wait_until(start.base + 3 * stage.pace + 2):
        raise SoakError(f"a start that got {number.name} goes on and on: {start.log}")


def await_it(stage: Stage, start: Start) -> None:
    """For a fault from inside; one that has not come after three times the pace is a plain SIGKILL."""
    if start.wait_until(start.base + 3 * stage.pace + 2):
        start.kill()


def at_a_point(stage: Stage) -> Plan:
    rare = stage.rng.random() < 0.6
    point = stage.rng.choice(RARE if rare else OFTEN)
    most = 1 if point == "while resuming" else 4 if rare else 3 * stage.pace
    return Plan(inside={"point": point, "count": stage.rng.randint(1, most)})


def at_the_model(stage: Stage) -> Plan:
    return Plan(inside={"point": "while the model is written", "count": stage.rng.randint(1, 3)})


def to_the_end(stage: Stage, start: Start) -> None:
    start.wait()


def full_disk(stage: Stage) -> Plan:
    writes = stage.rng.randint(0, 8 * stage.pace)
    return Plan(inside={"disk": writes, "folder": str(stage.out)})


def limit_files(stage: Stage, start: Start) -> None:
    """The kernel refuses bytes beyond a size: in the middle of a line of metrics, or of a checkpoint's file."""
    if not after_some(stage, start):
        return
    try:
        sizes = [path.stat().st_size for path in (newest(stage.out)[0] or stage.out).glob("*.safetensors")]
        line = start.metrics.stat().st_size + stage.rng.randint(0, 2000)
    except FileNotFoundError:
        sizes, line = [], 0  # rotated away just now
    limit = round(max(sizes) * stage.rng.uniform(0.5, 0.99)) if sizes and stage.rng.random() < 0.5 else line
    try:
        _, hard = resource.prlimit(start.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(start.process.pid, resource.RLIMIT_FSIZE, (limit, hard))
    except ProcessLookupError:  # it has ended
        return
    await_it(stage, start)


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def cut(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def damage(stage: Stage) -> Plan | None:
    """The newest checkpoint, where there is a whole one before it and enough come after it to push it out."""
    kept = checkpoint.kept(stage.out)
    found, step = newest(stage.out)
    whole = [path for path in kept if is_whole(path)]
    left = stage.setting.iterations - step
    if found is None or len(whole) < 2 or kept[-1] != found or left < KEEP * stage.setting.save_steps:
        return None
    file = stage.rng.choice(sorted(found.iterdir()))
    while is_whole(found):  # the last byte of a JSON file may be whitespace
        stage.rng.choice((flip, cut, remove))(file, stage.rng)
    return Plan(damaged=found)


def is_whole(path: Path) -> bool:
    try:
        checkpoint.verify(path)
    except checkpoint.CheckpointError:
        return False
    return True


def reward(kind: str) -> Callable[[Stage], Plan]:
    def plan(stage: Stage) -> Plan:
        flags = ("--reward_timeout_s", "0.5") if kind == "hangs" else ()
        call = stage.rng.randint(1, 2 * stage.pace)
        return Plan(inside={"reward": kind, "call": call}, flags=flags)

    return plan


def read_only(stage: Stage) -> Plan:
    """The folder with all in it, or the folder alone: what is in it can then be written on, nothing new comes."""
    paths = [stage.out]
    if stage.rng.random() < 0.5:
        paths += [path for path in stage.out.rglob("*") if not path.is_symlink()]

    @contextmanager
    def around():  # noqa: ANN202
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            yield
        finally:
            for path in paths:
                path.chmod(0o755 if path.is_dir() else 0o644)

    stage.out.mkdir(exist_ok=True)
    return Plan(around=around, heeds_rights=True)


def beside(stage: Stage) -> Plan | None:
    """Where the first run surely goes on for as long as the second one needs to start, and some."""
    needed = 2 * stage.pace + 3 * stage.start_s / stage.iteration_s
    return Plan() if stage.setting.iterations - newest(stage.out)[1] > needed else None


def second_run(stage: Stage, start: Start) -> None:
    """It is refused, and the first one goes on; at last that is killed."""
    if not after_some(stage, start):
        return
    with Start(stage.setting, stage.out, stage.name("second")) as other:
        code = other.wait()
        refused = code == FAILED and re.search("another run writes to", other.printed())
        if not refused and start.alive():
            raise SoakError(f"a second run in one folder ended with {code}, want {FAILED} and a refusal: {other.log}")
    if start.wait_until(start.step() + 2):
        start.kill()


def stand_still(stage: Stage, start: Start) -> None:
    """Stopped for some seconds, then asked to end while it stands, or later."""
    if not after_some(stage, start):
        return
    start.send(signal.SIGSTOP)
    time.sleep(stage.rng.uniform(0.5, 4))
    if stage.rng.random() < 0.5:
        start.send(signal.SIGTERM)
        start.send(signal.SIGCONT)
        return
    start.send(signal.SIGCONT)
    if start.wait_until(start.step() + 2):
        start.send(signal.SIGTERM)


EARLY = (STOPPED, FAILED, -signal.SIGTERM, -signal.SIGINT)
ASKED = {"codes": (STOPPED,), "says": RESUMABLE, "saves": True}
INSIDE = {"codes": (FAILED,), "strike": await_it}
FAULTS: Sequence[Fault] = (
    Fault("SIGKILL", (KILLED,), plain, kill),
    Fault("SIGKILL at a point", (KILLED,), at_a_point, await_it),
    Fault("SIGTERM", plan=plain, strike=signalled(signal.SIGTERM), **ASKED),
    Fault("SIGINT", plan=plain, strike=signalled(signal.SIGINT), **ASKED),
    Fault("signal while starting", EARLY, plain, early_signal),
    Fault("standing still", plan=plain, strike=stand_still, **ASKED),
    Fault("disk full", plan=full_disk, says="No space left on device", **INSIDE),
    Fault("file too large", (FAILED,), plain, limit_files, says="cannot be written .*File too large"),
    Fault("damaged checkpoint", (KILLED,), damage, signalled(signal.SIGKILL)),
    Fault("reward raises", plan=reward("raises"), says="'judge': raised KeyError", saves=True, **INSIDE),
    Fault("reward hangs", plan=reward("hangs"), says="'judge': no answer within 0.5 s", saves=True, **INSIDE),
    Fault("reward gives NaN", plan=reward("nan"), says="'judge': value .* is 'nan'", saves=True, **INSIDE),
    Fault("read-only folder", plan=read_only, says="cannot be written .*Permission denied", **INSIDE),
    Fault("second run", (KILLED,), beside, second_run),
)
AT_THE_END = Fault("SIGKILL at the final model", (KILLED,), at_the_model, to_the_end)
