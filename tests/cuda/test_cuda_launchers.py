"""The launchers (csrc/cuda/*.cu): their border, through torch's dispatcher, with tensors on the CPU.

Compiled with g++ over the emulated kernels, they are what a GPU's build compiles but for the device's name.
"""

from pathlib import Path

import emulation
import pytest
import torch
from golden_cases import offsets

import setup as builder
from engine.kernels._backend import REGISTRY
from engine.kernels.kl_reward_gae import kl_reward_gae_reference
from engine.kernels.ranking_loss import ranking_loss_reference

pytestmark = emulation.needs_compiler
OPS = ("kl_reward_gae", "ranking_loss")


def compile_launchers(target: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    macros = [flag for flag in builder.CUDA_FLAGS if flag.startswith("-D")]
    sources = [
        "-x",
        "c++",
        *map(str, builder.CUDA_SOURCES),
        str(emulation.EMULATED / "launchers.cpp"),
    ]
    places = [f"-I{emulation.EMULATED}", *(f"-isystem{path}" for path in include_paths())]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch", "-lc10"]
    options = ["-O0", "-shared", "-fPIC", "-DENGINE_EMULATED", *macros, *places]
    emulation.compile_with([*emulation.FLAGS, *options, *sources, *libraries], target)


@pytest.fixture(scope="module")
def ops():
    parts = (emulation.FLAGS, builder.CUDA_FLAGS, torch.__version__)
    key = emulation.digest(*parts, suffixes=(".cu", ".cuh", ".h", ".cpp"))
    library = emulation.kept("launchers", key, compile_launchers)
    torch.ops.load_library(library)
    return torch.ops.engine_cuda


@pytest.mark.parametrize("op", OPS)
def test_schemas_are_those_of_the_contract(op, ops):
    schema = torch._C.parse_schema(f"engine_cuda::{REGISTRY[op]}")
    assert str(getattr(ops, op).default._schema) == str(schema)


def tokens(lengths: list[int]) -> list[torch.Tensor]:
    n, s = sum(lengths), len(lengths)
    logprob, ref_logprob, value = torch.randn(3, n)
    score, bootstrap = torch.randn(2, s)
    return [logprob, ref_logprob, score, value, offsets(lengths), bootstrap]


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 1], [700, 2, 300]])
def test_kl_reward_gae(lengths, ops):
    given = tokens(lengths)
    ours = ops.kl_reward_gae(*given, 0.1, 0.99, 0.95, 2)
    *arrays, bootstrap = [x.double() if x.is_floating_point() else x for x in given]
    truth = kl_reward_gae_reference(*arrays, 0.1, 0.99, 0.95, bootstrap, "k3")
    for o, t in zip(ours, truth, strict=True):
        assert o.dtype == torch.float32 and o.shape == t.shape
        torch.testing.assert_close(o.double(), t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("denominator", [None, 2.5])
@pytest.mark.parametrize("lengths", [[], [0, 1], [4, 9, 0, 40]])
def test_ranking_loss(lengths, denominator, ops):
    score, rank = torch.randn(sum(lengths)), torch.randint(3, (sum(lengths),)).double()
    cu = offsets(lengths)
    loss, pairs, correct, grad = ops.ranking_loss(score, rank, cu, 1, denominator)
    assert pairs.dtype == correct.dtype == torch.int64 and loss.shape == pairs.shape == ()
    wide = score.double().requires_grad_()
    truth = ranking_loss_reference(wide, rank, cu, "prompt_mean_allpairs", denominator)
    (slope,) = torch.autograd.grad(truth[0], wide, allow_unused=True)
    slope = torch.zeros_like(wide) if slope is None else slope
    torch.testing.assert_close(loss.double(), truth[0].detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-6, atol=1e-7)
    assert (pairs, correct) == truth[1:]


def test_slices_that_start_anywhere(ops):
    given = tokens([40, 3])
    aside = [torch.cat([x[:1], x])[1:] for x in given]
    assert all(x.storage_offset() == 1 for x in aside)
    results = [ops.kl_reward_gae(*arrays, 0.1, 1.0, 0.95, 0) for arrays in (given, aside)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


NAMES = ("logprob", "ref_logprob", "score", "value", "cu", "bootstrap")


@pytest.mark.parametrize("place", range(6), ids=NAMES)
def test_what_does_not_fit_is_named(place, ops):
    given = tokens([5, 4])
    name, x = NAMES[place], given[place]
    wrong = {
        "dtype": (x.double(), f"{name}: got dtype Double, want "),
        "dimensions": (x.repeat(2, 1)[:, : x.numel()], f"{name}: got 2 dimensions"),
        "stride": (x.repeat_interleave(2)[::2], f"{name}: got a strided vector"),
    }
    if place not in (0, 4):  # the first vector and the offsets say how long the others are
        wrong["size"] = (x[1:], f"{name}: got 1 dimensions and {x.numel() - 1} elements")
    for bad, message in wrong.values():
        arguments = [*given[:place], bad, *given[place + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            ops.kl_reward_gae(*arguments, 0.1, 1.0, 0.95, 0)


def test_numbers_that_do_not_fit_are_named(ops):
    given, cu = tokens([5, 4]), offsets([3])
    score, rank = torch.zeros(3), torch.zeros(3).double()
    with pytest.raises(RuntimeError, match="estimator: got 3, want 0, 1 or 2"):
        ops.kl_reward_gae(*given, 0.1, 1.0, 0.95, 3)
    with pytest.raises(RuntimeError, match="cu: got no segment for 9 tokens"):
        empty = torch.zeros(0)
        logprob, ref_logprob, _, value, _, _ = given
        ops.kl_reward_gae(logprob, ref_logprob, empty, value, offsets([]), empty, 0.1, 1.0, 0.95, 0)
    with pytest.raises(RuntimeError, match="cu: got no elements"):
        ops.ranking_loss(score, rank, cu[:0], 0, None)
    with pytest.raises(RuntimeError, match="rank: got dtype Float, want Double"):
        ops.ranking_loss(score, rank.float(), cu, 0, None)
    with pytest.raises(RuntimeError, match="reduction: got -1, want 0, 1 or 2"):
        ops.ranking_loss(score, rank, cu, -1, None)
    with pytest.raises(RuntimeError, match="denominator: got 0, want more than 0"):
        ops.ranking_loss(score, rank, cu, 0, 0.0)
