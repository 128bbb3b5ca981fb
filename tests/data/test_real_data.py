"""The loaders on real published rows; needs a folder of them.

Run with ENGINE_TEST_DATA=FOLDER (JSON lines: sft, preference, rankings, prompts, pretrain) and
ENGINE_TEST_TOKENIZER=FOLDER (any model folder; without it a small tokenizer built here).
"""

import os
from pathlib import Path

import pytest

from engine.data.chat import Talk, TextEncoder
from engine.data.prompts import load_prompts
from engine.data.rankings import load_rankings
from engine.data.text import load_pretrain, load_sft

FOLDER = os.environ.get("ENGINE_TEST_DATA")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="ENGINE_TEST_DATA names no data folder")


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(str(FOLDER)) / "small"


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer):
    path = os.environ.get("ENGINE_TEST_TOKENIZER")
    if path is None:
        return chat_tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def test_demonstrations(folder: Path, tokenizer) -> None:
    data = load_sft([str(folder / "sft.jsonl")], tokenizer)
    assert data.report.skipped == {} and len(data) == data.report.read > 0
    assert len({example.source for example in data}) > 1
    for example in data:
        response = example.tokens[example.response_start :]
        assert response[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in response[:-1]


def test_rankings_and_pairs(folder: Path, tokenizer) -> None:
    sources = [str(folder / "preference.jsonl"), str(folder / "rankings.jsonl")]
    data = load_rankings(sources, tokenizer)
    assert data.report.skipped == {} and len(data) == data.report.read
    assert {2, 4} <= {len(group.responses) for group in data}
    assert any(len(set(group.ranks)) < len(group.ranks) for group in data)


def test_talks_go_through_the_template(folder: Path, tokenizer) -> None:
    data = load_prompts([str(folder / "prompts.jsonl")], tokenizer)
    talks = [prompt for prompt in data if prompt.messages is not None]
    assert talks and data.report.skipped == {}
    encoder = TextEncoder(tokenizer)
    for prompt in talks[:50]:
        ordinary = tokenizer.apply_chat_template(
            [dict(message) for message in prompt.messages], add_generation_prompt=True
        )["input_ids"]
        assert list(prompt.tokens) == ordinary != encoder.prompt(Talk(prompt.text))


def test_pretraining_text(folder: Path, tokenizer) -> None:
    path = folder.parent / "pretrain.jsonl"
    rows = load_pretrain([str(path)], tokenizer, 512)
    assert rows.table.shape[1] == 512 and rows.report.kept == rows.report.read
    assert len(rows) > 100 and 0 <= rows.tokens_left_over < 512
