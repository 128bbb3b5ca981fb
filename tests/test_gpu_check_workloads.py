"""make gpu-check's workloads and its child process, on tiny models in Triton's interpreter; the clock that needs a GPU
is replaced."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small_engines import save_tiny

from bench import gpu_check_child, gpu_check_kernels, gpu_check_workloads
from bench.gpu_check_kernels import Place
from engine.generate import generator, graph
from engine.kernels._backend import backend
from engine.model import weights

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@pytest.fixture
def clock(monkeypatch) -> None:
    def timed(call) -> dict[str, float]:
        call()
        return {"ms": 4.0}

    monkeypatch.setattr(gpu_check_kernels, "timed", timed)


def test_decode(folder):
    """Three calls with graphs and three without; on the CPU none is captured."""
    with backend("triton"):
        row = gpu_check_workloads.decode(folder, 2, DEVICE, prompt=3, new=2)
    assert row["workload"] == "rollout" and row["sequences"] == 2 and row["by"] == "engine"
    assert row["equal_to_the_bit"] and "error" not in row
    assert (row["graphs"] > 0) == (DEVICE == "cuda")
    for name in ("captured", "launched"):
        assert row[f"{name}_first_s"] > 0
        assert row[f"{name}_tokens_per_s"] == pytest.approx(2 * 2 / row[f"{name}_s"])


@pytest.mark.parametrize("change", ["none", "a log-prob", "a token", "nothing is captured"])
def test_what_decode_compares(change, folder, monkeypatch):
    """The last call without capture differs; and a GPU on which nothing was captured is told as an error."""
    wanted = []

    def generate(model, prompts, settings, eos_ids, limits):
        assert limits.max_active == len(prompts) == 2 and settings.max_new_tokens == 3
        wanted.append(graph._captured.get())
        tokens, logprobs = [4, 5, 6], torch.tensor([-1.0, -2.0, -3.0])
        if len(wanted) == 6 and change == "a log-prob":
            logprobs[2] += 1e-6
        if len(wanted) == 6 and change == "a token":
            tokens[0] = 9
        return [SimpleNamespace(tokens=tokens, logprobs=logprobs)]

    monkeypatch.setattr(generator, "generate", generate)
    device = "cuda" if change == "nothing is captured" else DEVICE
    if device != DEVICE:
        model = weights.load_policy(folder, device=DEVICE)
        monkeypatch.setattr(weights, "load_policy", lambda *_, **__: model)
    row = gpu_check_workloads.decode(folder, 2, device, prompt=5, new=3)
    assert wanted == [True] * 3 + [False] * 3
    assert row["equal_to_the_bit"] == (change in ("none", "nothing is captured"))
    said = {"none": None, "nothing is captured": "no step was captured"}
    if DEVICE == "cpu":
        assert row.get("error") == said.get(
            change, "the captured step and the launched one give other numbers"
        )


def test_prompts_are_of_the_models_vocabulary(folder):
    size = gpu_check_workloads.vocabulary(folder)
    assert size == json.loads((folder / "config.json").read_text())["vocab_size"]
    prompts = gpu_check_workloads.random_prompts(folder, 3, 500)
    assert len(prompts) == 3 and all(len(p) == 500 for p in prompts)
    tokens = {token for p in prompts for token in p}
    assert 0 <= min(tokens) < 20 and size - 20 < max(tokens) < size
    assert prompts == gpu_check_workloads.random_prompts(folder, 3, 500)


def test_train(folder, clock, monkeypatch):
    """The step that is timed has gradients for every weight, and makes the compute copy anew."""
    kept = []

    def load(*arguments, **options):
        kept.append(weights_of(*arguments, **options))
        return kept[-1]

    weights_of = weights.load_policy
    monkeypatch.setattr(weights, "load_policy", load)
    with backend("triton"):
        row = gpu_check_workloads.train(folder, DEVICE, tokens=32, length=16)
    assert row["workload"] == "training step" and row["ms"] == 4.0
    assert row["tokens_per_s"] == pytest.approx(8000.0)
    assert ("peak_gb" in row) == (DEVICE == "cuda")
    (model,) = kept
    assert all(float(p.grad.norm()) > 0 for p in model.parameters().values())
    assert model.version > 0


def test_the_random_model(tmp_path, monkeypatch):
    """Small here; the true one has SmolLM2-135M's shape."""
    true = {**gpu_check_workloads.SMOLLM2}
    assert (true["num_hidden_layers"], true["hidden_size"], true["vocab_size"]) == (30, 576, 49152)
    small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(gpu_check_workloads, "SMOLLM2", {**true, **small, **heads})
    row = gpu_check_workloads.random_model(tmp_path / "model")
    model = weights.load_policy(tmp_path / "model", device=DEVICE)
    assert model.architecture.vocab_size == gpu_check_workloads.vocabulary(tmp_path / "model") == 50
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.bfloat16} and row["parameters"] > 50 * 16


