"""Seeded defects: a kernel's source with one place changed must fail the check that is there to catch it.

    @mutations(kernels, {"mask dropped": ("mask=inside", "mask=at >= 0"), ...})
    def test_defects(): check()      # must raise for each of them, and pass on the unchanged source

The change is made to the whole file of the kernel, which is then imported anew under another name, so that jitted
functions that call each other are all of the changed file. The engine's ops reach it inside `running(changed)`. The
unchanged source goes the same way first: a check that fails by itself, or that the copy breaks, would catch everything.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.kernels import _backend
from engine.kernels.triton import _interpreter

UNCHANGED = "unchanged"  # the case of the source as it is
Change = tuple[str, str]  # what is there exactly once, and what takes its place

# Of some defects the one symptom is an address outside every tensor. A GPU does not look at addresses: it lets such a
# defect pass, or stops, and with it every later launch of the process.
interpreted = pytest.mark.skipif(
    not _interpreter.active(),
    reason="seeded defects reach outside memory: only the interpreter sees that, and survives it",
)


def mutate(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """`module` from its source with `old`, which is there exactly once, replaced. Raises ValueError otherwise."""
    source = Path(str(module.__file__)).read_text()
    if source.count(old) != 1:
        raise ValueError(f"{module.__name__}: {old!r} occurs {source.count(old)} times, want once")
    return _imported(module, source.replace(old, new), folder)


def copied(module: ModuleType, change: Change | None, folder: Path) -> ModuleType:
    """`mutate`, or without a change `module` from its unchanged source, by the same way."""
    if change is not None:
        return mutate(module, *change, folder)
    return _imported(module, Path(str(module.__file__)).read_text(), folder)


def _imported(module: ModuleType, source: str, folder: Path) -> ModuleType:
    path = folder / f"{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source)
    # in the package of the original, so that its relative imports find their files
    name = f"{module.__name__}_mutated"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    sys.modules[name] = changed
    try:
        spec.loader.exec_module(changed)
    finally:
        del sys.modules[name]
    return changed


@contextmanager
def running(module: ModuleType) -> Iterator[None]:
    """Inside, the op of the module's file runs on this module."""
    room = module.__name__.rpartition(".")[2].removesuffix("_mutated")
    original = _backend.triton_kernels

    def chosen(wanted: str) -> ModuleType:
        return module if wanted == room else original(wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "triton_kernels", chosen)
        yield


def seeded(
    module: ModuleType,
    changes: Mapping[str, Change],
    swapped: Callable[[Change | None, Path], AbstractContextManager[None]],
) -> Callable[..., Any]:
    """Parametrises a check by the changes and none; inside `swapped(change, folder)` the engine runs on the changed
    source. The test tells of which file its defects are, for test_triton_defects.py."""
    if UNCHANGED in changes:
        raise ValueError(f"{module.__name__}: {UNCHANGED!r} is the case without a defect")

    def decorate(check: Callable[[], None]) -> Callable[..., None]:
        @interpreted
        @pytest.mark.parametrize("defect", [UNCHANGED, *changes])
        def test(defect: str, tmp_path: Path) -> None:
            change = changes.get(defect)
            caught = nullcontext() if change is None else pytest.raises(AssertionError)
            with swapped(change, tmp_path), caught:
                check()

        test.__doc__ = check.__doc__
        test.of, test.changes = module, dict(changes)  # type: ignore[attr-defined]
        return test

    return decorate


def mutations(module: ModuleType, changes: Mapping[str, Change]) -> Callable[..., Any]:
    """Parametrises a check: it runs once a change, on the changed kernel, and must raise AssertionError; and once on
    the unchanged one, where it must pass."""
    return seeded(module, changes, lambda change, folder: running(copied(module, change, folder)))
