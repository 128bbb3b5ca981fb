"""The golden cases as the op tests pack them (tests/ops/golden_cases.py)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "ops"))
