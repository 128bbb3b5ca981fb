"""Matrix product with a weight that is packed once and read by generation, scoring and training.

    y = x W^T + bias

M rows, N columns (outputs), K depth. A weight is packed for the class of CPU at hand
(docs/design.md section 6); every element of y sums over K in order, in pieces at fixed depths, so it is a
function of its own row of x alone: the same bits for any number of rows, any place among them and
any number of threads. Gradients of the weight go to its float32 master (N, K). With bfloat16
storage on class `amx` the products take bfloat16 operands (x and the gradient are rounded) and
accumulate in float32; elsewhere x stays as it is and only the weight is bfloat16.

On a GPU the weight is read row-major, x and the gradient are rounded to its dtype, and the products
are the library's, whose bits depend on the number of rows; inside `exact_products()` y's do not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._backend import choose, cpu_class, define, kernel, kernels_usable
from ._memory import Slabs

PACKED_DTYPES = (torch.bfloat16, torch.float32)
_exact: ContextVar[bool] = ContextVar("engine_exact_products", default=False)
_PANEL = {"amx": 32, "avx512": 32, "avx2": 16}  # columns, other classes 8: csrc/cpu/gemm.h


@contextmanager
def exact_products(wanted: bool = True) -> Iterator[None]:
    """Inside the block a row of y on a GPU is a function of its own row of x alone, as on the CPU; slower.

    `wanted` false: the library's products, which is the default.
    """
    token = _exact.set(wanted)
    try:
        yield
    finally:
        _exact.reset(token)


def exact_forced() -> bool:
    """Is this inside `exact_products()`?"""
    return _exact.get()


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in its storage dtype, twice: row-major, and in the layout of one class of CPU."""

    dense: Tensor  # (N, K) storage dtype: embedding look-ups, gradients of x, the definitions
    data: Tensor | None  # bytes in the layout of `cpu_class`; None without C++ kernels
    cpu_class: str  # "amx", "avx512", "avx2", "plain", or "reference" without packed data

    @property
    def rows(self) -> int:
        return self.dense.shape[0]

    @property
    def cols(self) -> int:
        return self.dense.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.dense.dtype


def pack_weight(
    master: Tensor,  # (N, K)
    dtype: torch.dtype,
    slabs: Slabs | None = None,
) -> PackedWeight:
    """The compute copy of a weight: rounded to nearest even in `dtype`, and packed for this CPU.

    `slabs`: where a model's weights are kept side by side (None: memory of its own).
    Where `master` already has `dtype`, `dense` shares its memory: pack again after a change.
    """
    if master.dim() != 2:
        raise ValueError(f"master: got shape {tuple(master.shape)}, want (N, K)")
    dense = master.detach().to(dtype).contiguous()
    if dtype not in PACKED_DTYPES or dense.device.type != "cpu" or not kernels_usable():
        return PackedWeight(dense, None, "reference")
    data = torch.ops.engine.pack_weight(dense)
    return PackedWeight(dense, data if slabs is None else slabs.keep(data), cpu_class())


def refresh_weight(
    weight: PackedWeight,
    master: Tensor,  # (N, K) float32
) -> None:
    """`weight` anew from its master, in the memory that it has: one pass, no allocation.

    Raises ValueError on a master of another shape, and on a weight packed for another class.
    """
    if master.shape != weight.dense.shape:
        want = tuple(weight.dense.shape)
        raise ValueError(f"master: got shape {tuple(master.shape)}, want {want}")
    source = master.detach()
    if weight.data is None:
        weight.dense.copy_(source)
    else:
        torch.ops.engine.refresh_weight(source, weight.dense, packed_data(weight))


def packed_data(weight: PackedWeight) -> Tensor:
    """The bytes that the C++ kernels read, or a ValueError where they are for another class."""
    if weight.data is None or weight.cpu_class != cpu_class():
        raise ValueError(
            f"weight: got one packed for {weight.cpu_class!r}, want one for {cpu_class()!r}, which"
            " is in use now; choose the backend and the class before weights are packed"
        )
    return weight.data


