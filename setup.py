"""Builds the C++ extension `engine._C`; everything else about the package is in pyproject.toml.

A kernel's file has two halves (csrc/cpu/dispatch.h): the loops are compiled once a class of CPU (plain, avx2, avx512,
amx), each with its own flags, and one class is chosen when the library is loaded: no -march=native, so a wheel runs on
any machine. The other halves, checks and registration, are compiled once, some at a time, over a precompiled copy of
torch's headers.
Objects are kept in build/objects and made again only when what they are made from has changed. Without a compiler
nothing is built and the engine runs on the torch definitions; it says so when it starts.

Where torch is a CUDA build and nvcc is at hand, the kernels of csrc/cuda are built beside it, as `engine/_cuda*.so`:
in torch's stable ABI, so that one build serves later versions of torch. Elsewhere a line says why not; a GPU then runs
Triton's kernels for these ops too.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
OBJECTS = ROOT / "build" / "objects"
MODULE = ROOT / "csrc" / "cpu" / "dispatch.cpp"  # holds the Python module; torch's builder compiles it
SOURCES = sorted(path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if path != MODULE)
HEADERS = sorted((ROOT / "csrc" / "cpu").glob("*.h"))
TORCH_HEADERS = ROOT / "csrc" / "cpu" / "tensors.h"
BATCH = 6  # host halves that are compiled as one file: torch's templates, most of their time, are instantiated once
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC's own header of these instructions (its bug 105593)
]  # fmt: skip
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
CLASSES = {"plain": [], "avx2": AVX2, "avx512": AVX512, "amx": AMX}
TILED = ("gemm", "logprob")  # files of ENGINE_TILED_KERNELs; of the others class amx runs avx512's loops (dispatch.h)
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CUDA_OBJECTS = ROOT / "build" / "cuda"
CUDA_CODES = (80, 90, 100)  # A100, H100, B200; other GPUs of these generations run the same code
CUDA_TORCH = (2, 10)  # whose stable ABI the launchers use
# Nothing is contracted that is not written as fma, so that the tests' emulation (csrc/cuda/emulated) rounds alike.
CUDA_FLAGS = [
    *("-O3", "-std=c++20", "-fmad=false", "-DUSE_CUDA", "-Xcompiler", "-fPIC"),
    f"-DTORCH_TARGET_VERSION={CUDA_TORCH[0] << 56 | CUDA_TORCH[1] << 48:#018x}",
]
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def class_flags() -> dict[str, list[str]]:
    return CLASSES if platform.machine() in ("x86_64", "AMD64") else {"plain": []}


def class_halves() -> list[tuple[Path, str]]:
    """The files with loops, once a class that has its own."""
    looped = [source for source in SOURCES if "#ifdef ENGINE_CLASS" in source.read_text()]
    return [(path, name) for path in looped for name in class_flags() if name != "amx" or path.stem in TILED]


def torch_flags() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [*FLAGS, "-fopenmp", "-g0", *(word for path in include_paths() for word in ("-isystem", path))]


def stamp() -> str:
    """What every object depends on beside its sources: compiler, flags, torch."""
    import torch

    return f"{compiler()} {FLAGS} {CLASSES} {torch.__version__} {TORCH_HEADERS.read_text()}"


def empty_unless(folder: Path, stamp: str) -> None:
    """Makes the folder; what it holds is removed unless it was made under the same stamp."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "stamp"
    if not record.exists() or record.read_text() != stamp:
        for old in folder.iterdir():
            old.unlink()
        record.write_text(stamp)


def made_from(source: Path) -> set[Path]:
    """A source and every header of the folder that it includes, directly or not."""
    found, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r'#include "(\w+\.(?:h|cuh))"', path.read_text())
            waiting += [path.parent / name for name in names]
    return found


def make(target: Path, sources: Iterable[Path], command: list[str]) -> bool:
    """Runs `command -o target` where the target is missing or older than its sources."""
    newest = max(path.stat().st_mtime for source in sources for path in made_from(source))
    if target.exists() and target.stat().st_mtime >= newest:
        return False
    aside = target.with_suffix(f".{os.getpid()}.tmp")  # two builds at once never see half an object
    subprocess.run([*command, "-o", str(aside)], check=True)
    aside.replace(target)
    return True


def precompile_torch_headers() -> Path:
    """A header next to its precompiled form; the compiler takes the latter by itself where it fits."""
    header = OBJECTS / "torch_headers.h"
    if not header.exists():
        header.write_text(f'#include "{TORCH_HEADERS}"\n')
    compiled = OBJECTS / "torch_headers.h.gch"
    if not compiled.exists():
        aside = compiled.with_suffix(f".{os.getpid()}.tmp")
        command = [str(compiler()), *torch_flags(), "-x", "c++-header", str(header), "-o", str(aside)]
        subprocess.run(command, check=True)
        aside.replace(compiled)
    return header


def compile_loops(source: Path, name: str) -> str:
    """The loops of one kernel file -> the object of one class."""
    target = OBJECTS / f"{source.stem}.{name}.o"
    flags = [*FLAGS, *CLASSES[name], f"-DENGINE_CLASS={name}"]
    if make(target, [source], [str(compiler()), *flags, "-c", str(source)]):
        refuse_shared_inlines(target)
    return str(target)


def batches() -> list[list[Path]]:
    """The kernel files whose host halves are compiled together: what they define without a name must not collide."""
    return [SOURCES[i : i + BATCH] for i in range(0, len(SOURCES), BATCH)]


