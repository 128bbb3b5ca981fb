"""The ledger of predicted numbers: the counter on work whose bytes are known, its record, its page, and the bar."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("bytes are counted in the interpreter", allow_module_level=True)

import triton  # noqa: E402
from triton import language as tl  # noqa: E402

from bench import gpu, ledger, ledger_count, ledger_plan, ledger_table  # noqa: E402
from bench.rivals import eager, inductor, libraries  # noqa: E402
from engine.kernels.triton import _launch  # noqa: E402
from engine.run import memory  # noqa: E402


def case_of(op, name):
    return next(case for case in gpu.cases() if (case.op, case.name) == (op, name))


def counted(run):
    with torch.no_grad(), ledger_count.counting() as work:
        run()
    return work


# --- the counter ---


def test_operations_read_and_write_each_tensor_once():
    a, b = torch.zeros(10, 20), torch.zeros(10, 20)
    assert counted(lambda: a + b).memory == 3 * 800
    assert counted(lambda: a.add_(b)).memory == 3 * 800
    assert counted(lambda: a.T[2:].view(18, 10)).memory == 0
    assert counted(lambda: a.copy_(b)).memory == 2 * 800
    assert counted(lambda: torch.zeros(5)).memory == 20
    assert counted(lambda: a + b[:, :1]).memory == 2 * 800 + 40
    assert counted(lambda: a + a).memory == 2 * 800
    assert (
        counted(lambda: b.gather(1, torch.zeros(10, 1, dtype=torch.int64))).memory
        == 80 + 2 * 40 + 80
    )


def test_products_are_counted_and_not_computed():
    a, b = torch.empty(256, 64, device="meta"), torch.empty(64, 512, device="meta")
    work = counted(lambda: a @ b)
    once = 4 * (256 * 64 + 64 * 512 + 256 * 512)
    assert work.memory == once and work.flops == 2 * 256 * 64 * 512
    # 2 tiles of 256 columns and 2 of 128 rows: each operand a second time
    assert work.requested == once + 4 * (256 * 64 + 64 * 512)
    real = counted(lambda: torch.ones(256, 64) @ torch.ones(64, 512))
    assert real.flops == work.flops
    c = torch.empty(256, 512, device="meta")  # what is added to is read and written
    assert counted(lambda: torch.mm(a, b, out=c)).memory == once
    assert counted(lambda: torch.addmm(c, a, b, out=c)).memory == once + 4 * 256 * 512
    with pytest.raises(
        RuntimeError, match="a product into torch.float32: torch wants torch.bfloat16"
    ):
        counted(lambda: torch.mm(a.bfloat16(), b.bfloat16(), out=c))


def test_large_random_tensors_are_not_made():
    with ledger._Unwritten():
        assert torch.rand(ledger.LARGE + 1)[:1000].eq(0).all() and not torch.rand(1000).eq(0).all()


@pytest.mark.parametrize("rows", [8, 64])
def test_sampled_programs_stand_for_all(rows):
    case = case_of("swiglu", "backward")
    given = case.make("cpu", torch.bfloat16, N=rows, F=1536)
    work = counted(lambda: case.run(*given))
    assert work.requested == work.memory == case.bytes(2, N=rows, F=1536)
    assert work.exponentials == rows * 1536 and work.kernels == {"_backward": 1}


def test_programs_of_unequal_work_are_counted_more():
    """Every fifth tile of attention's rows is empty here, and so are the programs at 1/8, 3/8, 5/8, 7/8 of the grid."""
    case = case_of("attention", "forward, 135M")
    given = case.make("cpu", torch.bfloat16, **case.full)
    work = counted(lambda: case.run(*given))
    pairs = case.flops(2, **case.full)
    assert pairs < work.flops < 2 * pairs
    compulsory = case.bytes(2, **case.full)
    assert 0.95 * compulsory < work.memory <= 1.05 * compulsory
    most = ledger_count.UNEQUAL
    assert {len(ledger_count._places(n)) for n in range(2 * most)} == {*range(most + 1)}


@triton.jit
def _copy_some(x, out, there, size, BLOCK: tl.constexpr):
    """Program i + 2 copies block i: the first two and the last have nothing to copy, and write that they were there."""
    at = (tl.program_id(0) - 2) * BLOCK + tl.arange(0, BLOCK)
    mask = (at >= 0) & (at < size)
    tl.store(out + at, tl.load(x + at, mask=mask), mask=mask)
    tl.store(there + tl.program_id(0), 1)


