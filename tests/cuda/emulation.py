"""CUDA C++ on a machine without a GPU: the drivers of csrc/cuda/emulated, compiled and run.

A driver runs a kernel's unchanged file (csrc/cuda/<op>.cuh) on a file of cases and writes the results. It is compiled
with AddressSanitizer and UBSan; a changed kernel (a seeded defect) without, which takes a fifth of the time. Binaries
are kept in build/tests/cuda under a hash of what they are made from.
"""

import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor

import setup as builder

SOURCES = builder.ROOT / "csrc" / "cuda"
EMULATED = SOURCES / "emulated"
FOLDER = builder.ROOT / "build" / "tests" / "cuda"
# As nvcc is told in setup.py: nothing is contracted but what is written as fma.
FLAGS = ["-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
CHECKED = [
    *("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fno-sanitize=null,object-size,vptr",  # what takes half of the compiler's time; addresses are checked anyway
]
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
# The defect that is none: a check that fails by itself would catch everything.
UNCHANGED = "unchanged"
Case = Sequence[Any]  # arrays, in the order in which the driver reads them

needs_compiler = pytest.mark.skipif(
    builder.compiler() is None, reason="no C++ compiler to run CUDA C++ on the CPU"
)


def digest(*parts: object, suffixes: tuple[str, ...] = (".cuh", ".h", ".cpp")) -> str:
    """Of the files of csrc/cuda that end so, and of `parts`."""
    files = [path for path in sorted(SOURCES.rglob("*")) if path.suffix in suffixes]
    text = [path.name.encode() + path.read_bytes() for path in files]
    return hashlib.sha256(b"\0".join([*text, *(str(part).encode() for part in parts)])).hexdigest()[
        :16
    ]


def kept(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """FOLDER/name-key, which `make` makes where it is not there; one process does it, the others wait."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    target = FOLDER / f"{name}-{key}"
    if target.exists():
        return target
    with FileLock(f"{target}.lock"):
        if not target.exists():
            for old in FOLDER.glob(f"{name}-*"):
                if old != target and not old.name.endswith(".lock"):
                    shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            aside = FOLDER / f".{name}-{os.getpid()}"
            make(aside)
            aside.rename(target)
    return target


def compile_with(command: Iterable[str], target: Path) -> None:
    done = subprocess.run(
        [str(builder.compiler()), *command, "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def driver(name: str, checked: bool = True) -> Path:
    """csrc/cuda/emulated/<name>.cpp as a program."""
    flags = [*FLAGS, *(CHECKED if checked else ["-O0"])]
    command = [*flags, str(EMULATED / f"{name}.cpp")]
    kind = "checked" if checked else "plain"
    return kept(f"{name}-{kind}", digest(command), lambda target: compile_with(command, target))


def precompiled() -> Path:
    """The folder of a header that holds the shim, for the many small programs with a defect each."""
    flags = [*FLAGS, "-O0"]

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "shim.h").write_text(f'#include "{EMULATED / "cases.h"}"\n')
        compile_with([*flags, "-x", "c++-header", str(folder / "shim.h")], folder / "shim.h.gch")

    return kept("header", digest(flags, suffixes=(".h",)), make)


def changed(name: str, old: str, new: str) -> Path:
    """The driver over csrc/cuda/<name>.cuh with `old`, which is there exactly once, replaced."""
    original = (SOURCES / f"{name}.cuh").read_text()
    if original.count(old) != 1:
        raise ValueError(f"{name}.cuh: {old!r} occurs {original.count(old)} times, want once")
    label = hashlib.sha256(f"{old}\0{new}".encode()).hexdigest()[:8]
    return _over(name, original.replace(old, new), label)


def _over(name: str, text: str, label: str) -> Path:
    """The driver over `text` in the place of csrc/cuda/<name>.cuh."""
    key = digest(text, FLAGS)

    def make(target: Path) -> None:
        source = target.with_suffix(".cuh")
        source.write_text(text)
        kernels = [
            f'-DKERNELS="{source}"',
            f"-I{SOURCES}",
            "-include",
            str(precompiled() / "shim.h"),
        ]
        loose = ["-Wno-error", "-w"]  # a defect may leave a variable unused
        compile_with([*FLAGS, *loose, "-O0", *kernels, str(EMULATED / f"{name}.cpp")], target)
        source.unlink()

    return kept(f"{name}-changed-{label}", key, make)


def with_defect(name: str, defects: Mapping[str, tuple[str, str]], defect: str) -> Path:
    """`changed` by one of the defects; for UNCHANGED, the driver made the same way over the file as it is."""
    if defect == UNCHANGED:
        return _over(name, (SOURCES / f"{name}.cuh").read_text(), UNCHANGED)
    return changed(name, *defects[defect])


def caught(defect: str) -> AbstractContextManager[Any]:
    """Inside, the check of a defect must fail, that of the unchanged file pass."""
    return nullcontext() if defect == UNCHANGED else pytest.raises(AssertionError)


def compile_all(name: str, defects: Mapping[str, tuple[str, str]]) -> None:
    """Two compilers at a time, so that the tests find their programs."""
    precompiled()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda each: with_defect(name, defects, each), [UNCHANGED, *defects]))


def array(x: Any) -> np.ndarray:
    if isinstance(x, Tensor):
        return x.contiguous().numpy()
    values = list(x)
    return np.array(values, np.float64 if any(isinstance(v, float) for v in values) else np.int64)


def run(program: Path, cases: Sequence[Case], folder: Path) -> list[bytes]:
    """The records that the driver writes for the cases. AssertionError with its message where it fails."""
    given, results = folder / "cases", folder / "results"
    with open(given, "wb") as file:
        for case in cases:
            for each in case:
                data = array(each).tobytes()
                file.write(struct.pack("<q", len(data)) + data)
    done = start(program, str(given), str(results))
    assert done.returncode == 0, done.stderr
    raw, records, at = results.read_bytes(), [], 0
    while at < len(raw):
        (size,) = struct.unpack_from("<q", raw, at)
        records.append(raw[at + 8 : at + 8 + size])
        at += 8 + size
    return records


def start(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    try:
        return subprocess.run(
            [str(program), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
    except subprocess.TimeoutExpired as late:  # a loop without an end is a defect like others
        raise AssertionError(f"{program.name} did not end within {late.timeout} s") from late


def tensor(record: bytes, dtype: torch.dtype) -> Tensor:
    if not record:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(record), dtype=dtype)
