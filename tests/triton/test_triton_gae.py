"""gae's Triton kernels against the float64 definition."""

import pytest
import torch
from compare import assert_close
from guards import guarded
from launching import DEVICE, DTYPES, check_on_triton, gradients_on_triton, on_triton
from mutations import mutations
from token_ops import FLOAT32, blocks, golden, helper_mutations, offsets, on_device, ops_file

from engine.kernels._backend import backend
from engine.kernels.gae import gae, gae_reference
from engine.kernels.triton import _scan
from engine.kernels.triton import gae as kernels

GAMMA, LAM = 0.97, 0.9


def ours(reward, value, bootstrap, cu):
    return torch.cat(gae(reward, value, cu, GAMMA, LAM, bootstrap))


def defined(reward, value, bootstrap, cu):
    return torch.cat(gae_reference(reward, value, cu, GAMMA, LAM, bootstrap))


def inputs(lengths, dtype=torch.float32):
    n = sum(lengths)
    vectors = [torch.randn(size).to(dtype) for size in (n, n, len(lengths))]
    return (*vectors, offsets(lengths))


def check(lengths, dtype=torch.float32):
    check_on_triton(
        ours, defined, inputs(lengths, dtype), torch.randn(2 * sum(lengths)).to(dtype), units=8
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [3, 0, 1, 37, 0], [16, 17, 32]])
def test_against_float64(lengths, dtype):
    with blocks(16):
        check(lengths, dtype)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_without_tokens(lengths):
    given = [x.to(DEVICE) for x in inputs(lengths)]
    out, *gradients = gradients_on_triton(ours, given, torch.empty(0, device=DEVICE))
    assert out.shape == (0,) and [x.shape for x in gradients] == [(0,), (0,), (len(lengths),)]
    assert gradients[2].eq(0).all()


def test_blocks_of_the_table():
    check([300, 0, 5])


@golden("gae")
def test_golden(case):
    with blocks(4), on_device():
        ops_file("test_gae").test_golden(case, FLOAT32)


def test_an_episode_of_many_blocks():
    """gamma = lam = 1: the plain suffix sum, of which the values, 10,000 times larger, telescope away."""
    reward, value = torch.randn(2, 1500, device=DEVICE) * torch.tensor(
        [[1.0], [1e4]], device=DEVICE
    )
    cu = offsets([1500])
    with blocks(64):
        results = on_triton(gae)(reward, value, cu, 1.0, 1.0)
    plain = gae_reference(reward, value, cu, 1.0, 1.0)
    truth = gae_reference(reward.double(), value.double(), cu, 1.0, 1.0)
    for name, o, r, t in zip(("advantage", "returns"), results, plain, truth, strict=True):
        assert_close(o, r, t, name, units=8)


def test_infinite_rewards_reach_the_tokens_before_them_only():
    reward, value, cu = torch.zeros(9), torch.ones(9), offsets([5, 4])
    reward[3], reward[7] = float("-inf"), 1e4
    with blocks(4):
        advantage, _ = on_triton(gae)(reward.to(DEVICE), value.to(DEVICE), cu)
    assert advantage[:4].eq(float("-inf")).all() and advantage[4:].isfinite().all()


def test_neighbours_and_place_do_not_change_a_bit():
    lengths = [0, 37, 1, 20]
    reward, value, bootstrap, cu = (x.to(DEVICE) for x in inputs(lengths))
    run = on_triton(gae)
    with blocks(16):
        together = run(reward, value, cu, GAMMA, LAM, bootstrap)
        again = run(reward, value, cu, GAMMA, LAM, bootstrap)
        assert all(map(torch.equal, together, again))
        for s, (a, b) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
            alone = run(reward[a:b], value[a:b], offsets([b - a]), GAMMA, LAM, bootstrap[s : s + 1])
            assert all(torch.equal(x, y[a:b]) for x, y in zip(alone, together, strict=True))


def test_addresses_that_are_not_aligned():
    lengths = [5, 13]
    given = [x.to(DEVICE) for x in inputs(lengths, torch.bfloat16)]
    with blocks(8):
        want = on_triton(ours)(*given)
        with guarded() as guards, backend("triton"):
            assert torch.equal(ours(*(guards.place(x, shift=1) for x in given)), want)


FORWARD = "gamma * previous(v, next_value, BLOCK)"
CARRIES = "next_value, next_advantage = last(v, BLOCK), last(a, BLOCK)"
DEFECTS = {
    "the value of the same token": (FORWARD, "gamma * v"),
    "no value behind the block": (FORWARD, "gamma * previous(v, 0.0, BLOCK)"),
    "the bootstrap is forgotten": (
        "next_value = tl.load(bootstrap + episode).to(tl.float64)",
        "next_value = tl.zeros((), tl.float64)",
    ),
    "the value is not carried": (CARRIES, "next_advantage = last(a, BLOCK)"),
    "the advantage is not carried": (CARRIES, "next_value = last(v, BLOCK)"),
    "the episode before is walked too": ("inside = t >= start", "inside = t >= 0"),
    "the last token is left out": ("t = end - 1 - done", "t = end - 2 - done"),
    "a discount too many": ("delta = r + gamma", "delta = gamma * r + gamma"),
    "returns without the value": ("(a + v).to(", "a.to("),
    "returns' gradient is no reward's": ("decay, ga + gr, before", "decay, ga, before"),
    "no gradient from the token before": (" + gamma * previous(g, before, BLOCK)", ""),
    "gradient's carry": ("before = last(g, BLOCK)", "before = before + 0.0"),
    "the bootstrap's gradient without its discount": ("(gamma * before).to(", "before.to("),
    "gradient of the episode behind": ("inside = t < end", "inside = t < end + 1"),
}


def check_all():
    torch.manual_seed(3)
    with blocks(8):
        check([5, 0, 19])


test_defects_are_caught = mutations(kernels, DEFECTS)(check_all)
SCAN_DEFECTS = {
    "half of a number": (
        "tl.cast(high, tl.float64) + tl.cast(low, tl.float64)",
        "tl.cast(low, tl.float64)",
    ),
    "composition in the other order": ("a_next * b + b_next", "a * b_next + b"),
    "decays are not multiplied": ("return a * a_next,", "return a_next,"),
    "lanes outside decay": ("tl.where(inside, decay, 1.0)", "tl.where(inside, decay, decay)"),
    "the lane itself": ("tl.maximum(lane - 1, 0)", "lane"),
    "the last lane but one": ("== LANES - 1", "== LANES - 2"),
    "what came before is dropped": ("return a * before + b", "return b"),
}
test_defects_of_the_scan_are_caught = helper_mutations(_scan, kernels, SCAN_DEFECTS)(check_all)


def test_without_a_defect_the_checks_pass():
    check_all()
