"""A resume refuses what would change the result, lists it, and lets pass what is allowed by name."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import pytest
from run import faulty
from small_engines import save_tiny

import engine
from engine.errors import CheckpointError, ConfigError
from engine.run.resume import WITHOUT_EFFECT, check_same_run, differences, folder_identity
from engine.train import main, parse


@pytest.fixture
def setting(tmp_path) -> dict[str, str]:
    return faulty.make_setting(tmp_path)


sft = partial(faulty.sft, max_steps=2, eval_fraction=0.2)


def going_on(config: engine.SFTConfig, **more) -> engine.SFTConfig:
    return dataclasses.replace(config, resume_from_checkpoint="true", **more)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_another_config_is_refused_and_listed(setting, tmp_path):
    config = sft(setting, tmp_path / "run")
    engine.train_sft(config)
    before = snapshot(tmp_path / "run")
    with pytest.raises(CheckpointError) as refused:
        engine.train_sft(going_on(config, seed=1, learning_rate=0.5, save_steps=7, threads=2))
    text = str(refused.value)
    assert "seed: was 0, is 1" in text and "learning_rate: was 0.0001, is 0.5" in text
    assert "save_steps" not in text and "threads" not in text
    assert "--allow_config_change seed" in text
    assert snapshot(tmp_path / "run") == before  # its config.yaml above all


def test_allowed_keys_pass_and_are_noted(setting, tmp_path):
    config = sft(setting, tmp_path / "run")
    engine.train_sft(config)
    changed = going_on(config, max_steps=3, learning_rate=0.5)
    with pytest.raises(CheckpointError, match="max_steps") as refused:
        engine.train_sft(dataclasses.replace(changed, allow_config_change=["learning_rate"]))
    assert "learning_rate: was" not in str(refused.value)
    engine.train_sft(
        dataclasses.replace(changed, allow_config_change=["learning_rate", "max_steps"])
    )
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "as allowed: learning_rate: was 0.0001, is 0.5" in events
    engine.train_sft(changed)  # now it is the run's own
    assert "allow_config_change: []" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_data_set_that_shrank_or_changed_is_refused(setting, tmp_path):
    config = sft(setting, tmp_path / "run")
    engine.train_sft(config)
    path = Path(setting["sft"])
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:-1]))
    with pytest.raises(CheckpointError, match=r"data\.\w+: was \"\d+ rows .* is \"\d+ rows"):
        engine.train_sft(going_on(config))
    path.write_text("".join(rows[1:] + rows[:1]))  # as many, in another order
    with pytest.raises(CheckpointError, match=r"data\.train: was"):
        engine.train_sft(going_on(config))
    elsewhere = tmp_path / "elsewhere" / "of_another_name.jsonl"
    elsewhere.parent.mkdir()
    elsewhere.write_text("".join(rows))
    engine.train_sft(going_on(config, dataset_name=str(elsewhere)))  # moved, not changed


def test_a_model_that_changed_in_its_place_is_refused(setting, tmp_path):
    config = sft(setting, tmp_path / "run")
    engine.train_sft(config)
    save_tiny("llama", Path(setting["model"]), seed=1)
    with pytest.raises(CheckpointError, match=r"model\.model_name_or_path: was"):
        engine.train_sft(going_on(config))


def test_another_stage_is_refused(setting, tmp_path):
    engine.train_sft(sft(setting, tmp_path / "run"))
    config = engine.RMConfig(
        model_name_or_path=setting["model"], output_dir=str(tmp_path / "run"), max_length=80,
        dataset_name=setting["rankings"], threads=1, progress=False, resume_from_checkpoint="true",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="is of stage 'sft' at step 2, want stage 'rm'"):
        engine.train_reward_model(config)


def test_the_flag_is_repeatable_and_checked(setting, tmp_path, capsys):
    base = faulty.sft_words(setting, tmp_path / "run")
    once = parse([*base, "--allow_config_change", "seed"])[1]
    assert once.allow_config_change == ["seed"]
    many = ["--allow_config_change", "seed", "--allow_config_change=dtype"]
    assert parse([*base, *many])[1].allow_config_change == ["seed", "dtype"]
    listed = parse([*base, "--allow_config_change", '["seed", "dtype"]'])[1]
    assert listed.allow_config_change == ["seed", "dtype"]
    engine.train_sft(sft(setting, tmp_path / "run"))
    code = main(
        [*base, "--resume_from_checkpoint", "true", "--allow_config_change", "sead"]
    )
    assert code == 1 and "did you mean 'seed'" in capsys.readouterr().err


def test_every_flag_that_the_refusal_recommends_is_taken():
    """Also those of what the checkpoint's run had and this one has not."""
    state = {"config": {"seed": 0, "old_key": 1}, "inputs": {"data.train": "8 rows", "data.ptx": "4 rows"}}
    config, inputs = {"seed": 1}, {"data.train": "8 rows"}
    with pytest.raises(CheckpointError) as refused:
        check_same_run(Path("checkpoint-1"), state, config, inputs, [])
    recommended = re.findall(r"--allow_config_change (\S+)", str(refused.value))
    assert recommended == ["old_key", "seed", "data.ptx"]
    lines = check_same_run(Path("checkpoint-1"), state, config, inputs, recommended)
    assert [line.rpartition(": was")[0].split()[-1] for line in lines] == recommended
    with pytest.raises(ConfigError, match=r"got 'data.ptz', want .*data.ptx, data.train; did you mean 'data.ptx'"):
        check_same_run(Path("checkpoint-1"), state, config, inputs, ["data.ptz"])


