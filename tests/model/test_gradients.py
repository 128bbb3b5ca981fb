"""Gradients of every parameter of every family against transformers' autograd in float64."""

import pytest
import torch
from families import CASES, save, some_sequences
from transformers import AutoModelForCausalLM

from engine.data.pack import Packed, pack_groups, pack_sequences, predictions
from engine.model.names import place_of
from engine.model.transformer import Model, forward, logprobs
from engine.model.weights import load_policy
from tests.compare import assert_close

TEMPERATURE = 0.7


def our_gradients(
    model: Model, batch: Packed, segments: list[int] | None, factors, whole: bool = False
) -> None:
    shift = predictions(batch, segments)
    hidden = forward(model, batch)[shift.rows] if whole else forward(model, batch, rows=shift.rows)
    logprob, entropy = logprobs(model, hidden, shift.targets, TEMPERATURE)
    (factors * (logprob + 0.3 * entropy)).sum().backward()


def their_loss(theirs, sequence: list[int], start: int, factors):
    """The same sum over tokens ``start`` and later of one sequence."""
    tokens = torch.tensor([sequence])
    rows = theirs(tokens).logits[0, start - 1 : -1] / TEMPERATURE
    law = rows.log_softmax(-1)
    logprob = law.gather(1, tokens[0, start:, None])[:, 0]
    entropy = -(law.exp() * law).sum(-1)
    return (factors * (logprob + 0.3 * entropy)).sum()


def as_stored(model: Model) -> dict[str, torch.Tensor]:
    """Our gradients under the names, and in the layout, of the family's files."""
    pieces: dict[str, list] = {}
    for name, parameter in model.parameters().items():
        place, stored = place_of(model.architecture.family, name)
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.dtype == torch.float32
        pieces.setdefault(stored, []).append((place, parameter.grad))
    head_dim = model.architecture.head_dim
    return {
        name: parts[0][0].write([grad for _, grad in parts], head_dim)
        for name, parts in pieces.items()
    }


def their_gradients(model: Model, theirs) -> dict[str, torch.Tensor]:
    """Their gradients under the names of the files: gpt_neox's head has another name in memory."""
    renamed = model.architecture.family == "gpt_neox"
    return {
        name.replace("lm_head", "embed_out") if renamed else name: parameter.grad
        for name, parameter in theirs.named_parameters()
    }


def compare(model: Model, theirs) -> None:
    ours, wanted = as_stored(model), their_gradients(model, theirs)
    assert ours.keys() == wanted.keys()
    for name, grad in wanted.items():
        scale = float(grad.abs().max())
        assert scale > 1e-4, f"{name}: no gradient to compare"
        worst = float((ours[name] - grad).abs().max())
        assert worst <= 2e-5 * scale + 1e-5, f"{name}: off by {worst}, largest {scale}"


def pair(case, tmp_path) -> tuple[Model, torch.nn.Module]:
    theirs = save(case, tmp_path).double()
    return load_policy(tmp_path, "float32", trainable=True), theirs


@pytest.mark.parametrize("whole", [True, False], ids=["every-row", "rows-that-are-read"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_ragged_sequences(case, whole, tmp_path):
    model, theirs = pair(case, tmp_path)
    sequences = some_sequences(9, 2, 1, 17)
    sequences.insert(2, [])
    factors = [torch.randn(max(len(s) - 1, 0)) for s in sequences]
    our_gradients(model, pack_sequences(sequences), None, torch.cat(factors), whole)
    for sequence, factor in zip(sequences, factors, strict=True):
        if len(sequence) > 1:
            their_loss(theirs, sequence, 1, factor.double()).backward()
    compare(model, theirs)


@pytest.mark.parametrize("case", CASES)
def test_gradients_through_a_shared_prefix(case, tmp_path):
    """A prompt computed once collects the gradients of all of its answers."""
    model, theirs = pair(case, tmp_path)
    prompts, answers = some_sequences(8, 1), [some_sequences(3, 0, 11), some_sequences(5, 2)]
    segments = [1, 2, 3, 5, 6]
    factors = [torch.randn(len(answer)) for group in answers for answer in group]
    batch = pack_groups(list(zip(prompts, answers, strict=True)))
    our_gradients(model, batch, segments, torch.cat(factors))
    at = iter(factors)
    for prompt, group in zip(prompts, answers, strict=True):
        for answer in group:
            factor = next(at).double()
            if answer:
                their_loss(theirs, prompt + answer, len(prompt), factor).backward()
    compare(model, theirs)


def test_micro_batches_add_up(tmp_path):
    """Two backward passes leave the sum in the same buffers, in the tied table too."""
    save("llama-biased-tied-llama3", tmp_path)
    sequences = some_sequences(12, 5, 9)
    factors = [torch.randn(11), torch.randn(4), torch.randn(8)]
    whole, cut = (load_policy(tmp_path, "float32", trainable=True) for _ in range(2))
    our_gradients(whole, pack_sequences(sequences), None, torch.cat(factors))
    our_gradients(cut, pack_sequences(sequences[:1]), None, factors[0])
    our_gradients(cut, pack_sequences(sequences[1:]), None, torch.cat(factors[1:]))
    for name, parameter in whole.parameters().items():
        torch.testing.assert_close(
            cut.parameters()[name].grad, parameter.grad, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox-serial", "llama", "qwen3-biased"])
def test_bfloat16_gradients_go_through_the_rounding_to_float32_masters(case, tmp_path, cpu_class):
    """The truth is the gradient at the rounded weights, in float64."""
    exact = save(case, tmp_path)
    rounded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
    )
    exact.load_state_dict(rounded.state_dict())
    exact.double()
    model = load_policy(tmp_path, "bfloat16", trainable=True)
    sequences = some_sequences(20, 13)
    factors = torch.randn(31)
    our_gradients(model, pack_sequences(sequences), None, factors)
    for theirs, dtype in ((exact, torch.float64), (rounded, torch.bfloat16)):
        for sequence, factor in zip(sequences, factors.split([19, 12]), strict=True):
            their_loss(theirs, sequence, 1, factor.to(dtype)).backward()
    truth, reference = their_gradients(model, exact), their_gradients(model, rounded)
    for name, grad in as_stored(model).items():
        # two layers there and two back, two units of floor for each
        assert_close(grad, reference[name], truth[name], name, units=8.0)


def test_a_frozen_model_asks_for_no_gradient(tmp_path):
    save("llama", tmp_path)
    model = load_policy(tmp_path, "float32")
    assert not forward(model, pack_sequences(some_sequences(4))).requires_grad
