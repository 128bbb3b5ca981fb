"""engine.ops: the names and arguments that docs/design.md section 5 promises, and its table."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import ops
from engine.kernels import _backend
from engine.kernels.swiglu import swiglu

# The design's table; what an op takes beyond it is keyword-only.
SIGNATURES = {
    "linear_logprob": "hidden, weight, targets, temperature=1.0, bias=None",
    "linear_logprob_loss": "hidden, weight, targets, loss, temperature=1.0, bias=None",
    "kl_reward": "logprob, ref_logprob, score, cu, beta, estimator='k1', score_at='eos'",
    "gae": "reward, value, cu, gamma=1.0, lam=0.95, bootstrap=None",
    "whiten": "x, shift_mean=True",
    "ranking_loss": "score, rank, cu, reduction='prompt_mean_valid'",
    "ppo_policy_loss": "logprob, old_logprob, advantage, clip=0.2",
    "ppo_value_loss": "value, old_value, returns, clip=0.2",
    "attention": "q, k, v, cu, prefix=None",
    "pack": "padded, mask",
    "unpack": "packed, cu, mask=None, fill=0.0",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_and_arguments_are_those_of_the_design(name):
    parameters = inspect.signature(getattr(ops, name)).parameters.values()
    empty, keyword_only = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
    ours = [
        p.name if p.default is empty else f"{p.name}={p.default!r}"
        for p in parameters
        if p.kind is not keyword_only
    ]
    assert ", ".join(ours) == SIGNATURES[name]


def test_float64_runs_on_the_definition_and_cpp_refuses_it():
    x, cu = torch.zeros(2, dtype=torch.float64), torch.tensor([0, 2], dtype=torch.int32)
    assert ops.gae(x, x, cu)[0].dtype == torch.float64
    with (
        ops.backend("cpp"),
        pytest.raises(ops.BackendError, match="op 'gae': backend 'cpp' was asked for.*float64"),
    ):
        ops.gae(x, x, cu)
    with pytest.raises(ops.BackendError, match="backend: got 'gpu', want one of cpp, triton, reference"):
        ops.backend("gpu").__enter__()


def table_rows() -> dict[str, list[str]]:
    columns = [list(column.cells) for column in ops.backends_table().columns]
    return {cells[0]: list(cells[1:]) for cells in zip(*columns, strict=True)}


def test_table_names_every_op_and_its_backend(monkeypatch):
    rows, state = table_rows(), ops.triton_state("kl_reward")
    assert set(SIGNATURES) - {"unpack"} <= set(rows)
    public, cpp, triton, reference, in_use, reason = rows["pack"]
    assert (public, cpp, triton, reference, in_use) == ("yes", "-", "-", "yes", "reference")
    assert reason == "written in torch operations"
    if _backend.extension():
        assert rows["kl_reward"] == ["yes", "yes", state, "yes", "cpp", ""]
        assert rows["transformer_step"] == ["", "yes", "-", "yes", "cpp", ""]  # a class, no schema
        written = {path.stem for path in (Path(__file__).parents[1] / "csrc" / "cpu").glob("*.cpp")} & set(rows)
        assert len(written) > 15 and {rows[op][4] for op in written} == {"cpp"}
        with ops.backend("reference"):
            assert table_rows()["kl_reward"][4] == "reference"
            assert "was asked for" in table_rows()["kl_reward"][5]
        with ops.backend("triton"):
            assert table_rows()["swiglu"][4] == "triton"
            assert table_rows()["pack"][4] == "none: triton was asked for"
    monkeypatch.setattr(_backend, "extension", lambda: None)
    monkeypatch.setattr(_backend, "why_no_extension", lambda: "no compiler")
    assert table_rows()["kl_reward"] == ["yes", "-", state, "yes", "reference", "no compiler"]
    assert ops.machine_lines()[0] == "C++ kernels: none: no compiler"


def test_the_command_prints_machine_and_table():
    command = [sys.executable, "-m", "engine.ops"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in ("threads: ", "ranking_loss", "in use"))
    if _backend.extension():
        assert f"class of CPU found: {_backend.extension().detected_class()}" in done.stdout


def test_triton_that_cannot_run_is_an_error_that_says_why(monkeypatch):
    x = torch.zeros(2, 3)
    with ops.backend("triton"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ops.BackendError, match="op 'swiglu': .*'triton' .*on the CPU.*TRITON_INTERPRET=1"):
            swiglu(x, x)
        monkeypatch.setattr(_backend, "why_no_triton", lambda: "triton is not installed")
        with pytest.raises(ops.BackendError, match="'triton' was asked for.*triton is not installed"):
            swiglu(x, x)
        assert ops.triton_state("swiglu") == "not installed"
        with pytest.raises(ops.BackendError, match="its GPU kernel cannot run: triton is not installed"):
            _backend.triton_kernels("swiglu")


def test_nothing_imports_triton_before_a_gpu_kernel_is_launched():
    code = "import sys, engine, engine.ops as ops; ops.backends_table(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_on_a_gpu_cuda_cpp_goes_first_unless_triton_is_asked_for(monkeypatch):
    monkeypatch.setattr(_backend._cuda, "has_cuda_kernel", lambda op: op == "ranking_loss")
    monkeypatch.setattr(_backend._cuda, "cuda_kernel", lambda op: lambda *given: f"cuda {op}")
    monkeypatch.setattr(_backend, "_run_triton", lambda op, *given: f"triton {op}")
    single, half = torch.zeros(2), torch.zeros(2, dtype=torch.float16)
    assert _backend._run_on_gpu("ranking_loss", single) == "cuda ranking_loss"
    assert _backend._run_on_gpu("ranking_loss", half) == "triton ranking_loss"
    assert _backend._run_on_gpu("gae", single) == "triton gae"
    with ops.backend("triton"):
        assert _backend._run_on_gpu("ranking_loss", single) == "triton ranking_loss"
