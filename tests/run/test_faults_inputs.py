"""Models and data that are broken or odd: each is a clear error before anything is trained, or is counted."""

import json
import struct
from pathlib import Path

import pytest
from run import faulty
from safetensors.torch import load_file, save_file
from small_engines import byte_tokenizer, save_tiny
from stages.tiny_data import write

import engine
from engine.errors import ConfigError, DataError, EngineError, ModelError
from engine.model.weights import save_scalar, scalar_from_policy
from engine.train import main


@pytest.fixture
def setting(tmp_path) -> dict[str, str]:
    return faulty.make_setting(tmp_path)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def tensor(shape, end, kind="F32") -> bytes:
    return json.dumps({"w": {"dtype": kind, "shape": shape, "data_offsets": [0, end]}}).encode()


BROKEN = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:100],
    "cut in the weights": lambda data: data[:-1],
    "not safetensors": lambda data: b"<html>not found</html>" * 10,
    "a header of 2^63 bytes": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "a header of 2^40 bytes": lambda data: struct.pack("<Q", 2**40) + data[8:],
    "a tensor of 2^62 numbers": lambda data: header(tensor([2**31, 2**31], 2**63 - 1)),
    "a product that overflows": lambda data: header(tensor([2**33, 2**33], 0)) + b"",
    "a negative shape": lambda data: header(tensor([-1], 4)) + b"abcd",
    "an unknown type": lambda data: header(tensor([1], 4, "F7")) + b"abcd",
    "offsets beyond the file": lambda data: header(tensor([1000], 4000)) + b"abcd",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_weight_file_is_named(kind, setting, tmp_path, capsys):
    path = Path(setting["model"]) / "model.safetensors"
    path.write_bytes(BROKEN[kind](path.read_bytes()))
    with pytest.raises(ModelError, match="model.safetensors"):
        engine.train_sft(faulty.sft(setting, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_config_that_disagrees_with_the_weights_names_the_tensors(setting, tmp_path):
    path = Path(setting["model"]) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 1}))
    with pytest.raises(ModelError, match=r"mlp.*51"):
        engine.train_sft(faulty.sft(setting, tmp_path / "run"))


