"""The house: file sizes, import direction, where things are, and what the wheel may hold."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A package may import those to its right (docs/design.md section 3).
ORDER = ["train", "stages", "hybrid", "generate", "model", "data", "run", "ops", "kernels"]
# programs of their own, above the stages
OUTSIDE = {"sample", "plan", "report", "demo", "report_page", "report_run", "report_figures"}


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", *patterns], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long, f"over 400 lines: {long}"


def test_functions_are_short():
    long = []
    for path in tracked("engine/*.py", "kernels/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} ({lines})")
    assert not long, "over 60 lines: " + ", ".join(long)


def test_no_kernel_tunes_itself():
    """Blocks come from kernels/configs; engine/tune.py rewrites them when somebody asks."""
    tuned = [p for p in tracked("kernels/*.py") if re.search(r"autotune|heuristics", p.read_text())]
    assert not tuned


def room(module: str) -> str:
    """engine.stages.ppo.loop -> stages"""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "engine" else ""


def imports(path: Path) -> list[tuple[int, str]]:
    found = []
    package = ["engine", *path.relative_to(ROOT / "engine").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.append((node.lineno, name))
            found += [
                (node.lineno, f"{name}.{alias.name}") for alias in node.names if name == "engine"
            ]
    return found


def test_imports_point_one_way():
    wrong = []
    for path in tracked("engine/*.py"):
        own = room("engine." + ".".join(path.relative_to(ROOT / "engine").with_suffix("").parts))
        if own in OUTSIDE or own not in ORDER:
            continue
        for line, module in imports(path):
            target = room(module)
            if target in OUTSIDE or (target in ORDER and ORDER.index(target) < ORDER.index(own)):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_kernels_is_never_a_package():
    """A top-level package `kernels` would shadow Hugging Face's, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "engine" / "kernels").is_symlink()
    assert (ROOT / "engine" / "kernels").resolve() == ROOT / "kernels"


def test_an_installed_kernels_package_wins_over_the_folder(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("WHO = 'theirs'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.WHO)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "theirs"


def test_an_op_has_its_room():
    """kernels/x.py has tests/ops/test_x.py; csrc/cpu/x.cpp and x_<part>.cpp have kernels/x.py."""
    ops = {path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py")}
    assert not ops - tests, f"ops without a test: {sorted(ops - tests)}"
    parts = ("_backward", "_inputs")
    sources = {
        next(
            (path.stem.removesuffix(part) for part in parts if path.stem.endswith(part)), path.stem
        )
        for path in (ROOT / "csrc" / "cpu").glob("*.cpp")
    }
    shared = {
        "dispatch",
        "gemm",
        "logprob",
    }  # the module; what linear and the head's ops are made of
    assert not sources - ops - shared, f"C++ without an op: {sorted(sources - ops - shared)}"


def test_a_triton_kernel_has_its_rooms():
    """kernels/triton/x.py belongs to kernels/x.py and has its table, its test and its cases."""
    kernels = {path.stem for path in (ROOT / "kernels" / "triton").glob("[a-z]*.py")}
    for room, pattern, prefix in (
        ("kernels", "[a-z]*.py", ""),
        ("kernels/configs", "*.json", ""),
        ("tests/triton", "test_*.py", "test_triton_"),
        ("bench/gpu", "[a-z]*.py", ""),
    ):
        found = {path.stem.removeprefix(prefix) for path in (ROOT / room).glob(pattern)}
        assert not kernels - found, f"{room} lacks {sorted(kernels - found)}"


def test_no_path_of_a_machine_and_no_pickle():
    for path in tracked("*.py", "*.md", "*.yaml", "*.toml", "Makefile"):
        text = path.read_text()
        if path == Path(__file__):
            continue
        for word in ("/" + "root/", "/" + "work/", "/" + "home/"):
            assert word not in text, f"{path.relative_to(ROOT)} holds {word}"
        if path.is_relative_to(ROOT / "engine"):
            for line, module in imports(path) if path.suffix == ".py" else []:
                assert module.split(".")[0] not in ("pickle", "dill", "shelve"), f"{path}:{line}"
            assert "torch" + ".load(" not in text, f"{path.relative_to(ROOT)} unpickles"
            assert "trust_remote" + "_code=True" not in text
