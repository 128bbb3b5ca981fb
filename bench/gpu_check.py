"""`make gpu-check`: everything that only a GPU can say, in one run and one file to send back.

    python -m bench.gpu_check                  tests, kernels, the decode step, workloads; about an hour
    python -m bench.gpu_check --only gae       the kernels of these ops alone
    python -m bench.gpu_check --dry_run        what would be run, without a GPU; nothing is written

Writes bench/results/gpu-<name>.json: the environment; each test that failed; of each case of bench/gpu the median time
and its spread, beside the ledger's prediction, eager torch, and the libraries that are installed (Liger,
cut-cross-entropy, verl, flash-attn); replays of the captured decode step against the same step launched kernel by
kernel, to the bit; tokens a second of both, and of vLLM where it is installed. Exit codes: 0 all is well, 1 something
is not, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import DTYPES, Case, cases

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
LEDGER = RESULTS / "gpu_ledger.json"
TESTS = ("tests/triton", "tests/ops", "tests/generate/test_graph.py")
EXIT_NOT_WELL, EXIT_NO_GPU = 1, 2
SEQUENCES, PROMPT, NEW = (1, 16, 64, 256), 64, 128
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
Row = dict[str, Any]


def ledger(path: Path) -> dict[tuple[str, str], Row]:
    """The engine's rows of the ledger by (op, case); none without the file."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {(row["op"], row["case"]): row for row in rows if row["by"] == "engine"}


def missing(chosen: Sequence[Case], predicted: dict[tuple[str, str], Row]) -> list[str]:
    return [f"{c.op}, {c.name}" for c in chosen if (c.op, c.name) not in predicted]


def launches(case: Case, dtype: torch.dtype) -> list[str]:
    """The kernels that a case would launch on an H100, from its arguments' shapes alone."""
    from engine.kernels.triton import _launch

    seen: list[str] = []

    def see(launch: Any) -> bool:
        seen.append(launch.kernel.fn.__name__)
        return False

    observer, column = _launch.observer.set(see), _launch.column.set("sm_90")
    try:
        case.run(*case.make("meta", dtype, **case.full))
    finally:
        _launch.observer.reset(observer)
        _launch.column.reset(column)
    return seen


def dry_run(chosen: Sequence[Case]) -> int:
    """Builds the arguments of every case without memory, and says what would be launched and what is installed."""
    for case in chosen:
        shape = " ".join(f"{name}={size}" for name, size in case.full.items())
        for name in case.dtypes:
            found = launches(case, DTYPES[name])
            print(f"{case.op}, {case.name} ({shape}, {name}): {', '.join(found) or 'library'}")
    print(f"tests: {' '.join(TESTS)}")
    print(f"decode: {', '.join(map(str, SEQUENCES))} sequences of {PROMPT} + {NEW} tokens")
    print(f"others: {', '.join(installed()) or 'none installed'}")
    absent = missing(chosen, ledger(LEDGER))
    for line in absent:
        print(f"not in {LEDGER.name}: {line}; run python -m bench.ledger")
    return EXIT_NOT_WELL if absent else 0


def installed() -> list[str]:
    names = ("liger_kernel", "cut_cross_entropy", "verl", "flash_attn", "vllm")
    return [name for name in names if importlib.util.find_spec(name) is not None]


