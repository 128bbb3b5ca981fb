"""What the system says of processes, files and shared memory; Linux's /proc, no privileges."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bench.soak.setting import MARK

PROC = Path("/proc")
SHARED = Path("/dev/shm")
SEGMENTS = PROC / "sysvipc" / "shm"
MB = 1e6


@dataclass(frozen=True)
class Sample:
    """A process after an iteration: resident memory and its peak in 10^6 bytes, open files, threads, CPU seconds."""

    step: int
    resident: float
    peak: float
    files: int
    threads: int
    cpu_s: float


def sample(pid: int, step: int) -> Sample | None:
    """None where the process has ended."""
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
        files = len(os.listdir(PROC / str(pid) / "fd"))
        times = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None  # a process that is ending denies its files
    found = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    if "VmRSS" not in found:
        return None
    resident, peak = (int(found[name][0]) * 1024 / MB for name in ("VmRSS", "VmHWM"))
    cpu_s = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return Sample(step, resident, peak, files, int(found["Threads"][0]), cpu_s)


def marked(mark: str) -> list[str]:
    """Processes alive whose environment carries the mark: the runs of a soak and whatever they started."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"process {folder.name} ({words.strip()[:120]})")
        except OSError:  # it has ended, or is another user's
            continue
    return found


def shared_memory() -> frozenset[str]:
    """Names in /dev/shm and System V segments, of everybody."""
    names = {str(SHARED / name) for name in os.listdir(SHARED)} if SHARED.is_dir() else set()
    if SEGMENTS.is_file():
        rows = [line.split() for line in SEGMENTS.read_text().splitlines()[1:]]
        names |= {f"System V segment {row[1]}, made by process {row[4]}" for row in rows}
    return frozenset(names)


def in_use(names: frozenset[str]) -> frozenset[str]:
    """Those that a living process has open or mapped: asked after all runs have ended, somebody else's."""
    found: set[str] = set()
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            maps = (folder / "maps").read_text(errors="replace")
            links = {target(link) for link in (folder / "fd").iterdir()}
        except OSError:  # it has ended, or is another user's
            continue
        found |= {name for name in names if name in maps or name in links}
    return frozenset(found)


def target(link: Path) -> str | None:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # closed meanwhile
        return None
