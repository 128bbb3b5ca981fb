"""What compiled code must not do: one function a gate, from a record of bench/aot.py to what is wrong with it."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from bench import aot_paths
from bench.aot_code import MACHINES

Record = dict[str, Any]
THREADS = {"gfx942": 64}  # a warp's; 32 elsewhere

# By op, the kernels that must load 128 bits at a time: those that pass over memory, and those of products.
WIDE: dict[str, tuple[str, ...]] = {
    "adamw": ("_step", "_squares", "_ordered_sum"),
    "attention": ("_forward", "_delta", "_backward_queries", "_backward_keys"),
    "attention_decode": ("_chunk",),
    "gelu": ("_forward", "_backward"),
    "kl_reward": ("_forward", "_backward"),
    "layernorm": ("_forward", "_backward", "_backward_wide", "_sum_parts"),
    "linear": ("_forward",),
    "linear_logprob": ("_statistics", "_slab_gradient"),
    "linear_sample": ("_statistics", "_pick"),
    "ppo_policy_loss": ("_tokens",),
    "ppo_value_loss": ("_tokens",),
    "rmsnorm": ("_forward", "_backward", "_backward_wide", "_sum_parts"),
    "rope": ("_forward", "_rotate_and_write"),
    "swiglu": ("_forward", "_backward"),
    "whiten": ("_statistics", "_forward", "_backward"),
}
ANYWHERE = "a segment begins at any token, a number that is read: no address is known to be a multiple of 16 bytes"
WALK = f"{ANYWHERE}; lanes hold neighbours, so that a warp reads whole lines all the same"
FEW = "a few KB in all"
APART = "numbers of a tile lie N behind those of the one before, and N is any number"
# (op, kernel) -> why it need not
NARROW: dict[tuple[str, str], str] = {
    ("attention_decode", "_merge"): "one warp over the channels of a head: of 64, two a lane",
    ("gae", "_forward"): f"{WALK}; and it walks downwards",
    ("gae", "_backward"): WALK,
    ("kl_reward", "_ends"): "one token a segment, wherever it ends",
    ("kl_reward", "_backward_ends"): "one token a segment, wherever it ends",
    ("kl_reward_gae", "_forward"): f"{WALK}; and it walks downwards",
    ("linear_logprob", "_merge"): APART,
    ("linear_sample", "_merge"): APART,
    ("ppo_policy_loss", "add_partials"): FEW,
    ("ppo_value_loss", "add_partials"): FEW,
    ("ranking_loss", "_prompts"): f"{ANYWHERE}; {FEW}",
    ("ranking_loss", "_batch"): FEW,
    ("ranking_loss", "_gradient"): f"{ANYWHERE}; {FEW}",
    ("whiten", "_merge"): FEW,
}
# Ops whose blocks give a lane of AMD's 64 fewer than 128 bits in 16-bit dtypes.
NARROW_ON_AMD = {"kl_reward", "ppo_policy_loss", "ppo_value_loss", "swiglu", "whiten"}
# A depth of no multiple of 16 bytes (linear's): a row of such an operand begins at any address.
ODD = "UNIT=1"
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
    """Kernels of WIDE load 128 bits at a time."""
    narrow = record["arch"] == "gfx942" and record["op"] in NARROW_ON_AMD
    narrow &= record["dtype"] != "float32"
    narrow |= ODD in record["types"].split()
    if narrow or record["kernel"] not in WIDE.get(record["op"], ()):
        return ""
    return "no 128-bit load, which WIDE asks for" if not record["wide_loads"] else ""


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


def uncompiled(launched: Iterable[tuple[str, str]]) -> list[str]:
    """Kernels of kernels/triton that nothing of bench/gpu launches. `launched`: (file, name)."""
    missing = sorted(aot_paths.defined() - {*launched})
    return [f"kernels/triton/{room}.py, {name}: no case in bench/gpu" for room, name in missing]


def unsorted(kernels: Iterable[tuple[str, str]]) -> list[str]:
    """Kernels, as (op, name), that are neither in WIDE nor in NARROW, or in both; and entries of none."""
    wide = [(op, name) for op, of_op in WIDE.items() for name in of_op]
    known = [*wide, *NARROW]
    wrong = {*kernels} ^ {*known} | {one for one in known if known.count(one) > 1}
    want = "want it once, in WIDE or NARROW of bench/aot_gates.py"
    return [f"{op} {name}: {want}" for op, name in sorted(wrong)]
