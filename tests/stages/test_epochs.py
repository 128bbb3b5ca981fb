"""The loop of SFT and the reward model: what a line of metrics says of checkpoints; the answers that score 0."""

import json

import pytest
from run import faulty
from small_engines import CONTEXT, save_tiny
from stages.tiny_data import write, write_all

import engine
from engine.data.tokenizer import load_tokenizer
from engine.stages.inputs import best_answer, load_rm_data

COMMON = {"threads": 1, "progress": False, "dtype": "float32", "max_length": 80}


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("epochs")
    return {"model": str(save_tiny("llama", folder / "model")), **write_all(folder)}


@pytest.mark.parametrize("logging_steps,lines", [(1, [3, 5]), (2, [4, 6]), (5, [5])])
def test_metrics_of_a_checkpoint_wait_for_the_next_line(logging_steps, lines, setting, tmp_path, monkeypatch):
    """Written at once here, checkpoints of steps 2 and 4 are known of at steps 3 and 5; that of step 6 at the end."""
    faulty.written_at_once(monkeypatch)
    config = engine.SFTConfig(
        model_name_or_path=setting["model"],
        output_dir=str(tmp_path / "run"),
        dataset_name=setting["sft"],
        per_device_train_batch_size=4,
        num_train_epochs=2,
        save_steps=2,
        logging_steps=logging_steps,
        **COMMON,
    )
    text = (engine.train_sft(config) / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert [r["step"] for r in found if "timing/checkpoint_write" in r] == lines


def rm_data(setting, **more):
    config = engine.RMConfig(
        model_name_or_path=setting["model"], output_dir="o", **(COMMON | more)
    )
    return load_rm_data(config, load_tokenizer(setting["model"]), CONTEXT)


def test_answers_that_score_zero_are_drawn_from_all_rankings(setting, tmp_path):
    """Not the first ones, which of a mixture are one file's."""
    paths = []
    for name in ("one", "two"):
        rows = [
            {"prompt": f"{name} {i}", "responses": ["good", "bad"], "ranks": [0, 1]}
            for i in range(40)
        ]
        paths.append(write(tmp_path / f"{name}.jsonl", rows))
    given = {"dataset_mixture": [engine.DataSource(path) for path in paths], "demonstrations_limit": 20}
    data = rm_data(setting, **given)
    sources, prompts = ([getattr(g, name) for g in data.demonstrations] for name in ("source", "prompt"))
    assert len(set(prompts)) == 20
    for name in ("one", "two"):
        assert 4 <= sources.count(name) <= 16
    again, other = rm_data(setting, **given), rm_data(setting, seed=1, **given)
    assert prompts == [group.prompt for group in again.demonstrations]
    assert prompts != [group.prompt for group in other.demonstrations]


def test_answers_that_score_zero_are_all_in_the_files_order_where_they_are_few(setting):
    data = rm_data(setting, dataset_name=setting["rankings"], demonstrations_limit=12)
    assert list(data.demonstrations) == [best_answer(group) for group in data.train]