def linear_reference(
    x: Tensor,  # (M, K)
    weight: PackedWeight,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    master: Tensor | None = None,  # (N, K)
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # (M, N)
    """The definition: the product in the storage dtype; with `master`, of its rounding to it."""
    dense = weight.dense if master is None else master.to(weight.dtype)
    y = F.linear(x.to(weight.dtype), dense).to(out_dtype or x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def linear(
    x: Tensor,  # (M, K) bfloat16 or float32
    weight: PackedWeight,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    master: Tensor | None = None,  # (N, K) float32
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # (M, N) in out_dtype (None: the dtype of x)
    """y = x W^T + bias; gradients to x, bias, and `master` (float32), which stands for the weight.

    Without `master` the weight is frozen. Raises ValueError on shapes that do not fit, and on a
    weight that was packed for another class of CPU.
    """
    if x.dim() != 2 or x.shape[1] != weight.cols:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want (M, {weight.cols}) for this weight")
    if bias is not None and bias.shape != (weight.rows,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, want ({weight.rows},)")
    if master is not None and master.shape != weight.dense.shape:
        raise ValueError(
            f"master: got shape {tuple(master.shape)}, want {tuple(weight.dense.shape)}"
        )
    backend = choose("linear", x, weight.dense)
    if backend == "reference":
        return linear_reference(x, weight, bias, master, out_dtype)
    wide_bias = None if bias is None else bias.float().contiguous()
    return kernel("linear")(
        x.contiguous(),
        weight.dense,
        packed_data(weight) if backend == "cpp" else weight.dense,  # nothing is packed for Triton
        wide_bias,
        master,
        out_dtype or x.dtype,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dense, _data, _bias, master, _out_dtype = inputs
    ctx.master_dtype = None if master is None else master.dtype
    ctx.save_for_backward(x, dense)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, dense = ctx.saved_tensors
    need_x, _, _, need_bias, need_master, _ = ctx.needs_input_grad
    dx, dw, db = kernel("linear_backward")(
        grad.contiguous(), x, dense, need_x, need_master, need_bias
    )
    grad_master = dw.to(ctx.master_dtype) if need_master else None
    return dx if need_x else None, None, None, db if need_bias else None, grad_master, None


def _fake_pack(dense: Tensor) -> Tensor:
    if dense.is_cuda:
        return dense.new_empty(0, dtype=torch.uint8)
    width = _PANEL.get(cpu_class(), 8)
    depth = -(-dense.shape[1] // 32) * 32 if _tiles(dense.dtype) else dense.shape[1]
    panel_bytes = depth * width * dense.element_size()
    panel_bytes += 64 if panel_bytes and panel_bytes % 4096 == 0 else 0
    return dense.new_empty(-(-dense.shape[0] // width) * panel_bytes, dtype=torch.uint8)


def packed_bytes(rows: int, cols: int, dtype: torch.dtype) -> int:
    """Of a weight (rows, cols) packed for this CPU."""
    return _fake_pack(torch.empty(rows, cols, dtype=dtype, device="meta")).numel()


def _tiles(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and cpu_class() == "amx"


def _fake_backward(
    grad: Tensor, x: Tensor, dense: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = dense.shape
    wide = torch.float32
    return (
        x.new_empty((x.shape[0] if need_x else 0, k)),
        x.new_empty((n if need_weight else 0, k), dtype=wide),
        x.new_empty(n if need_bias else 0, dtype=wide),
    )


define("pack_weight(Tensor dense) -> Tensor", _fake_pack)
define(
    "refresh_weight(Tensor master, Tensor(a!) dense, Tensor(b!) data) -> ()",
    lambda master, dense, data: None,
)
define(
    "linear(Tensor x, Tensor dense, Tensor data, Tensor? bias, Tensor? master,"
    " ScalarType out_dtype) -> Tensor",
    lambda x, dense, data, bias, master, out_dtype: x.new_empty(
        (x.shape[0], dense.shape[0]), dtype=out_dtype
    ),
)
define(
    "linear_backward(Tensor grad, Tensor x, Tensor dense, bool need_x, bool need_weight,"
    " bool need_bias) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
torch.library.register_autograd("engine::linear", _backward, setup_context=_setup_context)
