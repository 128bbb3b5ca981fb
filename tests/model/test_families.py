"""Each family against transformers: logits in both types on every class of CPU, and back again."""

import pytest
import torch
from families import CASES, build, hf_logits, save, some_sequences
from transformers import AutoModelForCausalLM

from engine.data.pack import pack_sequences
from engine.kernels._backend import backend
from engine.model.transformer import forward, logits
from engine.model.weights import load_policy, save_policy
from tests.compare import assert_close

LENGTHS = (7, 0, 1, 23, 40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("families")
    return {case: (root / case, save(case, root / case)) for case in CASES}


def our_logits(model, sequences):
    with torch.no_grad():
        return logits(model, forward(model, pack_sequences(sequences)))


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_are_those_of_transformers(folders, case, cpu_class):
    folder, theirs = folders[case]
    sequences = some_sequences(*LENGTHS)
    ours = our_logits(load_policy(folder, "float32"), sequences)
    want = hf_logits(theirs, sequences)
    assert want.std() > 0.5  # a law far from uniform, so that 1e-4 means something
    assert (ours - want).abs().max() <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_of_the_torch_definitions(folders, case):
    folder, theirs = folders[case]
    sequences = some_sequences(*LENGTHS)
    with backend("reference"):
        ours = our_logits(load_policy(folder, "float32"), sequences)
    assert (ours - hf_logits(theirs, sequences)).abs().max() <= 1e-4


def bfloat16_truth(case, folder):
    """The same rounded weights in bfloat16 arithmetic, and in float64."""
    rounded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    exact = build(case)
    exact.load_state_dict(rounded.state_dict())
    return rounded, exact.double()


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_logits_follow_the_tolerance_rule(folders, case, cpu_class):
    folder, _ = folders[case]
    sequences = some_sequences(*LENGTHS)
    rounded, exact = bfloat16_truth(case, folder)
    ours = our_logits(load_policy(folder, "bfloat16"), sequences)
    assert_close(ours, hf_logits(rounded, sequences), hf_logits(exact, sequences), case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_gives_transformers_the_same_logits(
    folders, case, trainable, dtype, tmp_path
):
    folder, _ = folders[case]
    save_policy(load_policy(folder, dtype, trainable), tmp_path)
    back, notes = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not any(notes.values()), notes
    assert back.dtype == getattr(torch, dtype)
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=back.dtype)
    sequences = some_sequences(9)
    assert torch.equal(hf_logits(back, sequences), hf_logits(want, sequences))
