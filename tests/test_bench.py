"""The bench's own logic, without timing anything: floors by hand, rows, tables, prompts, the protocol with a peer."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from small_engines import byte_tokenizer, save_tiny

import engine
from bench import (
    decode,
    floors,
    machine,
    opponent,
    peer,
    records,
    rollout,
    suite,
    table,
    workloads,
)
from engine.kernels._backend import kernels_usable
from engine.kernels.transformer_step import PHASES

LIMITS = {
    "threads": 2,
    "fma_gflops": 100.0,
    "read_gb_per_s": {"32 KiB": 80.0, "512 KiB": 60.0, "1048576 KiB": 20.0},
    "copy_gb_per_s": {"32 KiB": 90.0, "512 KiB": 30.0, "1048576 KiB": 10.0},
    "barrier_us": 1.0,
}
# two layers of 4 query and 2 key heads of 8, hidden 32, inner 64, vocabulary 100, bf16 weights and cache, fp32
# activations
SIZES = floors.Sizes(2, 32, 64, 4, 2, 8, 100, True, 2, 4, 2)


def test_rates_are_of_the_nearest_faster_size():
    assert machine.read_rate(LIMITS, 10) == 80e9  # smaller than any: the smallest
    assert machine.read_rate(LIMITS, 600 << 10) == 60e9
    assert machine.read_rate(LIMITS, 2 << 30) == 20e9
    assert machine.copy_rate(LIMITS, 2 * (512 << 10)) == 30e9  # half is read, half written
    assert machine.copy_rate(LIMITS, 600 << 10) == 90e9
    assert machine.product_rate(LIMITS) == 100e9
    assert machine.product_rate({**LIMITS, "amx_bf16_gflops": 5000.0}) == 5000e9


def test_the_best_of_two_runs():
    other = {**LIMITS, "fma_gflops": 120.0, "barrier_us": 2.0}
    other["read_gb_per_s"] = {"32 KiB": 70.0, "512 KiB": 65.0, "1048576 KiB": 20.0}
    best = machine.best(LIMITS, other)
    assert best["fma_gflops"] == 120.0 and best["barrier_us"] == 1.0
    assert best["read_gb_per_s"] == {"32 KiB": 80.0, "512 KiB": 65.0, "1048576 KiB": 20.0}


def test_sizes_by_hand():
    # q 32x32, k and v 16x32, o 32x32; gate, up and down 64x32
    assert SIZES.layer_elements == 2 * (2 * 1024 + 2 * 512 + 3 * 2048)
    assert SIZES.head_elements == 3200
    assert SIZES.cache_bytes(3, 10) == 2 * 2 * 3 * 10 * 16 * 2
    assert SIZES.attention_flop(3, 10) == 2 * 2 * 2 * 3 * 10 * 32  # scores and sums, two FLOP each
    assert SIZES.between_bytes(3) == 3 * 4 * (8 * 32 + 2 * 32 + 5 * 16 + 3 * 64)


def test_floors_by_hand():
    assert floors.floor(LIMITS, 80, 1) == pytest.approx(1e-9)  # 80 bytes at 80 GB/s
    assert floors.floor(LIMITS, 80, 1000) == pytest.approx(1e-8)  # 1000 FLOP at 100 GFLOP/s
    assert floors.floor(LIMITS, 80, 1, 2 << 30) == pytest.approx(80 / 20e9)  # among much else
    by_phase = floors.phase_floors(LIMITS, SIZES, 4, 16)
    assert set(by_phase) == set(PHASES)
    assert by_phase["head"] == pytest.approx(2 * 3200 * 4 / 100e9)
    assert by_phase["products"] == pytest.approx(2 * SIZES.layer_elements * 4 / 100e9)
    wide = dataclasses.replace(SIZES, vocabulary=1 << 26)  # 4 GiB of head drive all else from the cache
    assert floors.phase_floors(LIMITS, wide, 1, 16)["attention"] == pytest.approx(
        SIZES.cache_bytes(1, 16) / 20e9
    )
    whole = 2 * (SIZES.layer_elements + 3200) * 4 + SIZES.attention_flop(4, 16)
    assert floors.step_floor(LIMITS, SIZES, 4, 16) == pytest.approx(whole / 100e9)


def test_the_floor_of_a_rollout_by_hand():
    """Two prompts of 6 and 10 tokens, 3 samples each of 4 new tokens, four sequences at once."""
    found = floors.rollout_floor(LIMITS, SIZES, [6, 10], 3, 24, 4)
    prefill = (2 * SIZES.layer_elements * 16 + 2 * 3200 * 2) / 100e9  # each prompt once
    assert found == pytest.approx(prefill + 6 * floors.step_floor(LIMITS, SIZES, 4, 8 + 2))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = save_tiny("llama", tmp_path_factory.mktemp("tiny"))
    return engine.HybridEngine.from_pretrained(folder, dtype="float32")


def test_sizes_are_those_of_the_model(tiny):
    sizes, specs = floors.Sizes.of(tiny.model), tiny.model.weights.specs
    matrices = [n for n, spec in specs.items() if spec.kind == "matrix"]
    elements = sum(tiny.model.weights.packed(n).dense.numel() for n in matrices)
    assert sizes.layer_elements + sizes.head_elements == elements


@pytest.mark.skipif(not kernels_usable(), reason="phases are those of the C++ step")
def test_a_recorded_step_knows_its_phases_and_what_lies_between(tiny):
    prompts = workloads.random_prompts(3, 5)
    prompts = [[token % 200 + 3 for token in prompt] for prompt in prompts]
    case = workloads.Case("rollout", prompts, 6, ())
    tokens = []
    found = decode.recorded(lambda: tokens.append(workloads.run(tiny, case)[1]))
    assert tokens == [18]
    assert len(found.calls) == 5  # the first token of each comes from the prefill
    assert set(found.a_step()) == {*PHASES, "call", "python"}
    assert all(seconds > 0 for seconds in found.phases.tolist())


@pytest.mark.skipif(not kernels_usable(), reason="on packed weights")
@pytest.mark.parametrize("rows", [1, 3])
def test_the_stacked_products_are_all_of_a_step(tiny, rows, monkeypatch):
    done = []
    monkeypatch.setattr(decode, "OUTPUT_BYTES", 4 * 100)  # several parts
    monkeypatch.setattr(decode, "linear", lambda x, w: done.append((x.shape[0], w.rows * w.cols)))
    decode.stacked_products(tiny.model, rows)()
    sizes = floors.Sizes.of(tiny.model)
    assert sum(n for _, n in done) == sizes.layer_elements + sizes.head_elements
    assert len(done) > 2 and {r for r, _ in done} == {rows}


@pytest.mark.skipif(not kernels_usable(), reason="a step of the C++ kernels")
def test_a_step_at_a_context_reads_written_pages(tiny):
    with torch.no_grad():
        step, cache = decode.decode_step(tiny.model, 2, 20)
        assert cache.keys[0].shape[0] == 4  # two pages of 16 each
        assert all((pages != 0).float().mean() > 0.9 for pages in (*cache.keys, *cache.values))
        assert step().tokens.shape == (2,)


def test_sizes_of_scale_are_those_that_the_model_can_read():
    sizes = decode.scale_sizes(1024)
    assert sizes[:2] == [(1, 128), (2, 128)] and (256, 128) in sizes
    assert [c for r, c in sizes if r == 64] == [128, 64, 256, 512, 1024]  # each once


def test_prompts_are_encoded_as_the_chat_template_does(tiny, tmp_path):
    """As a peer's user would: apply_chat_template with the generation prompt."""
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    talk.append({"role": "user", "content": "bye"})
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "how far?", "messages": None}, {"prompt": "x", "messages": talk}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_tokenizer()
    want = [
        list(tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False))
        for m in ([{"role": "user", "content": "how far?"}], talk)
    ]
    assert workloads.real_prompts(path, tiny.encode, 2) == want
    with pytest.raises(SystemExit, match="got 2 rows, want 3"):
        workloads.real_prompts(path, tiny.encode, 3)


