"""Masters, the compute copy, its version, and copies of a model."""

import pytest
import torch
from families import save, some_sequences

from engine.data.pack import pack_sequences
from engine.errors import ModelError
from engine.model.storage import StaleWeightsError
from engine.model.transformer import clone, forward
from engine.model.weights import load_policy, save_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("storage")
    save("qwen2", folder)
    return folder


@pytest.fixture(params=["float32", "bfloat16"])
def model(folder, request):
    return load_policy(folder, request.param, trainable=True)


def hidden(model):
    torch.manual_seed(4)
    with torch.no_grad():
        return forward(model, pack_sequences(some_sequences(11)))


def change(model, name="layers.1.mlp.up_proj.weight"):
    with torch.no_grad():
        model.parameters()[name].mul_(1.5)


@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "layers.1.mlp.up_proj.weight", "norm.weight"]
)
def test_a_changed_master_is_refused_until_refresh(model, name, tmp_path):
    before = hidden(model)
    change(model, name)
    for act in (lambda: hidden(model), lambda: save_policy(model, tmp_path)):
        with pytest.raises(StaleWeightsError, match=rf"{name}.*version 0.*model.refresh\(\)"):
            act()
    model.refresh()
    assert model.version == 1
    assert not torch.allclose(hidden(model), before, atol=1e-3)


def test_masters_are_float32_and_the_copy_is_of_the_storage_type(model):
    assert {p.dtype for p in model.parameters().values()} == {torch.float32}
    for name, master in model.parameters().items():
        stored = model.weights.stored(name)
        assert stored.dtype == model.dtype
        assert torch.equal(stored, master.detach().to(model.dtype))


def test_vectors_are_rounded_as_they_are_saved(model):
    name = "layers.0.self_attn.q_proj.bias"
    vector = model.weights.vector(name)
    assert vector.dtype == torch.float32
    assert torch.equal(vector, model.parameters()[name].detach().to(model.dtype).float())


def test_frozen_and_trained_models_compute_the_same(folder, model):
    frozen = load_policy(folder, str(model.dtype).removeprefix("torch."))
    assert frozen.parameters() == {} and not frozen.trainable and model.trainable
    assert torch.equal(hidden(frozen), hidden(model))


def test_state_goes_round(folder, model):
    change(model)
    model.refresh()
    state = {name: tensor.clone() for name, tensor in model.state().items()}
    other = load_policy(folder, str(model.dtype).removeprefix("torch."), trainable=True)
    other.load_state(state)
    assert other.version == 1
    assert list(state) == list(other.parameters())
    assert torch.equal(hidden(other), hidden(model))


def test_a_state_that_does_not_fit_is_named_whole_and_not_written(model):
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state().items()}
    del state["norm.weight"], state["layers.0.mlp.gate_proj.weight"]
    state["extra"] = torch.zeros(2)
    state["embed_tokens.weight"] = torch.zeros(3, 4)
    before = hidden(model)
    with pytest.raises(ModelError) as error:
        model.load_state(state)
    assert str(error.value).splitlines()[1:] == [
        "  missing: layers.0.mlp.gate_proj.weight",
        "  missing: norm.weight",
        "  left over: extra",
        "  wrong shape: embed_tokens.weight: got (3, 4), want (97, 48)",
    ]
    assert torch.equal(hidden(model), before)


def test_a_frozen_model_has_no_masters_to_act_on(folder):
    model = load_policy(folder, "float32")
    for name, act in (
        ("refresh", model.refresh),
        ("state", model.state),
        ("load_state", lambda: model.load_state({})),
    ):
        with pytest.raises(ModelError, match=f"{name}: the model is frozen.*trainable=True"):
            act()


@pytest.mark.parametrize("trainable", [False, True])
def test_a_clone_does_not_follow_its_model(model, trainable):
    """In float32 the compute copy of a trained model may be the master's own memory."""
    copy, before = clone(model, trainable), hidden(model)
    assert torch.equal(hidden(copy), before) and copy.trainable == trainable
    for name in model.parameters():
        change(model, name)
    model.refresh()
    assert torch.equal(hidden(copy), before)
    assert not torch.allclose(hidden(model), before, atol=1e-3)


def test_a_trained_clone_keeps_the_masters_bits(folder):
    model = load_policy(folder, "bfloat16", trainable=True)
    for name, master in clone(model, trainable=True).parameters().items():
        assert torch.equal(master, model.parameters()[name])
        assert master is not model.parameters()[name]


def test_clone_of_a_stale_model_is_refused(model):
    change(model)
    with pytest.raises(StaleWeightsError):
        clone(model, trainable=False)


def test_a_model_outlives_the_files_it_came_from(folder, tmp_path):
    """Frozen float32 weights of a float32 file are copied out of the mapped file."""
    model = load_policy(folder, "float32")
    save_policy(model, tmp_path)
    again = load_policy(tmp_path, "float32")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(hidden(again), hidden(model))
