"""What compiled code must not do: one function a gate, from a record of bench/aot.py to what is wrong with it."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.aot_code import MACHINES

Record = dict[str, Any]
KERNELS = Path(__file__).parents[1] / "kernels" / "triton"
THREADS = {"gfx942": 64}  # a warp's; 32 elsewhere

# Kernels that do nothing but pass over memory: what they load must come 128 bits at a time.
STREAMING: dict[str, tuple[str, ...]] = {
    "adamw": ("_step", "_squares"),
    "gelu": ("_forward", "_backward"),
    "kl_reward": ("_forward", "_backward"),
    "layernorm": ("_forward", "_backward", "_backward_wide"),
    "ppo_policy_loss": ("_tokens",),
    "ppo_value_loss": ("_tokens",),
    "rmsnorm": ("_forward", "_backward", "_backward_wide"),
    "rope": ("_forward", "_rotate_and_write"),
    "swiglu": ("_forward", "_backward"),
    "whiten": ("_forward", "_backward"),
}
# Ops whose blocks give a lane of AMD's 64 fewer than 128 bits in some dtype.
NARROW_ON_AMD = {"kl_reward", "ppo_policy_loss", "ppo_value_loss", "swiglu", "whiten"}
# (op, kernel, gate) -> the reason why it may
ALLOWED: dict[tuple[str, str, str], str] = {}


def registers(record: Record) -> str:
    """A block's registers must fit the register file."""
    threads = record["warps"] * THREADS.get(record["arch"], 32)
    wanted, most = record["registers"] * threads, MACHINES[record["arch"]].registers
    return f"{wanted} registers a block, at most {most}" if wanted > most else ""


def shared(record: Record) -> str:
    """A block's shared memory must be what the architecture gives to one."""
    most = MACHINES[record["arch"]].shared_block
    return (
        f"{record['shared']} bytes of shared memory, at most {most}"
        if record["shared"] > most
        else ""
    )


def spills(record: Record) -> str:
    """No local memory in a loop; a kernel without loops is itself the body of one, over its programs."""
    inside = record["local_in_loop"] if record["loop"] else record["local"]
    where = "in a loop" if record["loop"] else "in a kernel without loops"
    return f"{inside} loads and stores of local memory {where}" if inside else ""


def tensor_cores(record: Record) -> str:
    """Products of 16-bit numbers run on tensor cores: on whole warpgroups where a tile is large enough for that."""
    low = [dot for dot in record["dots"] if re.search(r" (bf16|f16)$", dot)]
    if not low:
        return ""
    if not record["hgmma"] + record["mma"]:
        return f"products {', '.join(low)} without a tensor core instruction"
    large = [dot for dot in low if int(dot.split("x")[0]) >= 64]
    if record["arch"] == "sm_90" and large and record["warps"] % 4 == 0 and not record["hgmma"]:
        return f"products {', '.join(large)} without HGMMA"
    return ""


def wide_loads(record: Record) -> str:
    """Kernels that stream load 128 bits at a time."""
    narrow = record["arch"] == "gfx942" and record["op"] in NARROW_ON_AMD
    if narrow or record["kernel"] not in STREAMING.get(record["op"], ()):
        return ""
    return "no 128-bit load in a kernel that streams" if not record["wide_loads"] else ""


def occupied(record: Record) -> str:
    """At least one block must fit."""
    return f"no block fits: {record['limit']}" if record["blocks"] < 1 else ""


GATES: dict[str, Callable[[Record], str]] = {
    gate.__name__: gate for gate in (registers, shared, spills, tensor_cores, wide_loads, occupied)
}


def named(record: Record) -> str:
    return f"{record['op']} {record['kernel']} {record['dtype']} {record['arch']} [{', '.join(record['cases'])}]"


def failures(record: Record) -> list[str]:
    """What is wrong with a variant, one sentence a gate."""
    found = []
    for name, gate in GATES.items():
        said = gate(record)
        if said and (record["op"], record["kernel"], name) not in ALLOWED:
            found.append(f"{name}: {said}")
    return found


def uncompiled(ops: Iterable[str]) -> list[str]:
    """Files of kernels/triton that no case of bench/gpu reaches."""
    rooms = {path.stem for path in KERNELS.glob("[a-z]*.py")}
    return [f"kernels/triton/{room}.py: no case in bench/gpu" for room in sorted(rooms - {*ops})]