def test_orders_and_answers_of_a_peer():
    orders = [
        {"prompts": [[1, 2], [3]], "max_new_tokens": 5, "stop": []},
        {"prompts": [[4]], "max_new_tokens": 2, "stop": [7, 8]},
    ]
    seen, answers = [], io.StringIO()

    def generate(prompts: list[list[int]], new: int, stop: list[int]) -> int:
        seen.append((prompts, new, stop))
        return len(prompts) * new

    peer.serve(generate, io.StringIO("".join(json.dumps(o) + "\n" for o in orders)), answers)
    assert seen == [([[1, 2], [3]], 5, []), ([[4]], 2, [7, 8])]
    found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert [answer["tokens"] for answer in found] == [10, 2]
    assert all(answer["seconds"] >= 0 for answer in found)


def test_tokens_of_a_padded_row_end_with_the_first_stop():
    assert peer.new_tokens([5, 7, 0, 0], [7, 8]) == 2
    assert peer.new_tokens([5, 7, 0, 0], []) == 4
    assert peer.new_tokens([7, 7], [7]) == 1


FAKE_PEER = """
import json, sys
print(json.dumps({"ready": 0.0, "versions": {"safe_path": str(sys.flags.safe_path)}}), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    tokens = len(order["prompts"]) * order["max_new_tokens"] - len(order["stop"])
    print(json.dumps({"seconds": 2.0, "tokens": tokens}), flush=True)
"""


