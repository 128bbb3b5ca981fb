"""Compiles every kernel of bench/gpu for every architecture, without a GPU, and holds the code to its gates.

    python -m bench.aot                       compile all, check, write bench/results/gpu_code.json
    python -m bench.aot --check               compile a part, check, and compare with that file (see `due`)
    python -m bench.aot --check_all           compile all, check, and compare
    python -m bench.aot --plan                compile nothing: is a kernel, or a way through one, left out?
    python -m bench.aot --only gae            one op: a line a kernel, its gates; nothing is written
    python -m bench.aot --only gae --keep DIR with the code of each kernel in DIR

Each case's launcher runs on "meta" tensors with an architecture's column of the tables, so what is compiled is what a
GPU would be given: the launches, the constants, and the arguments as Triton's own binder specialises them (divisible
by 16, equal to 1). Nothing is launched. Results lie in build/aot under a hash of all that made them.
"""

import argparse
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Container, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "aot"
RECORD = ROOT / "bench" / "results" / "gpu_code.json"
REGENERATE = "python -m bench.aot"
Record = dict[str, Any]
if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has no code
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))

from bench import aot_code, aot_gates, aot_paths  # noqa: E402
from bench.aot_plan import Variant, plan  # noqa: E402
from bench.gpu import DTYPES  # noqa: E402


def examined(variant: Variant, keep: Path | None = None) -> Record:
    """Compiles a variant and reads its code. Raises what the compiler raises."""
    return read(variant.arch, [assembled(variant, keep)])[0]


def assembled(variant: Variant, keep: Path | None = None) -> Any:
    """What triton makes of a variant. Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(variant.function, variant.signature, variant.constants, variant.attributes)
    target = GPUTarget(*aot_code.MACHINES[variant.arch].target)
    compiled = triton.compile(source, target=target, options=variant.options)
    if keep:
        _keep(compiled, variant, keep)
    return compiled


def read(arch: str, kernels: list[Any]) -> list[Record]:
    """The records of an architecture's compiled kernels: one call of the disassembler for all."""
    if arch in aot_code.RAW:
        codes = aot_code.nvidia([kernel.asm["cubin"] for kernel in kernels], arch)
    else:
        codes = [aot_code.amd(kernel.asm["amdgcn"]) for kernel in kernels]
    return [_record(arch, *pair) for pair in zip(kernels, codes, strict=True)]


def _record(arch: str, compiled: Any, code: Record) -> Record:
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    blocks, share, limit = aot_code.occupancy(arch, int(code["registers"]), shared, warps, columns)
    return {
        **code,
        "shared": shared,
        "tensor_memory": columns,
        "warps": warps,
        "stages": compiled.metadata.num_stages,
        "dots": _dots(compiled.asm["ttir"]),
        "blocks": blocks,
        "occupancy": share,
        "limit": limit,
    }


_TILE = r"tensor<(?:\d+x)?(\d+)x(\d+)x([a-z]\w*)>"
_DOT = re.compile(rf"tt\.dot .*: {_TILE} \* {_TILE}")


def _dots(ttir: str) -> list[str]:
    """Each product of the kernel as MxNxK type."""
    text = str(ttir)
    found = {f"{m[1]}x{m[5]}x{m[2]} {m[3]}" for m in _DOT.finditer(text)}
    if text.count("tt.dot ") and not found:
        raise RuntimeError("tt.dot is written in another way: mend _DOT in bench/aot.py")
    return sorted(found)


