"""What each kernel does, against the same work by others: PREDICTED, NOT MEASURED.

    python -m bench.ledger                      all ops, eager torch, torch.compile
    python -m bench.ledger --only gae swiglu    these; the rows of other ops stay as they are
    python -m bench.ledger --rivals DIR         and the libraries that bench/rivals/setup.sh put into DIR

Writes bench/results/gpu_ledger.json, and the tables of gpu_ledger.md from it. Bytes are counted
(bench/ledger_count.py), the code is that of bench/results/gpu_code.json, and a time is the floor of an H100 SXM. Rows
of libraries that are not there now stay as they were.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from torch.overrides import TorchFunctionMode

from bench import aot, ledger_plan, ledger_table
from bench.gpu import DTYPES, Case, cases
from bench.ledger_count import counting
from bench.rivals import eager, inductor
from bench.rivals.libraries import LACKS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
RECORD, PAGE = RESULTS / "gpu_ledger.json", RESULTS / "gpu_ledger.md"
LARGE = 2**27  # elements: random numbers of so many are not made
MEMORY, TENSOR, VECTOR, EXPONENTIALS, LAUNCH = (
    3.35e12,
    990e12,
    67e12,
    4.2e12,
    3e-6,
)  # H100 SXM, a second
# Ops on a number a token are counted in float32, as the engine calls them; the others in bfloat16.
FLOAT32 = (
    "gae", "kl_reward", "kl_reward_gae", "ppo_policy_loss", "ppo_value_loss", "ranking_loss", "whiten",
)  # fmt: skip
ENGINE, EAGER, COMPILED = "engine", "eager torch", "torch.compile"
CODE = ("registers", "stack", "local_in_loop", "shared")
Row = dict[str, Any]


def dtype_of(case: Case) -> str:
    return "float32" if case.op in FLOAT32 else case.dtypes[0]


def predicted_ms(row: Row) -> tuple[float, str]:
    """(the floor of an H100 SXM, what sets it)."""
    rate = TENSOR if row["dtype"] != "float32" else VECTOR
    floors = {
        "memory": row["memory"] / MEMORY,
        "products": row["flops"] / rate,
        "exponentials": row["exponentials"] / EXPONENTIALS,
        "launches": row["launches"] * LAUNCH,
    }
    name = max(floors, key=lambda key: floors[key])
    return 1e3 * floors[name], name


def _row(case: Case, by: str, **numbers: Any) -> Row:
    dtype = dtype_of(case)
    size = DTYPES[dtype].itemsize
    row: Row = {
        "op": case.op,
        "case": case.name,
        "dtype": dtype,
        "shape": case.full,
        "by": by,
        "compulsory": case.bytes(size, **case.full),
        "exponentials": case.exponentials(size, **case.full),
        **numbers,
    }
    milliseconds, bound = predicted_ms(row)
    return {**row, "predicted_ms": float(f"{milliseconds:.4g}"), "bound": bound}


def _code(variants: list[Row]) -> Row:
    """The worst of each number over the kernels of one call."""
    if not variants:
        return {}
    worst = {name: max(v[name] for v in variants) for name in CODE}
    return {**worst, "occupancy": min(v["occupancy"] for v in variants)}


def _recorded_code(case: Case) -> Row:
    if not aot.RECORD.exists():
        return {}
    return _code(
        [
            v
            for v in aot.recorded()["variants"]
            if v["op"] == case.op
            and v["arch"] == "sm_90"
            and v["dtype"] == dtype_of(case)
            and case.name in v["cases"]
        ]
    )


class _Unwritten(TorchFunctionMode):
    """Inside, large random tensors are memory that nobody has written to, which the system has not given yet: a count
    does not depend on numbers, and few programs run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.rand, torch.randn) and math.prod(args) > LARGE:
            func = torch.empty
        return func(*args, **(kwargs or {}))


def _gpu_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The product that linear_logprob's backward asks of a GPU's library; on the CPU it makes float32 copies first."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _gpu_add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    more = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    torch.addmm(total, a, b, out=total, **more)


def engine_row(case: Case) -> Row:
    """The case on the engine's kernels, interpreted for some of their programs."""
    from engine.kernels.triton import linear_logprob

    torch.manual_seed(0)
    with _Unwritten():
        given = case.make("cpu", DTYPES[dtype_of(case)], **case.full)
    original = linear_logprob.product, linear_logprob.add_product
    linear_logprob.product, linear_logprob.add_product = _gpu_product, _gpu_add_product
    try:
        with torch.no_grad(), counting() as work:
            case.run(*given)
    finally:
        linear_logprob.product, linear_logprob.add_product = original
    return _row(
        case,
        ENGINE,
        memory=round(work.memory),
        requested=round(work.requested),
        flops=work.flops,
        launches=work.launches,
        kernels=dict(sorted(work.kernels.items())),
        **_recorded_code(case),
    )