def test_idle_programs_at_the_ends_do_not_hide_memory():
    x, out, there = torch.zeros(64 * 16), torch.empty(64 * 16), torch.zeros(2 + 64 + 1)
    work = counted(lambda: _copy_some[(2 + 64 + 1,)](x, out, there, x.numel(), BLOCK=16))
    assert work.memory == 2 * 4 * x.numel() + 4 * there.numel()


def test_what_is_read_again_is_requested_and_not_memory():
    case = case_of("linear_logprob", "forward")
    shape = {"N": 300, "V": 700, "H": 64}
    given = case.make("cpu", torch.float32, **shape)
    work = counted(lambda: case.run(*given))
    assert work.requested > work.memory > 0


def test_eager_work_is_counted_by_phase():
    shape = {"N": 32, "F": 64}
    forward = eager.run("swiglu", "forward", torch.bfloat16, shape, ledger_count.counting)
    assert forward.memory == 5 * 2 * 32 * 64 and forward.launches == 2  # silu, then the product
    back = eager.run("swiglu", "backward", torch.bfloat16, shape, ledger_count.counting)
    assert back.memory > forward.memory
    assert eager.phases("loss and gradient") == (True, True)
    short = eager.run("gae", "forward", torch.float32, {"S": 2, "T": 512}, ledger_count.counting)
    long = eager.run("gae", "forward", torch.float32, {"S": 2, "T": 5120}, ledger_count.counting)
    assert long.memory == 10 * short.memory and long.launches == 10 * short.launches


def test_inductor_fuses_what_is_pointwise():
    shape = {"N": 32, "F": 64}
    assert inductor.run("swiglu", "forward", torch.bfloat16, shape) == (3 * 2 * 32 * 64, 1)


def test_inductor_s_groups_do_not_depend_on_the_threads():
    """A GPU's have none to depend on; a CPU with several would leave the gradient of a gather apart."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            shape = {"N": 64, "V": 512, "H": 16}
            found.append(inductor.run("linear_logprob", "backward", torch.bfloat16, shape))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_the_largest_floor_is_the_prediction():
    row = {"dtype": "bfloat16", "memory": 3.35e9, "flops": 0.0, "exponentials": 0.0, "launches": 1}
    assert ledger.predicted_ms(row) == (pytest.approx(1.0), "memory")
    assert ledger.predicted_ms({**row, "flops": 1.98e12}) == (pytest.approx(2.0), "products")
    assert ledger.predicted_ms({**row, "flops": 67e9, "dtype": "float32"})[0] == pytest.approx(1.0)
    assert ledger.predicted_ms({**row, "exponentials": 42e9}) == (
        pytest.approx(10.0),
        "exponentials",
    )
    assert ledger.predicted_ms({**row, "launches": 1000}) == (pytest.approx(3.0), "launches")


# --- the record ---


@pytest.fixture(scope="module")
def record():
    return ledger.recorded()


def test_a_cheap_case_is_as_recorded(record):
    case = case_of("swiglu", "forward")
    rows = {
        row["by"]: row
        for row in record["rows"]
        if (row["op"], row["case"]) == ("swiglu", "forward")
    }
    now = {
        row["by"]: row
        for row in ledger.compared([ledger.engine_row(case), *ledger.other_rows(case)])
    }
    for by in (ledger.ENGINE, ledger.EAGER, ledger.COMPILED):
        assert json.loads(json.dumps(now[by])) == rows[by], f"{by}: run `python -m bench.ledger`"


def test_the_page_is_made_from_the_record(record):
    assert ledger.PAGE.read_text() == ledger_table.page(record)
    titles = [line for line in ledger.PAGE.read_text().splitlines() if line.startswith("#")]
    assert all("predicted, not measured" in title.lower() for title in titles)
    assert ledger.RECORD.read_text() == ledger.written(record["rows"])


def test_every_case_has_a_row(record):
    known = {(row["op"], row["case"], row["by"]) for row in record["rows"]}
    for case in gpu.cases():
        assert (case.op, case.name, ledger.ENGINE) in known
        assert case.op not in eager.WORK or (case.op, case.name, ledger.EAGER) in known


NARROW = "gradients in bfloat16"


@pytest.mark.parametrize("op", ledger_table.BAR)
def test_no_alternative_that_does_the_whole_work_moves_fewer_bytes(record, op):
    """Over all phases of a shape: what a forward leaves to its backward is paid for there. Gradients that are narrower
    than the engine's are counted as wide."""
    totals = ledger_table.totals(record["rows"], op)
    assert totals
    for shape, moved in totals.items():
        least = moved.pop(ledger.ENGINE)
        assert moved, f"{op} {shape}: compared with nothing"
        rows = [row for row in record["rows"] if row["op"] == op and row["case"].endswith(shape)]
        for by, total in moved.items():
            row = next(row for row in rows if row["by"] == by)
            if row.get("lacks") == NARROW:
                sizes = row["shape"]
                total += 2 * (sizes["N"] + sizes["V"]) * sizes["H"]
            elif row.get("lacks"):
                continue
            assert total >= least, f"{op} {shape}: {by} moves {total}, the engine {least}"


