"""Seeded defects: a kernel's source with one place changed must fail the check that is there to catch it.

    @mutations(kernels, {"mask dropped": ("mask=inside", "mask=at >= 0"), ...})
    def test_defects(mutated): check(mutated)      # must raise for each of them

The change is made to the whole file of the kernel, which is then imported anew under another name, so that jitted
functions that call each other are all of the changed file. The engine's ops reach it inside `running(mutated)`.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.kernels import _backend


def mutate(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """`module` from its source with `old`, which is there exactly once, replaced. Raises ValueError otherwise."""
    source = Path(str(module.__file__)).read_text()
    if source.count(old) != 1:
        raise ValueError(f"{module.__name__}: {old!r} occurs {source.count(old)} times, want once")
    path = folder / f"{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new))
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


def mutations(module: ModuleType, changes: dict[str, tuple[str, str]]) -> Callable[..., Any]:
    """Parametrises a check: it runs once a change, on the changed kernel, and must raise AssertionError."""

    def decorate(check: Callable[[], None]) -> Callable[..., None]:
        @pytest.mark.parametrize("defect", changes)
        def test(defect: str, tmp_path: Path) -> None:
            changed = mutate(module, *changes[defect], tmp_path)
            with running(changed), pytest.raises(AssertionError):
                check()

        test.__doc__ = check.__doc__
        return test

    return decorate
