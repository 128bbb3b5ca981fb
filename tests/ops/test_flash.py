"""The flash-attn adapters: what they cover, that their calls fit the library's signatures, and what the calls mean.

flash-attn needs a GPU to be built, so its functions are stood in for: the pinned release's signatures
(flash_signatures.json), computed by the definition. Where the library is installed, or FLASH_ATTN_SDIST names its
source distribution, the signatures are read again and compared.
"""

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels import _flash
from engine.kernels._backend import BackendError, backend
from engine.kernels.attention import attention, attention_reference
from engine.kernels.attention_decode import attention_decode, page_shapes

PINNED = json.loads((Path(__file__).parents[1] / "flash_signatures.json").read_text())
REQUIRED = inspect.Parameter.empty


def signature(name: str) -> inspect.Signature:
    return inspect.Signature(
        inspect.Parameter(
            parameter,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=ast.literal_eval(default[0]) if default else REQUIRED,
        )
        for parameter, *default in PINNED["functions"][name]
    )


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """(T, Hq, D) over (K, Hk, D); with causal, the last row sees the last key."""
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    score = torch.einsum("ihd,jhd->hij", q.float(), k) * scale
    if causal:
        ahead = torch.ones(score.shape[1:]).triu(k.shape[0] - q.shape[0] + 1).bool()
        score = score.masked_fill(ahead, -torch.inf)
    return torch.einsum("hij,jhd->ihd", score.softmax(-1), v).to(q.dtype)


def plain(given: dict[str, object], *used: str) -> None:
    """Everything that the stand-in does not compute has its default."""
    for name, parameter in given["signature"].parameters.items():
        if parameter.default is not REQUIRED and name not in used:
            assert given[name] == parameter.default, f"{name}: {given[name]}"


def varlen(*args: object, **named: object) -> Tensor:
    bound = signature("flash_attn_varlen_func").bind(*args, **named)
    bound.apply_defaults()
    given = {**bound.arguments, "signature": bound.signature}
    plain(given, "softmax_scale", "causal", "deterministic")
    rows, bounds = [], [given[f"cu_seqlens_{x}"].tolist() for x in "qk"]
    for x, offsets in zip("qk", bounds, strict=True):
        longest = max(b - a for a, b in zip(offsets[:-1], offsets[1:], strict=True))
        assert longest <= given[f"max_seqlen_{x}"]
    # the library takes 1 for decoding, and then wants one row a sequence
    assert given["max_seqlen_q"] > 1 or len(bounds[0]) - 1 == len(given["q"])
    for s in range(len(bounds[0]) - 1):
        own, keys = (slice(b[s], b[s + 1]) for b in bounds)
        part = given["q"][own], given["k"][keys], given["v"][keys]
        rows.append(softmax_attention(*part, given["softmax_scale"], given["causal"]))
    return torch.cat(rows)


def with_kvcache(*args: object, **named: object) -> Tensor:
    bound = signature("flash_attn_with_kvcache").bind(*args, **named)
    bound.apply_defaults()
    given = {**bound.arguments, "signature": bound.signature}
    plain(given, "cache_seqlens", "block_table", "softmax_scale", "causal", "num_splits")
    assert given["num_splits"] == 1, "0 leaves the splits to the number of rows"
    rows = []
    for r, (q, length) in enumerate(zip(given["q"], given["cache_seqlens"].tolist(), strict=True)):
        caches = [given["k_cache"], given["v_cache"]]
        if given["block_table"] is None:
            k, v = (cache[r, :length] for cache in caches)
        else:
            assert caches[0].shape[1] % 256 == 0
            k, v = (c[given["block_table"][r].long()].flatten(0, 1)[:length] for c in caches)
        rows.append(softmax_attention(q, k, v, given["softmax_scale"], given["causal"]))
    return torch.stack(rows)


@pytest.fixture
def stand_in(monkeypatch):
    """A flash_attn that runs on the CPU."""
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.util.spec_from_loader("flash_attn", None)
    module.flash_attn_varlen_func = varlen
    module.flash_attn_with_kvcache = with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(_flash, "DEVICE", "cpu")


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def qkv(tokens: int, heads: tuple[int, int] = (4, 2), size: int = 16, dtype=torch.bfloat16):
    return [torch.randn(tokens, h, size).to(dtype) for h in (heads[0], heads[1], heads[1])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5, 1, 0, 9], [1], [0, 1]])
def test_attention_by_numbers(stand_in, dtype, lengths):
    """Result and gradients, through the public op: every argument of the call has the meaning that it should."""
    results = []
    for name in ("flash", "triton"):
        torch.manual_seed(1)
        leaves = [x.requires_grad_() for x in qkv(sum(lengths), dtype=dtype)]
        with _flash.attention_backend(name), backend("triton" if name == "flash" else "reference"):
            out = attention(*leaves, offsets(lengths))
        out.backward(torch.randn_like(out))
        results.append([out.detach(), *(x.grad for x in leaves)])
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("paged", [False, True])
def test_decode_by_numbers(stand_in, paged):
    lengths = torch.tensor([1, 300, 256], dtype=torch.int32)
    q = torch.randn(3, 4, 16).bfloat16()
    k, v = (torch.randn(6, 256, 2, 16).bfloat16() for _ in range(2))
    table = torch.tensor([[4, 0], [2, 5], [1, 3]], dtype=torch.int32)
    rows = [x[table.long()].flatten(1, 2) for x in (k, v)]
    out = _flash.decode(q, k, v, lengths, table) if paged else _flash.decode(q, *rows, lengths)
    for r, n in enumerate(lengths.tolist()):
        queries = torch.cat([torch.zeros(n - 1, 4, 16).bfloat16(), q[r : r + 1]])
        want = attention_reference(queries, *(x[r, :n] for x in rows), offsets([n]))[-1]
        torch.testing.assert_close(out[r], want)


