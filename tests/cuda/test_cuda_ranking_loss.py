"""csrc/cuda/ranking_loss.cuh, run on the CPU, against the float64 definition and the golden numbers."""

import functools
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import emulation
import pytest
import torch
from compare import assert_close
from golden_cases import GROUPS, offsets, ragged
from torch import Tensor

from engine.kernels.ranking_loss import (
    REDUCTIONS,
    ranking_denominator,
    ranking_loss_reference,
)

pytestmark = emulation.needs_compiler


class Result(NamedTuple):
    loss: Tensor
    grad: Tensor
    num_pairs: int
    num_correct: int


class Batch(NamedTuple):
    score: Tensor  # float32
    rank: Tensor  # float64
    cu: Tensor
    reduction: str = REDUCTIONS[0]
    denominator: float | None = None

    def case(self, order: str = "forward", seed: int = 1, threads: int = 256):
        machine = [emulation.ORDERS[order], seed, threads]
        numbers = [REDUCTIONS.index(self.reduction)], [float(self.denominator or 0)]
        return (machine, *numbers, self.score, self.rank, self.cu)

    def defined(self, dtype: torch.dtype) -> Result:
        score = self.score.detach().to(dtype).requires_grad_()
        loss, *counts = ranking_loss_reference(
            score, self.rank, self.cu, self.reduction, self.denominator
        )
        (grad,) = torch.autograd.grad(loss, score, allow_unused=True)
        return Result(
            loss.detach(), torch.zeros_like(score) if grad is None else grad, *map(int, counts)
        )


def batch(lengths: Sequence[int], levels: int = 4, scale: float = 1.0, **options) -> Batch:
    n = sum(lengths)
    rank = torch.randint(levels, (n,)).double()
    return Batch(torch.randn(n) * scale, rank, offsets(lengths), **options)


def outputs(program: Path, cases: Sequence, folder: Path) -> list[Result]:
    records = emulation.run(program, cases, folder)
    assert len(records) == 4 * len(cases)
    found = []
    for loss, grad, pairs, correct in zip(*(records[i::4] for i in range(4)), strict=True):
        counts = [int(emulation.tensor(r, torch.int64)) for r in (pairs, correct)]
        scalar = emulation.tensor(loss, torch.float32).reshape(())
        found.append(Result(scalar, emulation.tensor(grad, torch.float32), *counts))
    return found


def check(given: Batch, ours: Result, label: str = "") -> None:
    compare(ours, given.defined(torch.float64), given.defined(torch.float32), label)


def compare(ours: Result, truth: Result, plain: Result, label: str) -> None:
    assert_close(ours.loss, plain.loss, truth.loss, f"{label} loss")
    assert_close(ours.grad, plain.grad, truth.grad, f"{label} grad")
    assert ours[2:] == truth[2:], f"{label} counts: got {ours[2:]}, want {truth[2:]}"


def batches() -> list[Batch]:
    many = torch.randint(0, 7, (140,)).tolist()
    shapes = ([], [0], [1, 0], [2], [4, 1, 0, 9], [33, 32, 31, 3], [70, 5], many)
    made = [batch(shape, reduction=r) for shape, r in product(shapes, REDUCTIONS)]
    made += [batch([6, 5], levels=1, reduction=r) for r in REDUCTIONS]  # all tied
    made += [batch([9, 4, 9], 9, scale) for scale in (1e-4, 100.0, 1e4)]
    made += [batch([7, 40, 2], reduction=r, denominator=2.5) for r in REDUCTIONS]
    equal = batch([5, 38])
    return [*made, equal._replace(score=torch.full_like(equal.score, 0.7))]


@functools.cache
def prepared() -> tuple[list[Batch], list[tuple[Result, Result]]]:
    torch.manual_seed(0)
    given = batches()
    return given, [(b.defined(torch.float64), b.defined(torch.float32)) for b in given]


def same(a: Result, b: Result) -> bool:
    return torch.equal(a.loss, b.loss) and torch.equal(a.grad, b.grad) and a[2:] == b[2:]


MACHINES = [*product(emulation.ORDERS, (1,), (32, 128)), ("random", 2, 256)]  # order, seed, threads
FEW = [("forward", 1, 32), ("reverse", 1, 128)]  # for defects, whose programs are slow


