"""What `make gpu-check` times: each case of bench/gpu by the engine, and the same work by everybody else.

A row says who did the work (`by`), and then the time in milliseconds, or why there is none: `left_out` where it could
not be expected, `error` where something went wrong. The functions take the device and the size of the shapes, so that
tests run them on the CPU, in Triton's interpreter, with a clock of their own in the place of `timed`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu import DTYPES, Case, cases
from bench.gpu_check import Row, failure
from engine.kernels import _cuda, _flash

LEDGER = Path(__file__).parent / "results" / "gpu_ledger.json"
# The numbers behind the tensors in a call of CUDA C++: those that the case gives to Triton.
NUMBERS: dict[str, tuple[Any, ...]] = {
    "kl_reward_gae": (0.02, 1.0, 0.95, 0),
    "ranking_loss": (0, None),
}
FLASH_BLOCK = 256  # keys; flash-attn's pages are multiples of it
FLASH_NOTES = {
    "forward": "as the engine calls it: blocks for the longest sequence that could be",
    "backward": "as the engine calls it: deterministic",
    "decode": "as the engine calls it: keys in one split",
}


@dataclass(frozen=True)
class Place:
    """Where the work is done, and on which of a case's shapes: `full` or `small`."""

    device: str = "cuda"
    size: str = "full"

    def shape(self, case: Case) -> dict[str, int]:
        return case.full if self.size == "full" else case.small

    def make(self, case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
        return case.make(self.device, dtype, **self.shape(case))


def pieces(chosen: Sequence[Case]) -> list[str]:
    """A name for each case and dtype."""
    return [f"{case.op}, {case.name}, {name}" for case in chosen for name in case.dtypes]


def found(piece: str) -> tuple[Case, str]:
    """The case and the dtype of a piece."""
    known = {name: (case, name.rpartition(", ")[2]) for case in cases() for name in pieces([case])}
    return known[piece]


def ledger(path: Path) -> dict[tuple[str, str], Row]:
    """The engine's rows of the ledger by (op, case); none without the file."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {(row["op"], row["case"]): row for row in rows if row["by"] == "engine"}


def missing(chosen: Sequence[Case], predicted: dict[tuple[str, str], Row]) -> list[str]:
    return [f"{c.op}, {c.name}" for c in chosen if (c.op, c.name) not in predicted]


def launches(case: Case, dtype: torch.dtype) -> list[str]:
    """The kernels that a case would launch on an H100, from its arguments' shapes alone."""
    from engine.kernels.triton import _launch

    seen: list[str] = []

    def see(launch: Any) -> bool:
        seen.append(launch.kernel.fn.__name__)
        return False

    observer, column = _launch.observer.set(see), _launch.column.set("sm_90")
    try:
        case.run(*case.make("meta", dtype, **case.full))
    finally:
        _launch.observer.reset(observer)
        _launch.column.reset(column)
    return seen


def timed(call: Callable[[], Any]) -> Row:
    """Median of many launches, and the range that holds 60 % of them, in milliseconds; caches are flushed between."""
    import triton

    middle, low, high = triton.testing.do_bench(call, quantiles=[0.5, 0.2, 0.8])
    return {"ms": middle, "ms_low": low, "ms_high": high}


def attempted(work: Callable[[], Row], rival: bool = False) -> Row:
    """Work that fails says why, and the others go on. A rival may need more memory than there is."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        row = failure(error)
        return {"left_out": row["error"]} if rival else row
    except Exception as error:
        return failure(error)


def rate(row: Row, case: Case, dtype: torch.dtype, place: Place) -> Row:
    """With the case's compulsory bytes a second."""
    return {**row, "gb_per_s": case.bytes(dtype.itemsize, **place.shape(case)) / row["ms"] / 1e6}


def of_engine(case: Case, dtype: torch.dtype, place: Place) -> Row:
    """The Triton kernels, by their host function."""
    given = place.make(case, dtype)
    with torch.no_grad():
        return rate(timed(lambda: case.run(*given)), case, dtype, place)


def of_cuda(case: Case, dtype: torch.dtype, place: Place) -> Row:
    """The same in CUDA C++, which goes before Triton where it was built. Not built is no error; not loading is one."""
    given = place.make(case, dtype)
    if not _cuda.takes(*given):
        return {"left_out": "it takes float32, on NVIDIA's GPUs"}
    refusal = _cuda.why_no_cuda()
    if refusal and _cuda.library() is None:
        return {"left_out": refusal}
    if refusal:
        raise RuntimeError(refusal)
    op = _cuda.cuda_kernel(case.op)
    with torch.no_grad():
        row = timed(lambda: op(*given, *NUMBERS[case.op]))
    return rate(row, case, dtype, place)


def of_eager(case: Case, dtype: torch.dtype, place: Place) -> Row:
    """The same work as plain torch (bench/rivals/eager.py), with numbers in its tensors."""
    from bench.rivals import eager

    shape = place.shape(case)
    if case.op not in eager.WORK:
        return {"left_out": "it has no form in eager torch"}
    if "gae" in case.op and shape["T"] > eager.LONGEST:
        return {"left_out": f"a loop of {shape['T']} steps in eager torch is not worth the wait"}
    before, eager.DEVICE = eager.DEVICE, place.device
    try:
        given, forward = eager.WORK[case.op](case.name, dtype, **shape)
    finally:
        eager.DEVICE = before
    with torch.no_grad():
        for x in given:
            x.normal_() if x.is_floating_point() else x.zero_()
    ahead, back = eager.phases(case.name)
    if not back:
        with torch.no_grad():
            return timed(lambda: forward(*given))
    if ahead:
        return timed(lambda: eager._backward(forward(*given)))
    out = forward(*given)
    results = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
    grads, leaves = [torch.ones_like(x) for x in results], [x for x in given if x.requires_grad]
    return timed(lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True))


