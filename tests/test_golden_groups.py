"""Every group of golden numbers is used: by a test of its own, and where it has a kernel on the CPU's and on Triton."""

import json
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
GROUPS = json.loads((TESTS / "golden.json").read_text())["cases"]
# Choice entropies of Winogender and CrowS-Pairs: the engine has no such evaluation.
NOT_OFFERED = {"bias_eval_entropy"}
WITHOUT_KERNEL = {
    "accounting", "adaptive_kl", "eos_processing", "lr_schedule", "position_ids", "rm_normalisation", "win_rate",
}  # fmt: skip


def named_in(folder: str) -> set[str]:
    """Groups that a test file there names."""
    files = [path for path in TESTS.glob(folder) if path != Path(__file__)]
    text = "\n".join(path.read_text() for path in files)
    return {group for group in GROUPS if f'"{group}"' in text}


@pytest.mark.parametrize("folder", ["ops/test_*.py", "triton/test_*.py"])
def test_a_group_with_kernels_is_used_there(folder):
    assert named_in(folder) == GROUPS.keys() - WITHOUT_KERNEL - NOT_OFFERED


def test_a_group_without_kernels_is_used():
    assert named_in("**/test_*.py") == GROUPS.keys() - NOT_OFFERED
