"""kl_reward_gae's Triton kernel against the float64 definitions of both ops."""

import pytest
import torch
from compare import assert_close
from guards import guarded
from launching import DEVICE, DTYPES, on_triton
from mutations import mutations
from token_ops import FLOAT32, blocks, golden, offsets, on_device, ops_file

from engine.kernels._backend import backend
from engine.kernels.kl_reward_gae import kl_reward_gae, kl_reward_gae_reference
from engine.kernels.triton import kl_reward_gae as kernels

OPTIONS = (0.3, 0.97, 0.9)
NAMES = ("advantage", "returns", "reward", "kl")


def inputs(lengths, dtype=torch.float32):
    n, s = sum(lengths), len(lengths)
    vectors = [torch.randn(k).to(dtype).to(DEVICE) for k in (n, n, s, n, s)]
    return *vectors[:4], offsets(lengths), *OPTIONS, vectors[4]


def check(lengths, estimator, dtype=torch.float32):
    given = inputs(lengths, dtype)
    ours = on_triton(kl_reward_gae)(*given, estimator)
    plain = kl_reward_gae_reference(*given, estimator)
    floats = (torch.is_tensor(x) and x.is_floating_point() for x in given)
    wide = [x.double() if floating else x for x, floating in zip(given, floats, strict=True)]
    truth = kl_reward_gae_reference(*wide, estimator)
    for name, o, r, t in zip(NAMES, ours, plain, truth, strict=True):
        assert o.dtype == dtype
        assert_close(o, r, t, name, units=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths,estimator", [([], "k1"), ([1], "k2"), ([3, 0, 1, 21, 0], "k3")])
def test_against_float64(lengths, estimator, dtype):
    with blocks(8):
        check(lengths, estimator, dtype)


def test_blocks_of_the_table():
    check([300, 3], "k1")


@golden("ppo_ptx_full_step")
def test_golden(case):
    with blocks(4), on_device():
        ops_file("test_kl_reward_gae").test_golden(case, FLOAT32)


def test_equal_log_probs_pay_the_score_alone():
    n = 11
    logprob = torch.full((n,), -1e4, device=DEVICE)
    zero, score = torch.zeros(n, device=DEVICE), torch.tensor([2.5, -1.0], device=DEVICE)
    for estimator in ("k1", "k2", "k3"):
        with blocks(4):
            advantage, returns, reward, kl = on_triton(kl_reward_gae)(
                logprob, logprob, score, zero, offsets([4, 7]), 0.3, 1.0, 1.0, None, estimator
            )
        assert kl.eq(0).all() and reward[[3, 10]].tolist() == [2.5, -1.0]
        assert advantage.tolist() == [2.5] * 4 + [-1.0] * 7 and torch.equal(advantage, returns)


def test_neighbours_and_place_do_not_change_a_bit():
    lengths = [0, 19, 1, 8]
    logprob, ref, score, value, cu, *options, bootstrap = given = inputs(lengths)
    run = on_triton(kl_reward_gae)
    with blocks(8):
        together, again = run(*given, "k3"), run(*given, "k3")
        assert all(map(torch.equal, together, again))
        for s, (a, b) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
            own = (logprob[a:b], ref[a:b], score[s : s + 1], value[a:b], offsets([b - a]))
            alone = run(*own, *options, bootstrap[s : s + 1], "k3")
            assert all(torch.equal(x, y[a:b]) for x, y in zip(alone, together, strict=True))


def test_addresses_that_are_not_aligned():
    given = inputs([5, 13], torch.bfloat16)
    with blocks(8):
        want = on_triton(kl_reward_gae)(*given, "k2")
        with guarded() as guards, backend("triton"):
            placed = [guards.place(x, shift=1) if torch.is_tensor(x) else x for x in given]
            assert all(map(torch.equal, kl_reward_gae(*placed, "k2"), want))


DEFECTS = {
    "paid at the first token": ("t == end - 1, paid", "t == start, paid"),
    "paid at the token before the last": ("t == end - 1, paid", "t == end - 2, paid"),
    "the penalty is a bonus": ("r = -beta * k", "r = beta * k"),
    "the score is not in the advantage": ("delta = r.to", "delta = (-beta * k).to"),
    "the bootstrap is forgotten": (
        "next_value = tl.load(bootstrap + segment).to(tl.float64)",
        "next_value = tl.zeros((), tl.float64)",
    ),
    "carries dropped": ("last(v, BLOCK), last(a, BLOCK)", "last(v, BLOCK), next_advantage"),
    "reference and policy swapped": ("estimate(lp - ref,", "estimate(ref - lp,"),
    "penalised kl": ("k.to(kl.dtype", "(beta * k).to(kl.dtype"),
    "the segment before is walked too": ("inside = t >= start", "inside = t >= 0"),
}


def check_all():
    torch.manual_seed(3)
    with blocks(8):
        check([2, 0, 11], "k1")


def test_without_a_defect_the_check_passes():
    check_all()


test_defects_are_caught = mutations(kernels, DEFECTS)(check_all)