def _keep(compiled: Any, variant: Variant, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{variant.op}.{variant.kernel}.{variant.dtype}.{variant.arch}.{variant.key[:6]}"
    for kind in ("ttir", "ttgir", "ptx", "amdgcn"):
        if kind in compiled.asm:
            (folder / f"{stem}.{kind}").write_text(str(compiled.asm[kind]))
    if "cubin" in compiled.asm:
        text = aot_code.cuobjdump("--dump-sass", compiled.asm["cubin"])
        (folder / f"{stem}.sass").write_text(text)


_jobs: list[Variant] = []  # the workers' copy comes with the fork
_folder: Path | None = None
TOGETHER = 24  # variants of one task: the disassembler is called once for each architecture among them


def _work(first: int) -> list[Record]:
    """The records of TOGETHER variants, from the cache where they are known."""
    part = _jobs[first : first + TOGETHER]
    found: dict[str, Record] = {}  # by key
    fresh: dict[str, list[tuple[Variant, Any]]] = {}  # by architecture
    for variant in part:
        cached = CACHE / f"{variant.key}.json"
        if cached.exists() and _folder is None:
            found[variant.key] = json.loads(cached.read_text())
            continue
        try:
            fresh.setdefault(variant.arch, []).append((variant, assembled(variant, _folder)))
        except Exception as error:
            found[variant.key] = {"error": f"{type(error).__name__}: {str(error)[:600]}"}
    for arch, made in fresh.items():
        records = read(arch, [kernel for _, kernel in made])
        for (variant, _), record in zip(made, records, strict=True):
            found[variant.key] = record
            _store(variant, record)
    return [found[variant.key] for variant in part]


def _store(variant: Variant, record: Record) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    cached = CACHE / f"{variant.key}.json"
    beside = cached.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(record))
    os.replace(beside, cached)


def compiled(variants: list[Variant], keep: Path | None = None) -> Iterator[Record]:
    """The records of all, in order, from a process a core."""
    global _jobs, _folder
    import multiprocessing

    _jobs, _folder = variants, keep
    known = [(CACHE / f"{v.key}.json").exists() for v in variants]
    tasks = range(0, len(variants), TOGETHER)
    if all(known) and keep is None:
        parts: Iterator[list[Record]] = map(_work, tasks)
    else:
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0)), mp_context=context)
        parts = pool.map(_work, tasks)
    for variant, result in zip(variants, itertools.chain.from_iterable(parts), strict=True):
        yield {**_said(variant), **result}


def _said(variant: Variant) -> Record:
    return {
        "op": variant.op,
        "kernel": variant.kernel,
        "arch": variant.arch,
        "dtype": variant.dtype,
        "cases": sorted(variant.cases),
        "types": variant.types,
        "key": variant.key,
    }


def due(variants: list[Variant], known: Container[tuple[str, str]]) -> list[Variant]:
    """What a check compiles: every variant that is not `known` by its op and key, and of each kernel, known or not, as
    many as name each architecture and each dtype once.

    The code of the others, rows of tables and ways through a kernel, follows from the same sources, options and
    compiler as what is recorded under their keys.
    """
    kernels: dict[tuple[str, str], dict[tuple[str, str], Variant]] = {}
    for v in variants:
        kernels.setdefault((v.op, v.kernel), {}).setdefault((v.arch, v.dtype), v)
    ones = {id(v) for of_kernel in kernels.values() for v in _diagonal(of_kernel)}
    return [v for v in variants if id(v) in ones or (v.op, v.key) not in known]


def _diagonal(found: dict[tuple[str, str], Variant]) -> list[Variant]:
    """Some by architecture and dtype, so that each of both is among them."""
    archs, dtypes = ([*dict.fromkeys(names)] for names in zip(*found, strict=True))
    count = max(len(archs), len(dtypes))
    pairs = [(archs[i % len(archs)], dtypes[i % len(dtypes)]) for i in range(count)]
    chosen = [pair for pair in pairs if pair in found]
    for arch, dtype in found:
        if arch not in {a for a, _ in chosen} or dtype not in {d for _, d in chosen}:
            chosen.append((arch, dtype))
    return [found[pair] for pair in chosen]


def checked(variants: list[Variant]) -> Iterator[Record]:
    """The records of all, in order: those that are due compiled, the others as recorded under their keys."""
    before = recorded() if RECORD.exists() else {}
    same = before.get("versions") == versions()
    known = {(r["op"], r["key"]): r for r in before["variants"]} if same else {}
    now = due(variants, known)
    print(f"{len(now)} of {len(variants)} are compiled, the others as recorded", flush=True)
    made = {(v.op, v.key): record for v, record in zip(now, compiled(now), strict=True)}
    for v in variants:
        yield made.get((v.op, v.key)) or known[v.op, v.key] | _said(v)


@functools.cache
def versions() -> dict[str, str]:
    """Who made the code: triton and both of its assemblers."""
    import triton

    found = {"triton": triton.__version__}
    for name in ("ptxas", "ptxas-blackwell"):
        text = subprocess.run([aot_code.tool(name), "--version"], capture_output=True, text=True)
        match = re.search(r"V[\d.]+", text.stdout)
        found[name] = match[0] if match else "unknown"
    return found


