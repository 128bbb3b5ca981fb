"""Builds the C++ extension `engine._C`; everything else about the package is in pyproject.toml.

The kernels of csrc/cpu are compiled once a class of CPU (plain, avx2, avx512, amx), each with its own flags, and one is
chosen when the library is loaded: no -march=native, so a wheel runs on any machine. Without a compiler nothing is built
and the engine runs on the torch definitions; it says so when it starts.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
HEADERS = sorted((ROOT / "csrc" / "cpu").glob("*.h"))
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
CLASSES = {"plain": [], "avx2": AVX2, "avx512": AVX512, "amx": AMX}
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
]


def class_flags() -> dict[str, list[str]]:
    return CLASSES if platform.machine() in ("x86_64", "AMD64") else {"plain": []}


def has_class_half(source: Path) -> bool:
    return "#ifdef ENGINE_CLASS" in source.read_text()


def compile_class(compiler: str, source: Path, name: str, flags: list[str], folder: Path) -> str:
    """One kernel file for one class -> its object file; kept when nothing it is made from has changed."""
    target = folder / f"{source.stem}.{name}.o"
    newest = max(path.stat().st_mtime for path in [source, *HEADERS, Path(__file__)])
    if not target.exists() or target.stat().st_mtime < newest:
        command = [compiler, *FLAGS, *flags, f"-DENGINE_CLASS={name}", "-c", str(source), "-o"]
        subprocess.run([*command, str(target)], check=True)
        refuse_shared_inlines(target)
    return str(target)


def refuse_shared_inlines(target: Path) -> None:
    """A weak symbol could be merged with another class's and run its instructions: see csrc/cpu/dispatch.h."""
    if not shutil.which("nm"):
        return
    listing = subprocess.run(["nm", "-C", str(target)], check=True, capture_output=True, text=True)
    weak = [line for line in listing.stdout.splitlines() if " W " in line and "pick_" not in line]
    if weak:
        target.unlink()
        raise RuntimeError(
            f"{target.name}: weak symbols {weak}, want none; keep them in the class's namespace, static"
        )


def build_command() -> dict[str, type]:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or ""
            folder = Path(self.build_temp).resolve() / "classes"
            folder.mkdir(parents=True, exist_ok=True)
            jobs = [
                (compiler, source, name, flags, folder)
                for source in SOURCES
                if has_class_half(source)
                for name, flags in class_flags().items()
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda job: compile_class(*job), jobs))
            self.extensions[0].extra_objects.extend(objects)
            super().build_extensions()

    return {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}


def extension_arguments() -> dict[str, object]:
    """Empty where the extension cannot be built, with the reason on the terminal."""
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        print(
            "engine: no C++ compiler found: installing without C++ kernels (slower, on torch definitions)"
        )
        return {}
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError:
        print(
            "engine: torch is not importable here: installing without C++ kernels; with torch installed, use"
        )
        print("engine:   pip install --no-build-isolation .")
        return {}
    extension = CppExtension(
        "engine._C",
        [str(path.relative_to(ROOT)) for path in SOURCES],
        depends=[str(path.relative_to(ROOT)) for path in HEADERS],
        extra_compile_args=[*FLAGS, "-fopenmp", "-g0"],
        extra_link_args=["-fopenmp", "-s"],
    )
    return {"ext_modules": [extension], "cmdclass": build_command()}


setup(**extension_arguments())
