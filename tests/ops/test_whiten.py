"""whiten against the golden numbers, the float64 definition, and over two processes."""

import math

import pytest
import torch
from compare import assert_close
from golden_cases import GROUPS, golden_cases, packed
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.kernels.whiten import whiten, whiten_reference


@golden_cases("whiten")
def test_golden(case, precision):
    given_, want, dtype = case["inputs"], case["outputs"], precision.dtype
    x = packed(given_["values"], given_["mask"], dtype)
    expected = packed(want["whitened"], given_["mask"], dtype)
    ours = whiten(x, given_["shift_mean"])
    if given_["unbiased"]:  # the same direction, with the variance over n - 1
        variance, n = float(x.double().var(correction=0)), x.numel()
        mean = 0.0 if given_["shift_mean"] else float(x.double().mean())
        eps = given_["eps"]
        ours = (ours - mean) * math.sqrt((variance + eps) / (variance * n / (n - 1) + eps)) + mean
    precision.assert_close(ours, expected, case["name"])


def in_one_group(rank: int, folder: str) -> None:
    """One of two processes: its share of the golden case, an empty share, no tokens at all."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    group = torch.distributed.group.WORLD
    case = next(c for c in GROUPS["whiten"] if c["name"].startswith("two_shards"))
    given_, want = case["inputs"], case["outputs"]
    rows = given_["shards"][rank]
    values, mask, whitened = (
        [x[b] for b in rows] for x in (given_["values"], given_["mask"], want["whitened"])
    )
    x = packed(values, mask, torch.float64)
    expected = packed(whitened, mask, torch.float64)
    torch.testing.assert_close(whiten(x, group=group), expected, rtol=1e-10, atol=1e-12)
    narrow = whiten(x.float(), group=group)
    torch.testing.assert_close(narrow, expected.float(), rtol=2e-5, atol=2e-6)

    mine = torch.tensor([1.0, 2.0, 4.0, -3.0]) if rank == 0 else torch.empty(0)
    alone = whiten(mine)
    torch.testing.assert_close(whiten(mine, group=group), alone, rtol=1e-6, atol=0)
    assert whiten(torch.empty(0), group=group).shape == (0,)
    with pytest.raises(ValueError, match=r"want x.detach\(\)"):
        whiten(torch.zeros(2, requires_grad=True), group=group)
    torch.distributed.destroy_process_group()


def test_statistics_over_two_processes(tmp_path):
    torch.multiprocessing.spawn(in_one_group, (str(tmp_path),), nprocs=2)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@example(n=2, shift_mean=True, centre=0.0, scale=1e4, seed=1)
@given(
    n=st.integers(0, 300),
    shift_mean=st.booleans(),
    centre=st.sampled_from([0.0, -3.0, 1e4]),
    scale=st.sampled_from([1e-5, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_any_size_against_float64(cpu_class, n, shift_mean, centre, scale, seed):
    torch.manual_seed(seed)
    x = (torch.randn(n) * scale + centre).requires_grad_()
    wide = x.detach().double().requires_grad_()
    ours, truth = whiten(x, shift_mean), whiten_reference(wide, shift_mean)
    assert_close(ours, truth.float(), truth, "whiten")  # as good as float64, rounded once
    weights = torch.randn(n)
    (ours * weights).sum().backward()
    (truth * weights.double()).sum().backward()
    size = float(wide.grad.abs().max()) if n else 0.0
    # of two tokens almost nothing is left: terms of this size cancel, in float64
    terms = float(weights.abs().max() / (wide.detach().var(correction=0) + 1e-8).sqrt()) if n else 0.0
    atol = 1e-6 * size + 1e-14 * terms
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_blocks_of_other_means_against_float64(cpu_class, shift_mean):
    """Blocks are summed each around its own mean: here they are far from the mean of all, the last one is short."""
    x = torch.randn(3 * 4096 + 77) * 0.01 + torch.linspace(-50, 20, 3 * 4096 + 77).round()
    x[4096] = 1e4
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    ours, truth = whiten(x, shift_mean), whiten_reference(wide, shift_mean)
    assert_close(ours, truth.float(), truth, "whiten")
    weights = torch.randn(x.numel())
    (ours * weights).sum().backward()
    (truth * weights.double()).sum().backward()
    assert_close(x.grad, wide.grad.float(), wide.grad, "gradient")


def test_mean_and_variance_of_the_result(cpu_class):
    x = torch.randn(10_007) * 3 + 5
    shifted, kept = whiten(x).double(), whiten(x, shift_mean=False).double()
    assert abs(float(shifted.mean())) < 1e-7 and abs(float(shifted.var(correction=0)) - 1) < 1e-6
    assert abs(float(kept.mean() - x.double().mean())) < 1e-6


def test_none_and_one_token(cpu_class):
    assert whiten(torch.empty(0)).shape == (0,)
    assert whiten(torch.tensor([3.0])).tolist() == [0.0]
    assert whiten(torch.tensor([3.0]), shift_mean=False).tolist() == [3.0]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_gradcheck_of_the_definition(shift_mean):
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: whiten(v, shift_mean), x)


def test_opcheck():
    for shift_mean in (True, False):
        x = torch.randn(7, requires_grad=True)
        torch.library.opcheck(torch.ops.engine.whiten.default, (x, shift_mean))


def test_threads_do_not_change_a_bit(threads):
    torch.manual_seed(1)
    x = torch.randn(50_003)
    together = whiten(x)
    torch.set_num_threads(1)
    assert torch.equal(together, whiten(x))


def test_a_padded_tensor_is_refused():
    with pytest.raises(ValueError, match=r"x: got torch.float32 of shape \(2, 3\), want floats"):
        whiten(torch.zeros(2, 3))
