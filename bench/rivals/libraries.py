"""The cases that other libraries of Triton kernels do too, by their own host functions.

Each function makes its arguments on a device and gives the call. Where a host function insists on CUDA tensors, the
copy of its file that is read here does not. Asked without an interpreter, the same calls say what would be compiled.
"""

import functools
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

Call = Callable[[], Any]
MULTIPROCESSORS = 132  # of an H100 SXM


@triton.jit
def _logaddexp(a, b):  # type: ignore[no-untyped-def]
    """For cut-cross-entropy's, whose log1p of libdevice the interpreter has not."""
    most = tl.maximum(a, b)
    return most + tl.log(1.0 + tl.exp(tl.minimum(a, b) - most))


@triton.jit
def _rsqrt(x):  # type: ignore[no-untyped-def]
    """For Liger's, which is libdevice's."""
    return tl.rsqrt(x)


def _rows(device: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def _targets(device: str, N: int, V: int) -> torch.Tensor:
    return torch.arange(N, device=device) % V


def liger_logprob(device: str, dtype: torch.dtype, back: bool, N: int, V: int, H: int) -> Call:
    """reduction="none": a loss a token, no entropy; the backward makes the logits again."""
    ops = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    hidden, weight = _rows(device, dtype, N, H), _rows(device, dtype, V, H)
    targets, grad = _targets(device, N, V), _rows(device, torch.float32, N)
    more = {"token_grad_output": grad} if back else {}
    return lambda: ops.fused_linear_cross_entropy_forward(
        hidden,
        weight,
        targets,
        reduction="none",
        compute_gradients=back,
        weight_requires_grad=back,
        **more,
    )


def cce_logprob(device: str, dtype: torch.dtype, back: bool, N: int, V: int, H: int) -> Call:
    """Log-sum-exp and the target's logit by two kernels; no entropy; gradients under locks."""
    lse = importlib.import_module("cut_cross_entropy.cce_lse_forward")
    dot = importlib.import_module("cut_cross_entropy.indexed_dot")
    backward = importlib.import_module("cut_cross_entropy.cce_backward")
    if device == "cpu":
        lse.tl_logaddexp = _logaddexp  # type: ignore[attr-defined]
    hidden, weight = _rows(device, dtype, N, H), _rows(device, dtype, V, H)
    targets, row = _targets(device, N, V), _rows(device, torch.float32, N)
    if back:
        weight.requires_grad_()
        return lambda: backward.cce_backward_kernel(
            row, hidden, weight, row, None, None, None, targets
        )
    return lambda: (
        lse.cce_lse_forward_kernel(hidden, weight),
        dot.indexed_neg_dot_forward_kernel(hidden, weight, targets),
    )


@functools.cache
def _copied(path: str, pattern: str, instead: str) -> Any:
    """A library's file, edited, as a module of its own; its source lies on the disk, where Triton reads it."""
    import liger_kernel

    folder = Path(str(liger_kernel.__file__)).parents[1]
    edited, count = re.subn(pattern, instead, (folder / path).read_text())
    if not count:
        raise RuntimeError(f"{path} has nothing like {pattern!r}; want the version of setup.sh")
    copy = folder / f"copy_of_{path.replace('/', '_')}"
    copy.write_text(edited)
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[copy.stem] = module
    spec.loader.exec_module(module)
    return module


def _liger_norm(name: str) -> Any:
    """As on an H100: its backward starts a program a multiprocessor, where it sees no GPU one alone for all rows."""
    return _copied(f"liger_kernel/ops/{name}.py", r"\bsm_count = 1\b", f"sm_count = {MULTIPROCESSORS}")


def _verl(tma: bool) -> Any:
    """verl's kernels without the rest of verl, whose import needs a cluster's packages."""
    device = types.ModuleType("verl.utils.device")
    device.get_device_capability = lambda: (9, 0)  # type: ignore[attr-defined]
    device.get_device_name = lambda: "cpu"  # type: ignore[attr-defined]
    device.is_cuda_available = tma  # type: ignore[attr-defined]
    device.get_torch_device = lambda: torch.cuda  # type: ignore[attr-defined]
    sys.modules.update({"verl.utils.device": device})
    for parent in ("verl", "verl.utils"):
        sys.modules.setdefault(parent, types.ModuleType(parent))
    return _copied("verl/utils/kernel/kernels.py", r"\b\w+\.is_cuda\b", "True")


def verl_logprob(device: str, dtype: torch.dtype, back: bool, N: int, V: int, H: int) -> Call:
    """Log-prob and entropy; its hidden size must be a multiple of 128."""
    kernels = _verl(tma=device == "meta")
    hidden, weight = _rows(device, dtype, N, H), _rows(device, dtype, V, H)
    targets, row = _targets(device, N, V), _rows(device, torch.float32, N)
    if back:
        return lambda: kernels.efficient_entropy_backward(
            row,
            row.clone(),
            hidden,
            weight,
            targets,
            row.clone(),
            row + 1,
            row.clone(),
            0,
            False,
            0.7,
        )
    return lambda: kernels.efficient_entropy_forward(hidden, weight, targets, 0, 0.7)


def liger_swiglu(device: str, dtype: torch.dtype, back: bool, N: int, F: int) -> Call:
    """The backward writes over its inputs."""
    ops = importlib.import_module("liger_kernel.ops.swiglu")
    gate, up, grad = (_rows(device, dtype, N, F) for _ in range(3))
    return lambda: ops.swiglu_backward(gate, up, grad) if back else ops.swiglu_forward(gate, up)


def liger_rmsnorm(device: str, dtype: torch.dtype, back: bool, N: int, H: int) -> Call:
    """Of a stream in the storage dtype (the engine's is float32), and not with the residual sum."""
    ops = _liger_norm("rms_norm")
    if device == "cpu":
        ops.rsqrt = _rsqrt  # type: ignore[attr-defined]
    x, grad, weight = (
        _rows(device, dtype, N, H),
        _rows(device, dtype, N, H),
        _rows(device, dtype, H),
    )
    rstd = _rows(device, torch.float32, N)
    mode = ops._CASTING_MODE_LLAMA.value
    block, warps = ops.calculate_settings(H)
    if back:
        return lambda: ops.rms_norm_backward(
            grad, x, weight, rstd, 0.0, mode, block, warps, True, False
        )
    return lambda: ops.rms_norm_forward(x, weight, 1e-5, 0.0, mode, False)


def liger_layernorm(device: str, dtype: torch.dtype, back: bool, N: int, H: int) -> Call:
    ops = _liger_norm("layer_norm")
    if device == "cpu":
        ops.rsqrt = _rsqrt  # type: ignore[attr-defined]
    x, grad = _rows(device, dtype, N, H), _rows(device, dtype, N, H)
    weight, bias = _rows(device, dtype, H), _rows(device, dtype, H)
    mean, rstd = _rows(device, torch.float32, N), _rows(device, torch.float32, N)
    if back:
        return lambda: ops.layer_norm_backward(grad, x, weight, bias, mean, rstd)
    return lambda: ops.layer_norm_forward(x, weight, bias, 1e-5)


# op -> library -> the work
LIBRARIES: dict[str, dict[str, Callable[..., Call]]] = {
    "linear_logprob": {
        "liger-kernel": liger_logprob,
        "cut-cross-entropy": cce_logprob,
        "verl": verl_logprob,
    },
    "swiglu": {"liger-kernel": liger_swiglu},
    "rmsnorm": {"liger-kernel": liger_rmsnorm},
    "layernorm": {"liger-kernel": liger_layernorm},
}
# What a library's work has less than the engine's.
LACKS = {
    "liger-kernel linear_logprob": "no entropy, gradients in bfloat16",
    "cut-cross-entropy linear_logprob": "no entropy, no temperature, gradients in bfloat16; other sums at each run",
    "verl linear_logprob": "gradients in bfloat16",
    "eager torch linear_logprob": "gradients in bfloat16",
    "torch.compile linear_logprob": "gradients in bfloat16",
    "liger-kernel rmsnorm": "stream in the storage dtype",
    "liger-kernel layernorm": "stream in the storage dtype",
}