def environment() -> Row:
    from engine.run.session import versions

    properties = torch.cuda.get_device_properties(0)
    triton = importlib.import_module("triton")
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": triton.__version__,
        "machine": platform.platform(),
        "driver": driver(),
        **versions(),
    }


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def run_tests() -> Row:
    """pytest on the device, in a process of its own: a kernel that reads outside memory ends the process."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *TESTS]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return {
        "exit_code": done.returncode,
        "summary": lines[-1] if lines else done.stderr[-500:],
        "failed": [line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")],
        "errors": [line for line in lines if re.match(r"ERROR ", line)],
        "seconds": time.perf_counter() - began,
    }


def timed(call: Callable[[], Any]) -> Row:
    """Median of many launches, and the range that holds 60 % of them, in milliseconds; caches are flushed between."""
    import triton

    middle, low, high = triton.testing.do_bench(call, quantiles=[0.5, 0.2, 0.8])
    return {"ms": middle, "ms_low": low, "ms_high": high}


def attempted(work: Callable[[], Row]) -> Row:
    """A case that fails says why, and the others go on."""
    try:
        return work()
    except Exception as error:
        torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def of_engine(case: Case, dtype: torch.dtype) -> Row:
    given = case.make("cuda", dtype, **case.full)
    with torch.no_grad():
        row = timed(lambda: case.run(*given))
    moved = case.bytes(dtype.itemsize, **case.full)
    return {**row, "gb_per_s": moved / row["ms"] / 1e6}


def of_eager(case: Case, dtype: torch.dtype) -> Row:
    """The same work as plain torch (bench/rivals/eager.py), with numbers in its tensors."""
    from bench.rivals import eager

    if case.op not in eager.WORK or case.full.get("T", 0) > eager.LONGEST:
        raise NotImplementedError("has no form in eager torch that is worth a wait")
    eager.DEVICE = "cuda"
    given, forward = eager.WORK[case.op](case.name, dtype, **case.full)
    for x in given:
        with torch.no_grad():
            x.normal_() if x.is_floating_point() else x.zero_()
    ahead, back = eager.phases(case.name)
    if not back:
        with torch.no_grad():
            return timed(lambda: forward(*given))
    if ahead:
        return timed(lambda: eager._backward(forward(*given)))
    out = forward(*given)
    results = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
    grads, leaves = [torch.ones_like(x) for x in results], [x for x in given if x.requires_grad]
    return timed(lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True))


def of_libraries(case: Case, dtype: torch.dtype) -> list[Row]:
    from bench.rivals import libraries

    rows = []
    for name, work in libraries.LIBRARIES.get(case.op, {}).items():
        module, back = name.partition(",")[0].replace("-", "_"), "backward" in case.name
        if importlib.util.find_spec(module) is None or "residual" in case.name:
            continue
        row = attempted(lambda w=work, b=back: timed(w("cuda", dtype, b, **case.full)))
        rows.append({"by": name, "lacks": libraries.LACKS.get(f"{name} {case.op}", ""), **row})
    if (
        case.op == "attention"
        and "backward" not in case.name
        and importlib.util.find_spec("flash_attn")
    ):
        rows.append({"by": "flash-attn", **attempted(lambda: of_flash(case, dtype))})
    return rows


def of_flash(case: Case, dtype: torch.dtype) -> Row:
    from engine.kernels import _flash

    given = case.make("cuda", dtype, **case.full)
    with torch.no_grad():
        return timed(lambda: _flash.attention(*given))


def time_kernels(chosen: Sequence[Case]) -> list[Row]:
    """Every case, by everybody, one after the other on a warm GPU."""
    predicted, rows = ledger(LEDGER), []
    for case in chosen:
        for name in case.dtypes:
            dtype, row = DTYPES[name], {"op": case.op, "case": case.name, "dtype": name}
            ours = attempted(lambda c=case, d=dtype: of_engine(c, d))
            found = [{"by": "engine", **beside(ours, predicted.get((case.op, case.name)), name)}]
            found.append({"by": "eager torch", **attempted(lambda c=case, d=dtype: of_eager(c, d))})
            found += of_libraries(case, dtype)
            rows += [{**row, **one} for one in found]
            print(json.dumps(rows[-len(found)]), flush=True)
            torch.cuda.empty_cache()
    return rows


def beside(row: Row, prediction: Row | None, dtype: str) -> Row:
    """With the ledger's floor for an H100 SXM, where it is of this dtype, and the measured time over it."""
    if prediction is None or prediction["dtype"] != dtype or "ms" not in row:
        return row
    least = prediction["predicted_ms"]
    return {**row, "predicted_ms": least, "measured_to_predicted": row["ms"] / least}


def random_model(folder: Path) -> Path:
    """SmolLM2-135M's shape with random weights, so that nothing is downloaded."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SMOLLM2))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def decode(folder: Path) -> list[Row]:
    """Tokens a second of whole calls, captured and not; and whether both give the same numbers to the bit."""
    from engine.generate import graph
    from engine.generate.generator import generate
    from engine.generate.sampling import Sampling
    from engine.generate.scheduler import Limits
    from engine.model.weights import load_policy

    model, rows = load_policy(folder, "bfloat16", device="cuda"), []
    for count in SEQUENCES:
        prompts = torch.randint(100, 40000, (count, PROMPT)).tolist()
        results, row = [], {"workload": "rollout", "sequences": count, "by": "engine"}
        for name, wanted in (("captured", True), ("launched", False)):
            with graph.captured(wanted):
                for repeat in range(3):  # the first captures
                    began = time.perf_counter()
                    out = generate(model, prompts, Sampling(NEW), frozenset(), limits=Limits(count))
                    row[f"{name}_tokens_per_s"] = count * NEW / (time.perf_counter() - began)
                    row[f"{name}_first_s" if repeat == 0 else f"{name}_s"] = (
                        time.perf_counter() - began
                    )
            results.append(out)
        row["equal_to_the_bit"] = all(
            a.tokens == b.tokens and torch.equal(a.logprobs, b.logprobs)
            for a, b in zip(*results, strict=True)
        )
        rows.append(row)
        print(json.dumps(row), flush=True)
    graph.release(model)
    return rows


VLLM = """
import json, sys, time, torch
from vllm import LLM, SamplingParams
folder, counts, prompt, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
llm = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.5)
for count in counts:
    given = [{"prompt_token_ids": p} for p in torch.randint(100, 40000, (count, prompt)).tolist()]
    for _ in range(3):
        began = time.perf_counter()
        law = SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, logprobs=0, detokenize=False)
        llm.generate(given, law)
        seconds = time.perf_counter() - began
    print(json.dumps({"workload": "rollout", "sequences": count, "by": "vllm", "tokens_per_s": count * new / seconds}))
