"""Going on from an earlier checkpoint of a folder: the later ones, of the attempt that is given up, go aside."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from run import faulty
from same_run import assert_same

import engine
from engine.errors import OutputError
from engine.run import checkpoint
from engine.stages.sft import SFTStage

ALL = {"max_steps": 5, "save_steps": 1, "save_total_limit": 5}
CHANGED = {"learning_rate": 1e-2, "allow_config_change": ["learning_rate"]}


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    return faulty.make_setting(tmp_path_factory.mktemp("earlier"))


@pytest.fixture(scope="module")
def finished(setting) -> Path:
    out = Path(setting["model"]).parent / "finished"
    engine.train_sft(faulty.sft(setting, out, **ALL))
    return out


class Killed(BaseException):
    pass


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.kept(folder)]


def events(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "events.jsonl").read_text().splitlines()]


def killed_at_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = SFTStage.train_step

    def step_or_die(self, rows, step):
        if step == number:
            raise Killed
        return train_step(self, rows, step)

    monkeypatch.setattr(SFTStage, "train_step", step_or_die)


def test_the_next_resume_takes_the_new_attempt(setting, finished, tmp_path, monkeypatch):
    """And ends like the new attempt without the kill; the attempt given up is there to be gone back to."""
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    for folder in (run, undisturbed):
        shutil.copytree(finished, folder)
    config = partial(faulty.sft, setting, **ALL | CHANGED)
    engine.train_sft(config(undisturbed, resume_from_checkpoint=str(undisturbed / "checkpoint-2")))
    changed = config(run, resume_from_checkpoint=str(run / "checkpoint-2"))
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_at_step(3, patched)
        engine.train_sft(changed)
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert names(run / "previous-1") == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    said = f"an earlier attempt were moved to {run / 'previous-1'}: checkpoint-3, checkpoint-4, checkpoint-5"
    assert any(said in text for text in events(run))
    engine.train_sft(dataclasses.replace(changed, resume_from_checkpoint="true", allow_config_change=[]))
    assert f"going on from {run / 'checkpoint-3'}" in events(run)
    assert_same(run, undisturbed)
    for path in checkpoint.kept(run / "previous-1"):
        assert checkpoint.verify(path) == checkpoint.verify(finished / path.name)


@pytest.mark.parametrize("moved", range(4))
def test_a_kill_between_the_moves_leaves_one_attempt_or_the_other(setting, finished, tmp_path, monkeypatch, moved):
    """Until the newest is moved the attempt goes on that was to be given up, with all its records."""
    run, rename, left = tmp_path / "run", Path.rename, moved
    shutil.copytree(finished, run)
    config = faulty.sft(setting, run, **ALL)

    def rename_or_die(self, target):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename_or_die)
        earlier = dataclasses.replace(config, resume_from_checkpoint=str(run / "checkpoint-2"))
        if moved < 3:
            with pytest.raises(Killed):
                engine.train_sft(earlier)
        else:
            killed_at_step(2, patched)
            with pytest.raises(Killed):
                engine.train_sft(earlier)
    newest = "checkpoint-5" if moved < 3 else "checkpoint-2"
    found, damaged = checkpoint.newest_whole(run)
    assert (found, damaged) == (run / newest, [])
    engine.train_sft(dataclasses.replace(config, resume_from_checkpoint="true"))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5] and names(run)[-1] == "checkpoint-5"
    assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    engine.train_sft(earlier)  # as it was wanted at first; the other attempt is in a folder of its own
    assert names(run) == [f"checkpoint-{step}" for step in (1, 2, 3, 4, 5)]


def test_a_folder_that_refuses_the_move_is_an_error(setting, finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = faulty.sft(setting, run, **ALL, resume_from_checkpoint=str(run / "checkpoint-2"))

    def refuses(self, target):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(OutputError, match=r"checkpoint-3: cannot be written \(Permission denied\)"):
        engine.train_sft(config)
    assert names(run) == names(finished)


def test_damaged_ones_that_a_resume_passes_over_stay(setting, finished, tmp_path):
    """For inspection, until new ones replace them: nothing of another attempt can come of them."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "checkpoint-5" / "state.json").write_text("")
    assert [path.name for path in run.glob("previous-*")] == []
    engine.train_sft(faulty.sft(setting, run, **ALL, resume_from_checkpoint="true"))
    assert not list(run.glob("previous-*"))
    assert_same(run, finished)