def test_a_model_folder_that_is_not_there_is_one_message(setting, tmp_path, capsys):
    argv = [
        "--stage",
        "sft",
        "--model_name_or_path",
        str(tmp_path / "no"),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert main([*argv, "--dataset_name", setting["sft"]]) == 1
    said = capsys.readouterr().err
    assert "want a folder that exists" in said and "Traceback" not in said


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_tokenizer_of_another_vocabulary_is_refused(stage, setting, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(
        [f"{word} " for word in ("cat", "dog", "the", "red", "big", "two", "sees", "runs")]
    )
    tokenizer.save_pretrained(setting["model"])
    train, config = {
        "sft": (engine.train_sft, faulty.sft),
        "rm": (engine.train_reward_model, faulty.rm),
        "ppo": (engine.train_ppo, faulty.ppo),
    }[stage]
    with pytest.raises(
        ModelError, match=r"the tokenizer of .* gives token 26\d, the model has 0..262"
    ):
        train(config(setting, tmp_path / "run"))


def reward_model_of(rows: int, folder: Path) -> str:
    """A reward model with only so many rows of its vocabulary."""
    model = scalar_from_policy(str(save_tiny("llama", folder / "policy")), 0, "float32")
    save_scalar(model, folder, tokenizer=byte_tokenizer())
    weights = load_file(folder / "model.safetensors")
    cut = {name: t[:rows].clone() if t.shape[0] == 263 else t for name, t in weights.items()}
    save_file(cut, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    return str(folder)


@pytest.mark.parametrize(
    "rows, message",
    [
        (100, r"the value model: the tokenizer of .* gives token 258, the model has 0\.\.99"),
        (259, r"the value model: got a vocabulary of 259 rows, want at least the 263 of .*_token_embeddings\(263\)"),
    ],
)
def test_a_reward_model_of_a_smaller_vocabulary_is_refused(rows, message, setting, tmp_path):
    """259 are all that the tokenizer has; the policy's other four rows are sampled all the same."""
    other = reward_model_of(rows, tmp_path / "other")
    with pytest.raises(ModelError, match=message):
        engine.train_ppo(faulty.ppo(setting, tmp_path / "run", rewards=[engine.RewardSource(source=other)]))
    config = faulty.sft(setting, tmp_path / "run", select_by_reward_model=other, select_response_length=8)
    with pytest.raises(ModelError, match=message.replace("the value model", "select_by_reward_model .*other")):
        engine.train_sft(config)
    assert not (tmp_path / "run").exists()


def test_a_single_ranked_answer_is_a_bad_row(setting, tmp_path):
    one = {"prompt": "a", "responses": ["b"], "ranks": [0]}
    rows = [one, one | {"responses": ["b", "c"], "ranks": [0, 1]}]
    path = write(tmp_path / "k1.jsonl", rows)
    with pytest.raises(DataError, match="k1.jsonl:1: .*2"):
        engine.train_reward_model(faulty.rm(setting, tmp_path / "run", dataset_name=path))
    engine.train_reward_model(
        faulty.rm(setting, tmp_path / "run", dataset_name=path, bad_rows="skip")
    )
    assert "left out" in (tmp_path / "run" / "events.jsonl").read_text()


def test_nothing_but_ties_is_refused_and_a_batch_of_ties_teaches_nothing(setting, tmp_path):
    tie = {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}
    path = write(tmp_path / "ties.jsonl", [tie] * 3)
    with pytest.raises(DataError, match="all answers of each of 3 prompts are ties"):
        engine.train_reward_model(faulty.rm(setting, tmp_path / "run", dataset_name=path))
    path = write(tmp_path / "some.jsonl", [tie, tie, tie | {"ranks": [0, 1]}])
    config = faulty.rm(setting, tmp_path / "run", dataset_name=path, per_device_train_batch_size=1)
    engine.train_reward_model(config)
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    assert sorted(r["num_pairs"] for r in steps) == [0.0, 0.0, 1.0]
    assert all(r["loss"] == 0.0 for r in steps if r["num_pairs"] == 0.0)
    assert not any("non_finite" in r for r in records(tmp_path / "run"))


def test_no_rows_left_after_filters(setting, tmp_path):
    with pytest.raises(DataError, match="no usable row(.|\n)*too long: 12"):
        engine.train_ppo(faulty.ppo(setting, tmp_path / "run", max_length=1))
    assert not (tmp_path / "run").exists()


def test_prompts_longer_than_the_context(setting, tmp_path):
    """Left out and counted; a limit beyond the context is a config error, as is an answer as long as the context."""
    rows = [{"prompt": "word " * 40}, {"prompt": "short"}]
    path = write(tmp_path / "long.jsonl", rows)
    engine.train_ppo(faulty.ppo(setting, tmp_path / "run", dataset_name=path, total_episodes=4))
    assert "left out, too long: 1" in (tmp_path / "run" / "events.jsonl").read_text()
    wanted = "max_length: got 91, the model's context of 96 leaves 90 beside response_length 6"
    with pytest.raises(ConfigError, match=wanted):
        engine.train_ppo(faulty.ppo(setting, tmp_path / "no", dataset_name=path, max_length=91))
    with pytest.raises(ConfigError, match="response_length: .*no room"):
        engine.train_ppo(faulty.ppo(setting, tmp_path / "no", response_length=96))
    model = engine.HybridEngine.from_pretrained(setting["model"], dtype="float32")
    with pytest.raises(ConfigError, match="the model's context is 96"):
        model.generate(["word " * 40], max_new_tokens=4)


def all_tokens_end(setting: dict[str, str]) -> None:
    path = Path(setting["model"]) / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": list(range(263))}))


@pytest.mark.parametrize("score_at", ["eos", "eos_plus_one"])
def test_all_answers_empty(score_at, setting, tmp_path):
    """Every answer is its end alone."""
    all_tokens_end(setting)
    engine.train_ppo(faulty.ppo(setting, tmp_path / "run", "constant", score_at=score_at))
    found = [r for r in records(tmp_path / "run") if "val/eos_rate" in r]
    assert len(found) == 3
    for record in found:
        assert record["val/eos_rate"] == 1.0 and record["completions/mean_length"] == 1.0
        assert "non_finite" not in record and record["policy/skipped_steps"] == 0.0


@pytest.mark.parametrize("mode", ["subtract", "replace"])
def test_all_answers_hit_the_limit(mode, setting, tmp_path):
    engine.train_ppo(
        faulty.ppo(setting, tmp_path / "run", response_length=2, missing_eos_mode=mode)
    )
    found = [r for r in records(tmp_path / "run") if "val/eos_rate" in r]
    assert len(found) == 3
    for record in found:
        assert record["val/eos_rate"] == 0.0 and record["completions/length_p100"] == 2.0
        assert "non_finite" not in record


def test_an_empty_file_and_an_empty_folder(setting, tmp_path):
    path = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="no usable row"):
        engine.train_sft(faulty.sft(setting, tmp_path / "run", dataset_name=path))
    (tmp_path / "folder").mkdir()
    with pytest.raises(EngineError, match="no data files"):
        engine.train_sft(
            faulty.sft(setting, tmp_path / "run", dataset_name=str(tmp_path / "folder"))
        )
