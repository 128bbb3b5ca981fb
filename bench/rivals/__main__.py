"""python -m bench.rivals DIR: the libraries that setup.sh installed in DIR, as JSON lines.

With TRITON_INTERPRET=1 their work is counted; without it their kernels are compiled for sm_90 and their code is read.
"""

import argparse
import json
import os
import sys
from typing import Any

import torch

from bench.gpu import DTYPES, Case, cases
from bench.rivals import libraries

LARGEST = 2.5e9  # compulsory bytes of what is counted, so that it fits in a small machine


def wanted() -> list[Case]:
    found = [case for case in cases() if case.op in libraries.LIBRARIES]
    return [
        case
        for case in found
        if "residual" not in case.name and case.bytes(2, **case.full) < LARGEST
    ]


def compiled(call: libraries.Call) -> list[dict[str, Any]]:
    """Every launch of a call, not run but compiled for sm_90, each kernel once."""
    from triton.runtime.jit import JITFunction

    from bench import aot, aot_plan

    variants: dict[str, Any] = {}

    def run(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        variant = aot_plan.specialise(self, given, named, "sm_90", "", "bfloat16")
        variants.setdefault(variant.key, variant)

    original, item = JITFunction.run, torch.Tensor.item
    JITFunction.run, torch.Tensor.item = run, lambda self: 1  # host functions that read a value
    try:
        call()
    finally:
        JITFunction.run, torch.Tensor.item = original, item
    return [{"kernel": v.kernel, **aot.examined(v)} for v in variants.values()]


def record(case: Case, library: str, interpreted: bool) -> dict[str, Any]:
    work = libraries.LIBRARIES[case.op][library]
    said: dict[str, Any] = {
        "op": case.op,
        "case": case.name,
        "library": library,
        "dtype": "bfloat16",
    }
    said["lacks"] = libraries.LACKS.get(f"{library} {case.op}", "")
    back = "backward" in case.name
    try:
        with torch.no_grad():
            call = work("cpu" if interpreted else "meta", DTYPES["bfloat16"], back, **case.full)
            if not interpreted:
                return {**said, "code": compiled(call)}
            from bench.ledger_count import counting

            with counting() as counted:
                call()
        return {**said, **vars(counted)}
    except Exception as error:  # what a library cannot do is a result
        return {**said, "refused": f"{type(error).__name__}: {str(error).strip()[:200]}"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.rivals", description=__doc__)
    parser.add_argument("folder", help="where setup.sh installed them")
    parser.add_argument("--only", nargs="+", default=[], metavar="OP")
    parser.add_argument("--library", nargs="+", default=[])
    given = parser.parse_args()
    sys.path.insert(0, given.folder)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for case in wanted():
        for library in libraries.LIBRARIES[case.op]:
            asked = not given.library or library in given.library
            if asked and (not given.only or case.op in given.only):
                print(json.dumps(record(case, library, interpreted)), flush=True)


if __name__ == "__main__":
    main()
