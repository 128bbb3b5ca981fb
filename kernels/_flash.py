"""flash-attn (Dao 2023) as an explicit choice for attention on a GPU; never needed, never chosen by itself.

`ENGINE_ATTENTION=flash`, or `with attention_backend("flash")`, sends every `attention` to `flash_attn_varlen_func`.
What that does not serve is an error that says why: a shared prefix, float32, head sizes that are no multiple of 8 or
over 256, tensors elsewhere than on a GPU. ENGINE_BACKEND=reference goes before.

`decode` is for callers that keep their cache in flash-attn's own layout. The engine's cache is not: its pages hold 16
keys in words of 32 bits (kernels/attention_decode.py), flash-attn's a multiple of 256 keys in rows of channels.
Decoding over the engine's cache stays with its kernel. Signatures: flash-attn 2.8.3, tests/flash_signatures.json.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from ._backend import BackendError, forced_backend

CHOICES = ("triton", "flash")
DEVICE = "cuda"  # where flash-attn runs; AMD's too
HALVES = (torch.float16, torch.bfloat16)

_forced: ContextVar[str | None] = ContextVar("engine_attention", default=None)


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Inside the block attention on a GPU runs on `name`: "triton", the engine's kernel, or "flash"."""
    if name not in CHOICES:
        raise BackendError(f"attention_backend: got {name!r}, want one of {', '.join(CHOICES)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def chosen() -> bool:
    """Was flash-attn asked for? Raises BackendError for a name that is none."""
    name = _forced.get() or os.environ.get("ENGINE_ATTENTION") or "triton"
    if name not in CHOICES:
        raise BackendError(f"ENGINE_ATTENTION: got {name!r}, want one of {', '.join(CHOICES)}")
    return name == "flash" and forced_backend() != "reference"


def _module() -> ModuleType:
    return importlib.import_module("flash_attn")


def _why_no_heads(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Empty where flash-attn takes these heads, their dtype and their place."""
    size = q.shape[-1]
    if any(x.device.type != DEVICE for x in (q, k, v)):
        return f"it runs on GPUs only; q, k, v are on {q.device}, {k.device}, {v.device}"
    if q.dtype not in HALVES or not q.dtype == k.dtype == v.dtype:
        return (
            f"it takes float16 or bfloat16 throughout; q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if size % 8 or not 0 < size <= 256:
        return f"it takes head sizes up to 256 that are multiples of 8, not {size}"
    if k.shape[-1] != size or k.shape != v.shape or q.shape[-2] % k.shape[-2]:
        return f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} are not those of grouped heads"
    if (
        DEVICE == "cuda"
        and not torch.version.hip
        and torch.cuda.get_device_capability(q.device) < (8, 0)
    ):
        return "it needs compute capability 8.0 or newer"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed; pip install flash-attn==2.8.3"
    return ""


def why_not_attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, prefix: Tensor | None) -> str:
    """Empty where flash_attn_varlen_func serves this call of `attention`."""
    if prefix is not None:
        return "it has no shared prefix; give whole sequences, or use ENGINE_ATTENTION=triton"
    if q.dim() != 3 or q.shape[0] == 0 or q.shape[0] != k.shape[0]:
        return f"it takes packed rows (N, heads, D) with N above 0; q is {tuple(q.shape)}"
    if cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() < 2 or cu.device != q.device:
        given = f"{cu.dtype} {tuple(cu.shape)} on {cu.device}"
        return f"it takes int32 offsets of 1 sequence or more beside q; cu is {given}"
    return _why_no_heads(q, k, v)


def why_not_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, block_table: Tensor | None
) -> str:
    """Empty where flash_attn_with_kvcache serves this call of `decode`; never for the engine's own pages."""
    if k_cache.dim() != 4:
        return (
            f"a cache is (rows or blocks, keys, key heads, D), not {tuple(k_cache.shape)};"
            " pages of words, as the engine's cache has them, it cannot read"
        )
    if q.dim() != 3 or q.shape[0] == 0:
        return f"it takes one query a row, (R, heads, D) with R above 0; q is {tuple(q.shape)}"
    if block_table is not None and k_cache.shape[1] % 256:
        return f"its blocks hold a multiple of 256 keys, not {k_cache.shape[1]}"
    if block_table is None and k_cache.shape[0] != q.shape[0]:
        return f"it takes one row of cache a query, not {k_cache.shape[0]} for {q.shape[0]}"
    for name, x, dims in (("lengths", lengths, 1), ("block_table", block_table, 2)):
        if x is None:
            continue
        if x.dtype != torch.int32 or x.dim() != dims or x.shape[0] != q.shape[0]:
            return f"{name} is {x.dtype} {tuple(x.shape)}, want int32, {dims}-D, {q.shape[0]} rows"
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        return "the channels of a cache must lie side by side"
    return _why_no_heads(q, k_cache, v_cache)


def covers_attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, prefix: Tensor | None) -> bool:
    return not why_not_attention(q, k, v, cu, prefix)


def covers_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, block_table: Tensor | None = None
) -> bool:
    return not why_not_decode(q, k_cache, v_cache, lengths, block_table)


def _require(op: str, refusal: str) -> None:
    if refusal:
        raise BackendError(f"op {op!r}: flash-attn was asked for and cannot run: {refusal}")


def attention(
    q: Tensor,  # (N, Hq, D)
    k: Tensor,  # (N, Hk, D)
    v: Tensor,  # (N, Hk, D)
    cu: Tensor,  # (S+1,) int32
    prefix: Tensor | None = None,
) -> Tensor:  # (N, Hq, D)
    """`attention` by flash-attn, with its own gradients. Raises BackendError for what it does not serve.

    The longest sequence is not known without reading `cu`, which would wait for the device; N bounds it, and blocks
    beyond a sequence's end return at once. (One row with empty sequences beside it would look like decoding: 2.)
    """
    _require("attention", why_not_attention(q, k, v, cu, prefix))
    longest = max(2, q.shape[0])
    return _module().flash_attn_varlen_func(
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        cu_seqlens_q=cu.contiguous(),
        cu_seqlens_k=cu.contiguous(),
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=q.shape[-1] ** -0.5,
        causal=True,
        deterministic=True,  # the backward's sums over row blocks in one order
    )


def decode(
    q: Tensor,  # (R, Hq, D)
    k_cache: Tensor,  # (R, T, Hk, D), or blocks (P, a multiple of 256, Hk, D)
    v_cache: Tensor,
    lengths: Tensor,  # (R,) int32: keys of each row, its own among them
    block_table: Tensor | None = None,  # (R, maxblocks) int32
) -> Tensor:  # (R, Hq, D)
    """out_r = sum_{j < length_r} softmax_j(q_r . k_j / sqrt(D)) v_j over a cache in flash-attn's layout.

    One split of the keys: the library's own choice depends on the number of rows, and with it each row's bits would.
    """
    _require("attention_decode", why_not_decode(q, k_cache, v_cache, lengths, block_table))
    out: Tensor = _module().flash_attn_with_kvcache(
        q=q[:, None].contiguous(),
        k_cache=k_cache,
        v_cache=v_cache,
        cache_seqlens=lengths.contiguous(),
        block_table=block_table,
        softmax_scale=q.shape[-1] ** -0.5,
        causal=True,
        num_splits=1,
    )
    return out[:, 0]