"""


def vllm(folder: Path) -> list[Row]:
    command = [
        sys.executable,
        "-c",
        VLLM,
        str(folder),
        json.dumps(SEQUENCES),
        str(PROMPT),
        str(NEW),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return rows or [{"by": "vllm", "error": done.stderr[-300:]}]


def train(folder: Path, tokens: int = 8192) -> Row:
    """Tokens a second of forward, backward and refresh of one micro-batch of sequences of 512 tokens."""
    from engine.data.pack import pack_sequences, predictions
    from engine.model import transformer
    from engine.model.weights import load_policy

    model = load_policy(folder, "bfloat16", trainable=True, device="cuda")
    batch = pack_sequences(torch.randint(100, 40000, (tokens // 512, 512)).tolist())
    shift = predictions(batch)

    def step() -> None:
        hidden = transformer.chosen_rows(transformer.forward(model, batch), shift.rows)
        logprob, _ = transformer.logprobs(model, hidden, shift.targets)
        (-logprob.mean()).backward()
        model.refresh()

    row = timed(step)
    peak = torch.cuda.max_memory_allocated() / 1e9
    rate = tokens / row["ms"] * 1e3
    return {"workload": "training step", "tokens_per_s": rate, "peak_gb": peak, **row}


def workloads(model: Path | None) -> list[Row]:
    with tempfile.TemporaryDirectory() as aside:
        folder = model or random_model(Path(aside))
        rows = decode(folder)
        rows.append(attempted(lambda: train(folder)))
        return rows + (vllm(folder) if "vllm" in installed() else [])


def build() -> Row:
    """The C++ kernels, and with nvcc the CUDA C++ ones, made or brought up to date in this checkout."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"exit_code": done.returncode, "end": (done.stdout + done.stderr)[-2000:]}


def is_well(result: Row) -> bool:
    """It was built, every test passed, every kernel ran, every replay is the step to the bit."""
    ran = all("error" not in row for row in result["kernels"] if row["by"] == "engine")
    same = all(row.get("equal_to_the_bit", True) for row in result.get("workloads", []))
    codes = [result.get(part, {}).get("exit_code", 0) for part in ("build", "tests")]
    return ran and same and codes == [0, 0]


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.gpu_check", None, __doc__, formatter_class=raw)
    parser.add_argument("--only", nargs="+", default=[], metavar="OP", help="kernels of these")
    parser.add_argument("--model", type=Path, help="a folder (default: random SmolLM2-135M)")
    parser.add_argument("--dry_run", action="store_true", help="say what would be run, then stop")
    args = parser.parse_args(argv)
    chosen = [case for case in cases() if not args.only or case.op in args.only]
    if not chosen:
        parser.error(f"--only: got {' '.join(args.only)}, want ops of bench/gpu")
    if args.dry_run:
        return dry_run(chosen)
    if not torch.cuda.is_available():
        sys.stderr.write(
            f"python -m bench.gpu_check: no GPU: torch {torch.__version__} sees none;"
            " --dry_run says what would be run\n"
        )
        return EXIT_NO_GPU
    os.environ.pop("TRITON_INTERPRET", None)
    result: Row = {"environment": environment()}
    print(json.dumps(result["environment"], indent=1), flush=True)
    if not args.only:
        result["build"] = build()
        result["tests"] = run_tests()
        print(json.dumps(result["tests"], indent=1), flush=True)
    result["kernels"] = time_kernels(chosen)
    if not args.only:
        result["workloads"] = workloads(args.model)
    name = re.sub(r"[^a-z0-9]+", "-", result["environment"]["gpu"].lower()).strip("-")
    path = RESULTS / f"gpu-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}; please send it back")
    return 0 if is_well(result) else EXIT_NOT_WELL


if __name__ == "__main__":
    sys.exit(main())
