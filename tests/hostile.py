"""Values, texts and files that nobody means well, for the tests of readers."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from small_engines import byte_tokenizer

from engine.errors import EngineError
from engine.run import checkpoint

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TOKENIZER = byte_tokenizer()

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from([2**63, -(2**70), 10**400, "\ud800", "\x00", "../x", "", "<|end|>", "\u202e"])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", 1]), "content": scalars}) | values,
    max_size=3,
)  # fmt: skip
COLUMNS = ("prompt", "completion", "messages", "text", "responses", "ranks", "context", "completions", "chosen",
           "rejected", "source")  # fmt: skip
texts = st.lists(st.text(max_size=5), max_size=4)
row = st.dictionaries(st.sampled_from(COLUMNS), values | messages | texts, max_size=5)
junk = st.binary(max_size=300)


def only_ours(call, *arguments, **options):
    """Whatever it gets, it returns or raises an error of the engine's own."""
    try:
        return call(*arguments, **options)
    except EngineError as error:
        assert str(error)
        return None


def as_lines(items) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def save_small(root: Path) -> Path:
    tensors = {"model": {"w": torch.arange(6.0)}, "optimizer": {"steps": torch.tensor(3)}}
    shutil.rmtree(root, ignore_errors=True)
    return checkpoint.save(root, 3, tensors, {"step": 3, "stage": "sft", "tokens_seen": 7}, keep=1)


def resealed(path: Path) -> None:
    """A manifest that fits what is there: whoever can write the folder can do that."""
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in path.iterdir()
        if p.name != "manifest.json"
    }
    (path / "manifest.json").write_text(
        json.dumps({"format": 1, "step": 3, "interim": False, "files": files})
    )
