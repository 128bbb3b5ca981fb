"""The public face of the kernels: pure functions, packed tensors in and packed tensors out.

Offsets `cu` are int32 (S+1,) with cu[0] = 0; empty segments are allowed. Results are float32 on
every backend; float64 inputs run on the torch definitions ("reference"). Each function's contract
is its docstring.

`with backend("reference")` and ENGINE_BACKEND=reference choose the definitions; without a choice
C++ runs where it can. `python -m engine.ops` prints what runs on this machine, and why.
"""

import argparse
import importlib
import os
import pkgutil

import torch
from rich.console import Console
from rich.table import Table

import engine.kernels
from engine.kernels import _backend
from engine.kernels._backend import BackendError, backend, cpu_class
from engine.kernels.attention import attention
from engine.kernels.gae import gae
from engine.kernels.kl_reward import kl_reward
from engine.kernels.linear_logprob import linear_logprob
from engine.kernels.linear_logprob_loss import linear_logprob_loss
from engine.kernels.pack import pack, unpack
from engine.kernels.ppo_policy_loss import (
    ppo_policy_loss,
    ppo_policy_loss_and_sums,
    ppo_policy_stats,
)
from engine.kernels.ppo_value_loss import ppo_value_loss, ppo_value_loss_and_sums, ppo_value_stats
from engine.kernels.ranking_loss import ranking_denominator, ranking_loss
from engine.kernels.whiten import whiten

__all__ = [
    "BackendError",
    "attention",
    "backend",
    "cpu_class",
    "gae",
    "kl_reward",
    "linear_logprob",
    "linear_logprob_loss",
    "pack",
    "ppo_policy_loss",
    "ppo_policy_loss_and_sums",
    "ppo_policy_stats",
    "ppo_value_loss",
    "ppo_value_loss_and_sums",
    "ppo_value_stats",
    "ranking_denominator",
    "ranking_loss",
    "unpack",
    "whiten",
]


def op_modules() -> list[str]:
    """Every op of `engine/kernels`, public or not: one file, one op."""
    names = (module.name for module in pkgutil.iter_modules(engine.kernels.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def cpp_state(op: str) -> tuple[bool, str]:
    """Does this op have a C++ kernel here, and if not, why not?"""
    schemas = [name for name, room in _backend.ROOMS.items() if room == op]  # adamw's are adamw_steps, square_sums, ...
    if not schemas and op not in _backend.CLASSES:
        return False, "written in torch operations"
    if _backend.extension() is None:
        return False, _backend.why_no_extension()
    # beside them rmsnorm_residual, layernorm_residual and rope_and_write, which C++ has in its fused step only
    own = [name for name in (op, f"{op}_backward") if name in schemas] or schemas
    if all(map(_backend.has_cpu_kernel, own or [op])):
        return True, ""
    return False, "is defined, but the extension was built without its C++ file; rebuild it"


def triton_state(op: str) -> str:
    """Has this op a Triton kernel, and can it run here?"""
    if not _backend.has_triton_kernel(op):
        return "-"
    if _backend.why_no_triton():
        return "not installed"
    return "yes" if torch.cuda.is_available() else "no GPU"


def backend_in_use(op: str, has_cpp: bool) -> str:
    forced = _backend.forced_backend()
    if forced is None:
        return "cpp" if has_cpp else "reference"
    usable = {"cpp": has_cpp, "triton": _backend.has_triton_kernel(op), "reference": True}[forced]
    return forced if usable else f"none: {forced} was asked for"


def backends_table() -> Table:
    """Op by backend: what float32 tensors on the CPU run on, and the reason where it is not C++."""
    table = Table(title="Ops and backends")
    for column in ("op", "public", "cpp", "triton", "reference", "in use", "reason"):
        table.add_column(column)
    for op in op_modules():
        importlib.import_module(f"engine.kernels.{op}")
        has_cpp, reason = cpp_state(op)
        if has_cpp and _backend.forced_backend() == "reference":
            reason = "reference was asked for (ENGINE_BACKEND, or `with backend`)"
        public = op in __all__
        table.add_row(
            op,
            "yes" if public else "",
            "yes" if has_cpp else "-",
            triton_state(op),
            "yes",
            backend_in_use(op, has_cpp),
            reason,
        )
    return table


def machine_lines() -> list[str]:
    """The class of CPU that was found, the one in use and who chose it, and the threads."""
    module = _backend.extension()
    if module is None:
        return [
            f"C++ kernels: none: {_backend.why_no_extension()}",
            f"threads: {torch.get_num_threads()}",
        ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    asked = os.environ.get("ENGINE_CPU_CLASS")
    chosen = f"ENGINE_CPU_CLASS={asked}" if asked else "the best this machine runs"
    return [
        f"class of CPU found: {module.detected_class()}; in use: {module.cpu_class()} ({chosen})",
        f"threads: {torch.get_num_threads()} (torch {torch.__version__})",
        f"GPU: {gpu}",
    ]


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m engine.ops",
        description="Which implementation of each op runs here, and why.",
    ).parse_args()
    console = Console()
    for line in machine_lines():
        console.print(line, highlight=False)
    console.print(backends_table())


if __name__ == "__main__":
    main()
