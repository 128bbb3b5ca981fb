"""The work of bench/gpu's cases as plain torch, the way trainers write it; run on the device "meta", so only counted.

Each function gives (tensors, forward): `forward(*tensors)` is the work, and its backward is autograd's. What a trainer
would have padded is padded: T is the longest of S answers, and here all are as long.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "meta"
Eager = tuple[tuple[Tensor, ...], Callable[..., Any]]


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE, requires_grad=True)


def _fixed(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def linear_logprob(name: str, dtype: torch.dtype, N: int, V: int, H: int) -> Eager:
    """Logits in the storage dtype, then in float32: log-probs of the targets, and the entropy, as TRL has them."""

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = (hidden @ weight.T).float() / 0.7
        logprobs = torch.log_softmax(logits, -1)
        entropy = torch.logsumexp(logits, -1) - (torch.softmax(logits, -1) * logits).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    hidden, weight = _leaf(N, H, dtype=dtype), _leaf(V, H, dtype=dtype)
    return (hidden, weight, _fixed(N, dtype=torch.int64)), forward


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def ppo_policy_loss(name: str, dtype: torch.dtype, S: int, T: int) -> Eager:
    """TRL's: both losses, their maximum, masked means; clip fraction, approximate KL and the ratio's moments."""

    def forward(new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        difference = new - old
        ratio = torch.exp(difference)
        losses = -advantage * ratio
        clipped = -advantage * torch.clamp(ratio, 0.8, 1.2)
        loss = _masked_mean(torch.max(losses, clipped), mask)
        with torch.no_grad():
            _masked_mean((clipped > losses).float(), mask)
            _masked_mean(0.5 * difference.square(), mask)
            ratio.mean(), ratio.var()
        return loss

    return (_leaf(S, T, dtype=dtype), *(_fixed(S, T, dtype=dtype) for _ in range(3))), forward


def ppo_value_loss(name: str, dtype: torch.dtype, S: int, T: int) -> Eager:
    def forward(value: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        clipped = torch.clamp(value, old - 0.2, old + 0.2)
        first, second = (value - returns).square(), (clipped - returns).square()
        loss = 0.5 * _masked_mean(torch.max(first, second), mask)
        with torch.no_grad():
            _masked_mean((second > first).float(), mask)
        return loss

    return (_leaf(S, T, dtype=dtype), *(_fixed(S, T, dtype=dtype) for _ in range(3))), forward


def _advantages(reward: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over time from the end, as in TRL, OpenRLHF and verl."""
    last, found = torch.zeros_like(reward[:, 0]), []
    for t in reversed(range(reward.shape[1])):
        following = value[:, t + 1] if t + 1 < reward.shape[1] else torch.zeros_like(last)
        delta = reward[:, t] + following - value[:, t]
        last = delta + 0.95 * last
        found.append(last)
    advantage = torch.stack(found[::-1], 1)
    return advantage, advantage + value


def gae(name: str, dtype: torch.dtype, S: int, T: int) -> Eager:
    return (_leaf(S, T, dtype=dtype), _leaf(S, T, dtype=dtype)), _advantages


def _rewards(logprob: Tensor, reference: Tensor, score: Tensor, k3: bool) -> tuple[Tensor, Tensor]:
    difference = reference - logprob
    kl = torch.exp(difference) - 1 - difference if k3 else -difference
    reward = -0.02 * kl
    reward[torch.arange(len(score), device=score.device), -1] += score
    return reward, kl


def kl_reward(name: str, dtype: torch.dtype, S: int, T: int) -> Eager:
    given = (_leaf(S, T, dtype=dtype), _leaf(S, T, dtype=dtype), _leaf(S, dtype=dtype))
    return given, lambda *x: _rewards(*x, k3="k3" in name)


def kl_reward_gae(name: str, dtype: torch.dtype, S: int, T: int) -> Eager:
    def forward(
        logprob: Tensor, reference: Tensor, score: Tensor, value: Tensor
    ) -> tuple[Any, ...]:
        reward, kl = _rewards(logprob, reference, score, "k3" in name)
        return (*_advantages(reward, value), reward, kl)

    given = (*(_fixed(S, T, dtype=dtype) for _ in range(2)), _fixed(S, dtype=dtype))
    return (*given, _fixed(S, T, dtype=dtype)), forward


