"""Checkpoints: a folder that is either whole or not there.

    checkpoint-N/
        <group>.safetensors   one file a group: policy, value, ema, optimizer_policy, ...
        state.json            counters, cursors, controllers: plain JSON
        manifest.json         name, size and sha256 of each of the files above

`save` writes a hidden folder aside, syncs every file, the manifest last, and renames it once.
A kill at any moment leaves the older folders, with or without the new one. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.run.files import sync

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = ".safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_GROUP = re.compile(r"[A-Za-z0-9_]+")
# shard-R-model-1-of-1: of a checkpoint of several processes (sharded_checkpoint.py)
_FILE = re.compile(r"([A-Za-z0-9_]+|shard-\d+-model-\d+-of-\d+)\.safetensors|state\.json", flags=re.ASCII)
JSON_BYTES = 2**26  # more than any state; read into memory at once
ASIDE = ".tmp-"  # being written; of no use after a kill
_REPLACED = ".replaced-"  # a whole checkpoint, moved out of the way of its successor


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given, read back and verified: `tensors` is group -> name -> tensor (CPU)."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file. Raises `CheckpointError` when there is none of that name."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: has no {name}{TENSORS}, only {', '.join(sorted(self.tensors)) or 'none'};"
                " want a checkpoint of the same stage and config"
            )
        return self.tensors[name]

    def number(self, name: str) -> float:
        """One number of the state. Raises `CheckpointError` when it is none."""
        value = self.state.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{self.path / STATE}: {name} is {str(value)[:40]!r}, want a finite number")
        return value


def save(
    root: Path | str,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    interim: bool = False,
) -> Path:
    """Write `root/checkpoint-<step>`, then delete the oldest so that `keep` good ones stay.

    An `interim` one is beside the schedule (a stop was asked for): it counts for none of the `keep` and goes with the
    next one, so that which ones are kept in the end does not depend on where a run was stopped.

    `tensors` is group -> name -> tensor; `state` must be plain JSON of finite numbers. A checkpoint
    of the same step is replaced. Never deleted: the one just written, and those of later steps
    (of an earlier attempt). Raises `CheckpointError` for what cannot be written as asked, `OSError`
    when the disk refuses; then nothing new is left behind and the older ones are untouched.
    """
    root = Path(root)
    if step < 0 or keep < 1:
        raise CheckpointError(
            f"checkpoint: got step {step} and keep {keep}, want step >= 0 and keep >= 1"
        )
    for group in tensors:
        if not _GROUP.fullmatch(group):
            raise CheckpointError(f"checkpoint: got group {group!r}, want letters, digits and _")
    text = state_text(state)
    root.mkdir(parents=True, exist_ok=True)
    clean_up(root)
    aside = root / f"{ASIDE}checkpoint-{step}-{os.getpid()}"
    aside.mkdir()
    try:
        for group, named in tensors.items():
            plain = {name: t.detach().cpu().contiguous() for name, t in named.items()}
            try:
                save_file(plain, str(aside / f"{group}{TENSORS}"), metadata={"format": "pt"})
            except SafetensorError as error:  # it wraps the disk's own
                raise OSError(f"{group}{TENSORS}: {error}") from error
        return complete(aside, root, step, text, keep, interim)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def complete(
    aside: Path, root: Path, step: int, text: str, keep: int, interim: bool
) -> Path:
    """A folder of tensors becomes `root/checkpoint-<step>`: its state.json (`text`), every file synced, the manifest
    last, one rename. Then the oldest checkpoints go, as of `save`."""
    (aside / STATE).write_text(text, encoding="utf-8")
    names = sorted(path.name for path in aside.iterdir())
    files = {name: _fingerprint(aside / name) for name in names}
    for name in names:
        sync(aside / name)
    manifest = {"format": FORMAT, "step": step, "interim": interim, "files": files}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(aside / MANIFEST)
    sync(aside)
    final = _publish(aside, root / f"checkpoint-{step}")
    _rotate(root, step, keep)
    return final


def settle(root: Path, step: int, keep: int) -> None:
    """Finish what a `save` of `step` may have left to do when it was killed: put away, rotate."""
    clean_up(root)
    _rotate(root, step, keep)


def set_aside(root: Path, step: int, aside: Path) -> list[str]:
    """Move the checkpoints after `step` into `aside`, a new folder beside them, and give their names.

    The newest goes last: a kill before that leaves the attempt that they are of, its newest checkpoint and all, to go
    on with; after it `step` is the newest. Without later ones there is no new folder.
    """
    later = [path for found, path in sorted(_candidates(root).items()) if found > step]
    if later:
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        sync(aside)
        sync(root)
    return [path.name for path in later]


def load(path: Path | str) -> Checkpoint:
    """Read a checkpoint back. Raises `CheckpointError` when `verify` does."""
    path = Path(path)
    manifest = verify(path)
    tensors = {}
    for name in manifest["files"]:
        if name.endswith(TENSORS):
            try:
                tensors[name.removesuffix(TENSORS)] = load_file(str(path / name))
            except SafetensorError as error:
                raise CheckpointError(f"{path / name}: not a safetensors file ({error})") from error
    state = read_state(path)
    return Checkpoint(path, manifest["step"], tensors, state)


def verify(path: Path | str) -> dict[str, Any]:
    """Compare every byte with the manifest, which is returned.

    Raises `CheckpointError` naming the first file that is missing, of another size or altered.
    """
    path = Path(path)
    manifest = read_manifest(path)
    for name, wanted in manifest["files"].items():
        try:
            found = _fingerprint(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read ({error.strerror})") from error
        if (found["bytes"], found["sha256"]) != (wanted["bytes"], wanted["sha256"]):
            raise CheckpointError(
                f"{path / name}: sha256 {found['sha256'][:12]}..., but the manifest says "
                f"{wanted['sha256'][:12]}...; the file was altered, resume from another checkpoint"
            )
    return manifest


def latest(root: Path | str) -> Path | None:
    """The newest checkpoint under `root` that is whole; None when there is none at all.

    Damaged ones are passed over with a warning that names them and says why. When there are some
    and all are damaged, raises `CheckpointError`: to begin again in silence would hide the loss.
    """
    path, damaged = newest_whole(root)
    if damaged:
        warnings.warn(f"going back to {path}; passed over: {'; '.join(damaged)}", stacklevel=2)
    return path


def newest_whole(root: Path | str) -> tuple[Path | None, list[str]]:
    """`latest`, with what is wrong with the damaged ones that were passed over."""
    damaged: list[str] = []
    for path in reversed(kept(root)):
        try:
            step, name = verify(path)["step"], path.name.removeprefix(_REPLACED)
            if name != f"checkpoint-{step}":
                raise CheckpointError(f"{path / MANIFEST}: says step {step}; the file was altered")
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        return path, damaged
    if damaged:
        raise CheckpointError(
            f"{root}: every checkpoint is damaged ({'; '.join(damaged)}); "
            "want one whole checkpoint, or a new output folder to begin again"
        )
    return None, []


def kept(root: Path | str) -> list[Path]:
    """All checkpoints under `root`, oldest first, damaged ones too: `load` is what verifies."""
    try:
        found = _candidates(Path(root)) if Path(root).is_dir() else {}
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read ({error.strerror}); want a run's folder") from error
    return [found[step] for step in sorted(found)]


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint. Raises `CheckpointError` where it is not a JSON object."""
    return _json(path / STATE)


