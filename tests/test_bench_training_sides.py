"""Both programs of bench.ppo and bench.train on a small model: the engine and transformers give the same numbers.

Phases by hand, and the ops that are measured alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from small_engines import save_tiny

from bench import ppo_phases, train, training, training_engine, training_kernels, training_peer
from bench.training_cases import Case
from engine.kernels._backend import kernels_usable
from engine.run.memory import keep_freed

LIMITS = {
    "threads": 2,
    "fma_gflops": 100.0,
    "read_gb_per_s": {"32 KiB": 80.0},
    "copy_gb_per_s": {"32 KiB": 10.0},
    "barrier_us": 1.0,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """Its pad token is a token of the rows, as where it is the end of sequence."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("tiny"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 10}))
    return str(folder)


def small_cases() -> dict[str, Case]:
    ids = [[(7 * i + j) % 90 + 3 for j in range(12)] for i in range(4)]
    rows = [{"tokens": row[: 12 - 2 * i], "start": i} for i, row in enumerate(ids)]
    group = {
        "prompt": ids[0],
        "responses": [ids[1][:3], ids[2][:5], ids[3][:2]],
        "ranks": [1, 0, 2],
    }
    other = {"prompt": ids[1][:6], "responses": [ids[0][:3], ids[2][:4]], "ranks": [0, 1]}
    head = [0.1 * (-1) ** i for i in range(36)]
    numbers = [[0.5 * (i - j) for j in range(4)] for i in range(4)]
    episodes = {"episodes": ids, "prompt": 8, "micro_batch": 2, "advantage": numbers,
                "returns": numbers[::-1]}  # fmt: skip
    both = ("loss", "gradient norm")
    parts = [f"{m} {what}" for m in ("policy", "value") for what in both]
    return {
        "sft-ragged": Case("sft-ragged", "hf", 4, {"batches": [rows[:3], rows[3:]], "warm_up": rows},
                           dict.fromkeys(both, 1e-4)),
        "rm": Case("rm", "hf", 2, {"batches": [[group, other]], "warm_up": [other], "seed": 0, "head": head},
                   dict.fromkeys(both, 1e-4)),
        "ppo-update": Case("ppo-update", "hf", 4, {**episodes, "seed": 0, "head": head},
                           dict.fromkeys(parts, 1e-4)),
    }  # fmt: skip


@pytest.fixture
def own_head(monkeypatch):
    """The engine draws the head that the case brings."""
    head = torch.tensor(small_cases()["rm"].work["head"])[None]
    monkeypatch.setattr("engine.model.weights.new_score_weight", lambda *_: head)


def answers_of(workload, args, work, given) -> list[dict]:
    class Answers:
        def __init__(self) -> None:
            self.found = []

        def write(self, text: str) -> None:
            self.found.append(json.loads(text))

        def flush(self) -> None:
            return

    heard = Answers()
    workload(training_peer.Side(args, work, heard), iter(given))
    ready, *answers = heard.found
    assert "torch" in ready["versions"]
    return answers


@pytest.mark.parametrize("name", ["sft-ragged", "rm", "ppo-update"])
@pytest.mark.parametrize("warm_up", [True, False])
def test_both_sides_give_the_same_losses_and_gradients(tiny, own_head, name, warm_up):
    case = small_cases()[name]
    args = argparse.Namespace(model=tiny, dtype="float32", threads=1)
    order = {"warm_up": True} if warm_up else {}
    theirs_of, ours_of = training_peer.WORKLOADS["hf"][name], training_engine.WORKLOADS[name]
    (theirs,) = answers_of(theirs_of, args, case.work, [order])
    (ours,) = answers_of(ours_of, args, case.work, [order])
    assert not training.differing(ours["checks"], theirs["checks"], case.agree)
    assert ours["tokens"] == theirs["tokens"] > 0
    assert 0.05 < ours["peak_memory_gb"] < 100


def test_the_engine_with_prompts_repeated_has_the_same_loss(tiny, own_head):
    args = argparse.Namespace(model=tiny, dtype="float32", threads=1)
    given = [{}, {"repeat": True}]
    work = small_cases()["rm"].work
    shared, apart = answers_of(training_engine.rm, args, work, given)
    near = {"loss": 1e-5, "gradient norm": 1e-4}
    assert not training.differing(shared["checks"], apart["checks"], near)


@pytest.mark.skipif(
    not kernels_usable(), reason="old log-probs are the sampler's with the kernels only"
)
@pytest.mark.parametrize("stop", [True, False])
def test_an_iteration_of_the_engine(tiny, stop):
    prompts = [[5, 6, 7], [8, 9]]
    work = {"prompts": prompts, "new_tokens": 4, "stop": stop, "micro_batch": 2}
    args = argparse.Namespace(model=tiny, dtype="float32", threads=1)
    rows = [{"tokens": [5, 6, 7, 8], "start": 2}]
    given = [{"score": rows}, {"phases": True}, {"score": rows}]
    before, found, after = answers_of(training_engine.ppo, args, work, given)
    assert before["checks"] != after["checks"]  # a step was taken
    assert found["tokens"] == 5 + found["answer_tokens"]
    if not stop:
        assert found["answer_tokens"] == 8
    assert set(found["phases"]) == set(ppo_phases.PHASES) - {"rest"}
    assert all(seconds > 0 for seconds in found["phases"].values())
    assert sum(found["phases"].values()) < found["seconds"]