def whiten(name: str, dtype: torch.dtype, S: int, T: int) -> Eager:
    """TRL's masked_whiten."""

    def forward(x: Tensor, mask: Tensor) -> Tensor:
        mean = _masked_mean(x, mask)
        variance = _masked_mean((x - mean).square(), mask)
        return (x - mean) * torch.rsqrt(variance + 1e-8)

    return (_leaf(S, T, dtype=dtype), _fixed(S, T, dtype=dtype)), forward


def ranking_loss(name: str, dtype: torch.dtype, S: int, K: int) -> Eager:
    """All differences of a prompt's scores at once."""

    def forward(score: Tensor, rank: Tensor) -> Tensor:
        better = rank[:, :, None] < rank[:, None, :]
        losses = -F.logsigmoid(score[:, :, None] - score[:, None, :])
        pairs = better.sum((1, 2)).clamp(min=1)
        return ((losses * better).sum((1, 2)) / pairs).mean()

    return (_leaf(S, K, dtype=dtype), _fixed(S, K, dtype=torch.float64)), forward


def swiglu(name: str, dtype: torch.dtype, N: int, F: int) -> Eager:
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate) * up

    return (_leaf(N, F, dtype=dtype), _leaf(N, F, dtype=dtype)), forward


def gelu(name: str, dtype: torch.dtype, N: int, C: int) -> Eager:
    def forward(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh" if "tanh" in name else "none")

    return (_leaf(N, C, dtype=dtype),), forward


def rmsnorm(name: str, dtype: torch.dtype, N: int, H: int) -> Eager:
    """As in Hugging Face's Llama, of a float32 stream like the engine's."""

    def forward(x: Tensor, weight: Tensor, *residual: Tensor) -> Any:
        total = residual[0] + x if residual else x
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
        out = (weight * normed).to(dtype)
        return (out, total) if residual else out

    more = (_leaf(N, H),) if "residual" in name else ()
    return (_leaf(N, H, dtype=dtype if more else torch.float32), _leaf(H), *more), forward


def layernorm(name: str, dtype: torch.dtype, N: int, H: int) -> Eager:
    def forward(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Any:
        total = residual[0] + x if residual else x
        out = F.layer_norm(total, (H,), weight, bias, 1e-5).to(dtype)
        return (out, total) if residual else out

    more = (_leaf(N, H),) if "residual" in name else ()
    return (_leaf(N, H, dtype=dtype if more else torch.float32), _leaf(H), _leaf(H), *more), forward


def rope(name: str, dtype: torch.dtype, N: int, heads: int, key_heads: int, D: int) -> Eager:
    """Hugging Face's rotate_half; with keys and values written to their places where the case writes."""

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
        return x * cos + half * sin

    def forward(q: Tensor, cos: Tensor, sin: Tensor, *written: Tensor) -> Any:
        out = turned(q, cos, sin)
        if written:
            k, v, keys, values, places = written
            keys.index_put_((places,), turned(k, cos, sin))
            values.index_put_((places,), v)
        return out

    tables = (_fixed(N, 1, D, dtype=dtype), _fixed(N, 1, D, dtype=dtype))
    given = (_fixed(N, heads, D, dtype=dtype), *tables)
    if "write" in name:
        given += tuple(_fixed(N, key_heads, D, dtype=dtype) for _ in range(4))
        given += (_fixed(N, dtype=torch.int64),)
    return given, forward


def adamw(name: str, dtype: torch.dtype, n: int, ema: int = 0) -> Eager:
    """torch's operations of an AdamW step, then the copy in the storage dtype, then the average; or the norm alone."""

    def step(
        master: Tensor, grad: Tensor, first: Tensor, second: Tensor, copy: Tensor, average: Tensor
    ) -> None:
        master.addcdiv_(
            first.lerp_(grad, 0.1), second.mul_(0.95).addcmul_(grad, grad).sqrt().add_(1e-5)
        )
        copy.copy_(master)
        if ema:
            average.lerp_(master, 0.008)

    if "norm" in name:
        return (_fixed(n, dtype=dtype),), lambda grad: torch.linalg.vector_norm(
            grad, dtype=torch.float32
        )
    given = tuple(_fixed(n) for _ in range(4))
    return (*given, _fixed(n, dtype=dtype), _fixed(n)), step


def linear(name: str, dtype: torch.dtype, M: int, N: int, K: int) -> Eager:
    return (_fixed(M, K, dtype=dtype), _fixed(N, K, dtype=dtype)), F.linear


def linear_sample(name: str, dtype: torch.dtype, N: int, V: int, H: int) -> Eager:
    def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = (hidden @ weight.T).float() / 0.7
        token = torch.multinomial(torch.softmax(logits, -1), 1)
        return token, torch.log_softmax(logits, -1).gather(-1, token)

    return (_fixed(N, H, dtype=dtype), _fixed(V, H, dtype=dtype)), forward


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, heads, rows, D) of (B, heads, rows, D) and keys and values of (B, key heads, keys, D)."""
    group, size = q.shape[1] // k.shape[1], q.shape[3]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * size**-0.5
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def attention(
    name: str,
    dtype: torch.dtype,
    HQ: int,
    HK: int,
    D: int,
    S: int = 0,
    T: int = 0,
    G: int = 0,
    A: int = 0,
    L: int = 0,
) -> Eager:
    """Hugging Face's "eager": heads of keys repeated, all scores in memory, softmax in float32. A prompt that
    answers share is repeated before each."""
    rows, length = (G * A, T + L) if G else (S, T)
    given = tuple(_leaf(rows, heads, length, D, dtype=dtype) for heads in (HQ, HK, HK))
    return (*given, _fixed(1, 1, length, length, dtype=dtype)), _attended


def attention_decode(
    name: str, dtype: torch.dtype, R: int, T: int, HQ: int, HK: int, D: int
) -> Eager:
    """The same for one row a sequence, over a cache in one piece."""
    given = tuple(_fixed(R, heads, n, D, dtype=dtype) for heads, n in ((HQ, 1), (HK, T), (HK, T)))
    return given, lambda q, k, v: _attended(q, k, v, None)


WORK: dict[str, Callable[..., Eager]] = {
    work.__name__: work
    for work in (
        linear_logprob, ppo_policy_loss, ppo_value_loss, gae, kl_reward, kl_reward_gae, whiten, ranking_loss, swiglu,
        gelu, rmsnorm, layernorm, rope, adamw, linear, linear_sample, attention,
        attention_decode,
    )
}  # fmt: skip


def phases(name: str) -> tuple[bool, bool]:
    """(is the forward counted, is the backward counted) in a case of this name."""
    if "gradient" in name:
        return True, True
    return ("backward" not in name), "backward" in name


LONGEST = 512  # steps of a loop over time that are run; longer ones are scaled


def run(
    op: str, name: str, dtype: torch.dtype, shape: dict[str, int], counting: Callable[[], Any]
) -> Any:
    """Counts the phases of a case inside `counting()`, whose result is given back."""
    times = shape["T"] / LONGEST if "gae" in op else 1
    if times > 1:
        work = _run(op, name, dtype, {**shape, "T": LONGEST}, counting)
        work.memory, work.requested = work.memory * times, work.requested * times
        work.launches = round(work.launches * times)
        return work
    return _run(op, name, dtype, shape, counting)


def _run(
    op: str, name: str, dtype: torch.dtype, shape: dict[str, int], counting: Callable[[], Any]
) -> Any:
    given, forward = WORK[op](name, dtype, **shape)
    ahead, back = phases(name)
    if not back:
        with torch.no_grad(), counting() as work:
            forward(*given)
        return work
    if ahead:
        with counting() as work:
            _backward(forward(*given))
        return work
    out = forward(*given)
    with counting() as work:
        _backward(out)
    return work


def _backward(out: Any) -> None:
    results = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if x.requires_grad]
    torch.autograd.backward(results, [torch.empty_like(x) for x in results])
