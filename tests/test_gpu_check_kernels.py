"""make gpu-check's rows of kernels, on small shapes in Triton's interpreter: only the clock, which needs a GPU, is
replaced. flash-attn is stood in for by the functions of tests/ops/test_flash.py, other libraries by one of our own."""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
if importlib.util.find_spec("triton") is not None:
    from bench import gpu_check_kernels as checked
    from bench.gpu import DTYPES, cases
    from bench.gpu_check_kernels import Place, time_kernels
    from bench.rivals import eager, libraries
    from engine.kernels import _cuda, _flash

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = Path(__file__).parent / "ops"


@pytest.fixture
def results(monkeypatch) -> list:
    """What each timed call gave; the clock says 2 ms."""
    seen: list = []

    def timed(call) -> dict[str, float]:
        seen.append(call())
        return {"ms": 2.0, "ms_low": 1.5, "ms_high": 2.5}

    monkeypatch.setattr(checked, "timed", timed)
    return seen


def rows(piece: str) -> dict[str, dict]:
    """By who did the work."""
    found = list(time_kernels(piece, Place(DEVICE, "small")))
    assert len({row["by"] for row in found}) == len(found)
    return {row["by"]: row for row in found}


def different() -> list[str]:
    """One piece of each work on one small shape: the sizes of layers differ on the full shapes only."""
    unlike = {}
    for case in cases():
        phases = [word in case.name for word in ("backward", "residual", "tanh", "write", "norm")]
        key = (case.op, str(case.small), *phases)
        unlike.setdefault(key, case)
    return checked.pieces(list(unlike.values()))


def test_pieces_are_every_case_and_dtype():
    found = checked.pieces(cases())
    assert len(set(found)) == len(found) == sum(len(case.dtypes) for case in cases())
    for case in cases():
        for name in case.dtypes:
            assert checked.found(f"{case.op}, {case.name}, {name}") == (case, name)


@pytest.mark.parametrize(
    "op", sorted({case.op for case in cases()}) if "checked" in globals() else []
)
def test_every_work_by_the_engine_and_by_eager_torch(op, results, monkeypatch):
    for piece in different():
        if not piece.startswith(f"{op},"):
            continue
        results.clear()
        found = rows(piece)
        case, name = checked.found(piece)
        ours, theirs = found["engine"], found["eager torch"]
        assert {"op": op, "case": case.name, "dtype": name}.items() <= ours.items()
        moved = case.bytes(DTYPES[name].itemsize, **case.small)
        assert ours["gb_per_s"] == pytest.approx(moved / 2e6)
        for by, row in found.items():
            assert "error" not in row, f"{piece}, {by}: {row}"
        long = "gae" in op and case.small["T"] > eager.LONGEST
        assert ("left_out" in theirs) == long and ("ms" in theirs) != long
        timed = sum("ms" in row for row in found.values())
        assert len(results) == timed
    assert eager.DEVICE == "meta", "the ledger counts there"


def test_a_loop_that_nobody_waits_for_is_left_out(results):
    case, _ = checked.found("gae, forward, one episode, float32")
    row = checked.of_eager(case, torch.float32, Place("meta"))
    assert row == {"left_out": "a loop of 100000 steps in eager torch is not worth the wait"}
    assert not results


def test_long_sequences_of_attention_are_not_such_a_loop(results):
    case, _ = checked.found("attention, forward, 8B, bfloat16")
    assert case.full["T"] > eager.LONGEST
    before, eager.DEVICE = eager.DEVICE, "meta"
    try:
        given, forward = eager.WORK["attention"](case.name, torch.bfloat16, **case.full)
        assert forward(*given).shape == (8, 32, 2048, 128)
    finally:
        eager.DEVICE = before
    assert "ms" in checked.of_eager(case, torch.bfloat16, Place("meta"))


