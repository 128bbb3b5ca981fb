"""Enough defects are seeded: three in every file of kernels and in every kernel, or its check is hardly tried."""

import ast
import functools
import importlib
import os
from collections import defaultdict
from pathlib import Path

import pytest
from mutations import Change

FILES = Path(__file__).parents[2] / "kernels" / "triton"
FEWEST = 3


def jitted(path: Path) -> list[ast.FunctionDef]:
    """The functions under @triton.jit or @triton.jit(...)."""
    functions = [f for f in ast.parse(path.read_text()).body if isinstance(f, ast.FunctionDef)]
    return [f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]


SOURCES = {path.stem: jitted(path) for path in sorted(FILES.glob("*.py")) if jitted(path)}

# the names in the functions' bodies, by file
NAMED = {
    stem: {x.id for f in functions for x in ast.walk(f) if isinstance(x, ast.Name)}
    for stem, functions in SOURCES.items()
}


def is_part(stem: str, name: str) -> bool:
    """Does another jitted function name it? Then it is not launched itself. Public names are used by other files."""
    return any(name in NAMED[by] for by in ([stem] if name.startswith("_") else NAMED))


KERNELS = [(s, f.name) for s, fs in SOURCES.items() for f in fs if not is_part(s, f.name)]


@functools.cache
def seeded() -> dict[str, set[Change]]:
    """The changes that the tests of this folder make, by the file that they are made to."""
    found = defaultdict(set)
    for path in sorted(Path(__file__).parent.glob("test_triton_*.py")):
        if path != Path(__file__) and "mutations" in path.read_text():
            for test in vars(importlib.import_module(path.stem)).values():
                if hasattr(test, "changes"):
                    found[test.of.__name__.rpartition(".")[2]] |= set(test.changes.values())
    return found


def line_of(change: Change, source: str) -> int:
    """Where the change begins to differ."""
    old, new = change
    return source.count("\n", 0, source.index(old) + len(os.path.commonprefix([old, new]))) + 1


@pytest.mark.parametrize("stem", SOURCES)
def test_every_file_of_kernels_has_three_defects(stem):
    assert len(seeded()[stem]) >= FEWEST


@pytest.mark.parametrize("stem, name", KERNELS)
def test_every_kernel_has_three_defects_of_its_own(stem, name):
    """Defects in a function that a kernel calls are not its own: they may be those of another kernel alone."""
    source = (FILES / f"{stem}.py").read_text()
    lines = [line_of(change, source) for change in seeded()[stem]]
    kernel = next(f for f in SOURCES[stem] if f.name == name)
    own = [line for line in lines if kernel.lineno <= line <= kernel.end_lineno]
    assert len(own) >= FEWEST, f"{stem}.{name}: {len(own)} defects, want {FEWEST}"