def other_rows(case: Case) -> list[Row]:
    """The case by eager torch and by torch.compile."""
    if case.op not in eager.WORK:
        return []
    dtype = DTYPES[dtype_of(case)]
    work = eager.run(case.op, case.name, dtype, case.full, counting)
    shared = {"flops": work.flops, "memory": round(work.memory), "requested": round(work.requested)}
    rows = [_row(case, EAGER, launches=work.launches, **shared)]
    try:
        moved, groups = inductor.run(case.op, case.name, dtype, case.full)
    except Exception as error:
        print(f"{case.op}, {case.name}: torch.compile: {error!r}", file=sys.stderr)
        return rows
    # its products are the library's, with the operands that their tiles load again
    again = work.requested - work.memory
    numbers = {"memory": round(moved), "requested": round(moved + again), "flops": work.flops}
    return [*rows, _row(case, COMPILED, launches=groups, **numbers)]


def rival_rows(folder: Path, only: list[str], libraries: list[str]) -> list[Row]:
    """The libraries' rows, from two processes: one interprets, the other compiles."""
    by_key: dict[tuple[str, str, str], Row] = {}
    for interpreted in ("1", "0"):
        environment = {**os.environ, "TRITON_INTERPRET": interpreted}
        command = [sys.executable, "-m", "bench.rivals", str(folder)]
        command += ["--only", *only] if only else []
        command += ["--library", *libraries] if libraries else []
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        for line in run.stdout.splitlines():
            if line.startswith("{"):
                found = json.loads(line)
                key = (found["op"], found["case"], found["library"])
                by_key.setdefault(key, {}).update(found)
    known = {(case.op, case.name): case for case in cases()}
    rows = []
    for (op, name, library), found in by_key.items():
        case = known[op, name]
        if "memory" not in found:
            said = {"op": op, "case": name, "by": library, "refused": found.get("refused", "")}
            rows.append({**said, "dtype": found["dtype"], "shape": case.full})
            continue
        numbers = {
            "memory": round(found["memory"]),
            "requested": round(found["requested"]),
            "flops": found["flops"],
            "launches": found["launches"],
            "kernels": found["kernels"],
        }
        rows.append(_row(case, library, **numbers, **_code(found.get("code", []))))
    return rows


def key(row: Row) -> tuple[str, ...]:
    return (row["op"], row["case"], "" if row["by"] == ENGINE else row["by"])


def compared(rows: list[Row]) -> list[Row]:
    """With the ratio of each row's bytes to the engine's, and what a library's work lacks."""
    ours = {(row["op"], row["case"]): row for row in rows if row["by"] == ENGINE}
    for row in rows:
        lacks = LACKS.get(f"{row['by']} {row['op']}", "")
        row.update({"lacks": lacks} if lacks else {})
        base = ours.get((row["op"], row["case"]))
        if base and "memory" in row:
            row["bytes_to_engine"] = float(f"{row['memory'] / base['memory']:.4g}")
            row["time_to_engine"] = float(f"{row['predicted_ms'] / base['predicted_ms']:.4g}")
    return sorted(rows, key=key)


def written(rows: list[Row]) -> str:
    """The file: one row a line."""
    head = {
        "title": "PREDICTED, NOT MEASURED",
        "versions": {**aot.versions(), "torch": torch.__version__},
        "plan": ledger_plan.table(),
    }
    lines = ",\n".join(json.dumps(row, sort_keys=True) for row in rows)
    return json.dumps(head, sort_keys=True)[:-1] + ', "rows": [\n' + lines + "\n]}\n"


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.ledger", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="OP")
    parser.add_argument("--rivals", type=Path, metavar="DIR")
    parser.add_argument("--library", nargs="+", default=[], help="of DIR, these")
    given = parser.parse_args()
    kept = recorded()["rows"] if RECORD.exists() else []
    rows: dict[tuple[str, ...], Row] = {}
    for case in cases():
        if given.only and case.op not in given.only:
            continue
        try:
            new = [engine_row(case), *other_rows(case)]
        except Exception as error:  # one case must not lose the others
            print(f"FAILED {case.op}, {case.name}: {error!r}", file=sys.stderr)
            continue
        rows.update({key(row): row for row in new})
        print(f"{case.op}, {case.name}: {len(new)} rows", flush=True)
    if given.rivals:
        rows.update({key(row): row for row in rival_rows(given.rivals, given.only, given.library)})
    known = {(case.op, case.name) for case in cases()}
    for row in kept:  # of other ops, and of libraries that are not here
        if (row["op"], row["case"]) in known:
            rows.setdefault(key(row), row)
    RECORD.write_text(written(compared(list(rows.values()))))
    PAGE.write_text(ledger_table.page(recorded()))
    print(f"{len(rows)} rows in {RECORD.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
