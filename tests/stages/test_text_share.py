"""Pretraining text in SFT's batches: the share makes whole rows, steps count demonstrations, rows fit the context."""

import json
from pathlib import Path

import pytest
from small_engines import CONTEXT, save_tiny
from stages.tiny_data import write_all

import engine
from engine.data.tokenizer import load_tokenizer
from engine.errors import ConfigError, DataError
from engine.run import session
from engine.stages.dry_run import describe
from engine.stages.inputs import load_ppo_data, load_sft_data
from engine.stages.sft import SFTStage, epochs_config


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("share")
    return {"model": str(save_tiny("llama", folder / "model")), **write_all(folder)}


def config(batch: int, share: float, accumulation: int = 1) -> engine.SFTConfig:
    return engine.SFTConfig(
        model_name_or_path="m",
        output_dir="o",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        ptx_dataset_name="text",
        ptx_fraction=share,
    )


@pytest.mark.parametrize(
    "batch,share,made", [(4, 0.1, 0), (5, 0.1, 0), (8, 0.05, 0), (4, 0.9, 4), (1, 0.3, 0), (1, 0.7, 1)]
)
def test_a_share_that_leaves_no_text_or_no_demonstration_is_refused(batch, share, made):
    message = f"ptx_fraction: got {share}, want at least one .* of a batch of {batch} it makes {made} rows"
    with pytest.raises(ConfigError, match=message):
        config(batch, share)


@pytest.mark.parametrize(
    "batch,accumulation,share,made",
    [(6, 1, 0.1, 1), (1, 6, 0.1, 1), (2, 1, 0.5, 1), (4, 1, 0.8, 3), (32, 1, 0.1, 3)],
)
def test_what_is_left_of_a_batch_counts_the_steps(batch, accumulation, share, made):
    """Any share that is taken, also where the same share of what is left would be none."""
    given = config(batch, share, accumulation)
    assert given.ptx_rows == made
    assert epochs_config(given).batch_size == given.batch_size - made


@pytest.mark.parametrize("batch,share,rows,made", [(8, 0.25, 6, 2), (8, 0.25, 3, 1), (8, 0.25, 1, 0), (32, 0.1, 12, 1)])
def test_the_last_batch_of_an_epoch_has_the_same_share(batch, share, rows, made, setting):
    given = config(batch, share)
    data = load_sft_data(sft(setting, Path("o")), load_tokenizer(setting["model"]), CONTEXT)
    stage = SFTStage(given, None, data)
    chosen = stage.batch(range(rows), 3)
    assert len(chosen) == rows + made
    assert [row.tokens for row in chosen[rows:]] == data.ptx.rows(range(3 * given.ptx_rows, 3 * given.ptx_rows + made))


def test_without_text_steps_count_the_whole_batch():
    given = engine.SFTConfig(model_name_or_path="m", output_dir="o")
    assert given.ptx_rows == 0 and epochs_config(given) is given


def sft(setting: dict[str, str], out: Path, **more) -> engine.SFTConfig:
    values = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "ptx_fraction": 0.5, "ptx_length": 24}
    values |= {"max_length": 80}
    return engine.SFTConfig(
        model_name_or_path=setting["model"],
        output_dir=str(out),
        dataset_name=setting["sft"],
        ptx_dataset_name=setting["text"],
        threads=1,
        progress=False,
        dtype="float32",
        **(values | more),
    )


def test_the_steps_that_are_told_are_the_steps_that_are_made(setting, tmp_path, monkeypatch):
    """12 demonstrations, 2 in each batch, twice."""
    told = []
    real = session.RunLog

    def recording(folder, total_steps, **options):
        told.append(total_steps)
        return real(folder, total_steps=total_steps, **options)

    monkeypatch.setattr(session, "RunLog", recording)
    given = sft(setting, tmp_path / "run")
    assert dict(describe("sft", given))["steps"] == "12"
    lines = (engine.train_sft(given) / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in lines) == 12
    assert told == [12]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_held_out_text_of_a_folder_is_its_test_split(stage, setting, tmp_path):
    """Once the training text was read as held-out."""
    folder = tmp_path / "prose"
    folder.mkdir()
    for split, letter in (("train", "a"), ("test", "b"), ("validation", "c")):
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": letter * 200}) + "\n")
    text = {"eval_ptx_dataset_name": str(folder), "ptx_length": 24}
    text |= {} if stage == "sft" else {"ptx_dataset_name": str(folder)}
    make, load = (sft, load_sft_data) if stage == "sft" else (ppo, load_ppo_data)

    def letters(**more):
        given = make({**setting, "text": str(folder)}, tmp_path / "run", **text, **more)
        data = load(given, load_tokenizer(setting["model"]), CONTEXT)
        rows = (data.ptx.rows(range(2)), data.eval_ptx)
        return [load_tokenizer(setting["model"]).decode(r[0], skip_special_tokens=True)[-1] for r in rows]

    assert letters() == ["a", "b"]
    assert letters(ptx_dataset_split="test", eval_ptx_dataset_split="validation") == ["b", "c"]
    with pytest.raises(DataError, match="no split 'dev'"):
        letters(eval_ptx_dataset_split="dev")


