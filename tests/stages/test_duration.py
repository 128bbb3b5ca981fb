"""What --dry_run says of a run's length: the operations that the run then counts, over a rate that was measured."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from run import faulty
from small_engines import CONTEXT
from stages.tiny_data import write

import engine
from engine.data.tokenizer import load_tokenizer
from engine.stages import duration
from engine.stages.dry_run import describe
from engine.stages.inputs import load_ppo_data, load_rm_data, load_sft_data


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    return faulty.make_setting(tmp_path_factory.mktemp("duration"))


def counted(folder: Path) -> float:
    """Operations that the run has counted."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sum(value for r in records for name, value in r.items() if name.endswith("_flops") and name[:5] == "perf/")


@pytest.mark.parametrize("text", [0.0, 0.25])
def test_of_demonstrations_and_text(text, setting, tmp_path):
    rows = [{"prompt": "p" * (1 + i % 3), "completion": "c" * (1 + i)} for i in range(12)]
    more = {"ptx_dataset_name": setting["text"], "ptx_fraction": text, "ptx_length": 16} if text else {}
    more |= {"dataset_name": write(tmp_path / "rows.jsonl", rows), "max_steps": None, "num_train_epochs": 3}
    config = faulty.sft(setting, tmp_path / "run", **more)
    engine.train_sft(config)
    data = load_sft_data(config, load_tokenizer(setting["model"]), CONTEXT)
    assert duration.of_sft(config, data) == pytest.approx(counted(tmp_path / "run"))


def test_of_rankings(setting, tmp_path):
    config = faulty.rm(setting, tmp_path / "run", max_steps=None, num_train_epochs=2)
    engine.train_reward_model(config)
    data = load_rm_data(config, load_tokenizer(setting["model"]), CONTEXT)
    assert len(data.train) % config.batch_size == 0
    assert duration.of_reward_model(config, data) == pytest.approx(counted(tmp_path / "run"))


@pytest.mark.parametrize("more", [{}, {"num_samples": 2, "num_ppo_epochs": 2}])
def test_of_episodes(more, setting, tmp_path):
    """Answers of one token have the full length; prompts of one length are those of the first iteration."""
    data = write(tmp_path / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(8)])
    more |= {"dataset_name": data, "response_length": 1, "ptx_dataset_name": setting["text"], "ptx_length": 16}
    config = faulty.ppo(setting, tmp_path / "run", ptx_per_episode=1.0, **more)
    engine.train_ppo(config)
    found = load_ppo_data(config, load_tokenizer(setting["model"]), CONTEXT)
    assert duration.of_ppo(config, found) == pytest.approx(counted(tmp_path / "run"))


@pytest.mark.parametrize(
    ("operations", "text"), [(1.0, "1 min"), (90 * 60e9, "1 h 30 min"), (2 * 50 * 3600e9, "4 d 4 h")]
)
def test_the_line_says_how_long(operations, text, setting, tmp_path, monkeypatch):
    monkeypatch.setattr(duration, "product_rate", lambda *_: 1e9)
    config = faulty.sft(setting, tmp_path / "run")
    ranks = SimpleNamespace(size=2 if text == "4 d 4 h" else 1, smallest=lambda x: x)
    if ranks.size == 2:
        operations *= 2
    line = duration.said(operations, config, ranks)
    assert line.startswith(f"{text} if all {operations / 1e15:.3g} PFLOP ran as fast")
    assert f"here, {ranks.size:.3g} GFLOP/s" in line


def test_a_dry_run_measures_this_machine(setting, tmp_path):
    line = dict(describe("ppo", faulty.ppo(setting, tmp_path / "run")))["time"]
    assert " PFLOP with answers of the full length ran as fast as products do here, " in line
    assert not (tmp_path / "run").exists()
