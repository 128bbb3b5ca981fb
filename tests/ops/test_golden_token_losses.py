"""Golden losses over tokens, SFT's and its micro-batches' through linear_logprob, and tokens of PPO's clip alone.

A row of logits is the column of a weight that the hidden state of its token, a unit vector, picks.
"""

import torch
from golden_cases import GROUPS, golden_cases, ragged
from torch import Tensor

from engine.kernels.linear_logprob import linear_logprob
from engine.kernels.ppo_policy_loss import ppo_policy_loss


class TokenLosses:
    """The rows of a case: -log p of every token under the mask, and the gradient of the logits."""

    def __init__(self, given, dtype):
        self.logits = torch.tensor(given["logits"], dtype=dtype)  # (B, T, V)
        self.weight = self.logits.flatten(0, 1).T.contiguous().requires_grad_()
        self.labels = torch.tensor(given["labels"])
        self.mask = torch.tensor(given["mask"]).bool()

    def of(self, rows: list[int]) -> Tensor:  # (tokens of the rows,)
        chosen = torch.zeros_like(self.mask)
        chosen[rows] = self.mask[rows]
        slots = chosen.flatten().nonzero().squeeze(1)
        hidden = torch.eye(chosen.numel(), dtype=self.weight.dtype)[slots]
        return -linear_logprob(hidden, self.weight, self.labels.flatten()[slots])[0]

    @property
    def gradient(self) -> Tensor:  # (B, T, V)
        return self.weight.grad.T.reshape(self.logits.shape)


@golden_cases("sft_loss")
def test_golden_sft_loss(case, precision):
    """The mean over all answer tokens; of none it is 0, and its gradient zeros."""
    given, want, dtype = case["inputs"], case["outputs"], precision.dtype
    losses = TokenLosses(given, dtype)
    rows = [losses.of([b]) for b in range(len(given["labels"]))]
    whole = losses.of(list(range(len(rows))))
    loss = whole.sum() / max(whole.numel(), 1)
    loss.backward()
    assert whole.numel() == want["n_tokens"]
    precision.assert_close(loss, torch.tensor(want["token_mean"], dtype=dtype), case["name"])
    gradient = torch.tensor(want["grad_token_mean_wrt_logits"], dtype=dtype)
    precision.assert_close(losses.gradient, gradient, case["name"])
    means = [row.mean() for row in rows if row.numel()]
    mean = torch.stack(means).mean() if means else loss
    precision.assert_close(mean, torch.tensor(want["seq_mean"], dtype=dtype), "mean of the rows")


@golden_cases("grad_accumulation")
def test_golden_accumulation(case, precision):
    """Each micro-batch weighs as many tokens as it has: loss and gradient are the whole batch's."""
    given, want, dtype = case["inputs"], case["outputs"], precision.dtype
    losses = TokenLosses(given, dtype)
    total, loss, means = int(losses.mask.sum()), torch.zeros((), dtype=dtype), []
    for rows, count in zip(given["micro_batches"], want["micro_tokens"], strict=True):
        part = losses.of(rows)
        assert part.numel() == count
        (part.sum() / total).backward()
        loss += part.detach().sum() / total
        means.append(part.detach().mean())

    def close(ours, name):
        precision.assert_close(ours, torch.tensor(want[name], dtype=dtype), name)

    close(loss, "correct_global_token_mean")
    close(torch.stack(means), "micro_means")
    close(torch.stack(means).mean(), "wrong_mean_of_micro_means")
    assert abs(want["wrong_mean_of_micro_means"] - float(loss)) > 1e-2
    whole = GROUPS["sft_loss"][0]
    assert all(whole["inputs"][name] == given[name] for name in ("logits", "labels", "mask"))
    gradient = torch.tensor(whole["outputs"]["grad_token_mean_wrt_logits"], dtype=dtype)
    precision.assert_close(losses.gradient, gradient, "gradient")


def test_golden_logits_of_the_estimators(precision):
    """Log-probs of every token of two laws, and the KL between them."""
    (case,) = [case for case in GROUPS["kl_estimators"] if "policy_logits" in case["inputs"]]
    given, want, dtype = case["inputs"], case["outputs"], precision.dtype
    laws = []
    for name in ("policy", "ref"):
        logits = torch.tensor(given[f"{name}_logits"], dtype=dtype)
        one = torch.ones(len(logits), 1, dtype=dtype)
        logprob, _ = linear_logprob(one, logits[:, None], torch.arange(len(logits)))
        precision.assert_close(logprob, torch.tensor(want[f"logp_{name}"], dtype=dtype), name)
        laws.append(logprob)
    kl = (laws[0].exp() * (laws[0] - laws[1])).sum()
    precision.assert_close(kl, torch.tensor(want["exact_kl"], dtype=dtype), "KL")


def test_golden_tokens_of_the_clip(precision):
    """Each token of the clip's table as a batch of its own."""
    (case,) = [case for case in GROUPS["ppo_policy_loss"] if "per_token" in case["outputs"]]
    names = ("logprob_new", "logprob_old", "advantages")
    inputs = [ragged(case["inputs"][name], precision.dtype) for name in names]
    tokens = zip(*(x.split(1) for x in inputs), strict=True)
    losses = [ppo_policy_loss(*token, case["inputs"]["eps"])[0] for token in tokens]
    want = ragged(case["outputs"]["per_token"], precision.dtype)
    precision.assert_close(torch.stack(losses), want, case["name"])
