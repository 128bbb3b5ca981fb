"""The checked build: the extension with every class of CPU in it, made for this machine and under sanitizers.

What the machine cannot run is compiled from the same sources without the instructions: vectors of 16 lanes from the
compiler, AMX tiles from csrc/cpu/tiles_emulated.h. So packing, tails and edges of every class are tested everywhere.
The loops are instrumented by AddressSanitizer and UBSan: they alone work on raw pointers. The host halves are the
ones of the extension itself.

`build()` makes it, `run_tests(...)` runs pytest on it in a process of its own.
"""

import fcntl
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setup as builder
from engine.kernels._backend import extension

FOLDER = builder.ROOT / "build" / "checked"
MODULE = FOLDER / "_C.so"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# -O1 compiles in a fifth of the time of -O2. Without contraction sums round alike wherever the optimiser stands.
FLAGS = ["-O1", "-g1", "-ffp-contract=off", *(f for f in builder.FLAGS if not f.startswith("-O"))]
QUICK = {"ranking_loss": ["-O0"]}  # a function a number of answers: half a minute for each class, run for a second
# Fresh memory is NaN in float32 and bfloat16, so that a padding that is not written shows in the results. Freed memory
# is kept for a short while only: an operand that is read too late was freed just before, and new pages cost time.
ASAN_OPTIONS = (
    "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255:quarantine_size_mb=8:malloc_context_size=5"
)


def preloads() -> list[str]:
    """The sanitizer's runtime, and what it intercepts that Python itself does not load."""
    found = []
    for library in ("libasan.so", "libstdc++.so.6"):
        command = [str(builder.compiler()), f"-print-file-name={library}"]
        path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        found += [path] if Path(path).is_absolute() else []
    return found


def why_not() -> str:
    """Why there can be no checked build here, or nothing."""
    if builder.compiler() is None:
        return "no C++ compiler"
    if extension() is None:
        return "the extension is not built, whose host halves the checked build takes"
    if len(preloads()) < 2:
        return f"{builder.compiler()} has no AddressSanitizer (libasan.so)"
    return ""


def class_flags() -> dict[str, list[str]]:
    """avx2 is real where the machine has it; the higher ones never are, so that every machine tests the same."""
    classes = {
        "plain": [],
        "avx2": ["-DENGINE_LANES=8"],
        "avx512": ["-DENGINE_LANES=16"],
        "amx": ["-DENGINE_LANES=16", "-DENGINE_TILES"],
    }
    module = extension()
    if module is not None and module.detected_class() != "plain":
        classes["avx2"] = builder.AVX2
    return {name: classes[name] for name in builder.class_flags()}


def compile_loops(source: Path, name: str, flags: list[str]) -> str:
    target = FOLDER / f"{source.stem}.{name}.o"
    flags = [*FLAGS, *QUICK.get(source.stem, []), *SANITIZE, *flags]
    command = [str(builder.compiler()), *flags, f"-DENGINE_CLASS={name}", "-c"]
    builder.make(target, [source], [*command, str(source)])
    return str(target)


def compile_module() -> str:
    target = FOLDER / "dispatch.o"
    every = ["-DENGINE_EVERY_CLASS", "-Wno-unused-function"] if len(class_flags()) > 1 else []
    include = f"-I{sysconfig.get_path('include')}"
    command = [str(builder.compiler()), *builder.torch_flags(), "-O1", include, *every]
    source = builder.MODULE
    builder.make(target, [source], [*command, "-DTORCH_EXTENSION_NAME=_C", "-c", str(source)])
    return str(target)


def link(objects: list[str]) -> None:
    newest = max(Path(each).stat().st_mtime for each in objects)
    if MODULE.exists() and MODULE.stat().st_mtime >= newest:
        return
    from torch.utils.cpp_extension import library_paths

    libraries = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch", "-ltorch_cpu"]
    command = [str(builder.compiler()), "-shared", *SANITIZE, "-fopenmp", *objects, *libraries]
    subprocess.run([*command, "-ltorch_python", "-o", str(MODULE)], check=True)


def build() -> None:
    """One process at a time; objects are made again only when what they are made from has changed."""
    FOLDER.parent.mkdir(exist_ok=True)
    with open(FOLDER.parent / "checked.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder.empty_unless(FOLDER, f"{builder.stamp()} {FLAGS} {QUICK} {SANITIZE} {class_flags()}")
        builder.empty_unless(builder.OBJECTS, builder.stamp())
        header = builder.precompile_torch_headers()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            halves = [pool.submit(compile_module)]
            halves += [
                pool.submit(compile_loops, source, name, class_flags()[name])
                for source, name in builder.class_halves()
            ]
            halves += [pool.submit(builder.compile_batch, sources, header) for sources in builder.batches()]
            link([half.result() for half in halves])


def run_tests(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest with these arguments, on the checked build: engine._C is that module (checked_plugin.py)."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "ENGINE_"))},
        "LD_PRELOAD": " ".join(preloads()),
        "ASAN_OPTIONS": ASAN_OPTIONS,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ENGINE_CHECKED_MODULE": str(MODULE),
        "PYTHONPATH": os.pathsep.join([str(builder.ROOT), str(builder.ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "checked_plugin", "-p", "no:cacheprovider"]
    return subprocess.run(
        # capture=sys: the sanitizers write to the process's own stderr, and end it
        [*command, "-x", "-p", "no:xdist", "--capture=sys", *arguments],
        cwd=builder.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