@pytest.mark.parametrize("op", ledger_table.BAR)
def test_no_library_s_kernels_load_and_store_fewer_bytes(record, op):
    """By the counter that all go through, whatever their work lacks."""
    for shape, moved in ledger_table.totals(record["rows"], op, "requested").items():
        for by in moved.keys() - {ledger.EAGER, ledger.COMPILED}:
            assert moved[by] >= moved[ledger.ENGINE], f"{op} {shape}: {by} asks for fewer"
    libraries_of_op = {row["by"] for row in record["rows"] if row["op"] == op and "memory" in row}
    assert op != "linear_logprob" or {"cut-cross-entropy", "liger-kernel", "verl"} < libraries_of_op


def test_totals_are_of_whole_calls():
    rows = [
        {"op": "x", "case": case, "by": by, "memory": memory}
        for case, by, memory in (
            ("forward, small", "engine", 3.0),
            ("backward, small", "engine", 4.0),
            ("forward, small", "half", 1.0),
            ("loss and gradient", "engine", 5.0),
        )
    ]
    assert ledger_table.totals(rows, "x") == {"small": {"engine": 7.0}, "": {"engine": 5.0}}


@pytest.mark.parametrize("op", ledger_table.BAR)
def test_the_engine_does_not_spill_where_others_do(record, op):
    ours = [row for row in record["rows"] if row["op"] == op and row["by"] == ledger.ENGINE]
    assert ours and all(row["stack"] == row["local_in_loop"] == 0 for row in ours)


def test_libraries_are_recorded_even_where_they_are_not_installed(record):
    found = {(row["op"], row["by"]) for row in record["rows"] if "memory" in row}
    wanted = {(op, by) for op, work in libraries.LIBRARIES.items() for by in work}
    assert len(wanted) >= 6 and wanted <= found


# --- the plan of an iteration ---


def test_memory_of_a_policy_follows_from_its_parameters():
    model = ledger_plan.MODELS["SmolLM2-135M"]
    assert model.cache == 23_040  # bytes a token, docs/design.md
    phases = ledger_plan.memory(model, model, ledger_plan.Batch(episodes=1, running=1, budget=1))
    want = (
        (2 + 4 + 8 + 4) * 2 * 134.5e6 + 4 * 134.5e6 + 4 * 134.5e6
    )  # trained twice, averaged, frozen twice
    assert phases["update policy"] == pytest.approx(want, rel=0.01)


def test_activations_are_those_that_the_stages_plan_with():
    """Without checkpointing; a run's default keeps less."""
    sizes = SimpleNamespace(
        hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
        gated=True, qk_norm=False, parallel_residual=False,
    )  # fmt: skip
    dtypes = memory.Dtypes(torch.bfloat16, torch.bfloat16)
    kept = 30 * memory.kept_bytes(sizes, dtypes, "none")
    assert ledger_plan.MODELS["SmolLM2-135M"].activations == pytest.approx(kept, rel=0.01)


def test_more_ranks_need_less_and_take_less():
    policy, value = ledger_plan.MODELS["GPT-3 1.3B"], ledger_plan.MODELS["GPT-3 6B"]
    batch = ledger_plan.Batch()
    one, eight = (ledger_plan.memory(policy, value, batch, ranks) for ranks in (1, 8))
    assert all(eight[phase] < one[phase] for phase in one)
    slow, fast = (ledger_plan.seconds(policy, value, batch, ranks) for ranks in (1, 8))
    assert all(fast[phase] <= slow[phase] for phase in slow)


def test_what_fits_follows_from_the_largest_phase(record):
    assert record["plan"] == json.loads(json.dumps(ledger_plan.table()))
    for row in record["plan"]:
        largest = max(row["memory_gb"].values())
        assert (row["fits"]["80 GB"] == "yes") == (largest <= 80 * ledger_plan.HELD)
        name = f"| {row['policy']}, {row['reward and value']} |"
        line = next(x for x in ledger_table.page(record).splitlines() if x.startswith(name))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[-3:] == [row["fits"][size] for size in ("24 GB", "80 GB", "8 x 80 GB")]


def test_the_plan_holds_as_many_gradients_of_logits_as_the_launcher():
    (row,) = _launch.table("linear_logprob_backward")["sm_90"]
    assert (row["SLAB"], row["GRADIENTS"]) == (ledger_plan.SLAB, ledger_plan.GRADIENTS)