def fake_python(folder, code: str):
    """A program in place of a peer's python: it takes any words and runs `code`."""
    (folder / "fake.py").write_text(code)
    program = folder / "python"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} {folder}/fake.py\n")
    program.chmod(0o755)
    return program


def stopped(pid: int) -> bool:
    """Whether a process stands still; it may take a moment until a signal has arrived."""
    for _ in range(100):
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads the state from /proc")
def test_a_served_peer_is_stopped_but_for_its_turn(tmp_path):
    case = workloads.Case("ragged", [[1], [2]], 4, (0,))
    program = fake_python(tmp_path, FAKE_PEER)
    with opponent.Served("hf", program, "m", "float32", 1) as served:
        pid = served._process.pid
        assert served.versions == {"safe_path": "True"}  # bench/ hides no package of the peer
        assert stopped(pid)
        with served.awake():
            assert served.run(case) == (2.0, 7)
        assert stopped(pid)
    assert served._process.returncode == -signal.SIGKILL


def test_a_peer_that_ends_at_once_is_an_error_that_names_it(tmp_path):
    program = fake_python(tmp_path, "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="the peer vllm ended with code"):
        opponent.Served("vllm", program, "m", "float32", 1)


def test_a_peer_that_is_not_there_says_what_is_wanted(tmp_path):
    with pytest.raises(opponent.Missing, match="hf/bin/python"):
        opponent.opponent("hf", tmp_path, "m", "float32", 1)
    with pytest.raises(opponent.Missing, match="0 llama-batched-bench and 0 f16.gguf"):
        opponent.opponent("llama", tmp_path, "m", "float32", 1)
    with pytest.raises(opponent.Missing, match="0 bf16.gguf"):
        opponent.opponent("llama", tmp_path, "m", "bfloat16", 1)


LLAMA_TABLE = """
main: n_kv_max = 9216
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|    64 |     64 |    1 |    128 |    0.250 |   256.00 |    1.500 |    42.67 |    1.750 |    73.14 |
"""


def test_the_table_of_llama_batched_bench():
    assert opponent.llama_seconds(LLAMA_TABLE) == 1.75
    with pytest.raises(RuntimeError, match="no row of numbers"):
        opponent.llama_seconds("nothing")


class Fixed(opponent.Opponent):
    """A peer that takes a second a token."""

    name, dtype, versions = "vllm", "float32", {"vllm": "0"}

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def run(self, case: workloads.Case) -> tuple[float, int]:
        return float(self.tokens), self.tokens


def test_a_row_against_a_peer(tiny, monkeypatch):
    case = workloads.Case("rollout", [[1, 2], [3]], 4, ())
    costs = iter([9.0, 4.0, 2.0, 1.0])  # the first is to warm up
    monkeypatch.setattr(workloads, "run", lambda model, case: (8 * next(costs), 8))
    row = rollout.against(case, tiny, Fixed(8), 3, LIMITS)
    assert (row["ratio"], row["ratio_min"], row["ratio_max"]) == (0.5, 0.25, 1.0)
    assert (row["tokens_per_s"], row["peer_tokens_per_s"]) == (0.5, 1.0)
    assert (row["peer"], row["peer_dtype"], row["sequences"]) == ("vllm", "float32", 2)
    assert row["floor_ratio"] == pytest.approx(2.0 / workloads.floor_a_token(tiny, case, 8, LIMITS))


def test_a_peer_that_did_other_work_is_refused(tiny, monkeypatch):
    case = workloads.Case("rollout", [[1, 2], [3]], 4, ())
    monkeypatch.setattr(workloads, "run", lambda model, case: (1.0, 8))
    with pytest.raises(RuntimeError, match="vllm gave 7 tokens, want 8"):
        rollout.against(case, tiny, Fixed(7), 1, LIMITS)


def test_rows_with_the_same_key_are_replaced_others_kept(tmp_path):
    path = tmp_path / "deep" / "rollout-x.json"
    one = {"workload": "rollout", "sequences": 1, "dtype": "bfloat16", "tokens_per_s": 1.23456}
    against = {**one, "peer": "hf", "peer_dtype": "float32"}
    records.write(path, [one, against], LIMITS)
    records.write(path, [{**one, "tokens_per_s": 2.0}, {**one, "context": 64}], LIMITS)
    found = json.loads(path.read_text())
    assert [r["tokens_per_s"] for r in found["rows"]] == [2.0, 1.235, 1.235]
    assert [r.get("peer") for r in found["rows"]] == [None, "hf", None]
    assert all({"commit", "date"} <= set(row) for row in found["rows"])
    assert found["machine"]["fma_gflops"] == 100.0 and "torch" in found["versions"]


def recorded_rows() -> list[dict]:
    own = {"dtype": "bfloat16"}
    spread = {"ratio": 2.0, "ratio_min": 1.904, "ratio_max": 2.2}
    hf = {"peer": "hf", "peer_dtype": "float32", "peer_versions": {"transformers": "5"}}
    llama = {"peer": "llama", "peer_versions": {"llama.cpp": "1"}}
    once = {"ratio": 1.5, "ratio_min": 1.5, "ratio_max": 1.5}
    return [
        {"workload": "rollout", "sequences": 16, "tokens_per_s": 9.0, "dtype": "float32"},
        {"workload": "rollout", "sequences": 16, "tokens_per_s": 251.6, **own},
        {"workload": "rollout", "sequences": 16, **hf, **spread, **own},
        {"workload": "rollout", "sequences": 16, **llama, "peer_dtype": "f16", **once, **own},
        {"workload": "rollout", "sequences": 16, **llama, "peer_dtype": "bf16", **spread, **own},
        {"workload": "step", "sequences": 16, "peer": "products alone", **spread, **own},
        {"workload": "start", "sequences": 1, "seconds_from_pretrained": 2.345,
         "seconds_process": 12.04, **own},
    ]  # fmt: skip


def test_the_table_by_hand(tmp_path):
    machine_of = {"processor": "P", "threads": 2}
    found = {"machine": machine_of, "rows": recorded_rows()}
    (tmp_path / "rollout-avx2.json").write_text(json.dumps(found))
    text = table.render(tmp_path)
    none = " | ".join([table.NONE] * 4)
    assert f"| `amx` | all | {none} |" in text
    assert f"| `avx2` | 16 sequences | 252 | 2.00 (1.90 to 2.20) | {table.NONE} | 1.50 |" in text
    assert f"| `avx2` | 256 real prompts | {' | '.join([table.NONE] * 3)} | – |" in text
    assert f"| `avx2` | {table.NONE} / 2.00 / {table.NONE} | {table.NONE} | 2.35, whole" in text
    assert "process 12.0 |" in text
    assert "- `avx2`: P, 2 threads; transformers 5 in float32; llama.cpp 1 in f16" in text


def measured(name: str, seconds: float, **work: float) -> suite.Measured:
    return suite.Measured("rmsnorm", "op rows=32", name, seconds, dict(work))


def test_rows_of_kernels_by_hand():
    work = {"bytes": 2 << 20, "flop": 1000}  # 60 GB/s reading, 30 copying a MiB: 35 us
    given = [measured("engine", 7e-5, **work), measured("torch", 2e-4), measured("compiled", 1e-4)]
    alone = suite.Measured("gae", "op", "torch", 1.0)
    rows = suite.rows_of([*given, alone], LIMITS)
    assert len(rows) == 1  # a case without ours says nothing
    row = rows[0]
    assert row["alternative"] == "compiled" and row["ratio"] == pytest.approx(1e-4 / 7e-5)
    assert row["alternatives_us"] == {"torch": pytest.approx(200), "compiled": pytest.approx(100)}
    assert row["floor_ratio"] == pytest.approx(7e-5 / ((2 << 20) / 60e9))
    text = suite.lines(rows)
    assert text[0].split()[:2] == ["op", "case"] and "1.43" in text[1]


def test_limits_of_products_count_tiles_only_for_bf16():
    limits = {**LIMITS, "amx_bf16_gflops": 1000.0}
    assert suite.least_seconds({"flop": 1e9, "bf16": True}, limits) == pytest.approx(1e-3)
    assert suite.least_seconds({"flop": 1e9, "bf16": False}, limits) == pytest.approx(1e-2)
    assert suite.least_seconds({}, limits) == 0


def test_a_file_of_kernels_keeps_the_other_rows(tmp_path):
    path = tmp_path / "kernels-x.json"
    rows = [
        {"op": "gae", "case": "op", "ours_us": 1.0},
        {"op": "whiten", "case": "op", "ours_us": 2.0},
    ]
    suite.write(path, rows, LIMITS)
    suite.write(path, [{"op": "gae", "case": "op", "ours_us": 3.0}], LIMITS)
    found = json.loads(path.read_text())
    assert [(r["op"], r["ours_us"]) for r in found["rows"]] == [("gae", 3.0), ("whiten", 2.0)]
    assert len(path.read_text().splitlines()) < 60  # one row a line


def test_arguments_that_say_nothing_are_refused(capsys):
    with pytest.raises(SystemExit):
        rollout.parsed(["--model", "m", "--repeats", "0"])
    assert "--repeats: got 0, want 1 or more" in capsys.readouterr().err
    assert set(rollout.parsed(["--model", "m"]).only) == set(rollout.WORKLOADS)
