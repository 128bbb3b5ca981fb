"""linear_sample's Triton kernels: the inverse of the distribution function, and the bits of linear_logprob."""

import pytest
import torch
from guards import guarded
from head_cases import blocks, exact, head
from launching import DEVICE, DTYPES, on_triton
from mutations import mutations
from torch import Tensor

from engine.kernels._backend import backend, kernel
from engine.kernels.linear import PackedWeight
from engine.kernels.linear_logprob import linear_logits, linear_logprob
from engine.kernels.linear_sample import linear_sample, linear_sample_reference
from engine.kernels.triton import _launch
from engine.kernels.triton import linear_sample as kernels

LARGEST = 1 - 2.0**-53  # the largest float64 below 1
sample, score = on_triton(linear_sample), on_triton(linear_logprob)


def uniform(rows: int) -> Tensor:
    return torch.rand(rows, dtype=torch.float64, device=DEVICE)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def distribution(logits: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The same logits (V,) in every row."""
    return torch.ones(rows, 1, device=DEVICE), logits[:, None].to(DEVICE)


def assert_inverts(token: Tensor, u: Tensor, p: Tensor) -> None:
    """sum_{j < token} p_j <= u < sum_{j <= token} p_j, up to the rounding of float32 logits."""
    cumulated = torch.nn.functional.pad(p.cumsum(-1), (1, 0))
    low = cumulated.gather(-1, token[:, None]).squeeze(-1)
    high = cumulated.gather(-1, token[:, None] + 1).squeeze(-1)
    assert (low <= u + 1e-5).all() and (u < high + 1e-5).all()


def check(n, v, h, dtype=torch.float32, temperature=1.0, with_bias=True):
    hidden, weight, bias = head(n, v, h, dtype)
    u, bias = uniform(n), bias if with_bias else None
    token, logprob, entropy = sample(hidden, weight, u, temperature, bias)
    assert token.dtype == torch.int64 and token.shape == logprob.shape == entropy.shape == (n,)
    exactly = linear_logits(hidden.double(), weight.double(), temperature, bias)
    assert_inverts(token, u, exactly.softmax(-1))
    scored = score(hidden, weight, token, temperature, bias)
    assert torch.equal(logprob, scored[0]) and torch.equal(entropy, scored[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 9, 5), (1, 1, 1), (7, 150, 21)])
def test_inverts_the_distribution_function(dtype, shape):
    with blocks(n=32):
        check(*shape, dtype, 0.7)


def test_own_blocks():
    check(3, 321, 576, torch.bfloat16, 1.6, with_bias=False)


def test_a_whole_vocabulary():
    with blocks(n=8192, k=32):
        check(2, 49157, 24, torch.bfloat16)


def test_the_definition_and_the_kernel_draw_the_same():
    """The same token from u at the middle of its share, and all over [0, 1) but for the boundaries' rounding."""
    logits = torch.randn(40)
    p = logits.double().softmax(-1)
    middles = (p.cumsum(-1) - p / 2).to(DEVICE)
    with blocks():
        token, *_ = sample(*distribution(logits, 40), middles)
        assert torch.equal(token.cpu(), torch.arange(40))
        hidden, weight, bias = head(20, 75, 6)
        u = uniform(20)
        token, logprob, entropy = sample(hidden, weight, u, 0.8, bias)
    truth = linear_sample_reference(hidden.double(), weight.double(), u, 0.8, bias.double())
    same = token == truth[0]
    assert same.float().mean() >= 0.95
    torch.testing.assert_close(logprob[same].double(), truth[1][same], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), truth[2], rtol=1e-5, atol=1e-5)


def test_a_boundary_belongs_to_the_next_token():
    """Sums that have no rounding: four tokens of one logit have a quarter each, across tiles too."""
    logits = torch.full((64,), -torch.inf)
    logits[[3, 20, 21, 60]] = 2.0
    u = numbers(0.0, 0.25, 0.5, 0.75, 0.25 - 2.0**-54, 0.75 - 2.0**-53, 5e-324, LARGEST)
    with blocks():
        token, logprob, entropy = sample(*distribution(logits, len(u)), u)
    assert token.tolist() == [3, 20, 21, 60, 3, 21, 3, 60]
    torch.testing.assert_close(logprob, -torch.full_like(logprob, 4.0).log())
    torch.testing.assert_close(entropy, torch.full_like(logprob, 4.0).log())