def test_the_prediction_stands_beside(results, tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    row = {"op": "swiglu", "case": "forward", "by": "engine", "dtype": "bfloat16"}
    path.write_text(json.dumps({"rows": [{**row, "predicted_ms": 0.5}]}))
    monkeypatch.setattr(checked, "LEDGER", path)
    assert rows("swiglu, forward, bfloat16")["engine"]["measured_to_predicted"] == 4.0
    found = rows("swiglu, forward, float32")
    assert "predicted_ms" not in found["engine"] and "predicted_ms" not in found["eager torch"]


def test_a_measured_time_stands_beside_its_prediction():
    prediction = {"dtype": "bfloat16", "predicted_ms": 2.0}
    row = checked.beside({"ms": 3.0}, prediction, "bfloat16")
    assert row["predicted_ms"] == 2.0 and row["measured_to_predicted"] == 1.5
    assert checked.beside({"ms": 3.0}, prediction, "float32") == {"ms": 3.0}
    assert checked.beside({"error": "x"}, prediction, "bfloat16") == {"error": "x"}
    assert checked.beside({"ms": 3.0}, None, "bfloat16") == {"ms": 3.0}


def test_what_goes_wrong_is_named_and_the_rest_goes_on(results, monkeypatch):
    """NotImplementedError is torch's for what a device lacks: an error, and no form that is left out."""

    def lacks(*_: object) -> None:
        raise NotImplementedError("no kernel on this device")

    monkeypatch.setitem(eager.WORK, "swiglu", lambda *_, **__: ((), lacks))
    found = rows("swiglu, forward, float32")
    assert found["engine"]["ms"] == 2.0
    assert found["eager torch"]["error"] == "NotImplementedError: no kernel on this device"
    assert checked.attempted(lambda: {}["ms"]) == {"error": "KeyError: 'ms'"}


def test_a_rival_may_need_more_memory_than_there_is():
    def large() -> dict:
        raise torch.OutOfMemoryError("no room")

    assert checked.attempted(large) == {"error": "OutOfMemoryError: no room"}
    assert checked.attempted(large, rival=True) == {"left_out": "OutOfMemoryError: no room"}


@pytest.fixture
def pretend_cuda(monkeypatch) -> dict[str, list]:
    """CUDA C++ is there, and is Triton; the arguments of both, by op."""
    seen: dict[str, list] = {}

    def watch(op: str, function):
        def call(*arguments):
            seen.setdefault(op, []).append(arguments)
            return function(*arguments)

        return call

    for op in _cuda.OPS:
        module = importlib.import_module(f"engine.kernels.triton.{op}")
        monkeypatch.setattr(module, op, watch(op, getattr(module, op)))
    monkeypatch.setattr(_cuda, "why_no_cuda", lambda: "")
    monkeypatch.setattr(
        _cuda,
        "cuda_kernel",
        lambda op: getattr(importlib.import_module(f"engine.kernels.triton.{op}"), op),
    )
    return seen


@pytest.mark.parametrize("case", [c for c in cases() if c.op in _cuda.OPS], ids=lambda c: c.op)
def test_cuda_is_timed_beside_triton_on_the_same_work(case, results, pretend_cuda):
    found = rows(f"{case.op}, {case.name}, float32")
    assert list(found)[:3] == ["engine", "CUDA C++", "eager torch"]
    assert found["CUDA C++"]["ms"] == 2.0
    assert found["CUDA C++"]["gb_per_s"] == found["engine"]["gb_per_s"]
    triton, cuda = pretend_cuda[case.op]
    assert len(triton) == len(cuda)
    for one, other in zip(triton, cuda, strict=True):
        if isinstance(one, torch.Tensor):
            assert one.shape == other.shape and one.dtype == other.dtype
        else:
            assert one == other
    half = rows(f"{case.op}, {case.name}, bfloat16")["CUDA C++"]
    assert half["left_out"] == "it takes float32, on NVIDIA's GPUs" and "error" not in half


def test_every_op_in_cuda_has_its_numbers_and_a_case():
    assert set(checked.NUMBERS) == set(_cuda.OPS) <= {case.op for case in cases()}


@pytest.mark.parametrize("built", [False, True])
def test_cuda_that_is_not_built_is_left_out_and_that_does_not_load_an_error(
    built, results, monkeypatch
):
    monkeypatch.setattr(_cuda, "library", lambda: Path("engine/_cuda.so") if built else None)
    monkeypatch.setattr(_cuda, "why_no_cuda", lambda: "a reason")
    row = rows("ranking_loss, loss and gradient, float32")["CUDA C++"]
    assert row.get("error" if built else "left_out") == (
        "RuntimeError: a reason" if built else "a reason"
    )
    assert "ms" not in row


@pytest.fixture
def flash(monkeypatch):
    """tests/ops/test_flash.py's stand-in: the pinned release's signatures, computed by the definition."""
    spec = importlib.util.spec_from_file_location("flash_stand_in", OPS / "test_flash.py")
    theirs = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(OPS))
    spec.loader.exec_module(theirs)
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.util.spec_from_loader("flash_attn", None)
    module.flash_attn_varlen_func = theirs.varlen
    module.flash_attn_with_kvcache = theirs.with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(_flash, "DEVICE", DEVICE)