def state_text(state: Mapping[str, Any]) -> str:
    """The state as the text of its file. Raises `CheckpointError` for what JSON does not give back as it was."""
    try:
        text = json.dumps(state, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint: the state is not plain JSON of finite numbers ({error})"
        ) from error
    if json.loads(text) != state:  # tuples and number keys would come back as something else
        raise CheckpointError(
            "checkpoint: the state does not survive JSON; want dicts with string keys, lists, "
            "strings, numbers, booleans and None"
        )
    return text + "\n"


def _json(where: Path) -> dict[str, Any]:
    """The JSON object of a file."""
    try:
        with where.open("rb") as file:
            text = file.read(JSON_BYTES + 1)
        if len(text) > JSON_BYTES:
            raise ValueError(f"more than {JSON_BYTES} bytes")
        value = json.loads(text.decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{where}: missing; want a checkpoint-N folder") from error
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON ({str(error)[:80]})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a {type(value).__name__}, want an object; it is not a manifest or state")
    return value


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, with the sizes of its files checked (cheap: reads no tensor)."""
    where = path / MANIFEST
    manifest = _json(where)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{where}: format {str(manifest.get('format'))[:40]}, want {FORMAT}; it is not a manifest,"
            " or was written by another version of the engine"
        )
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, dict) or STATE not in files:
        raise CheckpointError(f"{where}: not a manifest (want a step, and files with {STATE} among them)")
    for name, entry in files.items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(
                f"{where}: names {name[:80]!r}, want names of tensor files and {STATE} in the same folder"
            )
        if not isinstance(entry, dict) or [type(entry.get(k)) for k in ("bytes", "sha256")] != [int, str]:
            raise CheckpointError(f"{where}: not a manifest ({name} has no bytes and sha256)")
        if (path / name).is_symlink() or not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing, but the manifest names it")
        found, size = (path / name).stat().st_size, entry["bytes"]
        if found != size:
            raise CheckpointError(
                f"{path / name}: {found} bytes, but the manifest says {size}; the file was cut or "
                "altered, resume from another checkpoint"
            )
    return manifest


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _publish(aside: Path, final: Path) -> Path:
    """The rename that makes a checkpoint exist. Its predecessor of the same step outlives it."""
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # a remainder goes with the next save
    return final


def _candidates(root: Path) -> dict[int, Path]:
    """Step -> folder. A replaced one counts where a kill came before its successor's rename."""
    found: dict[int, Path] = {}
    for prefix in (_REPLACED, ""):
        for path in root.iterdir():
            match = _NAME.fullmatch(path.name.removeprefix(prefix))
            if match and path.name.startswith(prefix) and path.is_dir():
                found[int(match[1])] = path
    return found


def clean_up(root: Path) -> None:
    """Finish what a killed `save` began. Only `save` does this: a reader may meet a live writer."""
    for path in _candidates(root).values():
        if path.name.startswith(_REPLACED):
            path.rename(root / path.name.removeprefix(_REPLACED))
    for path in list(root.iterdir()):
        if path.name.startswith((f"{ASIDE}checkpoint-", f"{_REPLACED}checkpoint-")):
            shutil.rmtree(path, ignore_errors=True)


def _rotate(root: Path, step: int, keep: int) -> None:
    """Delete all up to `step` but the newest `keep` good ones; `step` itself was just written."""
    good = 0
    steps = sorted((s for s in _candidates(root) if s <= step), reverse=True)
    for candidate in steps:
        path = root / f"checkpoint-{candidate}"
        try:
            interim = bool(read_manifest(path).get("interim", False))
        except CheckpointError:
            if good >= keep:
                shutil.rmtree(path)
            continue  # left for inspection until `keep` good ones are newer; it counts for none
        if candidate == step:
            good += not interim
        elif interim or good >= keep:
            shutil.rmtree(path)
        else:
            good += 1
