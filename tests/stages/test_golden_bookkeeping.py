"""Golden cases around the losses: where an answer ends, positions, the reward model's constant, the paper's counts."""

from types import SimpleNamespace

import pytest
import torch
from golden_models import context, golden_networks, scalar
from ops.golden_cases import GROUPS, golden_cases

from engine import ops
from engine.config import RMConfig
from engine.data.pack import last_rows, pack_sequences
from engine.data.prompts import Prompt
from engine.data.rankings import RankedGroup
from engine.generate import generator
from engine.generate.sampling import Sampling
from engine.generate.steps import Drawn
from engine.hybrid import Completion
from engine.stages.epochs import total_steps
from engine.stages.inputs import RMData
from engine.stages.ppo.batch import Rollouts
from engine.stages.ppo.forward import pack_answers
from engine.stages.ppo.rewards import paid_score
from engine.stages.ppo.update import minibatches
from engine.stages.rm import RMStage
from engine.stages.rm_metrics import count_pairs
from engine.train import parse

PROMPT = (7, 7)
BASE = ["--model_name_or_path", "model", "--output_dir", "run"]


class Scripted:
    """Steps that draw the golden answers' tokens, also those after the end, were they asked for."""

    cache = SimpleNamespace(copy=lambda pairs: None)

    def __init__(self, responses):
        self.responses, self.of_page, self.drawn = responses, {}, 0

    def prefill(self, prompts, pages):
        assert all(tuple(prompt) == PROMPT for prompt in prompts)
        known = len(self.of_page)
        self.of_page |= {table[0]: known + i for i, table in enumerate(pages)}
        return torch.arange(known, known + len(prompts))[:, None].float()

    def draw(self, hidden, uniform):
        return self._tokens([(int(row), 0) for row in hidden])

    def decode(self, rows, uniform):
        places = zip(rows.page_table[:, 0].tolist(), rows.positions.tolist(), strict=True)
        return self._tokens([(self.of_page[page], at - len(PROMPT) + 1) for page, at in places])

    def _tokens(self, places):
        self.drawn += len(places)
        zeros = torch.zeros(len(places))
        return Drawn(torch.tensor([self.responses[b][t] for b, t in places]), zeros, zeros)


def generated(given, steps, patch):
    """What the generator makes of the golden answers, as rollouts."""
    shape = SimpleNamespace(
        num_layers=1, num_kv_heads=1, head_dim=8, max_positions=64, vocab_size=10
    )
    model = SimpleNamespace(architecture=shape, kv_dtype=torch.float32, version=0)
    patch.setattr(generator, "steps_for", lambda *_: steps)
    responses = given["responses"]
    settings = Sampling(max_new_tokens=len(responses[0]))
    found = generator.generate(
        model, [PROMPT] * len(responses), settings, frozenset([given["eos_id"]])
    )
    prompts = [Prompt(PROMPT, "", None, {}, "golden")] * len(responses)
    return Rollouts(tuple(prompts), tuple(Completion(**vars(one), text="") for one in found), 1)


@golden_cases("eos_processing")
def test_golden_ends_of_answers(case, monkeypatch):
    """An answer ends with its first end token; nothing behind it is drawn; its score is read there, and paid."""
    given, want = case["inputs"], case["outputs"]
    steps = Scripted(given["responses"])
    answers = generated(given, steps, monkeypatch)
    assert answers.lengths == want["lengths"] and steps.drawn == sum(want["lengths"])
    assert answers.ended.tolist() == want["contains_eos"]
    tokens = torch.tensor([token for one in answers.completions for token in one.tokens])
    assert ops.unpack(tokens, answers.cu, fill=given["pad_id"]).tolist() == want["truncated"]
    assert ops.unpack(torch.ones(len(tokens)), answers.cu).tolist() == want["mask"]
    packed = pack_answers(answers, range(len(answers.prompts)))
    starts = packed.batch.cu_seqlens[packed.segments]
    assert (packed.last_rows - starts).tolist() == want["score_index_in_response"]
    score = torch.tensor(given["raw_scores"])
    for mode, penalty in (
        ("replace", -given["penalty_value"]),
        ("subtract", given["penalty_subtract"]),
    ):
        paid = paid_score(score, answers.ended, penalty, mode)
        assert paid.tolist() == want[f"scores_{mode}"], mode