VLLM = """
import pathlib, torch
class SamplingParams:
    def __init__(self, **given):
        assert given["max_tokens"] == 128 and given["ignore_eos"]
class LLM:
    def __init__(self, folder, **given):
        assert pathlib.Path(folder, "config.json").exists()
        print("a library that prints")
    def generate(self, given, law):
        assert all(len(p["prompt_token_ids"]) == 64 for p in given)
        if len(given) == FAILS: raise RuntimeError("no memory")
"""


@pytest.mark.parametrize("fails", [0, 4])
def test_vllm(fails, folder, tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(f"FAILS = {fails}\n{VLLM}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = gpu_check_workloads.vllm(folder, (1, 4))
    counts = [row["sequences"] for row in rows if "tokens_per_s" in row]
    assert counts == {0: [1, 4], 4: [1]}[fails]
    errors = [row["error"] for row in rows if "error" in row]
    assert len(errors) == (fails > 0) and all("RuntimeError: no memory" in e for e in errors)
    assert all(row["by"] == "vllm" for row in rows)


def test_vllm_that_does_not_end(folder, tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_check_workloads, "VLLM_SECONDS", 1)
    (row,) = gpu_check_workloads.vllm(folder, (1,))
    assert row == {"by": "vllm", "error": "it did not end within 1 s"}


PIECES = ["swiglu, forward, float32", "model", "decode 2", "train", "vllm", "nonsense"]


@pytest.fixture
def work(tmp_path, monkeypatch, clock):
    """A child's work in this process, its workloads replaced: (exit code, what it said)."""
    monkeypatch.setattr(gpu_check_workloads, "random_model", lambda model: {"made": str(model)})
    monkeypatch.setattr(
        gpu_check_workloads, "decode", lambda model, count, device: {"was": [count, device]}
    )
    monkeypatch.setattr(gpu_check_workloads, "train", lambda model, device: {}["no such"])
    monkeypatch.setattr(gpu_check_workloads, "vllm", lambda model: [{"by": "vllm"}] * 2)

    def run(pieces: list[str]) -> tuple[int, list[dict]]:
        said: list[dict] = []
        code = gpu_check_child.work(pieces, tmp_path, Place(DEVICE, "small"), said.append)
        return code, said

    return run


def test_a_child_does_every_piece_and_says_so(work, tmp_path):
    code, said = work(PIECES)
    assert code == 0 and [x["done"] for x in said if "done" in x] == PIECES
    rows = [x["row"] for x in said if "row" in x]
    assert [row["by"] for row in rows[:2]] == ["engine", "eager torch"]
    assert rows[2:] == [
        {"made": str(tmp_path)},
        {"workload": "rollout", "sequences": 2, "by": "engine", "was": [2, DEVICE]},
        {"workload": "training step", "by": "engine", "error": "KeyError: 'no such'"},
        {"by": "vllm"},
        {"by": "vllm"},
        {"piece": "nonsense", "error": rows[-1]["error"]},
    ]
    assert rows[-1]["error"].startswith("ValueError: piece: got 'nonsense'")


def test_a_child_ends_where_the_gpu_does_nothing_more(work, monkeypatch, capsys):
    """The row that was known is said first."""
    reasons = iter(["", "AcceleratorError: an illegal memory access"])
    monkeypatch.setattr(gpu_check_child, "why_broken", lambda device: next(reasons))
    code, said = work(PIECES)
    assert code == gpu_check_child.EXIT_BROKEN and len(said) == 2 and "row" in said[-1]
    assert "the GPU does nothing more: AcceleratorError: an ill" in capsys.readouterr().err


def test_what_a_broken_gpu_says():
    assert gpu_check_child.why_broken("cpu") == ""
    if DEVICE == "cpu":
        assert "Torch not compiled with CUDA" in gpu_check_child.why_broken("cuda")


def child(change: str, *pieces: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys, time\nfrom bench import gpu_check_child as child\n{change}\n"
    code += f"sys.exit(child.main(['--model', 'none', *{list(pieces)}]))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_what_libraries_print_is_no_row():
    change = (
        "def rows(*_):\n    print('noise')\n    yield {'a': 1}\n"
        "child.rows_of, child.why_broken = rows, lambda device: ''"
    )
    done = child(change, "one", "two")
    assert done.returncode == 0 and done.stderr.count("noise") == 2
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said == [{"row": {"a": 1}}, {"done": "one"}, {"row": {"a": 1}}, {"done": "two"}]


def test_a_kernel_that_hangs_ends_the_child():
    done = child("child.LIMIT, child.rows_of = 1, lambda *_: time.sleep(100)", "hangs")
    assert done.returncode == 1 and not done.stdout and "Timeout (0:00:01)!" in done.stderr


def test_environment(monkeypatch):
    """What a GPU says of itself is put in its place here."""
    gpu = SimpleNamespace(name="G", major=9, minor=0, total_memory=8e10, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    found = gpu_check_child.environment()
    assert found["gpu"] == "G" and found["capability"] == "9.0" and found["memory_gb"] == 80.0
    assert found["torch"] == torch.__version__ and found["triton"] and found["driver"]
    json.dumps(found)
