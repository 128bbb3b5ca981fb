"""What each Triton kernel loads and stores, counted in the interpreter, against the compulsory bytes."""

import pytest
import torch

from bench.gpu import DTYPES, cases
from bench.traffic import counted
from engine.kernels._backend import backend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.op}: {case.name}")
def test_bytes(case):
    dtype = DTYPES[case.dtypes[0]]
    arguments = case.make("cpu", dtype, **case.small)
    with backend("triton"), counted() as traffic:
        case.run(*arguments)
    compulsory = case.bytes(dtype.itemsize, **case.small)
    assert traffic.kernels, "no kernel was launched"
    assert traffic.atomics == 0, "atomics add in any order: runs would differ"
    assert compulsory <= traffic.bytes * 1.0001, (
        f"counted {traffic.bytes} bytes, fewer than the compulsory {compulsory:.0f}: the case's formula is wrong"
    )
    assert traffic.bytes <= case.most_traffic * compulsory, (
        f"counted {traffic.bytes} bytes ({traffic.loaded} in, {traffic.stored} out), want at most "
        f"{case.most_traffic} x {compulsory:.0f}"
    )
    assert case.most_traffic <= 1.05 or case.why, "a case that reads more than once says why"
