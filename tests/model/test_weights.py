"""Folders: shards, old layouts, and every way in which files can fail to fit."""

import json

import pytest
import torch
from families import CASES, FAMILIES, build, hf_logits, save, some_sequences
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from engine.data.pack import pack_sequences
from engine.errors import ModelError
from engine.hybrid import HybridEngine
from engine.kernels._backend import backend
from engine.model import weights
from engine.model.transformer import forward, logits
from engine.model.weights import load_policy, load_scalar, resolve_dtype, save_policy
from tests.small_engines import byte_tokenizer

ONE = "model.safetensors"


def agree(model, theirs) -> bool:
    sequences = some_sequences(8)
    with torch.no_grad():
        ours = logits(model, forward(model, pack_sequences(sequences)))
    return bool((ours - hf_logits(theirs, sequences)).abs().max() <= 1e-4)


def edit(folder, change) -> None:
    """Rewrites the tensors of a folder; ``change`` gets the dict."""
    tensors = load_file(folder / ONE)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / ONE)


def edit_config(folder, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def fails(folder, load=load_policy) -> str:
    with pytest.raises(ModelError) as error:
        load(folder, "float32")
    return str(error.value)


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "llama-biased-tied-llama3"])
def test_shards_in_and_out(case, tmp_path):
    theirs = build(case)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="50KB")
    assert not (tmp_path / "in" / ONE).exists()
    model = load_policy(tmp_path / "in", "float32")
    assert agree(model, theirs)
    save_policy(model, tmp_path / "out", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert agree(load_policy(tmp_path / "out", "float32"), theirs)
    assert agree(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    save_policy(model, tmp_path / "out")  # one file now: no shard is left beside it
    assert [p.name for p in (tmp_path / "out").glob("model*")] == [ONE]


def test_the_folder_keeps_config_generation_config_and_tokenizer(tmp_path):
    theirs = build("gpt2")
    theirs.generation_config.temperature = 0.7
    theirs.generation_config.do_sample = True
    theirs.generation_config.eos_token_id = [5, 6]
    theirs.save_pretrained(tmp_path / "in")
    edit_config(tmp_path / "in", torch_dtype="float32", of_another_program="kept")
    model = load_policy(tmp_path / "in", "bfloat16")
    assert model.eos_token_ids == {5, 6}
    save_policy(model, tmp_path / "out", tokenizer=byte_tokenizer())
    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("in", "out"))
    assert after == {**before, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert after["architectures"] == ["GPT2LMHeadModel"]
    name = "generation_config.json"
    assert json.loads((tmp_path / "out" / name).read_text())["temperature"] == 0.7
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert {t.dtype for t in load_file(tmp_path / "out" / ONE).values()} == {torch.bfloat16}


@pytest.mark.parametrize("has_config", [True, False])
def test_the_saved_policy_ends_where_it_was_trained_to(has_config, tmp_path):
    """With transformers too: at the tokenizer's end, and at those that the base names."""
    theirs = build("gpt2")
    theirs.generation_config.eos_token_id = [5, 6]
    theirs.save_pretrained(tmp_path / "in")
    if not has_config:
        (tmp_path / "in" / "generation_config.json").unlink()
    base = load_policy(tmp_path / "in", "float32").eos_token_ids
    tokenizer = byte_tokenizer()
    assert tokenizer.eos_token_id not in base
    policy = HybridEngine(load_policy(tmp_path / "in", "float32"), tokenizer)
    policy.save_pretrained(tmp_path / "out")
    saved = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert set(saved) == policy.eos_ids == base | {tokenizer.eos_token_id}
    assert load_policy(tmp_path / "out", "float32").eos_token_ids == policy.eos_ids
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():  # every next token is the tokenizer's end
        read.transformer.ln_f.weight.zero_()
        read.transformer.ln_f.bias.copy_(100 * read.lm_head.weight[tokenizer.eos_token_id])
    made = read.generate(torch.tensor([[7, 8]]), max_new_tokens=5, do_sample=False)
    assert made.tolist() == [[7, 8, tokenizer.eos_token_id]]


def test_an_end_that_config_json_alone_names_is_saved_where_it_is_read(tmp_path):
    """Where there is a generation config, transformers takes no end from config.json."""
    tokenizer = byte_tokenizer()
    build("llama").save_pretrained(tmp_path / "in")
    edit_config(tmp_path / "in", eos_token_id=tokenizer.eos_token_id)
    (tmp_path / "in" / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    save_policy(load_policy(tmp_path / "in", "float32"), tmp_path / "out", tokenizer=tokenizer)
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (saved.eos_token_id, saved.temperature) == (tokenizer.eos_token_id, 0.7)


def test_eos_of_the_config_where_there_is_no_generation_config(tmp_path):
    save("llama", tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert load_policy(tmp_path, "float32").eos_token_ids == {5}


@pytest.mark.parametrize("case", FAMILIES)
def test_half_precision_files_become_the_masters_exactly(case, tmp_path):
    build(case).half().save_pretrained(tmp_path)
    model = load_policy(tmp_path, "bfloat16", trainable=True)
    name, key = "norm.weight", "ln_f.weight" if case == "gpt2" else "norm.weight"
    stored = {k: t for k, t in load_file(tmp_path / ONE).items() if k.endswith(key)}
    want = next(t for k, t in stored.items() if "layers" not in k and t.shape == (48,))
    assert torch.equal(model.parameters()[name], want.float())


@pytest.mark.parametrize("case", ["gpt2", "llama-biased-tied-llama3"])
def test_old_files_without_prefix_and_with_buffers(case, tmp_path):
    theirs = save(case, tmp_path)
    prefix = theirs.base_model_prefix + "."
    buffer = "h.0.attn.bias" if case == "gpt2" else "layers.0.self_attn.rotary_emb.inv_freq"

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)
        tensors[buffer] = torch.ones(1, 1, 4, 4)

    edit(tmp_path, strip)
    assert agree(load_policy(tmp_path, "float32"), theirs)


def test_a_gpt_neox_head_under_its_other_name(tmp_path):
    theirs = save("gpt_neox", tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("embed_out.weight")}))
    assert agree(load_policy(tmp_path, "float32"), theirs)


def test_a_tied_head_may_be_written_twice_but_not_differ(tmp_path):
    theirs = save("qwen2", tmp_path)
    table = "model.embed_tokens.weight"
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t[table].clone()}))
    assert agree(load_policy(tmp_path, "float32"), theirs)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t[table] * 2}))
    assert f"lm_head.weight differs from {table}; set tie_word" in fails(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    assert not agree(load_policy(tmp_path, "float32"), theirs)


def test_everything_that_does_not_fit_is_named(tmp_path):
    save("gpt2", tmp_path)

    def spoil(tensors):
        del tensors["transformer.ln_f.bias"], tensors["transformer.h.1.attn.c_attn.weight"]
        tensors["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(57, 48)  # not turned
        tensors["transformer.wpe.weight"] = torch.zeros(63, 48)
        tensors["transformer.h.0.ln_1.weight"] = torch.zeros(48, dtype=torch.int8)
        tensors["transformer.h.2.ln_1.weight"] = torch.zeros(48)
        tensors["value.bias"] = torch.zeros(1)

    edit(tmp_path, spoil)
    assert sorted(fails(tmp_path).splitlines()[1:]) == [
        "  left over: transformer.h.2.ln_1.weight (48,)",
        "  left over: value.bias (1,)",
        "  missing: transformer.h.1.attn.c_attn.weight (48, 144)",
        "  missing: transformer.ln_f.bias (48,)",
        "  wrong shape: transformer.h.0.mlp.c_fc.weight: got (57, 48), want (48, 57)",
        "  wrong shape: transformer.wpe.weight: got (63, 48), want (64, 48)",
        "  wrong type: transformer.h.0.ln_1.weight: got I8, want one of F64, F32, F16, BF16",
    ]


def test_an_untied_head_must_be_there(tmp_path):
    save("llama", tmp_path)
    edit(tmp_path, lambda t: t.pop("lm_head.weight"))
    assert "missing: lm_head.weight (97, 48)" in fails(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_a_row_too_few_in_any_tensor_is_found(case, tmp_path):
    save(case, tmp_path)
    edit(tmp_path, lambda t: t.update({name: x[:-1] for name, x in t.items()}))
    assert fails(tmp_path).count("wrong shape: ") == len(load_file(tmp_path / ONE))


def test_a_model_of_the_other_kind_says_how_to_load_it(tmp_path):
    save("llama", tmp_path / "scalar", scalar=True)
    save("llama", tmp_path / "policy")
    message = fails(tmp_path / "scalar")
    assert "missing: lm_head.weight" in message and "left over: score.weight (1, 48)" in message
    assert message.endswith("load it with load_scalar.")
    message = fails(tmp_path / "policy", load_scalar)
    assert "missing: score.weight (1, 48)" in message and "left over: lm_head.weight" in message
    assert message.endswith("make one of a language model with scalar_from_policy.")


def test_folders_that_hold_no_safetensors(tmp_path):
    save("llama", tmp_path)
    (tmp_path / ONE).rename(tmp_path / "pytorch_model.bin")
    assert "got pytorch_model.bin, want model.safetensors; pickled files" in fails(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    assert "want model.safetensors or model.safetensors.index.json" in fails(tmp_path)
    (tmp_path / ONE).write_bytes(b"not a header")
    assert "not a readable safetensors file" in fails(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not valid JSON" in fails(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "got a JSON list, want an object" in fails(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "config.json: no such file; want a Hugging Face model folder" in fails(tmp_path)


def test_an_index_that_promises_too_much(tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"]["model.extra"] = first
    path.write_text(json.dumps(index))
    assert f"names tensors that are not there:\n  model.extra, in {first}" in fails(tmp_path)
    (tmp_path / first).unlink()
    assert f"names files that are not there: {first}" in fails(tmp_path)
    path.write_text("{}")
    assert "no weight_map in it" in fails(tmp_path)


def test_what_is_neither_folder_nor_hub_id(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for given in (tmp_path / "file", tmp_path / "a" / "b", "a//b"):
        assert "want a folder that exists, or a hub id" in fails(given)

    def refuse(repo, **options):
        raise OSError("offline")

    monkeypatch.setattr(weights.huggingface_hub, "snapshot_download", refuse)
    assert "got 'some/model', which is no folder here, and the hub does not" in fails("some/model")


def test_a_hub_id_fetches_safetensors_and_json_only(tmp_path, monkeypatch):
    theirs = save("llama", tmp_path)
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(weights.huggingface_hub, "snapshot_download", download)
    assert agree(load_policy("some/model", "float32"), theirs)
    assert asked == {
        "repo": "some/model",
        "allow_patterns": ["*.safetensors", "*.json"],
        "ignore_patterns": ["*/*"],
    }


def test_storage_types(monkeypatch):
    assert resolve_dtype("float32") == torch.float32
    assert resolve_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ModelError, match="got 'float16', want auto, bfloat16 or float32"):
        resolve_dtype("float16")
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        with backend("reference"):
            assert resolve_dtype("auto") == (torch.bfloat16 if native else torch.float32)
        monkeypatch.setattr(weights, "kernels_usable", lambda: True)
        assert resolve_dtype("auto") == torch.bfloat16
        monkeypatch.undo()
