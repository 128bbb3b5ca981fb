"""Tensors in and out of a Hugging Face folder: safetensors only, one file or several with an
index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import ModelError

from .architectures import Architecture
from .names import NAMINGS, Place, Spec, place_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a ModelError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such file; want a Hugging Face model folder with {path.name} in it"
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: got a JSON {type(value).__name__}, want an object")
    return value


class Stored:
    """The tensors of a folder by name, read when asked for out of mapped files."""

    def __init__(self, folder: Path, files: Mapping[str, Any]) -> None:
        self.folder = folder
        self._files = dict(files)

    def names(self) -> list[str]:
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        return str(self._files[name].get_slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """A view of the mapped file: copy what is to be kept."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


@contextmanager
def open_folder(folder: Path) -> Iterator[Stored]:
    """The tensors of a folder, as long as the block lasts.

    Raises:
        ModelError: no safetensors, a file of the index missing or damaged, a tensor not where the
            index says.
    """
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        paths, promised = _weight_files(folder)
        for path in paths:
            try:
                handle = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not a readable safetensors file: {error}") from error
            files.update({name: handle for name in handle.keys()})  # noqa: SIM118
        absent = [f"{name}, in {file}" for name, file in promised.items() if name not in files]
        if absent:
            lines = "\n  ".join(absent)
            raise ModelError(f"{folder / INDEX} names tensors that are not there:\n  {lines}")
        yield Stored(folder, files)


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files to open, and which tensor the index says is in which."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if (folder / INDEX).is_file():
        promised = read_json(folder / INDEX).get("weight_map")
        if not isinstance(promised, dict):
            raise ModelError(f"{folder / INDEX}: no weight_map in it; download the folder again")
        for name, file in promised.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", "..") or "\0" in file:
                raise ModelError(
                    f"{folder / INDEX}: {name} is said to be in {str(file)[:80]!r}, want a file of the same folder"
                )
        paths = [folder / file for file in sorted(set(promised.values()))]
        gone = [path.name for path in paths if not path.is_file()]
        if gone:
            raise ModelError(f"{folder}: {INDEX} names files that are not there: {', '.join(gone)}")
        return paths, promised
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        raise ModelError(
            f"{folder}: got {', '.join(pickled)}, want {SINGLE}; pickled files can run code and are"
            " never opened. Convert once with transformers:"
            " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    there = ", ".join(names) or "nothing"
    raise ModelError(f"{folder}: got {there}, want {SINGLE} or {INDEX}")


def match(
    specs: Mapping[str, Spec], a: Architecture, stored: Stored, new_head: bool = False
) -> dict[str, tuple[Place, str]]:
    """Place and stored name of each parameter. ``new_head``: the score head is made, and the output
    matrix left.

    Raises:
        ModelError: naming every tensor that is missing, left over, of the wrong shape or not a
            float.
    """
    naming = NAMINGS[a.family]
    bare = not any(name.startswith(naming.prefix) for name in stored.names())
    heads = [f"{head}.weight" for head in (naming.head, *naming.head_aliases)]
    found: dict[str, tuple[Place, str]] = {}
    problems: list[str] = []
    used: dict[str, tuple[int, ...]] = {}
    for name, spec in specs.items():
        if new_head and name == "score.weight":
            continue
        place, file_name = place_of(a.family, name)
        if name == "lm_head.weight":
            file_name = next((head for head in heads if head in stored), file_name)
        if bare:
            file_name = file_name.removeprefix(naming.prefix)
        found[name] = place, file_name
        used[file_name] = place.stored_shape(spec.shape)
    for file_name, shape in used.items():
        problems += _problems_of(stored, file_name, shape)
    spare = set(heads) if new_head else set()
    if a.tied_head and "score.weight" not in specs and not problems:
        spare |= _same_as_embedding(stored, heads, found["embed_tokens.weight"][1], problems)
    for name in stored.names():
        if name not in used and name not in spare and not name.endswith(naming.buffers):
            problems.append(f"left over: {name} {stored.shape(name)}")
    if problems:
        raise ModelError(
            f"{stored.folder}: the tensors do not fit config.json ({a.family}):\n  "
            + "\n  ".join(problems)
            + _hint(specs, stored)
        )
    return found


def _problems_of(stored: Stored, name: str, shape: tuple[int, ...]) -> list[str]:
    if name not in stored:
        return [f"missing: {name} {shape}"]
    problems = []
    if stored.shape(name) != shape:
        problems.append(f"wrong shape: {name}: got {stored.shape(name)}, want {shape}")
    if stored.kind(name) not in FLOATS:
        wanted = ", ".join(FLOATS)
        problems.append(f"wrong type: {name}: got {stored.kind(name)}, want one of {wanted}")
    return problems


def _same_as_embedding(
    stored: Stored, heads: list[str], embedding: str, problems: list[str]
) -> set[str]:
    """Copies of a tied head that older versions wrote out. One that differs means the head is not
    tied."""
    copies = {head for head in heads if head in stored}
    for head in copies:
        same = stored.shape(head) == stored.shape(embedding)
        if not (same and torch.equal(stored.read(head), stored.read(embedding))):
            problems.append(
                f"tied head: {head} differs from {embedding};"
                " set tie_word_embeddings to false in config.json"
            )
    return copies


def _hint(specs: Mapping[str, Spec], stored: Stored) -> str:
    if "score.weight" in stored and "score.weight" not in specs:
        return "\nThis is a scalar (reward) model: load it with load_scalar."
    if "score.weight" in specs and "score.weight" not in stored:
        return "\nThis is no scalar model: make one of a language model with scalar_from_policy."
    return ""
