"""The command line through the front door: keys, presets, dry run, stopping and going on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_engines import save_tiny
from stages.tiny_data import write_all

from engine.train import parse, preset_names

ROOT = Path(__file__).resolve().parents[1]
BASE = ["--model_name_or_path", "model", "--output_dir", "run"]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine.train", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


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
    ],
)
def test_values_are_checked(arguments, message, capsys):
    from engine.train import main

    assert main(["--stage", "sft", *BASE, *arguments]) == 2
    assert message in capsys.readouterr().err


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
    assert done.returncode == 0 and "--stage sft|rm|ppo" in done.stdout
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


def test_print_config_can_be_read_back(setting, tmp_path):
    done = run(*sft_arguments(setting, tmp_path / "run"), "--print_config")
    assert done.returncode == 0
    values = yaml.safe_load(done.stdout)
    assert values["per_device_train_batch_size"] == 2
    file = tmp_path / "config.yaml"
    file.write_text(done.stdout)
    assert parse(["--stage", "sft", "--config", str(file)])[1].dataset_name == setting["sft"]


def test_dry_run_says_what_would_run_and_writes_nothing(setting, tmp_path):
    done = run(*sft_arguments(setting, tmp_path / "run"), "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "24" in done.stdout and "steps" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_missing_data_set_is_one_message(setting, tmp_path):
    broken = {**setting, "sft": str(tmp_path / "nothing.jsonl")}
    done = run(*sft_arguments(broken, tmp_path / "run"))
    assert done.returncode == 1
    assert "nothing.jsonl" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(setting, tmp_path, number):
    """Stopped and resumed ends with the bytes of a run that was never stopped."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    arguments = sft_arguments(setting, out, "--num_train_epochs", "12", "--save_steps", "1000")
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.train", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not lines(out):
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert "--resume_from_checkpoint true" in output
    assert 0 < len(lines(out)) < 144
    done = run(
        "--stage", "sft", "--config", str(out / "config.yaml"), "--resume_from_checkpoint", "true"
    )
    assert done.returncode == 0, done.stderr
    assert (
        run(
            *sft_arguments(setting, whole, "--num_train_epochs", "12", "--save_steps", "1000")
        ).returncode
        == 0
    )
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [timeless(x) for x in lines(out)] == [timeless(x) for x in lines(whole)]


def lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timeless(record: dict) -> dict:
    return {
        k: v for k, v in record.items() if k != "time" and not k.startswith(("timing/", "perf/"))
    }
