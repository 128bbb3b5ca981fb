"""The shim that runs CUDA C++ on the CPU: what it computes, and that it reports what a GPU need not run."""

import pytest
from emulation import ORDERS, driver, needs_compiler, start

pytestmark = needs_compiler


def results(name: str, order: str = "forward", seed: int = 1, checked: bool = False) -> list[int]:
    done = start(driver("shim", checked), name, str(ORDERS[order]), str(seed))
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def message(name: str, order: str = "forward", checked: bool = False) -> str:
    done = start(driver("shim", checked), name, str(ORDERS[order]), "1")
    assert done.returncode != 0, f"{name} was not reported; it printed {done.stdout}"
    return done.stderr


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "sanitized"])
@pytest.mark.parametrize("order", ORDERS)
def test_right_kernels_are_right_in_every_order(order, checked):
    assert results("block_sum", order, checked=checked) == [128 * 127 // 2] * 128
    assert results("operations", order, checked=checked) == [1] * 64
    assert results("dynamic_shared", order, checked=checked) == list(range(64))[::-1]
    assert results("halves", order, checked=checked) == [3] * 16 + [20] * 16
    assert results("counts", order, checked=checked)[:2] == [3 * 64, 63]


def test_places_in_the_grid():
    want = [
        1000 * y + 100 * x + 10 * j + i
        for y in (0, 1)
        for x in (0, 1)
        for j in (0, 1)
        for i in range(4)
    ]
    assert results("of_blocks") == want


def test_a_missing_barrier_shows_in_another_order():
    forward, reverse = results("without_barrier"), results("without_barrier", "reverse")
    wanted = list(range(64))[::-1]
    assert forward != wanted and reverse != wanted and forward != reverse
    assert len({tuple(results("without_barrier", "random", seed)) for seed in range(4)}) == 4


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_is_poisoned_for_each_block(order):
    poison = int.from_bytes(b"\xcd" * 4, "little", signed=True)
    assert results("fresh_shared", order) == [poison] * 64


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("outside_static", "wrote outside the shared array held"),
        ("outside_dynamic", "wrote outside the shared array the dynamic bytes"),
        ("outside_output", "wrote outside of the results"),
        ("barriers_of_two_branches", "divergent barrier: thread"),
        ("returns_before_a_barrier", "divergent barrier: thread"),
        ("waits_for_each_other", "deadlock: no thread can go on"),
        ("mask_without_itself", "with mask 0x0000ffff, which lacks its own lane"),
        ("masks_that_differ", "divergent warp: thread"),
        ("reads_a_lane_apart", "reads lane 20, which mask 0x0000ffff lacks"),
        ("operations_that_differ", "divergent warp: thread"),
        ("lane_that_has_returned", "names lane 7, which has returned"),
        ("lane_that_is_not_there", "names lane 16, which the block does not have"),
        ("no_blocks", "invalid grid of 0 x 1 x 1 blocks"),
        ("too_many_threads", "invalid block of 1025 x 1 x 1 threads"),
        ("too_many_bytes", "65536 dynamic bytes"),
    ],
)
def test_what_a_gpu_need_not_run_is_reported(name, says):
    for order in ORDERS:
        found = message(name, order)
        # in another order the lane returns while its warp waits: nothing is left that can run
        late = name == "lane_that_has_returned" and "deadlock" in found
        assert says in found or late, found
        assert "emulated CUDA: kernel start.kernel, block (" in found


@pytest.mark.parametrize("name", ["outside_static", "outside_dynamic", "outside_output"])
def test_the_sanitizer_stops_a_wrong_address_where_it_is_used(name):
    found = message(name, checked=True)
    assert "AddressSanitizer: use-after-poison" in found and f"in {name}" in found.replace(
        "(anonymous namespace)::", ""
    )
