"""A pytest plugin: engine._C is the module that ENGINE_CHECKED_MODULE names, for every test of the process."""

import importlib.util
import os
import sys

import torch  # noqa: F401  the module is linked against it
from hypothesis import settings

path = os.environ["ENGINE_CHECKED_MODULE"]
spec = importlib.util.spec_from_file_location("engine._C", path)
if spec is None or spec.loader is None:
    raise ImportError(f"ENGINE_CHECKED_MODULE: got {path!r}, want the file of a Python extension")
sys.modules["engine._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["engine._C"])
settings.register_profile("checked", derandomize=True, database=None)
settings.load_profile("checked")
