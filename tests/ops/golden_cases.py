"""Golden cases (tests/golden.json) as parameters of tests, their padded rows packed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

Rows = Sequence[Sequence[float]]
_TEXT = (Path(__file__).parents[1] / "golden.json").read_text().replace('"-inf"', "-Infinity")
GROUPS: dict[str, list[dict[str, Any]]] = json.loads(_TEXT)["cases"]


def golden_cases(*groups: str) -> pytest.MarkDecorator:
    """Runs a test with `case`, each case of the groups."""
    cases = [case for group in groups for case in GROUPS[group]]
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


def offsets(lengths: Sequence[int]) -> torch.Tensor:  # (S+1,) int32
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def live_slots(case: dict[str, Any]) -> Rows:
    """The mask of a case: its tokens; in TRL's placement of the score, one slot after them too."""
    values = {**case["inputs"], **case["outputs"]}
    if "mask" in values:
        return values["mask"]
    return [[not pad for pad in row] for row in values["padding_mask_p1"]]


def mask_offsets(mask: Rows) -> torch.Tensor:
    return offsets([int(sum(row)) for row in mask])


def packed(rows: Rows, mask: Rows, dtype: torch.dtype) -> torch.Tensor:
    pairs = [pair for row, m in zip(rows, mask, strict=True) for pair in zip(row, m, strict=True)]
    return torch.tensor([x for x, keep in pairs if keep], dtype=dtype)


def ragged(rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=dtype)