def of_flash(case: Case, dtype: torch.dtype, place: Place) -> Row:
    """flash-attn over the case's own rows, or where it decodes over a cache in its own layout."""
    if case.op == "attention_decode":
        q, keys, values, lengths, table = flash_cache(place.device, dtype, **place.shape(case))
        reason = _flash.why_not_decode(q, keys, values, lengths, table)
        if reason:
            return {"left_out": reason}
        with torch.no_grad():
            row = timed(lambda: _flash.decode(q, keys, values, lengths, table))
        return {"note": FLASH_NOTES["decode"], **row}
    back, given = "backward" in case.name, place.make(case, dtype)
    q, k, v, cu, prefix = (*given[1:4], *given[-2:]) if back else given
    reason = _flash.why_not_attention(q, k, v, cu, prefix)
    if reason:
        return {"left_out": reason}
    if not back:
        with torch.no_grad():
            row = timed(lambda: _flash.attention(q, k, v, cu))
        return {"note": FLASH_NOTES["forward"], **row}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, grad = _flash.attention(*leaves, cu), given[0]
    row = timed(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    return {"note": FLASH_NOTES["backward"], **row}


def flash_cache(
    device: str,
    dtype: torch.dtype,
    R: int,
    T: int,
    HQ: int,
    HK: int,
    D: int,  # noqa: N803
) -> tuple[Tensor, ...]:
    """q, keys, values, lengths and the table of blocks: R rows over T keys each, all blocks different."""
    width = -(-T // FLASH_BLOCK)
    q = torch.randn(R, HQ, D, device=device).to(dtype)
    keys, values = (
        torch.randn(R * width, FLASH_BLOCK, HK, D, device=device).to(dtype) for _ in range(2)
    )
    lengths = torch.full((R,), T, dtype=torch.int32, device=device)
    table = torch.arange(R * width, dtype=torch.int32, device=device).view(R, width)
    return q, keys, values, lengths, table


def rivals(case: Case, dtype: torch.dtype, place: Place) -> dict[str, Callable[[], Row]]:
    """Who else does the work of a case: eager torch, and the libraries that are installed."""
    from bench.rivals import libraries

    back, shape = "backward" in case.name, place.shape(case)
    work: dict[str, Callable[[], Row]] = {"eager torch": lambda: of_eager(case, dtype, place)}
    for name, make in libraries.LIBRARIES.get(case.op, {}).items():
        module = name.partition(",")[0].replace("-", "_")
        if importlib.util.find_spec(module) is not None and "residual" not in case.name:
            work[name] = lambda make=make: timed(make(place.device, dtype, back, **shape))
    if case.op in ("attention", "attention_decode") and importlib.util.find_spec("flash_attn"):
        work["flash-attn"] = lambda: of_flash(case, dtype, place)
    return work


def time_kernels(piece: str, place: Place) -> Iterator[Row]:
    """One case in one dtype by everybody, one after the other on a warm GPU."""
    from bench.rivals import libraries

    case, name = found(piece)
    dtype, of = DTYPES[name], {"op": case.op, "case": case.name, "dtype": name}
    ours = attempted(lambda: of_engine(case, dtype, place))
    yield {**of, "by": "engine", **beside(ours, ledger(LEDGER).get((case.op, case.name)), name)}
    if case.op in _cuda.OPS:
        yield {**of, "by": "CUDA C++", **attempted(lambda: of_cuda(case, dtype, place))}
    for by, work in rivals(case, dtype, place).items():
        lacks = libraries.LACKS.get(f"{by} {case.op}", "")
        yield {**of, "by": by, "lacks": lacks, **attempted(work, rival=True)}


def beside(row: Row, prediction: Row | None, dtype: str) -> Row:
    """With the ledger's floor for an H100 SXM, where it is of this dtype, and the measured time over it."""
    if prediction is None or prediction["dtype"] != dtype or "ms" not in row:
        return row
    least = prediction["predicted_ms"]
    return {**row, "predicted_ms": least, "measured_to_predicted": row["ms"] / least}