def check_all(program: Path, folder: Path, machines: Sequence = MACHINES) -> None:
    """In every order and for blocks of one to eight warps: right; of one size of block, the same to the bit."""
    given, defined = prepared()
    found = outputs(program, [b.case(*m) for m in machines for b in given], folder)
    first: dict[int, list[Result]] = {}  # by threads
    for number, (order, _, threads) in enumerate(machines):
        results = found[number * len(given) : (number + 1) * len(given)]
        alike = first.setdefault(threads, results)
        for i, ours in enumerate(results):
            label = f"batch {i}, {threads} threads, {order}:"
            compare(ours, *defined[i], label)
            assert torch.equal(ours.grad, found[i].grad), f"{label} other gradients"
            assert same(ours, alike[i]), f"{label} not the same to the bit"


def test_against_float64_in_every_order_of_threads(tmp_path):
    check_all(emulation.driver("ranking_loss"), tmp_path)


def test_neighbours_and_place_do_not_change_a_bit(tmp_path):
    lengths = [4, 40, 0, 1, 9, 33, 6]
    given = batch(lengths, denominator=5.0)
    alone = [
        given._replace(score=given.score[a:b], rank=given.rank[a:b], cu=offsets([b - a]))
        for a, b in pairwise(given.cu.tolist())
    ]
    program = emulation.driver("ranking_loss")
    together, *apart = outputs(program, [b.case() for b in (given, *alone)], tmp_path)
    assert torch.equal(together.grad, torch.cat([own.grad for own in apart]))


def test_micro_batches_add_up_to_the_batch(tmp_path):
    program = emulation.driver("ranking_loss")
    for reduction in REDUCTIONS:
        whole = batch([4, 2, 5, 3], reduction=reduction)
        count = ranking_denominator(whole.rank, whole.cu, reduction)
        parts = [
            Batch(whole.score[:6], whole.rank[:6], offsets([4, 2]), reduction, count),
            Batch(whole.score[6:], whole.rank[6:], offsets([5, 3]), reduction, count),
        ]
        together, *halves = outputs(program, [b.case() for b in (whole, *parts)], tmp_path)
        torch.testing.assert_close(halves[0].loss + halves[1].loss, together.loss)
        assert torch.equal(torch.cat([half.grad for half in halves]), together.grad)


def test_a_nan_score_is_not_hidden_and_spares_the_other_prompts(tmp_path):
    given = batch([3, 4], levels=1000)
    given.score[1] = float("nan")
    (ours,) = outputs(emulation.driver("ranking_loss"), [given.case()], tmp_path)
    assert ours.loss.isnan() and ours.grad[:3].isnan().all() and ours.grad[3:].isfinite().all()


def test_offsets_that_do_not_fit_touch_nothing_else(tmp_path):
    given, wild = batch([40]), ([5, 2, 900, -7], [0, 90], [40, 0, 40], [2**31 - 1, -(2**31), 0])
    cases = [given._replace(cu=torch.tensor(cu, dtype=torch.int32)).case() for cu in wild]
    outputs(emulation.driver("ranking_loss"), cases, tmp_path)


def close_to_golden(ours: Tensor, want: Tensor, name: str) -> None:
    atol = 1e-3 if name.startswith("extreme_") else 2e-6  # tests/ops/conftest.py
    torch.testing.assert_close(ours, want, rtol=2e-5, atol=atol, msg=lambda m: f"{name}: {m}")


def test_golden_prompts(tmp_path):
    cases = list(product(GROUPS["pairwise_ranking_prompt"], REDUCTIONS))
    given = []
    for case, reduction in cases:
        score = torch.tensor(case["inputs"]["scores"], dtype=torch.float32)
        rank = torch.tensor(case["inputs"]["ranks"], dtype=torch.float64)
        given.append(Batch(score, rank, offsets([score.numel()]), reduction))
    found = outputs(emulation.driver("ranking_loss"), [b.case() for b in given], tmp_path)
    for (case, reduction), ours in zip(cases, found, strict=True):
        want = case["outputs"]
        literal = reduction == "prompt_mean_allpairs" and "loss_literal_eq1_divisor" in want
        kind = "{}_literal_eq1_divisor" if literal else "{}"
        assert ours.num_pairs == want["n_pairs"]
        for key, result in (("loss", ours.loss), ("grad", ours.grad)):
            expected = torch.tensor(want[kind.format(key)], dtype=torch.float32)
            close_to_golden(result, expected, f"{case['name']} {key}")


