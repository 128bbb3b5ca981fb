"""Files of a run folder: whole or not there, one writer at a time, and an error that names what the disk refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from engine.errors import ConfigError, OutputError

LOCK = ".lock"
_MODEL_ASIDE = ".tmp-model"


@contextmanager
def refusals_named(path: Path) -> Iterator[None]:
    """An `OSError` inside (safetensors wraps its own) becomes an `OutputError` that names the path and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        at = getattr(error, "filename", None) or path
        why = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{at}: cannot be written ({why}); nothing is left half-written. Free space or allow"
            " writing there, then go on from the newest checkpoint (--resume_from_checkpoint true)"
        ) from error


def check_output_file(path: Path, name: str = "output") -> None:
    """Whether a file can be written at `path`: asked before the work, whose result would be lost. Makes nothing.

    Raises:
        OutputError: a folder of that name is there, or the file or its folder cannot be written to.
    """
    if path.is_dir():
        raise OutputError(f"{name}: got {str(path)!r}, which is a folder; want a file to write, {path / 'NAME'}, say")
    _check_writable(path if path.exists() else path.parent, name, path)


def check_output_folder(path: Path, name: str = "output") -> None:
    """Whether files can be written into a folder `path`, which may be there already. Makes nothing.

    Raises:
        OutputError: a file of that name is there, or the folder cannot be made or written to.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{name}: got {str(path)!r}, which is a file; want a folder, new or there already")
    _check_writable(path, name, path)


def _check_writable(place: Path, name: str, path: Path) -> None:
    """Whether `place`, or the nearest folder above it that is there, can be written to."""
    if str(path).startswith("~"):
        raise OutputError(f"{name}: got {str(path)!r}, want a whole path: no shell has put the home folder for ~")
    while not place.exists() and place != place.parent:
        place = place.parent
    if place != path and not place.is_dir():
        raise OutputError(f"{name}: got {str(path)!r}, but {place} is a file, no folder; give another path")
    if not os.access(place, os.W_OK):
        raise OutputError(f"{name}: got {str(path)!r}, but {place} cannot be written to; allow it or give another path")


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, text: str) -> None:
    """Write a whole file so that a kill, or a disk that is full, leaves the old one or the new one.

    Raises:
        OutputError: the disk refuses.
    """
    aside = path.with_name(f".{path.name}.tmp")
    with refusals_named(path):
        try:
            with aside.open("wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


def append(path: Path, text: str) -> None:
    """Add text, a whole line or several, to a file in one unbuffered write.

    A kill leaves whole lines, or at worst one cut last line, which stays one: the next text begins a line of its own.
    A disk with room for a part of the text gets none of it.

    Raises:
        OutputError: the disk refuses.
    """
    data = text.encode()
    with refusals_named(path), path.open("a+b", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if before:
            file.seek(before - 1)
            data = data if file.read(1) == b"\n" else b"\n" + data
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:]) or 0
        except OSError:
            file.truncate(before)
            raise


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A folder aside to write a model to; at the end its files are synced and moved into `folder`, one rename each.

    An error inside, or a kill, leaves what was in `folder`. `config.json` goes last: who finds a new one finds the
    weights that belong to it.

    Raises:
        OutputError: the disk refuses.
    """
    aside = folder / _MODEL_ASIDE
    with refusals_named(folder):
        shutil.rmtree(aside, ignore_errors=True)  # of a killed run
        try:
            aside.mkdir(parents=True)
            yield aside
            files = sorted(p for p in aside.rglob("*") if p.is_file())
            for path in files:
                sync(path)
            for path in sorted(files, key=lambda p: p.name == "config.json"):
                target = folder / path.relative_to(aside)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
            sync(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """At most one run in an output folder: an advisory lock on its `.lock`, which a kill releases.

    It belongs to the open file, so a process that the run forked and that outlives it still holds it.

    Raises:
        ConfigError: another run has the folder.
        OutputError: it cannot be written to.
    """
    path = folder / LOCK
    with refusals_named(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise ConfigError(
                f"output_dir: another run writes to {folder} ({owner or 'just starting'}); wait for it, stop it, or"
                " give another folder"
            ) from None
        with refusals_named(path):
            os.ftruncate(descriptor, 0)
            owner = json.dumps({"process": os.getpid(), "host": socket.gethostname()})
            os.pwrite(descriptor, owner.encode(), 0)
        yield
    finally:
        os.close(descriptor)  # the lock goes with it
