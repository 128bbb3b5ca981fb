"""Golden losses, rewards and advantages through the stages: batches, micro-batches, denominators, gradients and slots
are the stage's own."""

import pytest
import torch
from cpu_classes import runnable_classes, use_class
from golden_models import context, golden_networks, gradient, padded, policy, scalar
from ops.conftest import Precision
from ops.golden_cases import GROUPS, golden_cases, live_slots, offsets, packed

from engine.config import PPOConfig, RMConfig, SFTConfig
from engine.data.rankings import RankedGroup
from engine.data.text import Example
from engine.run.distributed import ALONE, Ranks
from engine.stages import sft
from engine.stages.inputs import RMData, SFTData
from engine.stages.ppo.advantages import estimate, rewards_and_advantages
from engine.stages.ppo.batch import Scores
from engine.stages.ppo.metrics import segment_sums
from engine.stages.ppo.ptx import backward_lm_loss, mean_lm_loss
from engine.stages.ppo.rewards import token_rewards
from engine.stages.rm import RMStage

NAMES = {"model_name_or_path": "m", "output_dir": "o"}
WIDTH = 5  # slots of a row: its four, and one behind them
WHOLE, CUT, ALL_ALONE = 10**6, 6, 1  # tokens of a micro-batch
FLOAT32 = Precision(torch.float32, 2e-5, 2e-6)
REDUCTIONS = ("prompt_mean_valid", "prompt_mean_allpairs", "pair_mean")


@pytest.fixture(params=["definition", *runnable_classes()])
def precision(request):
    """float64 on the torch definition, then float32 on each class of C++ kernels."""
    if request.param == "definition":
        yield Precision(torch.float64, 1e-10, 1e-12)
    else:
        with use_class(request.param):
            yield FLOAT32


def named(group, name):
    return next(case for case in GROUPS[group] if case["name"] == name)


def slots_of(given):  # (B * WIDTH, V)
    return padded(given["logits"], WIDTH).flatten(0, 1)


def demonstrations(given, contexts=(1, 1, 1, 1)):
    """One a row, behind a context of so many tokens: its answer is what the mask lets through."""
    rows = []
    for b, (labels, mask) in enumerate(zip(given["labels"], given["mask"], strict=True)):
        answer = labels[: int(sum(mask))]
        tokens = (*context(b * WIDTH, contexts[b]), *answer)
        rows.append(Example(tokens, contexts[b], contexts[b], ""))
    return rows


def sft_stage(model, rows, budget, ranks=ALONE):
    config = SFTConfig(micro_batch_tokens=budget, **NAMES)
    return sft.SFTStage(config, model, SFTData(rows, (), None, (), ()), ranks)


class Seen:
    """The passes of a stage: which rows, and the log-probs of their targets."""

    def __init__(self, patch):
        self.rows, self.logprobs = [], []
        predicting, logprob_loss = sft.predicting, sft.transformer.logprob_loss

        def rows_seen(model, rows, *options):
            self.rows.append(sorted(row.address for row in rows))
            return predicting(model, rows, *options)

        def logprobs_seen(*arguments):
            results = logprob_loss(*arguments)
            self.logprobs.append(results[1])
            return results

        patch.setattr(sft, "predicting", rows_seen)
        patch.setattr(sft.transformer, "logprob_loss", logprobs_seen)


def close(precision, ours, want, name):
    """Two numbers of the host."""
    numbers = (torch.tensor(x, dtype=precision.dtype) for x in (ours, want))
    precision.assert_close(*numbers, name)


def check_gradient(model, want, precision, scale=1.0):
    """Of the logits, as the gradient of the head; of the slots that nothing reads it is 0."""
    expected = padded(want["grad_token_mean_wrt_logits"], WIDTH).flatten(0, 1).to(precision.dtype)
    precision.assert_close((gradient(model) / scale).cpu(), expected, "gradient of the logits")


def check_sft_loss(case, precision, device="cpu"):
    given, want = case["inputs"], case["outputs"]
    rows = demonstrations(given)
    for budget in (WHOLE, CUT, ALL_ALONE):
        model = policy(slots_of(given), precision.dtype, device)
        stage = sft_stage(model, rows, budget)
        metrics = stage.train_step(range(len(rows)), 0)
        close(precision, metrics["loss"], want["token_mean"], f"loss at {budget}")
        assert metrics["num_tokens"] == want["n_tokens"] + len(rows)
        check_gradient(model, want, precision)
        held = stage.mean_loss(model, [stage.demonstration(row, 0) for row in rows])
        close(precision, held, want["token_mean"], f"validation loss at {budget}")


