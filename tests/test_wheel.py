"""What a wheel holds, and that the engine runs without a compiler: on the torch definitions, saying so once."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel of the committed tree, built where no compiler is on the path, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "--format=tar", "HEAD"],
        capture_output=True,
        check=False,
    )
    if archive.returncode:
        pytest.skip("not a git checkout")
    source = folder / "source"
    source.mkdir()
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
    environment = {key: value for key, value in os.environ.items() if key != "CXX"}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    done = subprocess.run(
        command,
        cwd=source,
        env={**environment, "PATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archived:
        archived.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_holds_the_package_and_nothing_else(installed):
    names = {path.name for path in installed.iterdir()}
    assert names == {"engine", "rlhf_engine-0.1.0.dist-info"}
    for inside in (
        "kernels/gae.py",
        "kernels/triton/swiglu.py",
        "kernels/configs/swiglu.json",
        "presets/small.yaml",
        "demo/data/prompts.jsonl",
        "stages/ppo/loop.py",
    ):
        assert (installed / "engine" / inside).is_file(), inside
    assert not (installed / "engine" / "kernels").is_symlink()


def test_it_runs_without_the_extension_and_says_so_once(installed):
    # the test environment's own editable install would lend its extension to this package
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "import torch, engine, engine.ops as ops;"
        "assert 'site' in engine.__file__, engine.__file__;"
        "cu = torch.tensor([0, 2], dtype=torch.int32);"
        "print([float(ops.gae(torch.ones(2), torch.zeros(2), cu, 1.0, 1.0)[0][0]) for _ in range(2)])"
    )
    done = run(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[2.0, 2.0]"
    assert done.stderr.count("which are slower") == 1
    assert "C++ compiler" in done.stderr


def test_the_command_line_runs_from_any_folder(installed):
    done = run(installed, "-m", "engine.train", "--help")
    assert done.returncode == 0 and "small" in done.stdout, done.stderr
