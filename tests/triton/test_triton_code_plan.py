"""What is compiled: the plan of all variants, what it leaves out, and all kernels against the record.

The last test compiles every kernel for every architecture and in every dtype, and of its other
variants those that are not recorded under their sources: minutes where build/aot is empty, seconds where it is not.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_triton_code import without_interpreter

from bench import aot, aot_code, aot_gates, aot_paths, aot_plan, gpu

# --- plan ---


def test_rows_that_no_case_takes_are_found():
    case = next(case for case in gpu.cases() if case.op == "swiglu")
    tables = aot_plan.Tables()
    row = {"BLOCK": 512, "num_warps": 4, "num_stages": 1}
    columns = {
        arch: [{"up_to": 8, **row}, {"up_to": None, **row, "BLOCK": 1024}]
        for arch in aot_code.MACHINES
    }
    tables.load = lambda op: columns
    (launch,) = aot_plan.launches(case, "sm_90", "bfloat16", tables)
    assert launch.config.blocks == {"BLOCK": 1024}
    assert tables.untaken("sm_90") == [("swiglu", 0)] and len(tables.untaken("sm_80")) == 2
    tables.forced = ("swiglu", 0)
    (launch,) = aot_plan.launches(case, "sm_90", "bfloat16", tables)
    assert launch.config.blocks == {"BLOCK": 512}


def test_a_broken_launcher_is_named_and_hides_nothing(monkeypatch):
    case = next(case for case in gpu.cases() if case.op == "swiglu")
    made = aot_plan.Plan()
    broken = replace(case, name="broken", run=lambda *arguments: 1 / 0)
    made.add(broken, "sm_90", "bfloat16", aot_plan.Tables())
    assert "swiglu, broken, bfloat16, sm_90: ZeroDivisionError" in made.errors[0]


def test_variations_are_no_cases():
    """A record names what launches a kernel, and the ledger finds a case's kernels by that name."""
    names = [(one.op, one.name) for one in [*gpu.cases(), *gpu.variations()]]
    assert len({*names}) == len(names)


# --- what is left out ---


def test_the_plan_leaves_nothing_out():
    """Every kernel, and both outcomes of each condition that a launcher decides."""
    run = without_interpreter("-m", "bench.aot", "--plan")
    assert run.returncode == 0, run.stderr


def test_a_kernel_that_nothing_launches_is_named():
    defined = aot_paths.defined()
    assert aot_gates.uncompiled(defined) == []
    left = defined - {("gae", "_backward"), ("_reduce", "add_partials")}
    assert [text.split(":")[0] for text in aot_gates.uncompiled(left)] == [
        "kernels/triton/_reduce.py, add_partials",
        "kernels/triton/gae.py, _backward",
    ]
    # called by kernels, in their own file and from another
    assert not {("_scan", "recurrence"), ("linear_logprob", "tile_products")} & defined


def test_a_kernel_is_either_wide_or_has_a_reason_not_to_be():
    kernels = [(op, name) for op, of_op in aot_gates.WIDE.items() for name in of_op]
    kernels += aot_gates.NARROW
    assert aot_gates.unsorted(kernels) == []
    assert aot_gates.unsorted([*kernels, ("gae", "_new")])[0].startswith("gae _new:")
    assert aot_gates.unsorted(kernels[1:])[0].startswith("adamw _step:")


def called(x, KIND, deep, BLOCK):
    if KIND == 0:
        return x
    elif KIND == 1:
        return -x
    for _ in range(BLOCK, deep, BLOCK):
        x += 1
    return x


CALLED = SimpleNamespace(fn=called)


def kernel(x, bias, n, HAS, KIND, WIDTH, BLOCK):
    deep: int = WIDTH // 2
    if n > 0:  # loaded, as far as a compiler knows
        CALLED(x, KIND, deep, BLOCK)
    CALLED(x, 0, deep, BLOCK)  # the text's own choice
    if HAS and bias is not None:
        n = 1
        if n == 2:
            return
    else:
        return
    if WIDTH % BLOCK != 0:
        CALLED(x, 1, 0, BLOCK)


def outcomes(**constants):
    known = {"bias": aot_paths.TENSOR, "HAS": True, "KIND": 0, "WIDTH": 64, "BLOCK": 32}
    found = aot_paths.outcomes(SimpleNamespace(fn=kernel), {**known, **constants})
    return {(condition, value) for _, condition, value in found}


