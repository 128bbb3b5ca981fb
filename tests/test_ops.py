"""engine.ops: the names and arguments that docs/design.md section 5 promises, and its table."""

import inspect
import subprocess
import sys

import pytest
import torch

from engine import ops
from engine.kernels import _backend

# The design's table; what an op takes beyond it is keyword-only.
SIGNATURES = {
    "linear_logprob": "hidden, weight, targets, temperature=1.0, bias=None",
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
    with pytest.raises(ops.BackendError, match="backend: got 'gpu', want one of cpp, reference"):
        ops.backend("gpu").__enter__()


def table_rows() -> dict[str, list[str]]:
    columns = [list(column.cells) for column in ops.backends_table().columns]
    return {cells[0]: list(cells[1:]) for cells in zip(*columns, strict=True)}


def test_table_names_every_op_and_its_backend(monkeypatch):
    rows = table_rows()
    assert set(SIGNATURES) - {"unpack"} <= set(rows)
    public, cpp, reference, in_use, reason = rows["pack"]
    assert (public, cpp, reference, in_use) == ("yes", "-", "yes", "reference")
    assert reason == "written in torch operations"
    if _backend.extension():
        assert rows["kl_reward"] == ["yes", "yes", "yes", "cpp", ""]
        assert rows["transformer_step"] == ["", "yes", "yes", "cpp", ""]  # a class, not a schema
        with ops.backend("reference"):
            assert table_rows()["kl_reward"][3] == "reference"
            assert "was asked for" in table_rows()["kl_reward"][4]
    monkeypatch.setattr(_backend, "extension", lambda: None)
    monkeypatch.setattr(_backend, "why_no_extension", lambda: "no compiler")
    assert table_rows()["kl_reward"] == ["yes", "-", "yes", "reference", "no compiler"]
    assert ops.machine_lines()[0] == "C++ kernels: none: no compiler"


def test_the_command_prints_machine_and_table():
    command = [sys.executable, "-m", "engine.ops"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in ("threads: ", "ranking_loss", "in use"))
    if _backend.extension():
        assert f"class of CPU found: {_backend.extension().detected_class()}" in done.stdout
