"""csrc/cuda under nvcc, as setup.py builds it, and how the library is found and loaded. Nothing is run: no GPU.

torch's CPU wheel has the headers and all libraries but torch_cuda, for which a stand-in is linked.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import emulation
import pytest
import torch
from torch.torch_version import TorchVersion

import setup as builder
from engine.kernels import _cuda

KERNELS = {"apply", "tile_sums", "tile_carries", "rank_prompts", "rank_batch"}
needs_nvcc = pytest.mark.skipif(
    builder.nvcc() is None, reason="no nvcc: csrc/cuda is not compiled for GPUs"
)

BUILD = """
import sys, torch
from pathlib import Path
import torch.utils.cpp_extension as extension
folder = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
import setup as builder
libraries = extension.library_paths()
extension.library_paths = lambda *given: [*libraries, str(folder)]
builder.CUDA_OBJECTS = folder / "objects"
builder.compile_cuda(folder / "_cuda.so")
"""


def build(folder: Path) -> None:
    from torch.utils.cpp_extension import include_paths

    folder.mkdir()
    stand_in = [
        str(emulation.EMULATED / "launchers.cpp"),
        *(f"-isystem{p}" for p in include_paths()),
    ]
    options = ["-shared", "-fPIC", "-DUSE_CUDA", "-Wl,-soname,libtorch_cuda.so"]
    emulation.compile_with([*emulation.FLAGS, *options, *stand_in], folder / "libtorch_cuda.so")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder), str(builder.ROOT)],
        env={**os.environ, "NVCC_APPEND_FLAGS": "-Xptxas -v -Werror all-warnings"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "log").write_text(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def built() -> Path:
    """The folder of a library for all GPUs and of what ptxas said; made once for these sources and this nvcc."""
    parts = (builder.CUDA_FLAGS, builder.CUDA_CODES, builder.nvcc_version(), torch.__version__)
    key = emulation.digest(*parts, suffixes=(".cu", ".cuh"))
    return emulation.kept("nvcc", key, build)


def resources(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """By kernel and GPU: registers, bytes of stack, spilled bytes, bytes of shared memory."""
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        name, code = re.match(r"'(\w+)' for '(\w+)'", part).groups()
        kernel = next(k for k in KERNELS if f"{len(k)}{k}" in name)
        stack, stores, loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part
            ).groups(),
        )
        smem = re.search(r"(\d+) bytes smem", part)
        found[kernel, code] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "stack": stack,
            "spills": stores + loads,
            "shared": int(smem[1]) if smem else 0,
        }
    return found


@needs_nvcc
def test_every_kernel_compiles_for_every_gpu_without_warnings_or_spills(built):
    """On all of them 64 K registers and 2,048 threads a multiprocessor; here blocks of 128 and 256 threads."""
    found = resources((built / "log").read_text())
    assert set(found) == {(k, f"sm_{code}") for k in KERNELS for code in builder.CUDA_CODES}
    for where, used in found.items():
        assert used["spills"] == 0 and used["stack"] == 0, f"{where}: {used}"
        # two warps a scheduler in flight at the least, for kernels that wait for memory
        assert used["registers"] <= 128, f"{where}: {used}"
        assert used["shared"] <= 1024, f"{where}: {used}"


@needs_nvcc
def test_the_gate_sees_spills():
    log = (
        "ptxas info : Compiling entry function '_ZN11engine_cuda5applyILi8EEEv' for 'sm_90'\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info : Used 40 registers, used 1 barriers, 512 bytes smem\n"
    )
    want = {"registers": 40, "stack": 16, "spills": 20, "shared": 512}
    assert resources(log) == {("apply", "sm_90"): want}


def python(built: Path, code: str) -> subprocess.CompletedProcess[str]:
    runtime = (
        Path(str(builder.nvcc())).resolve().parent
    )  # where a wrapper stands, cudart may be elsewhere
    home = re.search(r"#\$ TOP=(\S+)", subprocess.run(
        [str(builder.nvcc()), "--dryrun", "x.cu"], capture_output=True, text=True, check=False
    ).stderr)  # fmt: skip
    top = Path(home[1]) if home else runtime.parent
    paths = [built, top / "lib", top / "lib64", top / "targets" / "x86_64-linux" / "lib"]
    return subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path\nBUILT = Path({str(built)!r})\n{code}"],
        env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(map(str, paths))},
        cwd=builder.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_nvcc
def test_the_library_loads_and_has_the_ops(built):
    code = """
import torch
from engine.kernels import _cuda, kl_reward_gae, ranking_loss
from engine.kernels._backend import REGISTRY
_cuda.library = lambda: BUILT / "_cuda.so"
assert _cuda.why_no_cuda() == "", _cuda.why_no_cuda()
for op in _cuda.OPS:
    assert _cuda.has_cuda_kernel(op)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"engine_cuda::{op}", "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"engine_cuda::{op}", "CPU")
    schema = torch._C.parse_schema(f"engine_cuda::{REGISTRY[op]}")
    assert str(_cuda.cuda_kernel(op).default._schema) == str(schema)
