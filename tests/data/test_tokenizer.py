"""load_tokenizer gives what AutoTokenizer gives, and does not import half of transformers for it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from small_engines import FAMILIES, save_tiny
from transformers import AutoTokenizer

from engine.data.tokenizer import load_tokenizer
from engine.errors import ModelError

CLASSES = (
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "GPTNeoXTokenizerFast",
    "LlamaTokenizer",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    None,  # not said: the model's type decides
)
TEXT = "Größe  and\n\n<|end|> 12,345 tokens"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


def say_class(folder, name):
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text()) | {"tokenizer_class": name}
    path.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_tokenizer_of_transformers(folders, family, name):
    say_class(folders[family], name)
    ours, theirs = load_tokenizer(folders[family]), AutoTokenizer.from_pretrained(folders[family])
    assert type(ours) is type(theirs)
    assert ours(TEXT) == theirs(TEXT) and ours.decode(ours(TEXT).input_ids) == theirs.decode(
        theirs(TEXT).input_ids
    )
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.get_chat_template() == theirs.get_chat_template()
    assert len(ours) == len(theirs) and ours.name_or_path == theirs.name_or_path


def test_it_takes_no_compiler_to_read_a_tokenizer(folders):
    say_class(folders["llama"], "TokenizersBackend")
    code = (
        "import sys; from engine.data.tokenizer import load_tokenizer;"
        f" load_tokenizer({str(folders['llama'])!r});"
        " print([m for m in ('torch._dynamo', 'sympy', 'torch.distributed.tensor') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_without_one_is_an_error_and_remote_code_is_not_run(tmp_path, folders):
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    path = folders["gpt2"] / "tokenizer_config.json"
    wants_code = {"auto_map": {"AutoTokenizer": ["own.Slow", "own.Fast"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(wants_code))
    (folders["gpt2"] / "own.py").write_text("raise SystemExit('remote code ran')")
    theirs = AutoTokenizer.from_pretrained(folders["gpt2"], trust_remote_code=False)
    assert type(load_tokenizer(folders["gpt2"])) is type(theirs)


def test_a_folder_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny("llama", tmp_path / "model")
    assert load_tokenizer("~/model").eos_token_id == load_tokenizer(tmp_path / "model").eos_token_id