def compile_batch(sources: list[Path], header: Path) -> str:
    """The host halves of some kernel files -> one object, over the precompiled header."""
    together = OBJECTS / f"{sources[0].stem}-{sources[-1].stem}.cpp"
    text = "".join(f'#include "{source}"\n' for source in sources)
    if not together.exists() or together.read_text() != text:  # a file that is gone is gone from the object too
        together.write_text(text)
    target = together.with_suffix(".o")
    make(target, [together, *sources], [str(compiler()), *torch_flags(), "-include", str(header), "-c", str(together)])
    return str(target)


def refuse_shared_inlines(target: Path) -> None:
    """A weak symbol could be merged with another class's and run its instructions: see csrc/cpu/dispatch.h."""
    if not shutil.which("nm"):
        return
    listing = subprocess.run(["nm", "-C", str(target)], check=True, capture_output=True, text=True)
    weak = [line for line in listing.stdout.splitlines() if " W " in line and "pick_" not in line]
    if weak:
        target.unlink()
        raise RuntimeError(f"{target.name}: weak symbols {weak}, want none; make them static, in the class's namespace")


def compile_kernels() -> list[str]:
    """All objects, on all cores."""
    empty_unless(OBJECTS, stamp())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        header = pool.submit(precompile_torch_headers)
        halves = [pool.submit(compile_loops, source, name) for source, name in class_halves()]
        halves += [pool.submit(compile_batch, sources, header.result()) for sources in batches()]
        return [half.result() for half in halves]


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    inside = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    return inside or shutil.which("nvcc")


def nvcc_says(option: str) -> str:
    command = [str(nvcc()), option]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def nvcc_version() -> str:
    found = re.search(r"release (\d+\.\d+)", nvcc_says("--version"))
    return found[1] if found else "unknown"


def why_no_cuda() -> str:
    """Why csrc/cuda cannot be built here, or nothing."""
    import torch

    wanted = ".".join(map(str, CUDA_TORCH))
    if not CUDA_SOURCES:
        return "this copy of the sources has no csrc/cuda"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if torch.__version__ < wanted:
        return f"torch {torch.__version__} is older than {wanted}"
    if nvcc() is None:
        return f"no nvcc on the path or in CUDA_HOME; install CUDA {torch.version.cuda}'s compiler"
    if nvcc_version().split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {nvcc_version()}, torch of {torch.version.cuda}"
    return ""


def cuda_code_flags() -> list[str]:
    """Machine code for each GPU that this nvcc knows, and PTX of the newest for those that come later."""
    known = nvcc_says("--list-gpu-code").split()
    codes = [code for code in CUDA_CODES if f"sm_{code}" in known]
    flags = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
    return [*flags, f"-gencode=arch=compute_{codes[-1]},code=compute_{codes[-1]}"]


def nvcc_command() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [str(nvcc()), "-ccbin", str(compiler()), *CUDA_FLAGS, *(f"-I{path}" for path in include_paths())]


def compile_cuda(target: Path) -> None:
    """csrc/cuda/*.cu -> one library of operators, which torch.ops.load_library loads."""
    from torch.utils.cpp_extension import library_paths

    command = [*nvcc_command(), *cuda_code_flags()]
    empty_unless(CUDA_OBJECTS, f"{stamp()} {command} {nvcc_version()}")
    objects = [CUDA_OBJECTS / f"{source.stem}.o" for source in CUDA_SOURCES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pairs = zip(objects, CUDA_SOURCES, strict=True)
        done = [pool.submit(make, made, [source], [*command, "-c", str(source)]) for made, source in pairs]
        for each in done:
            each.result()
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cuda", "-ltorch_cpu", "-ltorch", "-lc10"]
    link = [str(nvcc()), "-ccbin", str(compiler()), "-shared", "-cudart", "shared", *map(str, objects)]
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*link, *libraries, "-o", str(target)], check=True)


def cuda_extensions() -> list[Extension]:
    """`engine._cuda`, or nothing, with the reason on the terminal."""
    reason = why_no_cuda()
    if reason:
        print(f"engine: installing without CUDA C++ kernels (a GPU runs Triton's instead): {reason}")
        return []
    used = sorted({path for source in CUDA_SOURCES for path in made_from(source)})
    depends = [str(path.relative_to(ROOT)) for path in used]
    return [Extension("engine._cuda", [], depends=depends, optional=True)]


def build_command() -> dict[str, type]:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """torch's builder for the module and the link, with the kernels' objects made beforehand."""

        def build_extensions(self) -> None:
            self.extensions[0].extra_objects.extend(compile_kernels())
            super().build_extensions()

        def build_extension(self, extension: Extension) -> None:
            if extension.name != "engine._cuda":
                return super().build_extension(extension)
            try:
                compile_cuda(Path(self.get_ext_fullpath(extension.name)))
            except subprocess.CalledProcessError as error:  # it is optional: setuptools prints this and goes on
                raise CompileError(f"CUDA C++ kernels: {error}") from error

    return {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}


def extension_arguments() -> dict[str, object]:
    """Empty where the extension cannot be built, with the reason on the terminal."""
    if compiler() is None:
        print("engine: no C++ compiler found: installing without C++ kernels (slower, on torch definitions)")
        return {}
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError:
        print("engine: torch cannot be imported here: installing without C++ kernels; with torch installed, use")
        print("engine:   pip install --no-build-isolation .")
        return {}
    extension = CppExtension(
        "engine._C",
        [str(MODULE.relative_to(ROOT))],
        depends=[str(path.relative_to(ROOT)) for path in [*SOURCES, *HEADERS]],
        extra_compile_args=[*FLAGS, "-fopenmp", "-g0"],
        extra_link_args=["-fopenmp", "-s"],
    )
    return {"ext_modules": [extension, *cuda_extensions()], "cmdclass": build_command()}


if __name__ == "__main__":  # pip runs this file as the main one; tests import its functions
    setup(**extension_arguments())
