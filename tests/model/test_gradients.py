"""Gradients of every parameter of every family against transformers' autograd in float64."""

import pytest
import torch
from families import CASES, save, some_sequences

from engine.data.pack import Packed, pack_groups, pack_sequences, predictions
from engine.kernels._backend import backend
from engine.model.names import place_of
from engine.model.transformer import Model, forward, logprobs
from engine.model.weights import load_policy

TEMPERATURE = 0.7


def our_gradients(model: Model, batch: Packed, segments: list[int] | None, factors) -> None:
    shift = predictions(batch, segments)
    hidden = forward(model, batch)[shift.rows]
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


def compare(model: Model, theirs) -> None:
    ours = as_stored(model)
    wanted = {
        name.replace("lm_head", "embed_out") if model.architecture.family == "gpt_neox" else name: p
        for name, p in theirs.named_parameters()
    }
    assert ours.keys() == wanted.keys()
    for name, parameter in wanted.items():
        scale = float(parameter.grad.abs().max())
        assert scale > 1e-4, f"{name}: no gradient to compare"
        worst = float((ours[name] - parameter.grad).abs().max())
        assert worst <= 2e-5 * scale + 1e-5, f"{name}: off by {worst}, largest {scale}"


def pair(case, tmp_path) -> tuple[Model, torch.nn.Module]:
    theirs = save(case, tmp_path).double()
    return load_policy(tmp_path, "float32", trainable=True), theirs


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_ragged_sequences(case, tmp_path):
    model, theirs = pair(case, tmp_path)
    sequences = some_sequences(9, 2, 1, 17)
    sequences.insert(2, [])
    factors = [torch.randn(max(len(s) - 1, 0)) for s in sequences]
    our_gradients(model, pack_sequences(sequences), None, torch.cat(factors))
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


@pytest.mark.parametrize("case", ["gpt2", "qwen3-biased"])
def test_bfloat16_gradients_go_through_the_rounding_to_float32_masters(case, tmp_path):
    """Those of float32 at the rounded weights, up to the products' own rounding."""
    save(case, tmp_path)
    sequences = some_sequences(20, 13)
    factors = torch.randn(31)
    rounded, exact = (load_policy(tmp_path, d, trainable=True) for d in ("bfloat16", "float32"))
    exact.load_state({name: rounded.weights.stored(name).float() for name in exact.parameters()})
    with backend("reference"):
        our_gradients(exact, pack_sequences(sequences), None, factors)
    our_gradients(rounded, pack_sequences(sequences), None, factors)
    for name, parameter in exact.parameters().items():
        if case == "gpt2" and name.endswith("k_proj.bias"):
            continue  # without rotation a bias common to all keys changes nothing: gradient 0
        ours = rounded.parameters()[name].grad
        assert ours.dtype == torch.float32
        difference = (ours - parameter.grad).norm() / (parameter.grad.norm() + 1e-3)
        assert difference < 0.05, f"{name}: relative difference {difference:.3f}"


def test_a_frozen_model_asks_for_no_gradient(tmp_path):
    save("llama", tmp_path)
    model = load_policy(tmp_path, "float32")
    assert not forward(model, pack_sequences(some_sequences(4))).requires_grad
