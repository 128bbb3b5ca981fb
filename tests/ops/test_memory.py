"""Memory in large pages: what it holds, how long it lives, and that the kernel is asked for them."""

import mmap
from pathlib import Path

import pytest
import torch

from engine.kernels import _memory
from engine.kernels._memory import Slabs, zeros_in_large_pages


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (7,), (2, 1 << 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_it_is_zeros_that_can_be_written(shape, dtype):
    found = zeros_in_large_pages(shape, dtype)
    assert torch.equal(found, torch.zeros(shape, dtype=dtype))
    found.fill_(3)
    assert torch.equal(found, torch.full(shape, 3, dtype=dtype))


def test_where_the_system_has_none_it_is_zeros_all_the_same(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert torch.equal(zeros_in_large_pages((3, 5), torch.float32), torch.zeros(3, 5))


def test_the_kernel_is_asked_for_large_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no large pages")
    memory = zeros_in_large_pages((8 << 20,), torch.uint8)
    lines, inside = Path("/proc/self/smaps").read_text().splitlines(), False
    for line in lines:
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low <= memory.data_ptr() < high
        if inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    raise AssertionError("the memory is in no mapping")


def test_what_is_kept_lies_side_by_side_and_outlives_its_slabs(monkeypatch):
    monkeypatch.setattr(_memory, "_SLAB", 1024)
    slabs = Slabs()
    sizes = [100, 64, 0, 700, 300, 5000, 1]  # the fifth and the sixth want a slab of their own
    given = [torch.randint(0, 255, (n,), dtype=torch.uint8) for n in sizes]
    kept = [slabs.keep(data) for data in given]
    places = [k.data_ptr() for k in kept]
    assert places[1] - places[0] == 128 and all(p % 64 == 0 for p in places)
    del slabs
    assert all(torch.equal(*pair) for pair in zip(kept, given, strict=True))
    assert kept[0].data_ptr() != given[0].data_ptr()
