"""`make gpu-check`: everything that only a GPU can say, in one run and one file to send back.

    python -m bench.gpu_check                  build, tests, kernels, workloads; about an hour
    python -m bench.gpu_check --only gae       the kernels of these ops alone
    python -m bench.gpu_check --dry_run        what would be run, without a GPU; nothing is written

Writes bench/results/gpu-<name>.json (with --only, gpu-<name>-only.json): the environment; each test that failed; of
each case of bench/gpu the median time and its spread, beside the ledger's prediction, CUDA C++, eager torch, and the
libraries that are installed (Liger, cut-cross-entropy, verl, flash-attn); replays of the captured decode step against
the same step launched kernel by kernel, to the bit; tokens a second of both, and of vLLM where it is installed.

The file is written after every row. What fails is a row with its error, and what comes behind it goes on in another
process. Exit codes: 0 all is well, 1 something failed and is named in the end, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch may be missing: that is said in one line
    from bench.gpu import Case

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
# A process each: an error inside a kernel takes the rest of its process with it. (tests/ops runs on the CPU.)
TESTS = (
    "tests/ops",
    "tests/triton/test_*.py",
    "tests/cuda/test_cuda_device.py",
    "tests/generate/test_graph.py",
)
CHILD = (sys.executable, "-m", "bench.gpu_check_child")
LIBRARIES = ("liger_kernel", "cut_cross_entropy", "verl", "flash_attn", "vllm")
# Variables by which somebody may have asked for other kernels than those that a run takes by itself.
CHOICES = (
    "TRITON_INTERPRET",
    "ENGINE_BACKEND",
    "ENGINE_ATTENTION",
    "ENGINE_GRAPHS",
    "ENGINE_DEVICE",
)
TESTS_SECONDS = 3600  # a process of tests at most
EXIT_NOT_WELL, EXIT_NO_GPU = 1, 2
Row = dict[str, Any]


class Record:
    """What is known so far, in a file that is whole at every moment."""

    def __init__(self, path: Path, environment: Row, pieces: dict[str, list[str]]) -> None:
        self.path = path
        self.result: dict[str, Any] = {"environment": environment, **{part: [] for part in pieces}}
        self.waiting = {part: list(names) for part, names in pieces.items()}
        self.write()

    def take(self, part: str, row: Row) -> None:
        self.result[part].append(row)
        print(json.dumps({"part": part, **row}), flush=True)
        self.write()

    def done(self, part: str, piece: str) -> None:
        self.waiting[part].remove(piece)
        self.write()

    def not_run(self) -> list[str]:
        return [f"{part}: {name}" for part, names in self.waiting.items() for name in names]

    def write(self) -> None:
        known = {**self.result, "failed": failed(self.result), "not_run": self.not_run()}
        aside = self.path.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(json.dumps(known, indent=1) + "\n")
        aside.replace(self.path)


def failed(result: dict[str, Any]) -> list[str]:
    """Every row with an error, by what it is about."""
    about = ("piece", "op", "case", "dtype", "workload", "sequences", "by")
    lines = []
    for part, rows in result.items():
        for row in [rows] if isinstance(rows, dict) else rows:
            if "error" in row:
                name = ", ".join(str(row[key]) for key in about if key in row)
                lines.append(
                    f"{part}: {name}: {row['error']}" if name else f"{part}: {row['error']}"
                )
    return lines


def failure(error: Exception) -> Row:
    """With the kind of the error: torch says NotImplementedError for a kernel that a device lacks."""
    return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def attempted(work: Callable[[], Row]) -> Row:
    """A part that cannot be started, or does not end, says so, and the others go on."""
    try:
        return work()
    except Exception as error:
        return failure(error)


def surroundings() -> dict[str, str]:
    """The environment of every process here: without CHOICES, and pytest cuts no line."""
    kept = {name: value for name, value in os.environ.items() if name not in CHOICES}
    return {**kept, "COLUMNS": "400"}


def ran(command: Sequence[str], root: Path = ROOT, seconds: float | None = None) -> Any:
    """The finished process, with its output as text, whatever bytes it is of."""
    return subprocess.run(
        command,
        cwd=root,
        env=surroundings(),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=seconds,
    )


def build(root: Path = ROOT) -> Row:
    """The C++ kernels, and with nvcc the CUDA C++ ones, made or brought up to date in this checkout.

    setup.py goes on where it cannot build them, and says so: on a line that begins with "engine:" where something is
    not installed, else in setuptools' words, which is an error here.
    """
    done = ran([sys.executable, "setup.py", "build_ext", "--inplace"], root)
    text = done.stdout + done.stderr
    said = re.findall(r"^engine: (.+)$", text, re.MULTILINE)
    libraries = sorted(path.name for path in (root / "engine").glob("_cuda*.so"))
    row: Row = {"exit_code": done.returncode, "said": said, "cuda_libraries": libraries}
    if done.returncode:
        row["error"] = f"setup.py ended with {done.returncode}"
    elif 'building extension "engine._cuda" failed' in text or not (said or libraries):
        row["error"] = "the CUDA C++ kernels were not built, though nvcc is here"
    return {**row, "end": text[-2000:]}


def targets(patterns: Iterable[str] = TESTS) -> list[str]:
    """Folders and files, relative to the checkout."""
    return [str(p.relative_to(ROOT)) for each in patterns for p in sorted(ROOT.glob(each))]


def run_tests(target: str) -> Row:
    """pytest in a process of its own."""
    # pyproject.toml has one -q; under two, no line counts the tests
    options = ["--no-header", "--tb=short", "-rfEs", "-p", "no:cacheprovider"]
    began = time.perf_counter()
    done = ran([sys.executable, "-m", "pytest", *options, target], seconds=TESTS_SECONDS)
    lines = done.stdout.splitlines()
    row: Row = {
        "exit_code": done.returncode,
        "summary": lines[-1].strip("= ") if lines else "",
        "failed": [line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")],
        "errors": [line.removeprefix("ERROR ") for line in lines if line.startswith("ERROR ")],
        "skipped": [line.removeprefix("SKIPPED ") for line in lines if line.startswith("SKIPPED ")],
        "seconds": time.perf_counter() - began,
    }
    if done.returncode:
        row["error"] = f"pytest ended with {done.returncode}: {row['summary']}"
        row["end"] = (done.stdout + done.stderr)[-4000:]
    return row


def in_children(
    pieces: Sequence[str],
    command: Sequence[str],
    take: Callable[[Row], None],
    done: Callable[[str], None],
) -> None:
    """Runs pieces in a process, and those behind the one in which it ended in another one."""
    waiting = list(pieces)

    def finish(piece: str) -> None:
        waiting.remove(piece)
        done(piece)

    def at() -> str:
        return waiting[0] if waiting else pieces[-1]

    while waiting:
        try:
            code, end = in_child([*command, *waiting], at, take, finish)
        except OSError as error:
            code, end = None, f"it did not start: {type(error).__name__}: {error}"
        if code or waiting:
            take({"piece": at(), "error": f"its process ended with {code}: {end}"})
        if waiting:
            finish(at())


def in_child(
    command: Sequence[str],
    at: Callable[[], str],
    take: Callable[[Row], None],
    done: Callable[[str], None],
) -> tuple[int, str]:
    """The exit code of a process, and the end of what it said besides its rows."""
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=surroundings(),
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            errors="replace",
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            try:
                heard = json.loads(line)
            except json.JSONDecodeError:  # cut off where the process was killed
                take({"piece": at(), "error": f"half a row: {line[:300]}"})
                continue
            if "row" in heard:
                take(heard["row"])
            else:
                done(heard["done"])
        code = child.wait()
        said.seek(0)
        return code, said.read()[-1500:]


def dry_run(chosen: Sequence[Case], pieces: dict[str, list[str]]) -> int:
    """Builds the arguments of every case without memory, and says what would be launched and what is installed."""
    from bench import gpu_check_kernels as kernels
    from engine.kernels import _cuda

    for case in chosen:
        shape = " ".join(f"{name}={size}" for name, size in case.full.items())
        for name in case.dtypes:
            seen = kernels.launches(case, kernels.DTYPES[name])
            print(f"{case.op}, {case.name} ({shape}, {name}): {', '.join(seen) or 'library'}")
    for part in ("tests", "workloads"):
        print(f"{part}: {', '.join(pieces.get(part, [])) or 'none'}")
    print(f"CUDA C++ ({', '.join(_cuda.OPS)}): {_cuda.why_no_cuda() or 'built'}")
    print(f"others: {', '.join(installed()) or 'none installed'}")
    absent = kernels.missing(chosen, kernels.ledger(kernels.LEDGER))
    for line in absent:
        print(f"not in {kernels.LEDGER.name}: {line}; run python -m bench.ledger")
    return EXIT_NOT_WELL if absent else 0


def installed() -> list[str]:
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]


def plan(chosen: Sequence[Case], only: bool, model: Path | None) -> dict[str, list[str]]:
    """The pieces of each part, in their order."""
    from bench import gpu_check_kernels, gpu_check_workloads

    kernels = gpu_check_kernels.pieces(chosen)
    if only:
        return {"kernels": kernels}
    workloads = [] if model else ["model"]
    workloads += [f"decode {count}" for count in gpu_check_workloads.SEQUENCES] + ["train"]
    workloads += ["vllm"] if "vllm" in installed() else []
    parts = {"build": ["build"], "tests": targets()}
    return {**parts, "kernels": kernels, "workloads": workloads}


def check(pieces: dict[str, list[str]], model: Path, only: bool) -> Record:
    """Everything, in the order of `pieces`; what was done so far is on the disk when this is interrupted."""
    command, rows = (*CHILD, "--model", str(model)), []
    in_children(["environment"], command, rows.append, lambda piece: None)
    environment = {key: value for row in rows for key, value in row.items()}
    print(json.dumps(environment, indent=1), flush=True)
    name = re.sub(r"[^a-z0-9]+", "-", environment.get("gpu", "unknown").lower()).strip("-")
    record = Record(RESULTS / f"gpu-{name}{'-only' if only else ''}.json", environment, pieces)
    try:
        for part, names in pieces.items():
            run_part(part, names, command, record)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    return record


def run_part(part: str, names: Sequence[str], command: Sequence[str], record: Record) -> None:
    """What runs on the GPU in processes that may break; the build and pytest are processes anyway."""
    if part not in ("build", "tests"):
        take, done = partial(record.take, part), partial(record.done, part)
        return in_children(names, command, take, done)
    for piece in names:
        row = attempted(build if part == "build" else partial(run_tests, piece))
        record.take(part, {"piece": piece, **row})
        record.done(part, piece)


def tell(record: Record) -> int:
    """The end of a run: what failed, what was not run, and where the file is."""
    wrong = failed(record.result)
    for title, lines in (("failed", wrong), ("not run", record.not_run())):
        for line in lines:
            print(f"{title}: {line}")
    print(f"written: {record.path}; please send it back")
    return EXIT_NOT_WELL if wrong or record.not_run() else 0


def without_gpu() -> str:
    """Why there is nothing to do here, or nothing."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; make gpu-check PYTHON=... names another python"
    import torch

    if torch.cuda.is_available():
        return ""
    return f"no GPU: torch {torch.__version__} sees none; --dry_run says what would be run"


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m bench.gpu_check", None, __doc__, formatter_class=raw
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="OP", help="kernels of these")
    parser.add_argument("--model", type=Path, help="a folder (default: random SmolLM2-135M)")
    parser.add_argument("--dry_run", action="store_true", help="say what would be run, then stop")
    args = parser.parse_args(argv)
    reason = without_gpu()
    if reason and (not args.dry_run or "no torch" in reason):
        sys.stderr.write(f"python -m bench.gpu_check: {reason}\n")
        return EXIT_NO_GPU
    from bench.gpu import cases

    chosen = [case for case in cases() if not args.only or case.op in args.only]
    if not chosen:
        parser.error(f"--only: got {' '.join(args.only)}, want ops of bench/gpu")
    model = args.model.resolve() if args.model else None
    pieces = plan(chosen, bool(args.only), model)
    if args.dry_run:
        return dry_run(chosen, pieces)
    with tempfile.TemporaryDirectory() as aside:
        return tell(check(pieces, model or Path(aside) / "model", bool(args.only)))


if __name__ == "__main__":
    sys.exit(main())
