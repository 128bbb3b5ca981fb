"""What several GPUs take, on paper: the arithmetic by hand, the sizes of the paper, the words of the program."""

import math
from types import SimpleNamespace

import pytest

from engine.errors import ConfigError
from engine.model.footprint import (
    Layout,
    Phase,
    Sizes,
    epoch_phases,
    gathered,
    held,
    ppo_phases,
    sent_in_pass,
    sent_to_gather,
)
from engine.plan import PAPER, architecture_of, main, parser, plan, sizes_of
from engine.run.distributed import ALONE, Ranks
from engine.stages.several import check_memory

MODEL = Sizes("model", total=1000, layer=100, rest=200, largest=60, act_bytes=10)
FOUR = Layout(shards=4, replicate=1, storage=2, packed=False)


def test_what_a_rank_holds():
    assert held(MODEL, False, FOUR) == 12 * 1000 / 4
    assert held(MODEL, True, FOUR) == 16 * 1000 / 4
    assert gathered(MODEL, FOUR) == 2 * 1000
    assert gathered(MODEL, Layout(4, 1, 2, packed=True)) == 4 * 1000


def test_phases():
    rollout, score, update = ppo_phases(MODEL, MODEL, 500.0, 7, FOUR)
    assert (rollout.bytes, score.bytes) == (2000 + 500, 2000)
    grads, rest, layers, acts = 2 * 4 * 1000 / 4, (2 + 4) * 200, 2 * 2 * 100 + 8 * 100 + 4 * 60, 7 * 10
    assert update.bytes == grads + rest + layers + acts
    assert epoch_phases(MODEL, 7, FOUR)[1].bytes == grads / 2 + rest + layers + acts


def test_what_a_rank_sends():
    assert sent_to_gather(MODEL, FOUR) == 2 * 1000 * 3 / 4
    assert sent_in_pass(MODEL, FOUR) == (2 * (1000 + 800) + 4 * 1000) * 3 / 4
    two_by_two = Layout(2, 2, 2, packed=False)
    assert sent_in_pass(MODEL, two_by_two) == (2 * 1800 + 4000) / 2 + 2 * 4 * 500 * (1 / 2)
    assert sent_in_pass(MODEL, Layout(1, 1, 2, packed=False)) == 0.0


@pytest.mark.parametrize("name, billions", [("1.3B", 1.3), ("6B", 6.7), ("175B", 175.0)])
def test_the_papers_sizes(name, billions):
    size = sizes_of(name, "policy", "lm_head")
    assert size.total / 1e9 == pytest.approx(billions, rel=0.03)
    assert size.rest + PAPER[name][0] * size.layer == size.total
    assert size.layer == pytest.approx(12 * PAPER[name][1] ** 2, rel=0.01)
    assert architecture_of(name).num_layers == PAPER[name][0]


def lines(*arguments: str) -> list[str]:
    return plan(parser().parse_args([*arguments]))


def test_more_gpus_need_less_each_and_copies_more():
    def always(*more: str) -> float:
        text = lines("--model", "6B", "--gpu_memory", "80", *more)[2]
        return float(text.split()[1])

    assert always("--gpus", "64") < always("--gpus", "8")
    assert always("--gpus", "64", "--replicate", "8") == pytest.approx(always("--gpus", "8"), abs=0.1)


def test_the_program(capsys):
    assert main(["--model", "175B", "--gpus", "8", "--gpu_memory", "80"]) == 0
    said = capsys.readouterr().out
    assert "does not fit" in said.splitlines()[-1] and "assumed:" in said and "175B" in said
    assert main(["--model", "1.3B", "--gpus", "64", "--gpu_memory", "80"]) == 0
    assert "verdict: fits" in capsys.readouterr().out
    assert main(["--model", "1.3B", "--gpus", "9", "--gpu_memory", "80", "--replicate", "2"]) == 2
    assert "want a multiple" in capsys.readouterr().err
    assert main(["--model", "no/such/folder", "--gpus", "8", "--gpu_memory", "80"]) == 2


class Said:
    """A session's log and ranks."""

    def __init__(self, ranks: object) -> None:
        self.events: list[str] = []
        self.ranks, self.log = ranks, SimpleNamespace(event=self.events.append)


def test_too_large_a_phase_is_refused_before_it_begins():
    phase = Phase("rollout", (("the policy, whole", 3e9), ("keys and values", 2e9)))
    ranks = SimpleNamespace(size=2, any=bool)
    session = Said(ranks)
    check_memory(session, [phase], held=1e9, free=6e9)
    assert session.events == [
        "memory of a rank, rollout: 6.000 GB (1.000 always; the policy, whole 3.000, keys and values 2.000)"
    ]
    with pytest.raises(ConfigError, match=r"rollout needs 5\.000 GB more.*4\.000 GB are free(.|\n)*--kv_cache_gb"):
        check_memory(session, [phase], held=1e9, free=4e9)
    elsewhere = SimpleNamespace(size=2, any=lambda flag: True)  # another rank has no room
    with pytest.raises(ConfigError):
        check_memory(Said(elsewhere), [phase], held=1e9, free=6e9)


def test_one_process_says_nothing():
    session = Said(ALONE)
    check_memory(session, [Phase("rollout", (("x", math.inf),))], held=0.0, free=0.0)
    assert session.events == []
    assert Ranks(1, 4, 4, None).share(6) == [1, 5]
