"""Files of a run folder: whole or not there, the lock, and errors of the disk."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ConfigError, OutputError
from engine.run import files
from engine.run.files import append, folder_lock, published, replace

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file_limit():
    """No file of this process may grow over so many bytes: what a full disk is, without a disk."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(count: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_line_is_appended_whole_or_not_at_all(tmp_path, file_limit):
    path = tmp_path / "metrics.jsonl"
    append(path, "first\n")
    file_limit(10)
    with pytest.raises(OutputError, match=r"metrics.jsonl: cannot be written .*too large"):
        append(path, "second, of which four bytes have room\n")
    assert path.read_text() == "first\n"
    append(path, "3\n")
    assert path.read_text() == "first\n3\n"


def test_a_line_that_a_kill_cut_takes_no_other_with_it(tmp_path):
    path = tmp_path / "events.jsonl"
    append(path, '{"text": "first"}\n')
    os.truncate(path, 9)
    append(path, "second\n")
    append(path, "third\n")
    assert path.read_text() == '{"text": \nsecond\nthird\n'


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, file_limit):
    path = tmp_path / "config.yaml"
    replace(path, "old")
    file_limit(10)
    with pytest.raises(OutputError, match="config.yaml"):
        replace(path, "x" * 11)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.yaml"]


def test_a_model_is_published_whole_or_not_at_all(tmp_path):
    with published(tmp_path / "out") as aside:
        (aside / "config.json").write_text("1")
        (aside / "value").mkdir()
        (aside / "value" / "model.safetensors").write_text("1")
    with pytest.raises(RuntimeError), published(tmp_path / "out") as aside:
        (aside / "config.json").write_text("2")
        raise RuntimeError("in the middle")
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"out/config.json", "out/value/model.safetensors"}
    assert (tmp_path / "out" / "config.json").read_text() == "1"


def test_the_config_is_published_last(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(files.os, "replace", lambda a, b: moved.append(Path(b).name))
    with published(tmp_path) as aside:
        for name in ("config.json", "tokenizer.json", "model.safetensors", "adapter.json"):
            (aside / name).write_text("")
    assert moved[-1] == "config.json" and len(moved) == 4


def test_one_run_in_a_folder(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(ConfigError, match=f'"process": {os.getpid()}'), folder_lock(tmp_path):
            raise AssertionError
        with folder_lock(tmp_path.parent):
            pass
    with folder_lock(tmp_path):
        pass


def test_the_lock_goes_with_its_process(tmp_path):
    code = (
        "import sys, os; from pathlib import Path; from engine.run.files import folder_lock;"
        " lock = folder_lock(Path(sys.argv[1])); lock.__enter__(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -9
    with folder_lock(tmp_path):
        pass