@pytest.mark.skipif(DEVICE == "cuda", reason="the stand-in is on the CPU")
def test_flash_attention_forward_backward_and_decoding(flash, results):
    """Of the engine's sizes, and no gradient is kept where none is asked for."""
    for piece in (
        "attention, forward, 135M, bfloat16",
        "attention, backward, 135M, bfloat16",
        "attention_decode, 135M, bfloat16",
    ):
        results.clear()
        row = rows(piece)["flash-attn"]
        assert row["ms"] == 2.0 and row["note"].startswith("as the engine calls it: ")
        ours, theirs = results[0], results[-1]
        if "backward" in piece:
            assert len(theirs) == 3 and all(x.abs().max() > 0 for x in theirs)
            assert [x.shape for x in theirs] == [x.shape for x in ours[:3]]
        else:
            assert theirs.shape == (ours[0] if isinstance(ours, tuple) else ours).shape
            assert not theirs.requires_grad


@pytest.mark.skipif(DEVICE == "cuda", reason="the stand-in is on the CPU")
@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        ("attention, forward, 135M, float32", "it takes float16 or bfloat16"),
        ("attention, forward, shared prefix, 135M, bfloat16", "it has no shared prefix"),
        ("attention, backward, shared prefix, 135M, bfloat16", "it has no shared prefix"),
        ("attention_decode, 135M, float32", "it takes float16 or bfloat16"),
    ],
)
def test_what_flash_attention_does_not_serve_is_left_out(flash, results, piece, reason):
    row = rows(piece)["flash-attn"]
    assert row["left_out"].startswith(reason) and "error" not in row and "ms" not in row


def test_the_cache_of_flash_attention():
    """The last block is not full; every row has its own blocks."""
    q, keys, values, lengths, table = checked.flash_cache("cpu", torch.bfloat16, 3, 300, 4, 2, 16)
    assert q.shape == (3, 4, 16) and keys.shape == values.shape == (6, 256, 2, 16)
    assert lengths.tolist() == [300] * 3 and sorted(table.flatten().tolist()) == list(range(6))
    assert table.shape == (3, 2) and not torch.equal(keys, values)


def test_other_libraries_are_timed_where_they_are_installed(results, monkeypatch):
    module = types.ModuleType("some_kernels")
    module.__spec__ = importlib.util.spec_from_loader("some_kernels", None)
    given = []

    def work(*arguments, **shape):
        given.append((*arguments, shape))
        return lambda: "theirs"

    for op in ("swiglu", "rmsnorm"):
        named = {"some-kernels, tuned": work, "not-installed": work}
        monkeypatch.setitem(libraries.LIBRARIES, op, named)
    monkeypatch.setitem(libraries.LACKS, "some-kernels, tuned swiglu", "much")
    assert set(rows("swiglu, forward, bfloat16")) == {"engine", "eager torch"}
    monkeypatch.setitem(sys.modules, "some_kernels", module)
    row = rows("swiglu, backward, bfloat16")["some-kernels, tuned"]
    assert row["ms"] == 2.0 and row["lacks"] == "much" and results[-1] == "theirs"
    assert given == [(DEVICE, torch.bfloat16, True, {"N": 7, "F": 1536})]
    assert "some-kernels, tuned" not in rows("rmsnorm, residual, forward, bfloat16")
    assert "not-installed" not in rows("rmsnorm, forward, bfloat16")