@pytest.mark.parametrize("v", [1, 5, 100])
def test_tokens_without_probability_are_never_drawn(v):
    logits, dead = torch.randn(v), torch.rand(v) < 0.7
    dead[v // 2] = False
    dead[:1], dead[-1:] = v > 1, v > 1
    if v == 100:
        dead[16:32] = dead[90:] = True  # a tile, and the last one
    logits[dead] = -torch.inf
    u = torch.cat([uniform(9), numbers(0.0, LARGEST, 5e-324)])
    with blocks():
        token, logprob, _ = sample(*distribution(logits, len(u)), u)
    alive = (~dead).nonzero().squeeze(-1)
    assert not dead[token.cpu()].any() and torch.isfinite(logprob).all()
    assert token[-3] == token[-1] == alive[0] and token[-2] == alive[-1]


def test_underflow_at_the_end():
    """Tokens 1e4 below the rest have probability 0 in float32: not even the largest u draws them."""
    logits = torch.cat([torch.zeros(3), torch.full((60,), -1e4)])
    with blocks():
        token, logprob, entropy = sample(*distribution(logits, 2), numbers(LARGEST, LARGEST))
    assert token.tolist() == [2, 2]
    torch.testing.assert_close(logprob, torch.full_like(logprob, 3.0).log().neg())
    torch.testing.assert_close(entropy, torch.full_like(logprob, 3.0).log())


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_far_from_0(shift):
    logits, u = torch.randint(-8, 9, (75,)) / 4, uniform(5)  # exact beside the shift
    with blocks():
        near = sample(*distribution(logits, 5), u)
        far = sample(*distribution(logits + shift, 5), u)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_low_temperature_is_the_largest_logit():
    hidden, weight, _ = head(5, 90, 8)
    with blocks(n=32):
        token, logprob, _ = sample(hidden, weight, uniform(5), 1e-3)
    assert torch.equal(token, (hidden @ weight.T).argmax(-1)) and (logprob > -0.5).all()


def test_a_row_without_a_distribution():
    """It has a token of the vocabulary and nan, not an error: the host does not look at a GPU's values."""
    weight = torch.full((40, 1), -3e38, device=DEVICE)
    rows = torch.tensor([[1.0], [10.0], [float("nan")], [0.0]], device=DEVICE)
    with blocks():
        token, logprob, entropy = sample(rows, weight, numbers(0.5, 0.9, 0.9, 0.5))
    assert token.tolist() == [20, 0, 0, 20]
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == [False, True, True, False]


def check_past_the_end():
    """A u of 1, which rounding could make of a part: the last token that has mass."""
    logits = torch.zeros(75)
    logits[40:] = -torch.inf
    hidden, weight = distribution(logits, 1)
    none = weight.new_empty(0, dtype=torch.uint8)
    with guarded() as guards, backend("triton"), blocks():
        h, w, u = (guards.place(x) for x in (hidden, weight, numbers(1.0)))
        token, *_ = kernel("linear_sample")(h, w, none, u, 1.0, None)
    assert token.tolist() == [39]


def test_past_the_end():
    check_past_the_end()


def test_a_row_knows_nothing_of_the_others(monkeypatch):
    n, v, h = 18, 130, 20
    hidden, weight, bias, u = exact(n, h), exact(v, h), exact(v), uniform(n)
    for tiles in ({"n": 32}, {"m": 32, "n": 64, "k": 32, "t": 128}):
        with blocks(**tiles):
            whole = sample(hidden, weight, u, 0.9, bias)
            for first, rows in ((17, 1), (3, 2), (5, 12)):
                cut = slice(first, first + rows)
                part = sample(hidden[cut], weight, u[cut], 0.9, bias)
                assert all(torch.equal(p, w[cut]) for p, w in zip(part, whole, strict=True))
    with blocks(m=16, n=64, k=32, t=128):
        monkeypatch.setattr(kernels, "ROWS", 16)
        again = sample(hidden, weight, u, 0.9, bias)
    assert all(torch.equal(a, w) for a, w in zip(again, whole, strict=True))


def test_where_a_tensor_lies_does_not_matter():
    hidden, weight, bias = head(5, 40, 7, torch.bfloat16)
    u, results = uniform(5), []
    for shift in (0, 1):
        with guarded() as guards, backend("triton"), blocks():
            h, w, x, b = (guards.place(x, shift) for x in (hidden, weight, u, bias))
            results.append(linear_sample(h, PackedWeight(w, None, "reference"), x, 1.0, b))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_value_is_read_on_the_host():
    """Shapes alone decide what is launched: tensors without values do."""
    seen = []
    token = _launch.observer.set(lambda launch: seen.append(launch.kernel.fn.__name__))
    try:
        h, w, u = (torch.empty(s, device="meta") for s in ((9, 40), (300, 40), (9,)))
        kernels.linear_sample(h, w, w[:0], u.double(), 1.0, None)
    finally:
        _launch.observer.reset(token)
    assert seen == ["_statistics", "_pick", "_merge"]


def test_what_does_not_fit_is_named():
    hidden, weight = torch.zeros(2, 3), torch.zeros(7, 3)
    with backend("triton"):
        with pytest.raises(ValueError, match=r"uniform: got .*, want numbers in \[0, 1\)"):
            linear_sample(hidden, weight, torch.tensor([0.5, 1.0], dtype=torch.float64))
        with pytest.raises(ValueError, match="uniform: got torch.float32 of shape"):
            linear_sample(hidden, weight, torch.zeros(2))
        with pytest.raises(ValueError, match="weight: got no rows"):
            none = torch.zeros(2, dtype=torch.float64, device=DEVICE)
            linear_sample(hidden.to(DEVICE), weight[:0].to(DEVICE), none)


DEFECTS = {
    "a boundary belongs to the token before": ("(cumulated > wanted)", "(cumulated >= wanted)"),
    "the last index instead of the last with mass": (
        "last = tl.max(tl.where(alive, order, 0), 0)",
        "last = tl.max(order, 0)",
    ),
    "the first one behind": (
        "tl.where(reached < BLOCK, reached, last)",
        "tl.where(reached < BLOCK, reached + 1, last)",
    ),
    "mass before the tile forgotten": ("(wanted - before) / tl.sum(", "wanted / tl.sum("),
    "mass before with the tile's own": ("cumulated - mass, 0.0), 0)", "cumulated, 0.0), 0)"),
    "tiles' masses without their maxima": (
        "sums.to(tl.float64) * tl.exp(most - shift).to(tl.float64)",
        "sums.to(tl.float64)",
    ),
    "weighted sums for sums": (
        "tl.cast(N, tl.int64) * TILES,",
        "tl.cast(N, tl.int64) * TILES * 2,",
    ),
    "tiles behind the last": (
        """most = tl.load(at, mask=t < TILES, other=float("-inf"))
    sums = tl.load(at + tl.cast(N, tl.int64) * TILES, mask=t < TILES, other=0.0)""",
        """most = tl.load(at, mask=t <= TILES, other=float("-inf"))
    sums = tl.load(at + tl.cast(N, tl.int64) * TILES, mask=t <= TILES, other=0.0)""",
    ),
    "a neighbour's hidden state": ("this = m == row - row0", "this = m == 0"),
    "the row's place counted twice": ("hidden + row0 * H,", "hidden + row * H,"),
    "the tile's own maximum forgotten": (
        "tl.exp(z - tl.sum(tl.where(t == half, most, 0.0), 0))",
        "tl.exp(z)",
    ),
    "the other half": ("== half % 2) &", "!= half % 2) &"),
    "both halves": (
        "(n // (BLOCK_N // 2) == half % 2) & (column + n < V)",
        "column + n < V",
    ),
    "the half that is not loaded chosen": ("tl.where(loaded, within, 0.0)", "within"),
    "the tile's part of the token": ("(column + chosen)", "(half + chosen)"),
    "another token's logit": ("tl.where(n == chosen, z, 0.0)", "tl.where(n == 0, z, 0.0)"),
    "one u for all rows": ("tl.load(uniform + row)", "tl.load(uniform)"),
}


@mutations(kernels, DEFECTS)
def test_defects_are_caught():
    with blocks():
        test_a_boundary_belongs_to_the_next_token()
        check_past_the_end()
        check(17, 75, 21, temperature=0.7)
        test_far_from_0(1e4)
