"""csrc/cuda/kl_reward_gae.cuh, run on the CPU, against the float64 definition and the golden numbers."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

import emulation
import pytest
import torch
from compare import assert_close
from golden_cases import GROUPS, live_slots, mask_offsets, offsets, packed
from torch import Tensor

from engine.kernels.kl_reward import ESTIMATORS
from engine.kernels.kl_reward_gae import kl_reward_gae_reference

pytestmark = emulation.needs_compiler
NAMES = ("advantage", "returns", "reward", "kl")
STRIPES = 8  # of a tile, in the launcher: 256 tokens
RAGGED = [0, 70, 1, 0, 0, 255, 256, 257, 33, 32, 31, 512, 513, 2, 0, 1, 1, 1, 90, 0, 0]


@dataclass
class Batch:
    """What the op is given, in float32."""

    logprob: Tensor
    ref_logprob: Tensor
    score: Tensor
    value: Tensor
    cu: Tensor
    bootstrap: Tensor
    beta: float = 0.1
    gamma: float = 0.99
    lam: float = 0.95
    estimator: str = "k1"
    _numbers: tuple[float, float, float] = field(init=False)

    def __post_init__(self) -> None:
        self._numbers = (float(self.beta), float(self.gamma), float(self.lam))

    def case(
        self, order: str = "forward", seed: int = 1, threads: int = 128, stripes: int = STRIPES
    ):
        machine = [emulation.ORDERS[order], seed, threads]
        integers = [stripes, ESTIMATORS.index(self.estimator)]
        arrays = (self.logprob, self.ref_logprob, self.score, self.value, self.cu, self.bootstrap)
        return (machine, integers, self._numbers, *arrays)

    def defined(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = [x.to(dtype) for x in (self.logprob, self.ref_logprob, self.score, self.value)]
        bootstrap = self.bootstrap.to(dtype)
        return kl_reward_gae_reference(*wide, self.cu, *self._numbers, bootstrap, self.estimator)

    def segment(self, s: int) -> "Batch":
        a, b = self.cu[s], self.cu[s + 1]
        tokens = [x[a:b] for x in (self.logprob, self.ref_logprob)]
        one = slice(s, s + 1)
        of_segment = (self.score[one], self.value[a:b], offsets([int(b - a)]), self.bootstrap[one])
        return Batch(*tokens, *of_segment, *self._numbers, self.estimator)


def batch(lengths: Sequence[int], scale: float = 1.0, **options) -> Batch:
    n, s = sum(lengths), len(lengths)
    logprob, ref_logprob = torch.randn(n) * scale, torch.randn(n) * scale
    tokens, segments = (torch.randn(n), offsets(lengths)), (torch.randn(s), torch.randn(s))
    return Batch(logprob, ref_logprob, segments[0], *tokens, segments[1], **options)


def outputs(program: Path, cases: Sequence, folder: Path) -> list[tuple[Tensor, ...]]:
    """The four outputs of each case."""
    records = [emulation.tensor(r, torch.float32) for r in emulation.run(program, cases, folder)]
    assert len(records) == 4 * len(cases)
    return [tuple(records[i : i + 4]) for i in range(0, len(records), 4)]


def check(given: Batch, ours: Sequence[Tensor], label: str = "") -> None:
    compare(ours, given.defined(torch.float64), given.defined(torch.float32), label)


def compare(
    ours: Sequence[Tensor], truth: Sequence[Tensor], plain: Sequence[Tensor], label: str
) -> None:
    for name, o, r, t in zip(NAMES, ours, plain, truth, strict=True):
        # an advantage sums rewards that are float32: as many roundings as tests/ops/test_gae.py allows
        assert_close(o, r, t, f"{label} {name}", units=8 if name in NAMES[:2] else 2)


def batches() -> list[Batch]:
    shapes = ([], [0], [0, 0, 0], [1], [1] * 40, [33], [256], [257], [1200], RAGGED)
    made = [batch(lengths) for lengths in shapes]
    for (gamma, lam), estimator in product(
        [(1.0, 1.0), (1.0, 0.95), (0.9, 0.0), (0.0, 0.5)], ESTIMATORS
    ):
        made.append(batch([1, 0, 3, 270, 40], gamma=gamma, lam=lam, estimator=estimator))
    for scale, estimator in product([1e-6, 1e-3, 0.1, 10.0, 1e4], ESTIMATORS):
        if scale < 88 or estimator != "k3":  # where k3 overflows in float32 and not in float64
            made.append(batch([5, 90, 1], scale, estimator=estimator))
    return made


@functools.cache
def prepared() -> tuple[list[Batch], list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]]:
    torch.manual_seed(0)
    given = batches()
    return given, [(b.defined(torch.float64), b.defined(torch.float32)) for b in given]


MACHINES = [("forward", 1, 128), ("reverse", 1, 32), ("random", 1, 64), ("random", 2, 256)]
FEW = [("reverse", 1, 64)]  # order, seed, threads; for defects, whose programs are slow


def check_all(program: Path, folder: Path, machines: Sequence = MACHINES) -> None:
    """In every order and for blocks of one to eight warps: right, and the same to the bit."""
    given, defined = prepared()
    for stripes in (1, STRIPES):
        chosen = machines if stripes == 1 else machines[-2:]
        cases = [b.case(*machine, stripes) for machine in chosen for b in given]
        found = outputs(program, cases, folder)
        for i in range(len(given)):
            compare(found[i], *defined[i], f"batch {i}, {stripes} stripes:")
            for other in range(i, len(found), len(given)):
                same = [torch.equal(x, y) for x, y in zip(found[i], found[other], strict=True)]
                nan = any(x.isnan().any() for x in found[i])
                assert all(same) or nan, f"batch {i} in another order of threads: {same}"


def test_against_float64_in_every_order_of_threads(tmp_path):
    check_all(emulation.driver("kl_reward_gae"), tmp_path)


def test_a_long_segment_and_many_short_ones(tmp_path):
    """A chain of 313 tiles, more than a warp walks at once; windows of many tiles; long runs of empty segments."""
    lengths = torch.randint(0, 4, (700,)).tolist()
    given = [
        batch([10_000], gamma=1.0, lam=1.0),
        batch([0] * 3000 + [7] + [0] * 3000 + [300] + [0] * 40),
        batch(lengths),
    ]
    program = emulation.driver("kl_reward_gae")
    for stripes in (1, STRIPES):
        found = outputs(program, [b.case(stripes=stripes) for b in given], tmp_path)
        for b, ours in zip(given, found, strict=True):
            check(b, ours, f"{stripes} stripes:")


def test_neighbours_and_place_do_not_change_a_bit(tmp_path):
    given = batch(RAGGED, estimator="k3")
    alone = [given.segment(s) for s in range(len(RAGGED))]
    together, *apart = outputs(
        emulation.driver("kl_reward_gae"), [b.case() for b in (given, *alone)], tmp_path
    )
    for (begin, end), own in zip(pairwise(given.cu.tolist()), apart, strict=True):
        assert all(torch.equal(x[begin:end], y) for x, y in zip(together, own, strict=True))


def check_infinities(program: Path, folder: Path) -> None:
    """An overflowed reward reaches every earlier token of its segment, however small c^n is, and no other."""
    given = batch([40, 900, 40], estimator="k3", gamma=0.2, lam=0.5)
    given.logprob[930] = -2000.0  # k3 overflows, in float64 too: a reward of -inf
    for stripes in (1, STRIPES):
        (ours,) = outputs(program, [given.case(stripes=stripes)], folder)
        check(given, ours)
        assert ours[0][40:931].isneginf().all() and ours[0][931:].isfinite().all()
        assert ours[0][:40].isfinite().all()


def test_infinities_stay_in_their_segment(tmp_path):
    check_infinities(emulation.driver("kl_reward_gae"), tmp_path)


def test_offsets_that_do_not_fit_touch_nothing_else(tmp_path):
    """Nobody reads them before a launch on a GPU: numbers may be wrong, the sanitizer sees no wrong address."""
    n = 300
    wild = ([5, 2, 900, -7, n], [0, n + 50], [0, 10], [n, 0, n, 0], [2**31 - 1, -(2**31), 0])
    cases = []
    for cu in wild:
        given = batch([n])
        given.cu = torch.tensor(cu, dtype=torch.int32)
        given.score, given.bootstrap = torch.zeros(2, len(cu) - 1)
        cases += [given.case(stripes=stripes) for stripes in (1, STRIPES)]
    outputs(emulation.driver("kl_reward_gae"), cases, tmp_path)


def close_to_golden(ours: Tensor, want: Tensor, name: str) -> None:
    torch.testing.assert_close(ours, want, rtol=2e-5, atol=2e-6, msg=lambda m: f"{name}: {m}")


def test_golden_gae(tmp_path):
    """The reward as a log-prob: with k1 and beta = -1 it comes back as the reward."""
    given = []
    for case in GROUPS["gae"]:
        inputs, mask = case["inputs"], live_slots(case)
        reward, value = (packed(inputs[k], mask, torch.float32) for k in ("rewards", "values"))
        cu = mask_offsets(mask)
        zeros = torch.zeros(2, cu.numel() - 1)
        numbers = (-1.0, inputs["gamma"], inputs["lam"])
        given.append(
            Batch(reward, torch.zeros_like(reward), zeros[0], value, cu, zeros[1], *numbers)
        )
    found = outputs(emulation.driver("kl_reward_gae"), [b.case() for b in given], tmp_path)
    for case, b, ours in zip(GROUPS["gae"], given, found, strict=True):
        want, mask = case["outputs"], live_slots(case)
        assert torch.equal(ours[2], b.logprob)
        key = "advantages" if "advantages" in want else "advantages_before_whiten"
        close_to_golden(ours[0], packed(want[key], mask, torch.float32), case["name"])
        close_to_golden(ours[1], packed(want["returns"], mask, torch.float32), case["name"])


def test_golden_rewards(tmp_path):
    cases = [case for case in GROUPS["kl_penalised_reward"] if "TRL" not in case["name"]]
    assert cases
    given = []
    for case in cases:
        inputs, mask = case["inputs"], live_slots(case)
        logprob, ref = (
            packed(inputs[k], mask, torch.float32) for k in ("logprob_old", "logprob_ref")
        )
        score, cu = torch.tensor(inputs["scores"], dtype=torch.float32), mask_offsets(mask)
        zeros = (torch.zeros_like(logprob), cu, torch.zeros_like(score))
        kind = inputs.get("estimator", "k1")
        given.append(Batch(logprob, ref, score, *zeros, inputs["beta"], estimator=kind))
    found = outputs(emulation.driver("kl_reward_gae"), [b.case() for b in given], tmp_path)
    for case, ours in zip(cases, found, strict=True):
        mask = live_slots(case)
        want = packed(case["outputs"]["rewards"], mask, torch.float32)
        close_to_golden(ours[2], want, case["name"])
        close_to_golden(ours[3], packed(case["outputs"]["kl"], mask, torch.float32), case["name"])


def test_golden_estimators(tmp_path):
    names, given, wanted = [], [], []
    for case, estimator in product(GROUPS["kl_estimators"], ESTIMATORS):
        inputs, want = case["inputs"], case["outputs"]
        if "logp_minus_ref" in inputs:
            logprob = torch.tensor(inputs["logp_minus_ref"])
            ref = torch.zeros_like(logprob)
        else:
            logprob, ref = (torch.tensor(want[k]) for k in ("logp_policy", "logp_ref"))
        zero, cu = torch.zeros(1), offsets([logprob.numel()])
        given.append(
            Batch(logprob, ref, zero, torch.zeros_like(ref), cu, zero, 0.5, estimator=estimator)
        )
        names.append(f"{case['name']} {estimator}")
        wanted.append(torch.tensor(want[estimator]))
    found = outputs(emulation.driver("kl_reward_gae"), [b.case() for b in given], tmp_path)
    for name, want, ours in zip(names, wanted, found, strict=True):
        close_to_golden(ours[3], want, name)
        close_to_golden(ours[2], -0.5 * want, name)


DEFECTS = {
    "score one token early": ("j == 0 && lane() == 0)", "j == 0 && lane() == 1)"),
    "score at every end of a tile": ("if (last && j == 0", "if (j == 0"),
    "no reset at a segment's end": ("tile.is_last_of_segment() ? 0.0 : carry", "carry"),
    "no carry between tiles": ("tile.is_last_of_segment() ? 0.0 : carry[window]", "0.0"),
    "the value after a tile forgotten": (
        "p.bootstrap[tile.segment] : p.value[tile.end]",
        "p.bootstrap[tile.segment] : 0.0f",
    ),
    "bootstrap forgotten": ("last ? p.bootstrap[tile.segment]", "last ? 0.0f"),
    "composed the wrong way round": ("fma(c.step[d], lower, x)", "fma(c.step[d], x, lower)"),
    "carry not discounted": ("return fma(c.reach, carry, x)", "return carry + x"),
    "carry from the wrong lane": (
        "__shfl_sync(kAllLanes, advantage, kWarp - 1)",
        "__shfl_sync(kAllLanes, advantage, 0)",
    ),
    "next value from the wrong lane": (
        "__shfl_up_sync(kAllLanes, value[j], 1)",
        "__shfl_up_sync(kAllLanes, value[j], 2)",
    ),
    "shuffle of some lanes only": (
        "const float neighbour = __shfl_up_sync(kAllLanes, value[j], 1);",
        "const float neighbour = t >= tile.begin ? __shfl_up_sync(kAllLanes, value[j], 1) : 0.0f;",
    ),
    "chain walked one window off": ("carry[window - k - 1] = total", "carry[window - k] = total"),
    "chain's carry dropped": (
        "running = __shfl_sync(kAllLanes, total, kWarp - 1)",
        "running = 0.0",
    ),
    "chain discounted by one tile of 32": (
        "of_tile = power(of_tile * of_tile, c)",
        "of_tile = of_tile",
    ),
    "search one token off": ("cu[probe] <= token", "cu[probe] < token"),
    "mask of the stores dropped": ("if (kStore && t >= tile.begin)", "if (kStore)"),
    "k3 series cut": ("k > 2; --k", "k > 5; --k"),
    "returns without the value": ("advantage + value[j])", "advantage)"),
}


@pytest.fixture(scope="module")
def programs() -> None:
    emulation.compile_all("kl_reward_gae", {**DEFECTS, **INFINITE_DEFECTS})


@pytest.mark.parametrize("defect", [emulation.UNCHANGED, *DEFECTS])
def test_defects(defect, programs, tmp_path):
    changed = emulation.with_defect("kl_reward_gae", DEFECTS, defect)
    with emulation.caught(defect):
        check_all(changed, tmp_path, FEW)


INFINITE_DEFECTS = {"powers underflow": ("c > 0 ? fmax(product, DBL_MIN) : product", "product")}


@pytest.mark.parametrize("defect", [emulation.UNCHANGED, *INFINITE_DEFECTS])
def test_defects_at_infinity(defect, programs, tmp_path):
    changed = emulation.with_defect("kl_reward_gae", INFINITE_DEFECTS, defect)
    with emulation.caught(defect):
        check_infinities(changed, tmp_path)
