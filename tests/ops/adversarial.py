"""For every op with a CPU kernel a call that is right, and what can be wrong about each of its arguments.

`broken` makes one argument hostile: another dtype, device, shape or layout, bytes that are too few, offsets and tokens
that point anywhere, numbers that are none. An op may refuse the call or return, but touches no memory besides its own
(the checked build looks on) and leaves the next right call as it was.
"""

import importlib
import random
from collections.abc import Callable
from typing import Any

import torch
from test_attention_decode import batch, paged

import engine.ops
from engine.kernels import _backend
from engine.kernels.linear import pack_weight, packed_data
from engine.kernels.linear_logprob_loss import BLOCK, STRIDE

Arguments = list[Any]
N, H, V = 5, 12, 37
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
INTEGERS = (-(2**63), -(2**31) - 1, -2, -1, 0, 1, 2, 7, 2**31 - 1, 2**31, 2**62, 2**63 - 1)
NUMBERS = (0.0, -1.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def cu() -> torch.Tensor:
    return torch.tensor([0, 2, 2, N], dtype=torch.int32)


def attention_inputs() -> Arguments:
    return [randn(N, 4, 8), randn(N, 2, 8), randn(N, 2, 8)]


def prefix() -> torch.Tensor:
    return torch.tensor([0, 1, 0], dtype=torch.int32)


def attention_backward() -> Arguments:
    out, lse = torch.ops.engine.attention(*(inputs := attention_inputs()), cu(), prefix())
    return [randn(N, 4, 8), *inputs, out, lse, cu(), prefix()]


def head() -> Arguments:
    weight = pack_weight(randn(V, H), torch.bfloat16)
    return [randn(N, H), weight.dense, packed_data(weight)]


def head_backward() -> Arguments:
    hidden, dense, data = head()
    targets, bias = torch.randint(0, V, (N,)), randn(V)
    _, entropy, row_max, log_sum = torch.ops.engine.linear_logprob(hidden, dense, data, targets, 0.7, bias, None)
    wanted = [True, True, True]
    return [randn(N), randn(N), hidden, dense, data, targets, 0.7, bias, row_max, log_sum, entropy, *wanted]


def kept(rows: int) -> torch.Tensor:
    return randn(-(-V // BLOCK) * rows * STRIDE)


def kept_head() -> Arguments:
    """Logits are kept of products without tiles."""
    weight = pack_weight(randn(V, H), F32 if engine.ops.cpu_class() == "amx" else BF16)
    targets = torch.randint(0, V, (N,))
    return [randn(N, H), weight.dense, packed_data(weight), targets, 0.7, randn(V), kept(N)]


def kept_backward() -> Arguments:
    *given, logits = kept_head()
    results = torch.ops.engine.linear_logprob_kept(*given, logits)
    gradients = [randn(N, H), randn(V, H), randn(V), True]
    return [randn(N), randn(N), *given, *results[2:], results[1], logits, *gradients]


def packed() -> Arguments:
    weight = pack_weight(randn(V, H), torch.bfloat16)
    return [randn(V, H), weight.dense, packed_data(weight)]


def moved(*shape: int) -> Arguments:
    return [randn(*shape), randn(*shape), randn(*shape), torch.rand(*shape)]


HYPERPARAMETERS = [0.01, 0.9, 0.95, 1e-8]  # lr, betas, eps
CORRECTIONS = [0.1, 0.3, 1.0, None, 0.9]  # of the betas, scale, clip, decay of the average


def adamw_steps() -> Arguments:
    small, (master, dense, data) = moved(7), packed()
    columns = [list(column) for column in zip(small, [master, *moved(V, H)[1:]], strict=True)]
    beside = [[randn(7), dense], [None, data], [randn(7), randn(V, H)]]
    return [*columns, *beside, *HYPERPARAMETERS, [0.0, 0.1], *CORRECTIONS]


def decoding() -> Arguments:
    q, k, v = batch([3, 17, 64], (4, 2), 8, torch.float32)
    return [q, *paged(k, v), torch.tensor([3, 17, 64], dtype=torch.int32)]


def ranks() -> torch.Tensor:
    return torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])


def of_rows(count: int, *others: Any) -> Callable[[], Arguments]:
    return lambda: [*(randn(N) for _ in range(count)), *others]


F32, BF16 = torch.float32, torch.bfloat16
CALLS: dict[str, Callable[[], Arguments]] = {
    "attention": lambda: [*attention_inputs(), cu(), prefix()],
    "attention_backward": attention_backward,
    "attention_decode": decoding,
    "gae": lambda: [randn(N), randn(N), cu(), randn(3), 0.99, 0.95],
    "gae_backward": lambda: [randn(N), randn(N), cu(), 0.99, 0.95],
    "kl_reward": lambda: [randn(N), randn(N), randn(3), cu(), 0.02, 0, True],
    "kl_reward_backward": lambda: [*(randn(N) for _ in range(4)), cu(), 0.02, 2, False],
    "kl_reward_gae": lambda: [randn(N), randn(N), randn(3), randn(N), cu(), randn(3), 0.02, 0.99, 0.95, 1],
    "pack_weight": lambda: [randn(V, H)],
    "refresh_weight": packed,
    "linear": lambda: [*head(), randn(V), None, F32],
    "linear_backward": lambda: [randn(N, V), randn(N, H), head()[1], True, True, True],
    "linear_logprob": lambda: [*head(), torch.randint(0, V, (N,)), 0.7, randn(V), None],
    "linear_logprob_backward": head_backward,
    "linear_logprob_kept": kept_head,
    "linear_logprob_kept_backward": kept_backward,
    "linear_sample": lambda: [*head(), torch.rand(N).double(), 0.7, randn(V)],
    "ppo_policy_loss": of_rows(3, 0.2, 5.0, 20.0),
    "ppo_value_loss": of_rows(3, 0.2, 5.0),
    "ranking_loss": lambda: [randn(N), ranks(), cu(), 0, None],
    "whiten": of_rows(1, True),
    "whiten_backward": of_rows(2, True),
    "adamw_steps": adamw_steps,
    "square_sums": of_rows(1),
    "ordered_sum": lambda: [randn(N).double()],
    "gelu": lambda: [randn(N, H), True],
    "gelu_backward": lambda: [randn(N, H), randn(N, H), False],
    "swiglu": lambda: [randn(N, H), randn(N, H)],
    "swiglu_backward": lambda: [randn(N, H), randn(N, H), randn(N, H)],
    "rmsnorm": lambda: [randn(N, H), randn(H), 1e-5, BF16],
    "rmsnorm_backward": lambda: [randn(N, H), randn(N, H), randn(H), randn(N)],
    "layernorm": lambda: [randn(N, H), randn(H), randn(H), 1e-5, BF16],
    "layernorm_backward": lambda: [randn(N, H), randn(N, H), randn(H), randn(N), randn(N)],
    "rope": lambda: [randn(N, 4, 8), torch.tensor([0, 3, 1, 9, 2]), randn(10, 6), False],
}


for module in engine.ops.op_modules():
    importlib.import_module(f"engine.kernels.{module}")  # defines its ops


def every_op() -> list[str]:
    """Each schema of engine.kernels for which C++ has a kernel."""
    assert _backend.extension() is not None
    return sorted(op for op in _backend.REGISTRY if _backend.has_cpu_kernel(op))


def hostile_values(x: torch.Tensor, r: random.Random) -> torch.Tensor:
    """Offsets, tokens, pages or numbers that point anywhere; what a dtype does not hold wraps around or is infinite."""
    y, values = x.clone(), NUMBERS if x.dtype.is_floating_point else INTEGERS
    for _ in range(r.randint(1, max(1, x.numel()))):
        if x.numel():
            y.view(-1)[r.randrange(x.numel())] = torch.tensor(r.choice(values)).to(x.dtype)
    return y


def another_size(x: torch.Tensor, r: random.Random) -> torch.Tensor:
    """One dimension shorter, longer, empty or much longer; new elements are 1, within most ranges."""
    if not x.dim():
        return x.new_ones(3)
    d = r.randrange(x.dim())
    sizes = list(x.shape)
    sizes[d] = r.choice([0, 1, sizes[d] - 1, sizes[d] + 1, 2 * sizes[d], 1000])
    y = x.new_ones([max(0, size) for size in sizes])
    common = tuple(slice(0, min(a, b)) for a, b in zip(x.shape, y.shape, strict=True))
    y[common] = x[common]
    return y


def another_layout(x: torch.Tensor, r: random.Random) -> torch.Tensor:
    """The same elements further apart, backwards, or one element again and again."""
    kinds: list[Callable[[], torch.Tensor]] = [
        lambda: torch.stack([x, x], -1)[..., 0],
        lambda: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
        lambda: x[:1].expand(x.shape) if x.dim() and x.shape[0] else x,
        lambda: x[..., None],
        lambda: x[None],
        lambda: x.reshape(-1),
        lambda: x.reshape(-1)[0] if x.numel() else x,
    ]
    return r.choice(kinds)()


def broken_tensor(x: torch.Tensor, r: random.Random) -> torch.Tensor:
    kind = r.randrange(6)
    if kind == 0:
        return x.to(r.choice(DTYPES))
    if kind == 1:
        return x.to("meta")
    if kind == 2:
        return another_size(x, r)
    if kind == 3:
        return another_layout(x, r)
    return hostile_values(x, r)


def broken(value: Any, r: random.Random) -> Any:
    """`value` as somebody might give it who means harm, or has made a mistake."""
    if isinstance(value, list):
        if r.random() < 0.3:
            return value[:-1] if r.random() < 0.5 else value + value[-1:]
        at = r.randrange(len(value))
        return [broken(x, r) if i == at else x for i, x in enumerate(value)]
    if isinstance(value, torch.Tensor):
        return broken_tensor(value, r)
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return r.choice(NUMBERS)
    if isinstance(value, int):
        return r.choice(INTEGERS)
    return r.choice(DTYPES) if isinstance(value, torch.dtype) else randn(3)


def copied(value: Any) -> Any:
    if isinstance(value, list):
        return [copied(x) for x in value]
    return value.clone() if isinstance(value, torch.Tensor) else value
