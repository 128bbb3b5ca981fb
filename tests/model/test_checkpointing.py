"""What the backward makes again changes memory and time, and no bit of a gradient."""

import pytest
import torch
from families import CASES, VOCABULARY, save, some_sequences

from engine.data.pack import pack_groups, pack_sequences, predictions
from engine.model import transformer
from engine.model.checkpointing import MODES, made_again, saved_as
from engine.model.dropout import Dropout
from engine.model.transformer import Model
from engine.model.weights import load_policy

GROUPS = [
    ([1, 2, 3, 4, 5, 6, 7], [[8, 9], [10], [11, 12, 13]]),
    ([VOCABULARY - 1, 3], [[5], [4, 4, 4, 4]]),
]


ACTIVITIES = [torch.profiler.ProfilerActivity.CPU]


def gradients(model: Model, mode: str, dropout: Dropout | None) -> dict[str, torch.Tensor]:
    """Of two micro-batches, so that sums over them are compared too."""
    for batch, p in ((pack_groups(GROUPS), dropout), (pack_sequences([[3, 1, 4, 1, 5]]), None)):
        shift = predictions(batch)
        hidden = transformer.forward(model, batch, p, shift.rows, mode)
        logprob, entropy = transformer.logprobs(model, hidden, shift.targets, 0.7)
        (logprob * torch.linspace(-1, 2, len(logprob)) + 0.3 * entropy).sum().backward()
    found = {name: p.grad for name, p in model.parameters().items()}
    for parameter in model.parameters().values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_equal_to_the_bit(case, dtype, tmp_path):
    save(case, tmp_path)
    model = load_policy(tmp_path, dtype, trainable=True)
    segments = tuple(enumerate([7, 2, 1, 3, 2, 1, 4]))
    for dropout in (None, Dropout(0.3, 1, 2, segments)):
        none, selective, full = (gradients(model, mode, dropout) for mode in MODES)
        for name, gradient in none.items():
            assert gradient.any(), name
            assert torch.equal(gradient, selective[name]), name
            assert torch.equal(gradient, full[name]), name


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_a_layer_runs_again_only_where_asked(case, tmp_path, monkeypatch):
    """Products are the expensive part: selective repeats none of them, full repeats each once."""
    save(case, tmp_path)
    model = load_policy(tmp_path, "bfloat16", trainable=True)
    calls: list[str] = []

    def counting(name):
        real = getattr(transformer, name)
        return lambda *a, **k: calls.append(name) or real(*a, **k)

    act, norm = ("swiglu", "rmsnorm") if case == "llama" else ("gelu", "layernorm")
    for name in ("attention", act, norm):
        monkeypatch.setattr(transformer, name, counting(name))
    counts = {}
    for mode in MODES:
        calls.clear()
        gradients(model, mode, None)
        counts[mode] = {name: calls.count(name) for name in ("attention", act, norm)}
    # two micro-batches of two layers; two norms a layer and a last one
    assert counts["none"] == {"attention": 4, act: 4, norm: 10}
    assert counts["selective"] == {"attention": 4, act: 8, norm: 18}
    assert counts["full"] == {"attention": 8, act: 8, norm: 18}


def kept_bytes(model: Model, mode: str, tokens: int) -> int:
    """What is left of all that a forward allocated, when only its result is held."""
    batch = pack_sequences(some_sequences(tokens))
    with torch.profiler.profile(activities=ACTIVITIES, profile_memory=True) as record:
        hidden = transformer.forward(model, batch, checkpointing=mode)
        assert hidden.requires_grad
    return sum(event.self_cpu_memory_usage for event in record.events())


def test_each_mode_keeps_less_than_the_one_before(tmp_path):
    save("llama", tmp_path)
    model = load_policy(tmp_path, "bfloat16", trainable=True)
    none, selective, full = (kept_bytes(model, mode, 64) for mode in MODES)
    assert selective < 0.75 * none
    assert full < 0.5 * selective


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_that_is_dropped_leaves_nothing(mode, tmp_path):
    """No cycle between what is saved and the operations that saved it."""
    save("llama", tmp_path)
    model = load_policy(tmp_path, "bfloat16", trainable=True)
    held = kept_bytes(model, mode, 64)
    with torch.profiler.profile(activities=ACTIVITIES, profile_memory=True) as record:
        transformer.forward(model, pack_sequences(some_sequences(64)), checkpointing=mode)
    left = sum(event.self_cpu_memory_usage for event in record.events())
    assert left < 0.05 * held


@torch.no_grad()
def test_nothing_is_wrapped_without_a_gradient():
    value = torch.ones(3)
    for context in (made_again(True, value, value.clone), saved_as(True, (value,), torch.bfloat16)):
        assert context.__enter__() is None


def test_a_recipe_is_made_once_a_backward():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    made: list[int] = []
    square = x * x
    kept = x.detach()

    def make() -> torch.Tensor:
        made.append(1)
        return kept * kept

    with made_again(True, square, make):
        out = (square.sin() + square.cos()).sum()  # both save their input
    out.backward(retain_graph=True)
    assert len(made) == 1
    first, x.grad = x.grad, None
    out.backward()
    assert len(made) == 2 and torch.equal(first, x.grad)
