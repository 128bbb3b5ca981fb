"""The command line through the front door: keys, presets, dry run, stopping and going on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import yaml
from small_engines import save_tiny
from stages.tiny_data import write_all

from engine.config import RewardSource, SFTConfig
from engine.data.rows import DataSource
from engine.errors import ConfigError
from engine.train import main, parse, preset_names

ROOT = Path(__file__).resolve().parents[1]
BASE = ["--model_name_or_path", "model", "--output_dir", "run"]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine.train", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def run_here(*arguments: str) -> int:
    """The same without the seconds in which Python starts."""
    with mock.patch.dict(os.environ):  # which settle_machine changes
        return main(arguments)


def test_an_unknown_key_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--stage", "sft", *BASE, "--learning_rat", "1"])
    assert stopped.value.code == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("kl_coeff: 0.1\n")
    with pytest.raises(SystemExit):
        parse(["--stage", "ppo", *BASE, "--config", str(file)])
    assert "did you mean 'kl_coef'" in capsys.readouterr().err


def test_later_words_win(tmp_path):
    """preset < --config < --key"""
    file = tmp_path / "config.yaml"
    file.write_text("learning_rate: 0.5\nmax_length: 77\n")
    _, config, _ = parse(
        ["--stage", "rm", "--preset", "small", *BASE, "--config", str(file), "--max_length", "78"]
    )
    assert (config.learning_rate, config.max_length) == (0.5, 78)
    assert config.per_device_train_batch_size == 16  # the preset's


def test_nested_values():
    _, config, _ = parse(
        ["--stage", "ppo", *BASE, "--rewards", '[{"source": "module:function", "weight": 0.5}]']
    )
    assert config.rewards[0].weight == 0.5


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--max_length", "0"], "max_length: got 0, want a number above 0"),
        (["--adam_beta1", "1.5"], "adam_beta1: got 1.5, want a number from 0 to 1"),
        (["--ptx_fraction", "0.1"], "ptx_fraction: got 0.1"),
        (["--preset", "smal"], "did you mean 'small'"),
        (["--output_dir=~/run"], "output_dir: got '~/run', want a whole path"),
        (["--data_dir=~/data"], "data_dir: got '~/data', want a whole path"),
        (["--learning_rate", ".inf"], "learning_rate: got inf, want a finite number, 0 or more"),
        (["--adam_epsilon", ".inf"], "adam_epsilon: got inf, want a finite number above 0"),
        (["--max_grad_norm", ".inf"], "max_grad_norm: got inf, want a finite number above 0, or 0, which turns"),
        (["--max_grad_norm", ".nan"], "max_grad_norm: got nan, want a finite number"),
        (["--max_grad_norm", "-1"], "max_grad_norm: got -1.0, want a finite number"),
    ],
)
def test_values_are_checked(arguments, message, capsys):
    from engine.train import main

    assert main(["--stage", "sft", *BASE, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_the_weight_of_a_reward_is_finite(weight):
    with pytest.raises(ConfigError, match=r"rewards: weight of module:function: got .*, want a finite number"):
        RewardSource(source="module:function", weight=weight)
    assert RewardSource(source="module:function", weight=-1.0).weight == -1.0  # a penalty


def test_a_preset_or_stage_in_a_file_is_refused_unless_it_repeats_the_command_line(tmp_path):
    """It comes too late to choose the keys and their defaults by, wherever the file stands among the words."""
    file = tmp_path / "config.yaml"
    words = ["--stage", "sft", *BASE, "--config", str(file)]
    file.write_text("preset: paper-1.3b\n")
    wanted = "preset: got 'paper-1.3b' in the --config file and {}.*give --preset paper-1.3b"
    with pytest.raises(ConfigError, match=wanted.format("no --preset")):
        parse(words)
    with pytest.raises(ConfigError, match=wanted.format("--preset small")):
        parse([*words, "--preset", "small"])
    with_it = ["--preset=paper-1.3b", *words], [*words, "--preset", "paper-1.3b"]
    plain = parse(["--stage", "sft", "--preset", "paper-1.3b", *BASE])
    assert [parse(given) for given in with_it] == [plain, plain]
    file.write_text("stage: rm\npreset: null\n")
    for given in (words, [*words[2:], *words[:2]]):
        with pytest.raises(ConfigError, match="stage: got 'rm' in the --config file and --stage sft.*give --stage rm"):
            parse(given)
    file.write_text("stage: sft\nmax_length: 77\n")
    assert parse(words)[1].max_length == 77


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_valid_config(name):
    stages = yaml.safe_load((ROOT / "engine" / "presets" / f"{name}.yaml").read_text())
    for stage in stages:
        extra = ["--reward_model_path", "reward"] if stage == "ppo" else []
        if stage == "sft" and "ptx_fraction" in stages[stage]:
            extra += ["--ptx_dataset_name", "text"]
        parse(["--stage", stage, "--preset", name, *BASE, *extra])


def test_help_works_from_any_folder(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0 and all(f"--stage {stage} " in done.stdout for stage in ("sft", "rm", "ppo"))
    said = re.search(r"^ +paper-6b +(.*)$", done.stdout, re.M)
    assert said and said[1] == "The 6B column of InstructGPT (Ouyang et al. 2022, appendix C)"
    done = run("--stage", "ppo", "--help")
    assert done.returncode == 0 and "--kl_coef" in done.stdout


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("train")
    save_tiny("llama", folder / "model")
    return {"model": str(folder / "model"), **write_all(folder, count=24)}


def sft_arguments(setting: dict[str, str], out: Path, *more: str) -> list[str]:
    return [
        "--stage", "sft", "--model_name_or_path", setting["model"], "--output_dir", str(out),
        "--dataset_name", setting["sft"], "--max_length", "80", "--dtype", "float32",
        "--per_device_train_batch_size", "2", "--threads", "1", *more,
    ]  # fmt: skip


def test_print_config_can_be_read_back(setting, tmp_path, capsys):
    arguments = sft_arguments(setting, tmp_path / "run", "--preset", "small")
    with pytest.raises(SystemExit) as ended:
        run_here(*arguments, "--print_config")
    said = capsys.readouterr().out
    assert ended.value.code == 0
    values = yaml.safe_load(said)
    assert values["per_device_train_batch_size"] == 2
    file = tmp_path / "config.yaml"
    file.write_text(said)
    assert parse(["--stage", "sft", "--config", str(file)]) == parse(arguments)


def test_dry_run_says_what_would_run_and_writes_nothing(setting, tmp_path, capsys):
    assert run_here(*sft_arguments(setting, tmp_path / "run"), "--dry_run") == 0
    said = capsys.readouterr().out
    assert "24" in said and "steps" in said
    assert not (tmp_path / "run").exists()


def test_a_missing_data_set_is_one_message(setting, tmp_path):
    broken = {**setting, "sft": str(tmp_path / "nothing.jsonl")}
    done = run(*sft_arguments(broken, tmp_path / "run"))
    assert done.returncode == 1
    assert "nothing.jsonl" in done.stderr and "Traceback" not in done.stderr


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(setting, tmp_path):
    """Stopped and resumed ends with the bytes of a run that was never stopped."""
    whole = tmp_path / "whole"
    assert run_here(*sft_arguments(setting, whole, "--num_train_epochs", "8", "--save_steps", "1000")) == 0
    for number in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / number.name
        arguments = sft_arguments(setting, out, "--num_train_epochs", "8", "--save_steps", "1000")
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.train", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not lines(out):
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 3, output
        assert "--resume_from_checkpoint true" in output
        assert 0 < len(lines(out)) < len(lines(whole))
        again = ["--config", str(out / "config.yaml"), "--resume_from_checkpoint", "true"]
        assert run_here("--stage", "sft", *again) == 0
        assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        assert [timeless(x) for x in lines(out)] == [timeless(x) for x in lines(whole)]


def lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timeless(record: dict) -> dict:
    return {
        k: v for k, v in record.items() if k != "time" and not k.startswith(("timing/", "perf/"))
    }


def test_a_mixture_has_the_same_keys_on_both_doors(tmp_path, capsys):
    words = ["--stage", "sft", "--model_name_or_path", "m", "--output_dir", "o", "--config", str(tmp_path / "c.yaml")]
    (tmp_path / "c.yaml").write_text("dataset_mixture:\n- {path: a.jsonl, split: test, name: small, weight: 0.5}\n")
    made = SFTConfig(
        model_name_or_path="m", output_dir="o", dataset_mixture=[DataSource("a.jsonl", "test", "small", 0.5)]
    )
    assert parse(words)[1].dataset_mixture == made.dataset_mixture
    (tmp_path / "c.yaml").write_text("dataset_mixture:\n- {path: a.jsonl, fraction: 0.5}\n")
    with pytest.raises(SystemExit):
        parse(words)
    assert "fraction" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"dataset_mixture\[0\]: got .*want keys of path, .*.*fraction"):
        SFTConfig(model_name_or_path="m", output_dir="o", dataset_mixture=[{"path": "a.jsonl", "fraction": 0.5}])