def test_an_answer_of_exact_length_is_ended_by_no_token(tiny):
    assert training_engine.Endless.from_pretrained(tiny, dtype="float32").eos_ids == frozenset()
    assert training_engine.engine.HybridEngine.from_pretrained(tiny, dtype="float32").eos_ids


class Tiny:
    vocab_size, hidden_size, num_layers, num_heads, num_kv_heads = 100, 32, 2, 4, 2
    head_dim, intermediate_size, gated, qk_norm, parallel_residual = 8, 64, True, False, False


def test_flop_of_phases_by_hand():
    found = ppo_phases.phase_flop(Tiny(), [3, 5], [2, 4])
    attention = 4 * 2 * 32 * (5 * 6 / 2 + 9 * 10 / 2)
    elements = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    trunk, head = 2 * elements * 14 + attention, 2 * 3200 * 6
    assert found["reference"] == found["rollout"] == trunk + head
    assert found["value"] == found["reward"] == trunk
    assert found["policy update"] == 3 * (trunk + head) and found["value update"] == 3 * trunk
    assert ppo_phases.optimizer_bytes(10) == 280


def test_phases_by_hand():
    one = {
        "seconds": 10.0,
        "phases": {"rollout": 4.0, "optimizer": 2.0},
        "flop": {"rollout": 2e11},
        "optimizer_bytes": 10e9,
    }
    found = ppo_phases.phases([one], LIMITS)
    assert found["rollout"] == {"seconds": 4.0, "share": 0.4, "gflops": 50.0, "of_peak": 0.5}
    assert found["rest"] == {"seconds": 4.0, "share": 0.4}
    assert found["optimizer"]["of_copy"] == 0.5  # 5 of 10 GB/s


def test_the_rivals_of_linear_logprob_agree(monkeypatch):
    monkeypatch.setattr(training_kernels, "VOCABULARY", 700)
    monkeypatch.setattr(training_kernels, "HIDDEN", 36)
    monkeypatch.setattr(training_kernels, "CHUNK", 10)
    runs = {
        n: training_kernels.head_gradients(n, torch.float32, 33)()
        for n in ("engine", training_kernels.LATER, "eager", "chunked")
    }
    training_kernels.nearly(runs["engine"], runs["eager"], "eager")
    training_kernels.nearly(runs[training_kernels.LATER], runs["eager"], "eager")
    for own, other in zip(runs["chunked"], runs["eager"], strict=True):
        torch.testing.assert_close(own, other)
    wrong = (runs["eager"][0], 1.05 * runs["eager"][1])
    with pytest.raises(RuntimeError, match="gradients of weight are 0.0"):
        training_kernels.nearly(runs["engine"], wrong, "eager")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's own peak")
def test_extra_memory_is_what_a_call_takes_beside_its_gradients():
    size = 200 << 20

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        scratch = torch.ones(size // 4)
        return scratch[:10].clone(), torch.ones(50 << 18)

    keep_freed()  # as a run in this process may have: the gradient then comes from what is at hand
    at_hand = [torch.ones(1 << 20) for _ in range(20)]  # below malloc's size for a mapping of their own
    del at_hand
    # A system that reclaims pages nobody touches lowers what is resident meanwhile; nothing raises it.
    assert max(training_kernels.extra_memory(run) for _ in range(3)) == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("name", train.OPS)
def test_ops_are_checked_against_their_definitions(name, monkeypatch):
    training_kernels.check_op(name)
    real = training_kernels.op_calls(2)

    def broken(episodes: int) -> dict:
        calls = iter(range(100))

        def run() -> tuple[torch.Tensor, ...]:
            return tuple(x + next(calls) // len(out) for x in out)

        out = real[name][0]()
        return {name: (run, 1)}

    monkeypatch.setattr(training_kernels, "op_calls", broken)
    with pytest.raises(AssertionError, match=name):
        training_kernels.check_op(name)


def test_a_pass_over_bytes_by_hand(monkeypatch):
    monkeypatch.setattr(training_kernels, "op_calls", lambda _: {"gae": (lambda: None, 10e9)})
    monkeypatch.setattr(training_kernels, "check_op", lambda _: None)
    calls = training_kernels.CALLS
    times = iter([2.0, 3.0] * (calls // 2) + [4.0] * calls)
    monkeypatch.setattr(training_kernels, "seconds_of", lambda _: next(times))
    (row,) = training_kernels.passes(("gae", "sft"), 2, LIMITS)
    assert (row["ratio"], row["ratio_min"], row["ratio_max"]) == (3.0, 2.0, 4.0)
    assert row["peer"] == "one pass over its bytes" and row["memory_ratio"] is None