def check_accumulation(case, precision, patch, device="cpu"):
    """The golden cut, by the stage's own rule; the loss is that of the whole batch, not the mean of the means."""
    given, want = case["inputs"], case["outputs"]
    rows, seen = demonstrations(given, (2, 1, 1, 1)), Seen(patch)
    model = policy(slots_of(given), precision.dtype, device)
    metrics = sft_stage(model, rows, CUT).train_step(range(len(rows)), 0)
    assert seen.rows == given["micro_batches"]
    assert [len(x) for x in seen.logprobs] == want["micro_tokens"]
    means = torch.stack([-x.mean() for x in seen.logprobs]).cpu()
    expected = torch.tensor(want["micro_means"], dtype=precision.dtype)
    precision.assert_close(means, expected, "means of the micro-batches")
    close(precision, metrics["loss"], want["correct_global_token_mean"], "loss")
    assert abs(metrics["loss"] - want["wrong_mean_of_micro_means"]) > 1e-2
    check_gradient(model, GROUPS["sft_loss"][0]["outputs"], precision)


def check_lm_loss(case, precision, device="cpu", coefficient=27.8):
    """The pretraining term: every token after a row's first is predicted."""
    given, want = case["inputs"], case["outputs"]
    rows = [row.tokens for row in demonstrations(given)]
    for budget in (WHOLE, CUT, ALL_ALONE):
        model = policy(slots_of(given), precision.dtype, device)
        found = backward_lm_loss(model, rows, coefficient, budget)
        close(precision, found, want["token_mean"], f"loss at {budget}")
        check_gradient(model, want, precision, coefficient)
        held = mean_lm_loss(model, rows, budget)
        close(precision, held, want["token_mean"], f"held-out loss at {budget}")


def ranked(given):
    """Prompts with K answers of 1 to K tokens, so that each is read at a slot of its own; and all slots' scores."""
    groups, slots, at = [], [], []
    for scores, ranks in zip(given["scores"], given["ranks"], strict=True):
        answers = tuple((7,) * (i + 1) for i in range(len(scores)))
        groups.append(RankedGroup(tuple(context(len(slots))), answers, tuple(ranks), "golden"))
        at += range(len(slots) + 1, len(slots) + 1 + len(scores))
        slots += [0.0, *scores]
    return groups, torch.tensor(slots), at


def check_ranking_loss(case, reduction, device="cpu"):
    given, want = case["inputs"], case["outputs"]
    groups, slots, at = ranked(given)
    for budget in (WHOLE, ALL_ALONE):
        model = scalar(slots, device)
        config = RMConfig(micro_batch_tokens=budget, loss_reduction=reduction, **NAMES)
        stage = RMStage(config, model, RMData(groups, (), (), ()))
        metrics = stage.train_step(range(len(groups)), 0)
        for name, theirs in (("loss", reduction), ("log_loss", "pair_mean")):
            close(FLOAT32, metrics[name], want[theirs]["loss"], f"{name} at {budget}")
        assert metrics["num_pairs"] == want["n_valid_pairs"]
        assert metrics["accuracy"] == pytest.approx(want["accuracy_strict"])
        expected = torch.zeros(len(slots), 1)
        expected[at, 0] = torch.tensor([x for row in want[reduction]["grad"] for x in row])
        FLOAT32.assert_close(gradient(model).cpu(), expected, f"gradient at {budget}")


class Answers:
    """The answers of a golden case of rewards, packed; each has ended, and may be as long as the rows are wide."""

    def __init__(self, case, precision, device):
        given, self.case = case["inputs"], case
        width = len(given["logprob_old"][0])
        self.tokens = [[t < n for t in range(width)] for n in given["lengths"]]
        self.precision, self.device = precision, device
        self.old, self.ref = (self.packed(given[k]) for k in ("logprob_old", "logprob_ref"))
        self.score = torch.tensor(given["scores"], dtype=precision.dtype).to(device)
        self.ended = torch.ones(len(self.tokens), dtype=torch.bool, device=device)
        self.cu = offsets(given["lengths"]).to(device)
        later = "padding_mask_p1" in case["outputs"]
        self.config = PPOConfig(
            reward_model_path="r", response_length=width, gamma=1.0, lam=0.95, whiten_advantages=not later,
            kl_estimator=given.get("estimator", "k1"), score_at="eos_plus_one" if later else "eos", **NAMES,
        )  # fmt: skip

    def packed(self, rows):
        return packed(rows, self.tokens, self.precision.dtype).to(self.device)

    def close(self, ours, rows, name, mask=None):
        want = packed(rows, mask or self.tokens, self.precision.dtype)
        self.precision.assert_close(ours.cpu(), want, f"{self.case['name']}: {name}")


