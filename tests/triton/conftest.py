"""The Triton kernels' tests need triton; without a GPU they run in its interpreter (tests/conftest.py asks for it)."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
