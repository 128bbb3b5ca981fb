"""Compiled kernels: the readers of their code, and each gate on kernels that break it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot, aot_code, aot_gates

ROOT = Path(__file__).parents[2]


def without_interpreter(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    run = [sys.executable, *command]
    return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled():
    """tests/triton/violations.py, compiled."""
    run = without_interpreter("tests/triton/violations.py")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def records(compiled):
    return compiled["alone"]


def failing(record):
    return [text.split(":")[0] for text in aot_gates.failures(record)]


# --- gates ---


@pytest.mark.parametrize(
    "name",
    [
        "copy", "copy on AMD", "running", "product", "product on sm_80", "product on sm_100", "product on AMD",
        "product, small", "product in float32",
    ],
)  # fmt: skip
def test_proper_kernels_pass(records, monkeypatch, name):
    monkeypatch.setitem(aot_gates.WIDE, "test", ("_copy",))
    assert failing(records[name]) == []


@pytest.mark.parametrize(
    "name, gate",
    [
        ("copy unaligned", "wide_loads"),
        ("copy unaligned on AMD", "wide_loads"),
        ("running, too wide", "spills"),
        ("running, too wide, on AMD", "spills"),
        ("product without HGMMA", "tensor_cores"),
    ],
)
def test_a_kernel_that_breaks_a_gate_fails_it(records, monkeypatch, name, gate):
    monkeypatch.setitem(aot_gates.WIDE, "test", ("_copy",))
    assert failing(records[name]) == [gate]


def test_too_much_shared_memory_fails(records):
    assert failing(records["product, too many stages"]) == ["shared", "occupied"]


def test_each_gate_on_numbers_at_its_edge(records):
    product, copy = records["product"], records["copy"]
    edge = {**copy, "warps": 8, "registers": 256}
    assert aot_gates.registers(edge) == "" != aot_gates.registers({**edge, "registers": 257})
    edge = {**product, "shared": 227 * 1024}
    assert aot_gates.shared(edge) == "" != aot_gates.shared({**edge, "shared": 227 * 1024 + 1})
    assert aot_gates.shared({**edge, "arch": "sm_80"}) and aot_gates.shared(
        {**edge, "arch": "gfx942"}
    )
    spilled = {**product, "local": 4, "local_in_loop": 0}
    assert aot_gates.spills(spilled) == "" != aot_gates.spills({**spilled, "local_in_loop": 1})
    assert aot_gates.spills({**spilled, "loop": False})
    for arch in aot_code.MACHINES:
        none = {**product, "arch": arch, "hgmma": 0, "mma": 0}
        assert "tensor core" in aot_gates.tensor_cores(none)
    assert aot_gates.tensor_cores({**product, "hgmma": 0, "mma": 8}).endswith("without HGMMA")
    assert aot_gates.tensor_cores({**product, "hgmma": 0, "mma": 8, "warps": 2}) == ""


def test_what_is_allowed_needs_its_own_entry(records, monkeypatch):
    bad = {**records["running"], "local_in_loop": 2}
    assert failing(bad) == ["spills"]
    monkeypatch.setitem(aot_gates.ALLOWED, ("test", "_running", "spills"), "a test")
    assert failing(bad) == [] and failing({**bad, "kernel": "_other"}) == ["spills"]


def test_an_operand_of_odd_depth_may_be_loaded_in_pieces(records, monkeypatch):
    monkeypatch.setitem(aot_gates.WIDE, "test", ("_copy",))
    assert failing({**records["copy unaligned"], "types": "UNIT=1 BLOCK=64"}) == []
    assert failing({**records["copy unaligned"], "types": "UNIT=16"}) == ["wide_loads"]


# --- readers ---


def test_tensor_cores_and_shared_memory_are_read(records):
    assert records["product"]["hgmma"] and records["product on sm_100"]["hgmma"]
    assert records["product on sm_80"]["mma"] and records["product on AMD"]["mma"]
    assert records["product"]["dots"] == ["64x64x64 bf16"] and records["product"]["loop"]
    assert records["product on sm_100"]["tensor_memory"] == 64
    assert records["copy"]["wide_loads"] == records["copy"]["loads"] == 1


def test_the_hash_is_of_the_code_alone(records):
    assert records["copy"]["hash"] == records["copy renamed"]["hash"]
    assert records["copy"]["hash"] != records["copy doubled"]["hash"]


def test_kernels_read_by_one_call_are_those_that_cuobjdump_prints(compiled):
    alone = {name: compiled["alone"][name]["hash"] for name in compiled["together"]}
    assert len(alone) > 5 and len({*alone.values()}) > 5
    assert compiled["together"] == alone == compiled["cuobjdump"]


def lines(*texts):
    return "\n".join(
        f"        /*{16 * at:04x}*/   {text} ;  /* 0x0 */" for at, text in enumerate(texts)
    )


def test_registers_are_renumbered_by_first_use():
    one = aot_code.sass(lines("IADD3 R4, P1, R2, UR6, RZ", "@!P1 LDG.E.128 R8, desc[UR4][R4.64]"))
    other = aot_code.sass(lines("IADD3 R9, P0, R3, UR2, RZ", "@!P0 LDG.E.128 R1, desc[UR5][R9.64]"))
    mixed = aot_code.sass(lines("IADD3 R9, P0, R3, UR2, RZ", "@!P0 LDG.E.128 R1, desc[UR5][R3.64]"))
    assert one.hash == other.hash != mixed.hash


def looped(*texts):
    code = aot_code.sass(lines(*texts))
    return [at for at, inside in enumerate(code.in_loop) if inside]


def test_a_loop_is_a_cycle_not_a_backward_branch():
    assert looped("NOP", "LDL R1, [R2]", "@P0 BRA 0x10", "EXIT", "BRA 0x40") == [1, 2]
    # cold code behind the end that goes back to where it came from
    assert looped("NOP", "@P0 BRA 0x40", "NOP", "EXIT", "STL [R1], R2", "BRA 0x20") == []
    # the same, from inside a loop
    cold = ("@P0 BRA 0x40", "NOP", "@P1 BRA 0x0", "EXIT", "STL [R1], R2", "BRA 0x10")
    assert looped(*cold) == [0, 1, 2, 4, 5]
    # a subroutine is in a loop where its caller is
    assert looped(
        "CALL.REL.NOINC 0x30", "@P1 BRA 0x0", "EXIT", "LDL R1, [R2]", "RET.REL R2 0x0"
    ) == [0, 1, 3, 4]
    assert looped("CALL.REL.NOINC 0x20", "EXIT", "LDL R1, [R2]", "RET.REL R2 0x0") == []
    # control goes on behind branches that only some threads take
    assert looped("NOP", "BRA.DIV UR4, 0x30", "@P0 BRA 0x0", "EXIT") == [0, 1, 2]
    assert looped("NOP", "BRA.U !UP0, 0x30", "@P0 BRA 0x0", "EXIT") == [0, 1, 2]


def test_a_loop_in_AMD_assembly():
    text = "f:\n\ts_nop 0\n.LBB0_1:  ; loop\n\tscratch_load_dword v1, off, s0\n\ts_cbranch_scc1 .LBB0_1\n"
    text += "\ts_endpgm\n.Lfunc_end0:\n\t.section x\n\ts_nop 1\n"
    code = aot_code.amd_code(text)
    assert code.in_loop == [False, True, True, False]
    assert code.count(aot_code.AMD_LOCAL, looped=True) == 1


@pytest.mark.parametrize(
    "arch, registers, shared, warps, want",
    [
        ("sm_90", 32, 0, 4, (16, 1.0)),
        ("sm_90", 128, 0, 8, (2, 0.25)),
        ("sm_90", 129, 0, 8, (1, 0.125)),  # 136 a thread: granules of 8
        ("sm_90", 32, 100 * 1024, 4, (2, 0.125)),
        ("sm_80", 32, 100 * 1024, 4, (1, 0.062)),
        ("sm_90", 32, 0, 1, (32, 0.5)),  # 32 blocks at most
        ("gfx942", 128, 0, 4, (4, 0.5)),
    ],
)
def test_occupancy(arch, registers, shared, warps, want):
    assert aot_code.occupancy(arch, registers, shared, warps)[:2] == want


def test_tensor_memory_limits_the_blocks():
    assert aot_code.occupancy("sm_100", 32, 0, 4, columns=256) == (2, 0.125, "tensor memory")


# --- record ---


def test_a_changed_variant_is_a_difference(records, tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "RECORD", tmp_path / "gpu_code.json")
    some = [records["copy"], records["product"]]
    assert "missing" in aot.differences(some)[0]
    aot.RECORD.write_text(aot.written(some))
    assert len(aot.RECORD.read_text().splitlines()) == 4  # one variant a line
    assert aot.differences(some) == []
    assert "hash" in aot.differences([{**some[0], "hash": "0"}, some[1]])[0]
    assert "not recorded" in aot.differences([*some, records["running"]])[0]
    assert "no longer compiled" in aot.differences(some[:1])[0]
    monkeypatch.setattr(aot, "versions", lambda: {"triton": "another"})
    assert aot.differences(some[:1]) == []  # other compilers make other code