def test_conditions_come_out_as_for_the_compiler():
    both, uneven = "HAS and bias is not None", "WIDTH % BLOCK != 0"
    assert outcomes() == {("KIND == 0", True), (both, True), (uneven, False)}
    assert outcomes(WIDTH=65) - outcomes() == {(uneven, True)}
    # neither what is behind a return nor the rest of a chain is reached
    assert outcomes(HAS=False) == {("KIND == 0", True), (both, False)}
    assert (both, False) in outcomes(bias=None)
    assert ("KIND == 1", True) in outcomes(KIND=1)
    last = outcomes(KIND=2)
    assert ("KIND == 1", False) in last and ("range(BLOCK, deep, BLOCK)", False) in last
    assert ("range(BLOCK, deep, BLOCK)", True) in outcomes(KIND=2, WIDTH=66)
    assert ("D < BLOCK_D", True) in outcomes(D=80, BLOCK_D=128)


def planned(**constants):
    kinds = dict.fromkeys(("x", "bias"), "*fp32") | {"n": "i32"}
    kinds |= dict.fromkeys(("HAS", "KIND", "WIDTH", "BLOCK"), "constexpr")
    values = {"HAS": True, "KIND": 0, "WIDTH": 64, "BLOCK": 32, **constants}
    params = [SimpleNamespace(is_constexpr=kind == "constexpr") for kind in kinds.values()]
    function = SimpleNamespace(fn=kernel, cache_key="", params=params)
    given = {(at,): values[name] for at, name in enumerate(kinds) if name in values}
    return aot_plan.Variant("test", "_kernel", "sm_90", "float32", function, kinds, given, {}, {})


def test_a_check_compiles_each_kernel_once_and_what_is_not_known():
    one, row, other = planned(), planned(BLOCK=16), planned(BLOCK=8)
    wide = replace(planned(BLOCK=16), dtype="bfloat16")
    variants = [one, row, other, wide]
    assert len({v.key for v in variants}) == 3  # a dtype is no part of a key but by its types
    assert aot.due(variants, {}) == variants
    known = {(v.op, v.key) for v in variants}
    assert aot.due(variants, known) == [one, wide]
    assert aot.due(variants, known - {("test", other.key)}) == [one, other, wide]
    archs, dtypes = ("sm_80", "sm_90", "sm_100"), ("bfloat16", "float32")
    grid = [replace(one, arch=arch, dtype=dtype) for arch in archs for dtype in dtypes]
    now = aot.due(grid, {(v.op, v.key) for v in grid})
    assert len(now) == 3 and {v.arch for v in now} == {*archs} and {v.dtype for v in now} == {*dtypes}
    now = aot.due(grid[:3], {(v.op, v.key) for v in grid})  # a pair on the diagonal is not there
    assert {v.arch for v in now} == {*archs[:2]} and {v.dtype for v in now} == {*dtypes}
    assert aot.due([replace(row, op="another"), one], known) == [replace(row, op="another"), one]


def test_where_triton_lies_is_no_part_of_a_key():
    there = planned()
    there.options = {"libraries": (("device", "/somewhere/else/device.bc"),), "warps": 4}
    here = replace(there, options={"libraries": (("device", "/here/device.bc"),), "warps": 4})
    assert there.key == here.key
    assert there.key != replace(there, options={"libraries": (), "warps": 4}).key
    assert there.key != replace(there, options={**there.options, "warps": 8}).key


def test_a_changed_source_is_compiled_and_compared(tmp_path, monkeypatch):
    """What is recorded under a key stands for itself alone: another key is compiled, and its code compared."""
    monkeypatch.setattr(aot, "RECORD", tmp_path / "record.json")
    same, changed, seen = planned(), planned(BLOCK=16), []

    def compile_(variants):
        seen.extend(variants)
        return iter([{**aot._said(v), "registers": 40} for v in variants])

    monkeypatch.setattr(aot, "compiled", compile_)
    records = [{**aot._said(v), "registers": 32} for v in (same, changed)]
    records[0]["registers"] = 40
    records[1]["key"] = "of an older source"
    aot.RECORD.write_text(aot.written(records))
    found = list(aot.checked([same, changed]))
    assert seen == [same, changed] and [r["registers"] for r in found] == [40, 40]
    assert [text.endswith(": registers 32 -> 40") for text in aot.differences(found)] == [True]
    seen.clear()
    records[1] = {**aot._said(changed), "registers": 32}
    aot.RECORD.write_text(aot.written(records))
    assert [r["registers"] for r in aot.checked([same, changed])] == [40, 32] and seen == [same]
    seen.clear()  # another compiler: nothing is known
    monkeypatch.setattr(aot, "versions", lambda: {"triton": "another"})
    assert len(list(aot.checked([same, changed]))) == len(seen) == 2


