"""Fixtures shared by all tests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def golden() -> dict[str, list[dict[str, Any]]]:
    """The golden numbers (float64) by group; the string "-inf" stands for minus infinity."""
    text = (Path(__file__).parent / "golden.json").read_text()
    return json.loads(text.replace('"-inf"', "-Infinity"))["cases"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