def identity(record: Record) -> tuple[str, ...]:
    return tuple(str(record[name]) for name in ("op", "kernel", "dtype", "arch", "types"))


def written(records: list[Record]) -> str:
    """The file's text: one variant a line, sorted, so that a change is a changed line."""
    head = {"versions": versions(), "regenerate": REGENERATE}
    lines = [json.dumps(record, sort_keys=True) for record in sorted(records, key=identity)]
    body = ",\n".join(lines)
    return json.dumps(head, sort_keys=True)[:-1] + ', "variants": [\n' + body + "\n]}\n"


def recorded() -> Record:
    found: Record = json.loads(RECORD.read_text())
    return found


def differences(records: list[Record]) -> list[str]:
    """Against bench/results/gpu_code.json; other versions of the compiler make other code, which proves nothing."""
    if not RECORD.exists():
        return [f"{RECORD.name} is missing: run `{REGENERATE}`"]
    known = recorded()
    if known["versions"] != versions():
        print(f"not compared: recorded with {known['versions']}, here {versions()}")
        return []
    before = {identity(record): record for record in known["variants"]}
    now = {identity(record): record for record in records}
    found = [f"{' '.join(key)}: not recorded" for key in now if key not in before]
    found += [f"{' '.join(key)}: recorded, no longer compiled" for key in before if key not in now]
    for key in now.keys() & before.keys():
        changed = [
            f"{name} {before[key].get(name)} -> {now[key].get(name)}"
            for name in sorted((now[key].keys() | before[key].keys()) - {"key"})
            if before[key].get(name) != now[key].get(name)
        ]
        if changed:
            found.append(f"{' '.join(key)}: {'; '.join(changed)}")
    return sorted(found)


def _line(record: Record) -> str:
    who = f"{record['op']} {record['kernel']} {record['dtype']} {record['arch']}"
    if "error" in record:
        return f"{who}: {record['error']}"
    tensor = f" mma {record['hgmma']}+{record['mma']}" if record["dots"] else ""
    return (
        f"{who}: {record['registers']} registers, stack {record['stack']}, local {record['local']}"
        f" ({record['local_in_loop']} in loops), shared {record['shared']},"
        f" wide loads {record['wide_loads']}/{record['loads']}{tensor},"
        f" {record['blocks']} blocks, occupancy {record['occupancy']:.0%} ({record['limit']})"
    )


def left_out(variants: list[Variant]) -> list[str]:
    """What the plan of all cases does not compile, or no gate was chosen for."""
    launched = {aot_paths.names(variant.function) for variant in variants}
    ways = aot_paths.missed((v.arch, v.function, v.known) for v in variants)
    kernels = {(variant.op, variant.kernel) for variant in variants}
    return aot_gates.uncompiled(launched) + ways + aot_gates.unsorted(kernels)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.aot", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="OP")
    parser.add_argument("--arch", nargs="+", default=[], choices=[*aot_code.MACHINES])
    parser.add_argument("--dtype", nargs="+", default=[], choices=[*DTYPES])
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument("--plan", action="store_true", help="compile nothing")
    aim.add_argument("--check", action="store_true", help="compare with the recorded file")
    aim.add_argument("--check_all", action="store_true", help="so, and compile what is known too")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the code of each kernel")
    given = parser.parse_args()
    start, part = time.perf_counter(), bool(given.only or given.arch or given.dtype)
    variants, problems = plan(given.only, given.arch, given.dtype)
    problems += [] if part else left_out(variants)
    records: list[Record] = []
    short = given.check and not (part or given.keep)
    made = checked(variants) if short else compiled([] if given.plan else variants, given.keep)
    for record in made:
        records.append(record)
        failed = [] if "error" in record else aot_gates.failures(record)
        if part or failed or "error" in record:
            print(_line(record), flush=True)
        problems += [f"{_line(record)}"] if "error" in record else []
        problems += [f"{aot_gates.named(record)}: {text}" for text in failed]
    if (given.check or given.check_all) and not part:
        problems += differences(records)
    elif not (part or given.plan) and not any("error" in record for record in records):
        RECORD.write_text(written(records))
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    print(f"{len(variants)} variants, {len(problems)} failures, {time.perf_counter() - start:.1f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