@pytest.mark.parametrize("epochs,share,made", [(1, 0.4, 3), (2, 0.9, 7)])
def test_each_step_of_ppo_has_a_row_of_text(epochs, share, made, tmp_path):
    """Else some steps would have the pretraining term in full and others none."""
    text = {"ptx_dataset_name": "text", "num_mini_batches": 4, "num_ppo_epochs": epochs}
    wanted = f"ptx_per_episode: got {share}, want a row .* {4 * epochs} policy steps .* a batch of 8 has {made}$"
    with pytest.raises(ConfigError, match=wanted):
        ppo({"model": "m", "prompts": "p"}, tmp_path, ptx_per_episode=share, **text)
    assert ppo({"model": "m", "prompts": "p"}, tmp_path, ptx_per_episode=epochs / 2, **text)
    assert ppo({"model": "m", "prompts": "p"}, tmp_path, ptx_per_episode=share, ptx_coef=0.0, **text)


def test_a_warm_up_that_never_ends_is_refused_before_training(setting, tmp_path):
    """12 demonstrations, 2 in each batch, twice."""
    given = sft(setting, tmp_path / "run", warmup_steps=12)
    for stage in (engine.train_sft, lambda config: describe("sft", config)):
        with pytest.raises(ConfigError, match="warmup_steps: got 12, want fewer than the run's 12 steps"):
            stage(given)
    assert not (tmp_path / "run").exists()


def test_rows_of_text_longer_than_the_context_are_refused_when_they_are_read(setting, tmp_path):
    message = f"ptx_length: got {CONTEXT + 1}, the model's context is {CONTEXT}; want at most that"
    long = {"ptx_length": CONTEXT + 1}
    with pytest.raises(ConfigError, match=message):
        engine.train_sft(sft(setting, tmp_path / "sft", **long))
    held = {"ptx_dataset_name": None, "ptx_coef": 0.0, "eval_ptx_dataset_name": setting["text"]}
    for text in ({"ptx_dataset_name": setting["text"]}, held):
        with pytest.raises(ConfigError, match=message):
            engine.train_ppo(ppo(setting, tmp_path / "ppo", **long, **text))
    assert not (tmp_path / "sft").exists() and not (tmp_path / "ppo").exists()
    assert describe("sft", sft(setting, tmp_path / "sft", ptx_length=CONTEXT))
    assert describe("ppo", ppo(setting, tmp_path / "ppo", **long))  # no text, nothing to fit


def ppo(setting: dict[str, str], out: Path, **more) -> engine.PPOConfig:
    values = {"max_length": 60, "response_length": 8, "batch_size": 8, "total_episodes": 8}
    return engine.PPOConfig(
        model_name_or_path=setting["model"],
        output_dir=str(out),
        rewards=[engine.RewardSource(source="stages.test_text_share:zero")],
        dataset_name=setting["prompts"],
        threads=1,
        progress=False,
        dtype="float32",
        **(values | more),
    )


def zero(prompts, completions, **columns):
    return [0.0] * len(completions)


def test_a_prompt_limit_is_told_with_the_context_and_the_answer(setting, tmp_path):
    given = ppo(setting, tmp_path / "run", max_length=CONTEXT - 7)
    message = (
        f"max_length: got {CONTEXT - 7}, the model's context of {CONTEXT} leaves {CONTEXT - 8}"
        " beside response_length 8; want at most that"
    )
    with pytest.raises(ConfigError, match=message):
        describe("ppo", given)
    with pytest.raises(ConfigError, match=f"response_length: got {CONTEXT}, .*no room .*context of {CONTEXT}"):
        describe("ppo", ppo(setting, tmp_path / "run", response_length=CONTEXT))
    with pytest.raises(ConfigError, match=f"max_length: got {CONTEXT + 1}, the model's context is {CONTEXT};"):
        describe("sft", sft(setting, tmp_path / "run", max_length=CONTEXT + 1))