assert not _cuda.has_cuda_kernel("gae")
print("loaded")
"""
    done = python(built, code)
    assert done.stdout.strip() == "loaded", done.stderr


def test_without_the_library_the_reason_says_what_to_do(monkeypatch):
    _cuda.why_no_cuda.cache_clear()
    monkeypatch.setattr(_cuda, "library", lambda: None)
    assert not _cuda.has_cuda_kernel("kl_reward_gae")
    assert "not built; with nvcc and a CUDA build of torch" in _cuda.why_no_cuda()
    _cuda.why_no_cuda.cache_clear()


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    _cuda.why_no_cuda.cache_clear()
    (tmp_path / "_cuda.so").write_bytes(b"not a library")
    monkeypatch.setattr(_cuda, "library", lambda: tmp_path / "_cuda.so")
    assert not _cuda.has_cuda_kernel("kl_reward_gae")
    assert "do not load: " in _cuda.why_no_cuda()
    _cuda.why_no_cuda.cache_clear()


def test_what_the_library_takes(monkeypatch):
    x, cu = torch.zeros(2), torch.zeros(2, dtype=torch.int32)
    assert _cuda.takes(x, x.double(), cu, 0, None)
    assert not _cuda.takes(x.bfloat16(), x, cu) and not _cuda.takes(cu, 1.0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not _cuda.takes(x)


def pretend(monkeypatch, cuda: str | None, nvcc: str | None, release: str = "13.0") -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(builder, "nvcc", lambda: nvcc)
    answers = {
        "--version": f"nvcc: release {release}, V{release}.88",
        "--list-gpu-code": "sm_80 sm_90",
    }
    monkeypatch.setattr(builder, "nvcc_says", answers.__getitem__)


@pytest.mark.parametrize(
    ("cuda", "nvcc", "reason"),
    [
        (None, "/cuda/bin/nvcc", "was built without CUDA"),
        ("13.0", None, "no nvcc on the path or in CUDA_HOME; install CUDA 13.0's compiler"),
        ("12.8", "/cuda/bin/nvcc", "nvcc is of CUDA 13.0, torch of 12.8"),
        ("13.1", "/cuda/bin/nvcc", ""),
    ],
)
def test_when_setup_builds_cuda(cuda, nvcc, reason, monkeypatch, capsys):
    pretend(monkeypatch, cuda, nvcc)
    assert reason in builder.why_no_cuda() and bool(reason) == bool(builder.why_no_cuda())
    modules = builder.extension_arguments()["ext_modules"]
    assert [m.name for m in modules] == ["engine._C", *(["engine._cuda"] if not reason else [])]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (1 if reason else 0)
    if reason:
        assert (
            lines[0].startswith("engine: installing without CUDA C++ kernels")
            and reason in lines[0]
        )
    else:
        assert modules[1].optional
        assert (
            "csrc/cuda/ranking_loss.cuh" in modules[1].depends
            and "csrc/cuda/border.cuh" in modules[1].depends
        )


def test_a_torch_whose_stable_abi_is_too_old(monkeypatch):
    pretend(monkeypatch, "13.0", "/cuda/bin/nvcc")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1"))
    assert builder.why_no_cuda() == "torch 2.9.1 is older than 2.10"


def test_sources_without_csrc_cuda(monkeypatch):
    pretend(monkeypatch, "13.0", "/cuda/bin/nvcc")
    monkeypatch.setattr(builder, "CUDA_SOURCES", [])
    assert builder.why_no_cuda() == "this copy of the sources has no csrc/cuda"


def test_codes_are_those_that_nvcc_knows(monkeypatch):
    pretend(monkeypatch, "12.6", "/cuda/bin/nvcc")
    codes = [flag.rpartition("code=")[2] for flag in builder.cuda_code_flags()]
    assert codes == ["sm_80", "sm_90", "compute_90"]


def test_cuda_home_comes_before_the_path(monkeypatch, tmp_path):
    inside = tmp_path / "bin" / "nvcc"
    inside.parent.mkdir()
    inside.write_text("#!/bin/sh\n")
    inside.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert builder.nvcc() == str(inside)


def test_the_builder_sends_each_extension_its_way(monkeypatch, tmp_path):
    """engine._cuda to nvcc, where it may fail without the package failing; engine._C to torch's builder."""
    from setuptools.errors import CompileError
    from torch.utils.cpp_extension import BuildExtension

    seen = []
    build = builder.build_command()["build_ext"]
    command = SimpleNamespace(get_ext_fullpath=lambda name: str(tmp_path / "_cuda.so"))
    # with_options gives a subclass of the class that is asked
    ours = next(
        c for c in build.mro() if "build_extension" in c.__dict__ and c is not BuildExtension
    )
    monkeypatch.setattr(builder, "compile_cuda", seen.append)
    ours.build_extension(command, SimpleNamespace(name="engine._cuda"))
    assert seen == [tmp_path / "_cuda.so"]

    def fails(target: Path) -> None:
        raise subprocess.CalledProcessError(1, ["nvcc"])

    monkeypatch.setattr(builder, "compile_cuda", fails)
    with pytest.raises(CompileError, match="CUDA C.. kernels: Command"):
        ours.build_extension(command, SimpleNamespace(name="engine._cuda"))