@golden_cases("position_ids")
def test_golden_positions(case):
    """Padding on either side is packed away: positions count real tokens, the last row holds the last of them."""
    mask = torch.tensor(case["inputs"]["attention_mask"])
    want = {name: torch.tensor(rows) for name, rows in case["outputs"].items()}
    columns, cu = ops.pack(torch.arange(mask.shape[1]).expand(mask.shape), mask)
    batch = pack_sequences([part.tolist() for part in columns.tensor_split(cu[1:-1].long())])
    assert torch.equal(batch.positions, ops.pack(want["exclusive_cumsum"], mask)[0])
    assert torch.equal(columns[last_rows(batch)], want["last_real_index"])


def test_golden_constant(cpu_class):
    """Minus the mean over demonstrations, by the stage; scores afterwards are the golden ones."""
    case = next(c for c in GROUPS["rm_normalisation"] if "raw_demo_scores" in c["inputs"])
    given, want = case["inputs"], case["outputs"]
    raw = [*given["raw_demo_scores"], *given["raw_scores"]]
    slots = torch.tensor([x for score in raw for x in (0.0, score)])
    groups = [
        RankedGroup(tuple(context(2 * i)), ((7,),), (1.0,), "golden") for i in range(len(raw))
    ]
    demonstrations = groups[: len(given["raw_demo_scores"])]
    model, data = scalar(slots), RMData((), (), demonstrations, ())
    config = RMConfig(model_name_or_path="m", output_dir="o", micro_batch_tokens=5)
    with golden_networks():
        constant = -RMStage(config, model, data).demonstration_mean()
        stage = RMStage(config, model.with_constant(model.constant + constant), data)
        scores = torch.cat(stage.scores(groups)).tolist()
        mean = stage.demonstration_mean()
    assert constant == pytest.approx(want["bias"], rel=2e-5, abs=2e-6)
    after = [*want["demo_scores_after"], *want["scores_after"]]
    assert scores == pytest.approx(after, rel=2e-5, abs=2e-6)
    assert mean == pytest.approx(want["demo_mean_after"], abs=2e-6)


def preset(stage, name="paper-1.3b"):
    extra = ["--reward_model_path", "reward"] if stage == "ppo" else []
    return parse(["--stage", stage, "--preset", name, *BASE, *extra])[1]


@golden_cases("accounting")
def test_golden_counts_of_the_paper(case):
    """Of the presets. An epoch's last batch may be smaller here, so epochs end on a whole step."""
    given, want = case["inputs"], case["outputs"]
    ppo, rm = preset("ppo"), preset("rm")
    assert (ppo.total_episodes, ppo.batch_size) == (given["episodes"], given["batch"])
    assert ppo.num_iterations == want["ppo_iterations"]
    plan = list(minibatches(ppo.batch_size, ppo, 0))
    assert len(plan) == want["minibatches_per_iteration"]
    assert [len(prompts) for _, prompts in plan] == [given["minibatch"]] * len(plan)
    assert ppo.num_iterations * len(plan) == want["ppo_optimizer_steps"]
    rows = range(round(ppo.batch_size * ppo.ptx_per_episode))
    shares = [len(rows[number :: len(plan)]) for number, _ in plan]
    assert shares == [want["ptx_examples_per_minibatch"]] * len(plan)
    assert ppo.num_iterations * len(rows) == want["ptx_examples_total"]
    passes = ppo.num_iterations * ppo.batch_size / given["ppo_prompts"]
    assert passes == pytest.approx(want["passes_over_prompts"])
    for name, key in (("paper-1.3b", "sft_steps_small"), ("paper-175b", "sft_steps_175b")):
        sft = preset("sft", name)
        steps = total_steps(sft, given["sft_prompts"])
        assert want[key] <= steps < want[key] + sft.num_train_epochs, name
    assert want["rm_steps"] <= total_steps(rm, given["rm_prompts"]) < want["rm_steps"] + 1
    pairs = rm.batch_size * count_pairs(range(given["Kmax"]))
    assert pairs == want["max_pairs_per_rm_batch"]
