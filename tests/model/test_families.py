"""Each family against transformers: logits in both types on every class of CPU, and back again."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import CASES, LINEAR, LLAMA3, hf_logits, save, some_sequences
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.data.pack import pack_sequences
from engine.errors import ModelError
from engine.kernels._backend import backend
from engine.model.transformer import forward, logits
from engine.model.weights import load_policy, save_policy
from tests.compare import assert_close

LENGTHS = (7, 0, 1, 23, 40)


@dataclass(frozen=True)
class Case:
    """A folder, and what transformers makes of it: computed once, compared on every class."""

    folder: Path
    sequences: list[list[int]]
    float32: Tensor  # (N, V) logits
    bfloat16: Tensor  # (N, V) of weights and arithmetic in bfloat16
    truth: Tensor  # (N, V) of the same rounded weights in float64


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def make(name: str) -> Case:
        theirs = save(name, root / name)
        sequences = some_sequences(*LENGTHS)
        plain = hf_logits(theirs, sequences)
        rounded = AutoModelForCausalLM.from_pretrained(
            root / name, dtype=torch.bfloat16, attn_implementation="eager"
        )
        theirs.load_state_dict(rounded.state_dict())
        truth = hf_logits(theirs.double(), sequences)
        return Case(root / name, sequences, plain, hf_logits(rounded, sequences), truth)

    return make


def our_logits(case: Case, dtype: str) -> Tensor:
    model = load_policy(case.folder, dtype)
    with torch.no_grad():
        return logits(model, forward(model, pack_sequences(case.sequences)))


@pytest.mark.parametrize("name", CASES)
def test_float32_logits_are_those_of_transformers(cases, name, cpu_class):
    case = cases(name)
    assert case.float32.std() > 0.5  # a law far from uniform, so that 1e-4 means something
    assert (our_logits(case, "float32") - case.float32).abs().max() <= 1e-4


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "both"])
def test_a_scaling_written_into_a_saved_config_is_that_of_transformers(scaling, spelling, tmp_path):
    """transformers 5 saves `rope_parameters` of every model, guides ask for `rope_scaling`."""
    torch.manual_seed(2)
    save("qwen2", tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert saved["rope_parameters"]["rope_type"] == "default"
    path.write_text(json.dumps({**saved, "rope_scaling": scaling}))
    with pytest.raises(ModelError, match=r"got rope_parameters .* and rope_scaling .*, want one of them"):
        load_policy(tmp_path, "float32")
    del saved["rope_parameters"]
    stated = ["rope_parameters", "rope_scaling"] if spelling == "both" else [spelling]
    path.write_text(json.dumps({**saved, **dict.fromkeys(stated, scaling)}))
    sequences = some_sequences(*LENGTHS)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    want = hf_logits(theirs, sequences).log_softmax(-1)
    model = load_policy(tmp_path, "float32")
    with torch.no_grad():
        ours = logits(model, forward(model, pack_sequences(sequences))).log_softmax(-1)
    assert (ours - want).abs().max() <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_float32_logits_of_the_torch_definitions(cases, name):
    case = cases(name)
    with backend("reference"):
        assert (our_logits(case, "float32") - case.float32).abs().max() <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_logits_follow_the_tolerance_rule(cases, name, cpu_class):
    case = cases(name)
    ours = our_logits(case, "bfloat16")
    # two layers round many times over: two units of floor for each instead of two for one op;
    # what that lets pass one by one, the error of all elements together does not
    assert_close(ours, case.bfloat16, case.truth, name, units=4.0)
    error, theirs = ((x.double() - case.truth).pow(2).mean().sqrt() for x in (ours, case.bfloat16))
    assert error <= theirs


@pytest.mark.parametrize("dtype, trainable", [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_gives_transformers_the_same_logits(cases, name, dtype, trainable, tmp_path):
    case = cases(name)
    save_policy(load_policy(case.folder, dtype, trainable), tmp_path)
    back, notes = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(notes.values()), notes
    assert back.dtype == getattr(torch, dtype)
    assert torch.equal(hf_logits(back, case.sequences), getattr(case, dtype))
