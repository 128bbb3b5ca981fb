"""The kernels in CUDA C++ (csrc/cuda), where the package was installed with nvcc beside a CUDA build of torch.

Their library holds no Python: it registers operators in torch's namespace `engine_cuda`, with the schemas that
kernels/<op>.py defines. It is loaded when a GPU op first asks for it. An op that has no kernel in it, arguments of
another dtype than float32, AMD's GPUs and machines without nvcc run Triton's kernels, which all ops have.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPS = ("kl_reward_gae", "ranking_loss")


def library() -> Path | None:
    """engine/_cuda*.so, which setup.py builds where it can."""
    spec = importlib.util.find_spec("engine._cuda")
    return Path(spec.origin) if spec is not None and spec.origin else None


@functools.cache
def why_no_cuda() -> str:
    """Empty where the library is there and loads; loads it."""
    path = library()
    if path is None:
        return (
            "the CUDA C++ kernels are not built; with nvcc and a CUDA build of torch, reinstall with"
            " pip install --no-build-isolation -e ."
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the CUDA C++ kernels do not load: {error}"
    return ""


def has_cuda_kernel(op: str) -> bool:
    """Has the library this op, and does it load here?"""
    return op in OPS and not why_no_cuda()


def takes(*arguments: Any) -> bool:
    """The library's ops are float32 (ranks float64), on an NVIDIA GPU."""
    floats = [x for x in arguments if isinstance(x, Tensor) and x.is_floating_point()]
    return bool(floats) and floats[0].dtype == torch.float32 and torch.version.hip is None


def cuda_kernel(op: str) -> Callable[..., Any]:
    """`torch.ops.engine_cuda.<op>`, for an op that the library has."""
    return getattr(torch.ops.engine_cuda, op)