def test_golden_batches(tmp_path):
    cases = list(product(GROUPS["pairwise_ranking_batch"], REDUCTIONS))
    given = []
    for case, reduction in cases:
        score, rank = (
            ragged(case["inputs"][k], d)
            for k, d in (("scores", torch.float32), ("ranks", torch.float64))
        )
        cu = offsets([len(row) for row in case["inputs"]["scores"]])
        given.append(Batch(score, rank, cu, reduction))
    found = outputs(emulation.driver("ranking_loss"), [b.case() for b in given], tmp_path)
    for (case, reduction), ours in zip(cases, found, strict=True):
        want = case["outputs"]
        name = f"{case['name']} {reduction}"
        close_to_golden(ours.loss, torch.tensor(want[reduction]["loss"]), name)
        close_to_golden(ours.grad, ragged(want[reduction]["grad"], torch.float32), name)
        assert ours.num_pairs == want["n_valid_pairs"]
        assert ours.num_correct / ours.num_pairs == pytest.approx(want["accuracy_strict"])


DEFECTS = {
    "ties taken as pairs": ("wins = rank_i < rank_j", "wins = rank_i <= rank_j"),
    "winners and losers swapped": (
        "wins = rank_i < rank_j, loses = rank_j < rank_i",
        "loses = rank_i < rank_j, wins = rank_j < rank_i",
    ),
    "gradient of the wrong sign": (
        "slope += wins ? -wrong : wrong",
        "slope += wins ? wrong : -wrong",
    ),
    "losers get no gradient": ("slope += wins ? -wrong : wrong", "slope += wins ? -wrong : 0.0"),
    "score from the wrong lane": (
        "__shfl_sync(kAllLanes, held_score, j)",
        "__shfl_sync(kAllLanes, held_score, j ^ 1)",
    ),
    "shuffle of some lanes only": (
        "if (!mine || !(wins || loses)) continue;",
        "if (!mine) break; if (!(wins || loses)) continue;",
    ),
    "idle lanes count": ("if (!mine || !(wins || loses))", "if (!(wins || loses))"),
    "answers beyond a warp forgotten": ("others += kWarp) {", "others = own.count) {"),
    "softplus of the wrong side": ("(margin < 0 ? -margin : 0.0)", "(margin > 0 ? margin : 0.0)"),
    "equal scores taken as correct": ("correct += margin > 0", "correct += margin >= 0"),
    "prompts of one answer counted": ("? answers > 1 : pairs", "? answers > 0 : pairs"),
    "C(K, 2) off": ("answers * (answers - 1) / 2)", "answers * (answers + 1) / 2)"),
    "denominator forgotten": ("double total = denominator;", "double total = 1.0;"),
    "gradient not divided by its prompt": (
        "? 0.0 : 1.0 / (divisor_of(reduction, own.count, pairs) * total)",
        "? 0.0 : 1.0 / total",
    ),
    "every other prompt of a block skipped": ("s += warps_of_grid()", "s += 2 * warps_of_grid()"),
    "barrier after writing missing": ("  __syncthreads();\n  T total = 0;", "  T total = 0;"),
    "barrier before the next sum missing": ("  __syncthreads();  // before", "  // before"),
    "barrier of one warp only": (
        "  __syncthreads();\n  T total = 0;",
        "  if (threadIdx.x < kWarp) __syncthreads();\n  T total = 0;",
    ),
}


@pytest.fixture(scope="module")
def programs() -> None:
    emulation.compile_all("ranking_loss", DEFECTS)


@pytest.mark.parametrize("defect", [emulation.UNCHANGED, *DEFECTS])
def test_defects(defect, programs, tmp_path):
    changed = emulation.with_defect("ranking_loss", DEFECTS, defect)
    with emulation.caught(defect):
        check_all(changed, tmp_path, FEW)
