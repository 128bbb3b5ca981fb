"""What torch.compile would move: the eager work of `eager.py`, traced, split and fused by inductor's own scheduler.

No code is made: bytes are those that each fused group reads and writes, as the scheduler gives them, products as groups
of their own. It is the scheduler for CPUs, since that for GPUs asks a driver; its groups differ little, and where they
do, larger ones move less. The forward keeps what inductor's partition of the joint graph keeps.
"""

import logging
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.rivals import eager


def _counted(found: list[tuple[int, int]]) -> Any:
    """A compiler for aot_function that lowers and schedules a graph and keeps (bytes, groups)."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        mode = next((x.fake_mode for x in inputs if hasattr(x, "fake_mode")), FakeTensorMode())
        with V.set_fake_mode(mode):
            lowered = GraphLowering(graph)
            with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
                lowered.run(*inputs)
                lowered._update_scheduler()
                nodes = lowered.scheduler.nodes
                moved = sum(node.get_read_write_buffers_sizes() for node in nodes)
                found.append((int(moved), len(nodes)))
        return graph.forward

    return compiler


LONGEST = 16  # steps of a loop over time that are traced: each compiles for itself


def run(op: str, name: str, dtype: torch.dtype, shape: dict[str, int]) -> tuple[float, int]:
    """(bytes, launches) of a case's phases. Loops over time are traced for 16 steps, their groups scaled."""
    times = shape["T"] / LONGEST if "gae" in op else 1
    if times > 1:
        bytes, groups = _run(op, name, dtype, {**shape, "T": LONGEST})
        return bytes * times, round(groups * times)
    return _run(op, name, dtype, shape)


def _run(op: str, name: str, dtype: torch.dtype, shape: dict[str, int]) -> tuple[float, int]:
    from functorch.compile import aot_function, min_cut_rematerialization_partition
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table

    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    forwards: list[tuple[int, int]] = []
    backwards: list[tuple[int, int]] = []
    ahead, back = eager.phases(name)
    eager.DEVICE = "cpu"
    try:
        # a CPU with several threads leaves scatter_add to a kernel of its own; a GPU fuses it
        with config.patch({"cpp.fallback_scatter_reduce_sum": False}), FakeTensorMode():
            given, forward = eager.WORK[op](name, dtype, **shape)
            if not back:
                given = tuple(x.detach() for x in given)
            compiled = aot_function(
                forward,
                fw_compiler=_counted(forwards),
                bw_compiler=_counted(backwards),
                partition_fn=min_cut_rematerialization_partition,
                decompositions=select_decomp_table(),
            )
            out = compiled(*given)
            if back:
                eager._backward(out)
    finally:
        eager.DEVICE = "meta"
    parts = (forwards if ahead else []) + (backwards if back else [])
    return float(sum(bytes for bytes, _ in parts)), sum(groups for _, groups in parts)