def test_differences_name_added_and_removed_keys():
    """Not one that is null: a checkpoint from before there was such a key is of the same run."""
    assert differences({"a": 1, "b": [1], "e": None}, {"b": [1, 2], "c": 0, "d": None}) == {
        "a": "was 1, is absent",
        "b": "was [1], is [1, 2]",
        "c": "was absent, is 0",
    }


def test_every_key_without_effect_exists():
    """A key renamed in the config must be renamed here too."""
    keys = {f.name for kind in engine.config.STAGES.values() for f in dataclasses.fields(kind)}
    assert keys >= WITHOUT_EFFECT


@pytest.mark.parametrize("state", [{}, {"config": 1, "inputs": {}}, {"config": {}}])
def test_a_state_without_config_is_refused(state):
    with pytest.raises(CheckpointError, match="does not say which config"):
        check_same_run(Path("checkpoint-1"), state, {"seed": 0}, {}, [])


def test_the_identity_of_a_folder_sees_one_changed_weight_block_and_config(setting):
    folder = Path(setting["model"])
    first = folder_identity(folder)
    assert folder_identity(folder) == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"engine_score_constant": 1.0}))
    second = folder_identity(folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert len({first, second, folder_identity(folder)}) == 3


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(setting, tmp_path):
    """To the bytes that a run without damage ends with."""
    config = sft(setting, tmp_path / "run", max_steps=3)
    engine.train_sft(config)
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    newest = tmp_path / "run" / "checkpoint-3" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    engine.train_sft(going_on(config))
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "passed over: " in events and str(newest) in events and "checkpoint-2" in events
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights


def test_time_and_size_of_a_checkpoint_are_recorded(setting, tmp_path):
    engine.train_sft(sft(setting, tmp_path / "run", max_steps=3))
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert all(f"checkpoint-{step}: " in events for step in (1, 2, 3))
    sizes = [x["perf/checkpoint_gb"] for x in lines if "perf/checkpoint_gb" in x]
    for size in sizes:  # of those that were whole before the last step ended
        folder = tmp_path / "run" / "checkpoint-3"
        assert size == pytest.approx(
            sum(p.stat().st_size for p in folder.iterdir()) / 1e9, rel=0.01
        )
