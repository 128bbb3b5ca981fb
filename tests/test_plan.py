"""What several GPUs take, on paper: the arithmetic by hand, the sizes of the paper, the words of the program."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.config import PPOConfig, SFTConfig
from engine.errors import ConfigError
from engine.model.names import Spec
from engine.plan import PAPER, POSITIVE, described, main, parser, plan, sent_in_pass, sent_to_gather
from engine.run import memory
from engine.run.distributed import Ranks
from engine.run.memory import Dtypes, parameters
from engine.stages.estimates import Described, Load, Machine, PPOModels, ppo_estimator
from engine.stages.resources import settle

BF16 = torch.bfloat16
# 1000 parameters, 2 layers of 400 (its largest tensor 300), 200 outside
SPECS = {
    "embed_tokens.weight": Spec((20, 10), "matrix"),
    **{f"layers.{i}.{name}": spec for i in range(2) for name, spec in
       (("mlp.up_proj.weight", Spec((30, 10), "matrix")), ("mlp.down_proj.weight", Spec((10, 10), "matrix")))},
}  # fmt: skip
MODEL = Described(described("1.3B", "lm_head").architecture, SPECS)
FOUR = Machine(torch.device("cuda"), Dtypes(BF16, BF16), False, 0.0, held=0, free=10**12, size=4, shards=4)
TWO_BY_TWO = replace(FOUR, shards=2)


def estimate(machine: Machine):
    config = PPOConfig(model_name_or_path="m", output_dir="o", reward_model_path="r")
    models = PPOModels(MODEL, MODEL, (MODEL,))
    return ppo_estimator(config, machine, Load(5, 7, 5), models)(7, "selective", 1.0)


def test_what_a_rank_always_holds():
    assert FOUR.trained(MODEL) == {"masters": 1000.0, "moments": 2000.0, "average": 0.0}
    assert sum(FOUR.trained(MODEL, averaged=True).values()) == 16 * 1000 / 4
    assert sum(TWO_BY_TWO.trained(MODEL).values()) == 12 * 1000 / 2
    assert FOUR.frozen(MODEL) == 2 * 1000
    one = replace(FOUR, size=1, shards=1)
    assert one.trained(MODEL)["compute copy"] == 2 * 1000 and one.training_pass([MODEL]) == {}
    assert one.whole("policy", MODEL) == {}


def test_what_a_phase_gathers():
    phases = estimate(FOUR).phases
    weights = 16 * 1000 / 4 + 12 * 1000 / 4 + 2 * 2 * 1000
    cache = phases["samples"]["cache"]
    assert sum(phases["samples"].values()) == weights + 2000 + cache
    kept = phases["scores"]["activations"]
    assert sum(phases["scores"].values()) == weights + 2 * 2000 + kept  # no kernel of a CPU: the policy scores too
    assert "policy, gathered" not in estimate(replace(FOUR, packed=True)).phases["scores"]
    trains = phases["trains"]
    assert trains["gradients"] == 4 * 1000 / 4  # of one model after the other
    assert trains["embeddings and head, gathered, with their gradient"] == (2 + 4) * 200
    assert trains["two layers gathered, one's gradient and its reduction"] == 2 * 2 * 400 + 8 * 400 + 4 * 300
    assert phases["saves"]["checkpoint"] == (3 * 2 + 1) * 4 * 1000 / 4


def test_what_a_rank_sends():
    assert sent_to_gather(MODEL, 4) == 2 * 1000 * 3 / 4
    assert sent_in_pass(MODEL, 4, 1) == (2 * (1000 + 800) + 4 * 1000) * 3 / 4
    assert sent_in_pass(MODEL, 2, 2) == (2 * 1800 + 4000) / 2 + 2 * 4 * 500 * (1 / 2)
    assert sent_in_pass(MODEL, 1, 1) == 0.0


@pytest.mark.parametrize("name, billions", [("1.3B", 1.3), ("6B", 6.7), ("175B", 175.0)])
def test_the_papers_sizes(name, billions):
    found = described(name, "lm_head")
    total = parameters(found.specs)
    assert total / 1e9 == pytest.approx(billions, rel=0.03)
    layer = parameters({n: s for n, s in found.specs.items() if n.startswith("layers.0.")})
    assert layer == pytest.approx(12 * PAPER[name][1] ** 2, rel=0.01)
    assert found.architecture.num_layers == PAPER[name][0]


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


def config_of(**more) -> SFTConfig:
    return SFTConfig(model_name_or_path="m", output_dir="o", dataset_name="d", micro_batch_tokens=7, **more)


def test_several_processes_do_not_begin_where_it_does_not_fit():
    estimator = lambda *_: estimate(FOUR)  # noqa: E731
    peak, load = int(estimate(FOUR).peak), Load(5, 7)
    _, line = settle(config_of(), replace(FOUR, free=peak), load, estimator)
    assert "estimated peak of each of 4 processes" in line
    with pytest.raises(ConfigError, match=r"each of 4 processes needs(.|\n)*policy, gathered(.|\n)*--kv_cache_gb"):
        settle(config_of(), replace(FOUR, free=peak // 2), load, estimator)
    alone = replace(FOUR, size=1, shards=1, free=peak // 2)  # it may page, and hurts nobody else
    assert "are free beside" in settle(config_of(), alone, load, estimator)[1]


def test_ranks_plan_with_the_least_that_one_of_them_has():
    ranks = SimpleNamespace(largest=lambda x: max(x, 50), smallest=lambda x: min(x, 100))
    assert replace(FOUR, held=5, free=200).agreed(ranks) == replace(FOUR, held=50, free=100)
    assert Ranks(1, 4, 4, None).share(6) == [1, 5]


def test_a_rank_on_a_cpu_has_its_part_of_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    monkeypatch.setenv("ENGINE_DEVICE", "cpu")
    assert Machine.of(config_of(device="cpu", replicate=2), 4, 4).free == 250
    assert Machine.of(config_of(device="cpu", replicate=2), 4, 4).shards == 2


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_plan_of_nothing_is_refused_by_name(name, value, capsys):
    given = {"model": "1.3B", "gpus": "8", "gpu_memory": "80"} | {name: value}
    assert main([word for key, text in given.items() for word in (f"--{key}", text)]) == 2
    assert f"{name}: got {value}" in capsys.readouterr().err