def test_what_turns_a_loop_more_often_is_no_other_variant(monkeypatch):
    monkeypatch.setattr(aot_plan, "TURNS", (("WIDTH",), ("KIND",)))
    made, first, uneven, other = aot_plan.Plan(), planned(), planned(WIDTH=65), planned(BLOCK=16)
    assert [made.alike(x) for x in (first, planned(WIDTH=96))] == [first, first]
    assert [made.alike(x) for x in (uneven, other)] == [uneven, other] and len(made.found) == 3


def seen(case):
    """What is known of the arguments of a case's launches."""
    for launch in aot_plan.launches(case, "sm_90", case.dtypes[0]):
        given = dict(zip(aot_paths.parameters(launch.kernel.fn), launch.arguments, strict=False))
        known = {name: aot_paths.TENSOR for name, x in given.items() if isinstance(x, torch.Tensor)}
        yield "sm_90", launch.kernel, {**known, **launch.constants, **launch.config.blocks}


def test_a_way_that_no_case_takes_is_named(monkeypatch):
    of_rope = {key: why for key, why in aot_paths.NEVER.items() if key[0].startswith("rope.")}
    monkeypatch.setattr(aot_paths, "NEVER", of_rope)
    compiled = [one for case in gpu.cases() if case.op == "rope" for one in seen(case)]
    missed = aot_paths.missed(compiled)
    assert "rope._forward, sm_90: `INVERSE` of _forward is never True" in missed
    assert "rope._rotate_and_write, sm_90: `D > ROT` of _rotate is never True" in missed
    compiled += [one for case in gpu.variations() if case.op == "rope" for one in seen(case)]
    assert aot_paths.missed(compiled) == []
    monkeypatch.setitem(of_rope, ("rope._forward", "INVERSE", True), "a test")
    assert aot_paths.missed(compiled) == ["rope._forward: NEVER has `INVERSE`, True in vain"]
    monkeypatch.setattr(aot_paths, "NEVER", {})
    assert "rope._forward, sm_90: `ROT > 0` of _rotate is never False" in aot_paths.missed(compiled)


# --- record ---


TABLES = sorted(aot_plan.TABLES.glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_row_of_a_table_is_recorded_for_every_dtype(path):
    """A table beside which lies one for float32 is for the other dtypes."""
    narrow, wide = {"bfloat16", "float16"}, {"float32"}
    beside = path.with_name(f"{path.stem}_float32.json").exists()
    dtypes = wide if path.stem.endswith("_float32") else narrow if beside else narrow | wide
    ops = {case.op for case in gpu.cases()}
    op = max((op for op in ops if path.stem.startswith(op)), key=len)
    compiled = [v for v in aot.recorded()["variants"] if v["op"] == op]
    for arch, rows in json.loads(path.read_text()).items():
        for row in rows:
            warps, stages = row["num_warps"], row["num_stages"]
            # what the launcher alone reads: SLAB and GRADIENTS make a WIDTH, PIECE and MANY a PIECE
            others = ("up_to", "num_warps", "num_stages", "SLAB", "GRADIENTS", "PIECE", "MANY")
            blocks = {f"{name}={value}" for name, value in row.items() if name not in others}
            taken = [
                v
                for v in compiled
                if (v["arch"], v["warps"], v["stages"]) == (arch, warps, stages)
                and blocks <= set(v["types"].split())
            ]
            found = {v["dtype"] for v in taken}
            # a kernel of float32 statistics is the same in every dtype, and recorded once
            same = not any(kind in v["types"] for v in taken for kind in ("*bf16", "*fp16"))
            assert dtypes <= found or same & bool(found), f"{arch} {row}: {dtypes - found} missing"


def test_all_kernels_pass_their_gates_and_are_as_recorded():
    run = without_interpreter("-m", "bench.aot", "--check")
    assert run.returncode == 0, (
        f"{run.stderr}\nIf it is meant, run `{aot.REGENERATE}` and commit its file."
    )