def test_what_attention_does_not_cover(stand_in):
    q, k, v = qkv(4)
    cu, prefix = offsets([2, 2]), torch.tensor([0, 0], dtype=torch.int32)
    assert _flash.covers_attention(q, k, v, cu, None)
    for arguments, reason in (
        ((q, k, v, cu, prefix), "no shared prefix"),
        ((q.float(), k.float(), v.float(), cu, None), "float16 or bfloat16"),
        ((*qkv(4, size=12), cu, None), "multiples of 8, not 12"),
        ((*qkv(4, size=264), cu, None), "up to 256"),
        ((q, k, v, cu.long(), None), "int32 offsets"),
        ((*qkv(0), offsets([0]), None), "N above 0"),
    ):
        assert not _flash.covers_attention(*arguments)
        with _flash.attention_backend("flash"), pytest.raises(BackendError, match=reason):
            attention(*arguments)


def test_what_decode_does_not_cover(stand_in):
    q, (_, k, v) = torch.zeros(2, 4, 16).bfloat16(), qkv(2 * 256)
    k, v = (x.view(2, 256, 2, 16) for x in (k, v))
    lengths, table = torch.ones(2, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
    assert _flash.covers_decode(q, k, v, lengths) and _flash.covers_decode(q, k, v, lengths, table)
    ours = [torch.zeros(3, *s).bfloat16() for s in page_shapes(2, 16, torch.bfloat16)]
    for arguments, reason in (
        ((q, *ours, lengths, table), "pages of words"),
        ((q, k[:, :16], v[:, :16], lengths, table), "multiple of 256 keys, not 16"),
        ((q, k[:1], v[:1], lengths), "one row of cache a query"),
        ((q, k, v, lengths.long()), "lengths is torch.int64"),
        ((q.float(), k, v, lengths), "float16 or bfloat16"),
    ):
        assert not _flash.covers_decode(*arguments)
        with pytest.raises(BackendError, match=reason):
            _flash.decode(*arguments)


def test_never_by_itself_and_never_in_silence(monkeypatch):
    q, k, v = qkv(4)
    monkeypatch.delenv("ENGINE_ATTENTION", raising=False)
    assert not _flash.chosen()
    monkeypatch.setenv("ENGINE_ATTENTION", "flash")
    with pytest.raises(BackendError, match="flash-attn was asked for.*GPUs only"):
        attention(q, k, v, offsets([4]))
    with _flash.attention_backend("triton"):
        assert attention(q, k, v, offsets([4])).shape == q.shape
    with backend("reference"):  # goes before
        assert attention(q, k, v, offsets([4])).shape == q.shape
    monkeypatch.setenv("ENGINE_ATTENTION", "fast")
    with pytest.raises(
        BackendError, match="ENGINE_ATTENTION: got 'fast', want one of triton, flash"
    ):
        attention(q, k, v, offsets([4]))
    with pytest.raises(BackendError, match="got 'fast'"), _flash.attention_backend("fast"):
        pass


def test_the_engines_own_pages_are_decoded_by_its_own_kernel(monkeypatch):
    """The switch is for attention only."""
    monkeypatch.setenv("ENGINE_ATTENTION", "flash")
    pages = [torch.zeros(1, *s) for s in page_shapes(2, 8, torch.float32)]
    one = torch.ones(1, dtype=torch.int32)
    assert attention_decode(torch.zeros(1, 4, 8), *pages, one[None] * 0, one).shape == (1, 4, 8)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is installed")
def test_not_installed(monkeypatch):
    monkeypatch.setattr(_flash, "DEVICE", "cpu")
    assert "pip install" in _flash.why_not_attention(*qkv(4), offsets([4]), None)


@pytest.mark.parametrize("name", PINNED["functions"])
def test_signatures_of_the_installed_library(name):
    flash_attn = pytest.importorskip("flash_attn")
    installed = inspect.signature(getattr(flash_attn, name)).parameters
    pinned = signature(name).parameters
    assert {n: p.default for n, p in installed.items()} == {n: p.default for n, p in pinned.items()}


@pytest.mark.skipif("FLASH_ATTN_SDIST" not in os.environ, reason="FLASH_ATTN_SDIST names no file")
def test_signatures_of_the_source_distribution():
    path = Path(os.environ["FLASH_ATTN_SDIST"])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == PINNED["sha256"]
    with tarfile.open(path) as archive:
        member = archive.extractfile(f"{PINNED['source']}/flash_attn/flash_attn_interface.py")
        assert member is not None
        tree = ast.parse(member.read())
    found = {
        node.name: parameters(node)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name in PINNED["functions"]
    }
    assert found == PINNED["functions"]


def parameters(node: ast.FunctionDef) -> list[list[str]]:
    """[[name] or [name, default as source]]."""
    assert not (
        node.args.posonlyargs or node.args.kwonlyargs or node.args.vararg or node.args.kwarg
    )
    defaults = [[ast.unparse(default)] for default in node.args.defaults]
    required = len(node.args.args) - len(defaults)
    return [
        [argument.arg, *(defaults[i - required] if i >= required else [])]
        for i, argument in enumerate(node.args.args)
    ]
