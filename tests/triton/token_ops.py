"""What the tests of ops on packed tokens share: golden cases, small blocks, and defects in helpers of kernels."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from launching import DEVICE
from mutations import Change, copied, running, seeded

from engine.kernels._backend import backend
from engine.kernels.triton import _launch, _reduce

OPS = Path(__file__).parents[1] / "ops"


def ops_file(name: str) -> ModuleType:
    """tests/ops/<name>.py, whose checks also hold for these kernels."""
    if str(OPS) not in sys.path:
        sys.path.append(str(OPS))  # for its imports
    spec = importlib.util.spec_from_file_location(f"ops_{name}", OPS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses of a module look for it there
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


FLOAT32 = ops_file("conftest").Precision(torch.float32, 2e-5, 2e-6)
GROUPS = ops_file("golden_cases").GROUPS


def golden(*groups: str) -> pytest.MarkDecorator:
    cases = [case for group in groups for case in GROUPS[group]]
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


def offsets(lengths: list[int]) -> torch.Tensor:  # (S+1,) int32
    total = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return total.to(torch.int32).to(DEVICE)


@contextmanager
def on_device() -> Iterator[None]:
    """Checks that know nothing of Triton run on it inside, and make their tensors there."""
    with backend("triton"), torch.device(DEVICE):
        yield


@contextmanager
def blocks(block: int, rows: int = 2) -> Iterator[None]:
    """Every table says BLOCK = `block`, and reductions go on `rows` at a time: few numbers fill several blocks."""
    row = {"up_to": None, "BLOCK": block, "num_warps": 1, "num_stages": 1}
    with pytest.MonkeyPatch.context() as patch:
        columns = dict.fromkeys((*_launch.NVIDIA, *_launch.AMD), [row])
        patch.setattr(_launch, "table", lambda op: columns)
        patch.setitem(_reduce.ONE_PROGRAM.blocks, "ROWS", rows)
        yield


def helper_mutations(
    helper: ModuleType, user: ModuleType, changes: dict[str, Change]
) -> Callable[..., Any]:
    """`mutations` in a file that the kernels of `user` import."""

    @contextmanager
    def swapped(change: Change | None, folder: Path) -> Iterator[None]:
        (folder / "user").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            changed = copied(helper, change, folder)
            if helper is _reduce:
                changed.ONE_PROGRAM.blocks["ROWS"] = 2
            patch.setitem(sys.modules, helper.__name__, changed)
            importing = copied(user, None, folder / "user")
        with running(importing):
            yield

    return seeded(helper, changes, swapped)