def check_rewards(case, precision, device="cpu"):
    answers, given, want = Answers(case, precision, device), case["inputs"], case["outputs"]
    log = (answers.old, answers.ref, answers.score, answers.ended, answers.cu)
    found = token_rewards(*log, given["beta"], answers.config)
    answers.close(found.reward, want["rewards"], "rewards", live_slots(case))
    assert found.cu.tolist() == offsets([int(sum(row)) for row in live_slots(case)]).tolist()
    if "kl" in want:
        answers.close(found.kl, want["kl"], "kl")
        penalties = segment_sums(-given["beta"] * found.kl.cpu(), answers.cu.cpu())
        expected = torch.tensor(want["non_score_reward_sum"], dtype=precision.dtype)
        precision.assert_close(penalties, expected, "penalty of each answer")
    if "score_index" in want:
        assert (found.cu.diff() - 1).tolist() == want["score_index"]


def check_advantages(precision, device="cpu"):
    """Rewards, GAE and whitening in one: golden outputs of each are golden inputs of the next."""
    case = named("kl_penalised_reward", "eos_placement_k1_beta0.02")
    gae, white = (
        named("gae", "ragged_gamma1.0_lambda0.95"),
        named("whiten", "ragged_shift1_unbiased0"),
    )
    assert gae["inputs"]["rewards"] == case["outputs"]["rewards"]
    assert white["inputs"]["values"] == gae["outputs"]["advantages"]
    answers = Answers(case, precision, device)
    value, nothing = answers.packed(gae["inputs"]["values"]), torch.zeros_like(answers.score)
    scores = Scores(answers.old, answers.ref, value, nothing, answers.score)
    given = (answers.ended, answers.cu, case["inputs"]["beta"], answers.config)
    rewards, advantages = rewards_and_advantages(scores, *given)
    answers.close(rewards.reward, case["outputs"]["rewards"], "rewards")
    answers.close(advantages.returns, gae["outputs"]["returns"], "returns")
    answers.close(advantages.advantage, white["outputs"]["whitened"], "advantages")


def check_advantages_one_slot_later(precision, device="cpu"):
    """TRL's placement: the value after the last token stands in the slot where the score is paid."""
    case = named("kl_penalised_reward", "eos_plus_one_placement_TRL")
    gae = named("gae", "TRL_eos_plus_one_variant")
    assert gae["inputs"]["rewards"] == case["outputs"]["rewards"]
    answers, values = Answers(case, precision, device), gae["inputs"]["values"]
    after = [[*row, 0.0][n] for row, n in zip(values, case["inputs"]["lengths"], strict=True)]
    final = torch.tensor(after, dtype=precision.dtype).to(device)
    log = (answers.old, answers.ref, answers.score, answers.ended, answers.cu)
    rewards = token_rewards(*log, case["inputs"]["beta"], answers.config)
    packed_values = answers.packed(values)
    found = estimate(rewards, packed_values, final, answers.ended, answers.cu, answers.config)
    answers.close(found.advantage, gae["outputs"]["advantages_before_whiten"], "advantages")
    answers.close(found.returns, gae["outputs"]["returns"], "returns")


@golden_cases("kl_penalised_reward")
def test_golden_rewards(case, precision):
    check_rewards(case, precision)


def test_golden_advantages(precision):
    check_advantages(precision)
    check_advantages_one_slot_later(precision)


@golden_cases("sft_loss")
def test_golden_sft_loss(case, precision):
    with golden_networks():
        check_sft_loss(case, precision)


@golden_cases("grad_accumulation")
def test_golden_accumulation(case, precision, monkeypatch):
    with golden_networks():
        check_accumulation(case, precision, monkeypatch)


@golden_cases("sft_loss")
def test_golden_pretraining_loss(case, precision):
    with golden_networks():
        check_lm_loss(case, precision)


@pytest.mark.parametrize("budget,passes", [(WHOLE, [[0, 2], [1, 3]]), (5, [[0], [2], [1, 3], [3]])])
def test_golden_parts_of_two_ranks(budget, passes, precision, monkeypatch):
    """What they add up to. At 5 tokens the first has two passes, so the second repeats the shortest row, for 0."""
    case = named("sft_loss", "ragged_with_fully_masked_row")
    rows, seen = demonstrations(case["inputs"], (1, 1, 4, 1)), Seen(monkeypatch)
    model, loss = policy(slots_of(case["inputs"]), precision.dtype), 0.0
    with golden_networks():
        for rank in range(2):
            stage = sft_stage(model, rows, budget, Ranks(rank, 2, 1, None))
            loss += stage.train_step(range(len(rows)), 0)["loss"]
    assert seen.rows == passes
    close(precision, loss, case["outputs"]["token_mean"], "loss")
    check_gradient(model, case["outputs"], precision)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@golden_cases("pairwise_ranking_batch")
def test_golden_ranking_loss(case, reduction, cpu_class):
    with golden_networks():
        check_ranking_loss(case, reduction)
