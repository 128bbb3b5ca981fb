"""attention: S sequences of T tokens, or G prompts of T tokens with A answers of L tokens each.

Compulsory: q, k, v read and the result and its log-sum-exp written, once each; the backward reads those and the
gradient, and writes three. Products: 4 D a query head and a pair of tokens that see each other, 2.5 times that in the
backward (which makes the scores again); exponentials: one a pair, in the backward one in each of its two kernels.
"""

import torch
from torch import Tensor

from bench.gpu import Case, Variation


def qkv(device: str, dtype: torch.dtype, N: int, HQ: int, HK: int, D: int) -> list[Tensor]:  # noqa: N803
    return [torch.randn(N, heads, D, device=device).to(dtype) for heads in (HQ, HK, HK)]


def make(device: str, dtype: torch.dtype, S: int, T: int, HQ: int, HK: int, D: int) -> tuple:  # noqa: N803
    cu = torch.arange(S + 1, dtype=torch.int32, device=device) * T
    return *qkv(device, dtype, S * T, HQ, HK, D), cu, None


def make_shared(
    device: str,
    dtype: torch.dtype,
    G: int,
    T: int,
    A: int,
    L: int,
    HQ: int,
    HK: int,
    D: int,  # noqa: N803
) -> tuple:
    segment = torch.arange(G * (1 + A), dtype=torch.int32, device=device)
    group, of_group = segment // (1 + A), segment % (1 + A)
    begin = group * (T + A * L) + (of_group > 0) * (T + (of_group - 1) * L)
    end = torch.full((1,), G * (T + A * L), dtype=torch.int32, device=device)
    cu = torch.cat([begin.int(), end])
    return *qkv(device, dtype, G * (T + A * L), HQ, HK, D), cu, group * (1 + A)


def backward_of(arguments: tuple) -> tuple:
    """The result and its log-sum-exp stand for themselves: the time does not depend on their values."""
    q, k, v, cu, prefix = arguments
    lse = torch.full(q.shape[:2], 9.0, dtype=torch.float32, device=q.device)
    return torch.randn_like(q), q, k, v, torch.randn_like(q), lse, cu, prefix


def make_backward(device: str, dtype: torch.dtype, **shape: int) -> tuple:
    return backward_of(make(device, dtype, **shape))


def make_shared_backward(device: str, dtype: torch.dtype, **shape: int) -> tuple:
    return backward_of(make_shared(device, dtype, **shape))


def forward(*arguments: Tensor) -> object:
    from engine.kernels.triton.attention import attention

    return attention(*arguments)


def backward(*arguments: Tensor) -> object:
    from engine.kernels.triton.attention import attention_backward

    return attention_backward(*arguments)


def tokens(S: int = 0, T: int = 0, G: int = 0, A: int = 0, L: int = 0, **_: int) -> int:  # noqa: N803
    return S * T + G * (T + A * L)


def pairs(S: int = 0, T: int = 0, G: int = 0, A: int = 0, L: int = 0, **_: int) -> int:  # noqa: N803
    """(row, key) that see each other."""
    own = T * (T + 1) // 2
    return S * own + G * (own + A * (L * T + L * (L + 1) // 2))


def forward_bytes(size: int, HQ: int, HK: int, D: int, **shape: int) -> float:  # noqa: N803
    return tokens(**shape) * (size * D * 2 * (HQ + HK) + 4 * HQ)


def backward_bytes(size: int, HQ: int, HK: int, D: int, **shape: int) -> float:  # noqa: N803
    return tokens(**shape) * (size * D * 4 * (HQ + HK) + 4 * HQ)


SMOLLM2, LLAMA = {"HQ": 9, "HK": 3, "D": 64}, {"HQ": 32, "HK": 8, "D": 128}
GEMMA = {"HQ": 16, "HK": 8, "D": 256}  # Gemma 2 9B: the tables' row for more than 128 channels
FEW, WIDE = {"HQ": 3, "HK": 1, "D": 64}, {"HQ": 2, "HK": 1, "D": 256}
WHY = "each query head and block of rows reads its keys again (from the L2 cache)"
WHY_BACKWARD = f"two kernels read all inputs, and {WHY}, as each block of keys its rows"


def case(name: str, size: str, full: dict[str, int], small: dict[str, int], most: float) -> Case:
    shared, back = "shared" in name, "backward" in name
    makes = {(False, False): make, (True, False): make_shared}
    makes |= {(False, True): make_backward, (True, True): make_shared_backward}
    return Case(
        "attention",
        f"{name}, {size}",
        makes[shared, back],
        backward if back else forward,
        full,
        small,
        bytes=backward_bytes if back else forward_bytes,
        flops=lambda size, HQ, HK, D, **of: (10 if back else 4) * HQ * D * pairs(**of),
        exponentials=lambda size, HQ, HK, D, **of: (2 if back else 1) * HQ * pairs(**of),
        most_traffic=most,
        why=WHY_BACKWARD if back else WHY,
    )


SHORT = {"S": 2, "T": 150}
GROUP = {"G": 1, "T": 60, "A": 2, "L": 40}
CASES = [
    case("forward", "135M", {"S": 16, "T": 512, **SMOLLM2}, {**SHORT, **FEW}, 2.2),
    case("forward", "8B", {"S": 8, "T": 2048, **LLAMA}, {**SHORT, **FEW}, 2.2),
    case(
        "forward, shared prefix",
        "135M",
        {"G": 8, "T": 512, "A": 8, "L": 64, **SMOLLM2},
        {**GROUP, **FEW},
        2.2,
    ),
    case("backward", "135M", {"S": 16, "T": 512, **SMOLLM2}, {**SHORT, **FEW}, 2.8),
    case("backward", "8B", {"S": 8, "T": 2048, **LLAMA}, {**SHORT, **FEW}, 2.8),
    case(
        "backward, shared prefix",
        "135M",
        {"G": 8, "T": 512, "A": 8, "L": 64, **SMOLLM2},
        {**GROUP, **FEW},
        2.8,
    ),
    case("forward", "9B, 256 channels", {"S": 4, "T": 2048, **GEMMA}, {"S": 2, "T": 60, **WIDE}, 2.2),
    case("backward", "9B, 256 channels", {"S": 4, "T": 2048, **GEMMA}, {"S": 2, "T": 60, **WIDE}, 2.8),
]
PHI = {"HQ": 32, "HK": 32, "D": 80}  # Phi-2 and Pythia-2.8B: no power of two
PREFIXED = {"G": 2, "T": 512, "A": 8, "L": 64}
VARIATIONS = [
    *(
        Variation("attention", f"{name}, 80 channels", build, run, {"S": 8, "T": 2048, **PHI})
        for name, build, run in (("forward", make, forward), ("backward", make_backward, backward))
    ),
    # keys of a prefix that no query of its own sees take more registers: PPO of an 8B, and in float32
    Variation(
        "attention", "backward, shared prefix, 8B", make_shared_backward, backward, {**PREFIXED, **LLAMA}
    ),
    *(
        Variation("attention", f"{name}, shared prefix, float32", build, run, {**PREFIXED, **PHI}, "float32")
        for name, build, run in (
            ("forward", make_shared, forward),
            ("backward", make_shared_backward, backward),
        )
    ),
]
