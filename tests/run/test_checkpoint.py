"""Checkpoints: round trip, damage of every kind, kills at every moment, rotation."""

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.run import checkpoint
from engine.run.checkpoint import kept, latest, load, save, verify

Tensors = dict[str, dict[str, Tensor]]
FILES = ["policy.safetensors", "optimizer_policy.safetensors", "state.json", "manifest.json"]


def _tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(9, 5, generator=generator)
    return {
        "policy": {"w": weight, "transposed": weight.T.clone().T, "half": weight.bfloat16()},
        "optimizer_policy": {"steps": torch.tensor(seed), "empty": torch.zeros(0, 3)},
    }


def _save(root: Path, step: int, keep: int = 3) -> Path:
    state = {"step": step, "lr": 0.1 + step, "cursor": {"epoch": 1, "row": None}, "kl": [1e-300]}
    return save(root, step, _tensors(step), state, keep)


def _same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[g].keys() == right[g].keys()
        and all(
            left[g][n].dtype == right[g][n].dtype and torch.equal(left[g][n], right[g][n])
            for n in left[g]
        )
        for g in left
    )


def _names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    path = _save(tmp_path / "run", 7)
    assert path == tmp_path / "run" / "checkpoint-7"
    assert sorted(FILES) == _names(path)
    found = load(path)
    assert (found.path, found.step) == (path, 7)
    assert _same(found.tensors, _tensors(7))
    assert found.state == {
        "step": 7,
        "lr": 7.1,
        "cursor": {"epoch": 1, "row": None},
        "kl": [1e-300],
    }
    assert _names(tmp_path / "run") == ["checkpoint-7"]
    assert latest(tmp_path / "run") == path


def test_equal_contents_give_equal_bytes(tmp_path: Path) -> None:
    first, second = _save(tmp_path / "a", 2), _save(tmp_path / "b", 2)
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in FILES)


def test_nothing_there(tmp_path: Path) -> None:
    assert latest(tmp_path) is None and latest(tmp_path / "no such folder") is None
    assert kept(tmp_path / "no such folder") == []
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-3").write_text("a file, not a folder")
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="missing; want a checkpoint-N folder"):
        load(tmp_path / "checkpoint-9")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_named_and_passed_over(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    _save(tmp_path, 1)
    bad = _save(tmp_path, 2)
    if name == "manifest.json" and damage is _cut:
        damage(bad / name)  # the final newline: still whole JSON
    damage(bad / name)
    if name == "manifest.json" and damage is _flip:
        with pytest.raises(CheckpointError):  # the flipped bit hits some name, size or digest
            load(bad)
    else:
        with pytest.raises(CheckpointError, match=name):
            load(bad)
    with pytest.warns(UserWarning, match=r"checkpoint-1; passed over: .*checkpoint-2"):
        found = latest(tmp_path)
    assert found == tmp_path / "checkpoint-1"
    assert _same(load(found).tensors, _tensors(1))


def test_a_manifest_of_another_step_is_passed_over(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    manifest = _save(tmp_path, 2) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
    with pytest.warns(UserWarning, match=r"checkpoint-1; passed over: .*says step 3"):
        assert latest(tmp_path) == tmp_path / "checkpoint-1"


def test_all_damaged_is_an_error_that_names_them(tmp_path: Path) -> None:
    for step in (1, 2):
        _flip(_save(tmp_path, step) / "policy.safetensors")
    with pytest.raises(CheckpointError, match=r"every .*checkpoint-2.*checkpoint-1"):
        latest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a manifest"),
        ('{"format": 99, "step": 1, "files": {}}', "format 99, want 1"),
        ('{"format": 1, "step": 1, "files": {}}', "state.json"),
        (
            '{"format": 1, "step": 1, "files": {"state.json": {"bytes": 0, "sha256": ""},'
            ' "../x": {"bytes": 0, "sha256": ""}}}',
            "same folder",
        ),
    ],
)
def test_a_foreign_manifest(tmp_path: Path, text: str, message: str) -> None:
    path = _save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    (path / "state.json").write_text("")
    with pytest.raises(CheckpointError, match=message):
        verify(path)


def test_rotation_counts_good_ones_only(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step, keep=2)
    assert _names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    _cut(tmp_path / "checkpoint-3" / "policy.safetensors")
    _save(tmp_path, 4, keep=2)  # 3 is damaged: 2 must stay, or one good one would be left
    assert _names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    _save(tmp_path, 10, keep=2)  # by number, not by spelling
    assert _names(tmp_path) == ["checkpoint-10", "checkpoint-4"]
    assert [path.name for path in kept(tmp_path)] == ["checkpoint-4", "checkpoint-10"]
    _save(tmp_path, 11, keep=1)
    assert _names(tmp_path) == ["checkpoint-11"]


def test_a_step_before_existing_ones_is_kept(tmp_path: Path) -> None:
    for step in (20, 30):
        _save(tmp_path, step)
    _save(tmp_path, 10, keep=1)
    assert _names(tmp_path) == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    _flip(_save(tmp_path, 5) / "state.json")
    save(tmp_path, 5, {"policy": {"w": torch.ones(2)}}, {"again": True}, keep=1)
    found = load(tmp_path / "checkpoint-5")
    assert found.state == {"again": True} and found.tensors.keys() == {"policy"}
    assert _names(tmp_path) == ["checkpoint-5"]


@pytest.mark.parametrize(
    "state", [{"x": float("nan")}, {"x": torch.zeros(1)}, {"x": (1, 2)}, {1: "x"}]
)
def test_a_state_that_json_would_change_is_refused(
    tmp_path: Path, state: dict[str, object]
) -> None:
    with pytest.raises(CheckpointError, match="JSON"):
        save(tmp_path / "run", 1, {}, state, keep=1)
    assert not (tmp_path / "run").exists()


def test_other_bad_arguments(tmp_path: Path) -> None:
    for step, keep in ((-1, 1), (1, 0)):
        with pytest.raises(CheckpointError, match="want step >= 0 and keep >= 1"):
            save(tmp_path, step, {}, {}, keep)
    with pytest.raises(CheckpointError, match="'../policy'"):
        save(tmp_path, 1, {"../policy": {}}, {}, keep=1)


class Killed(OSError):
    """An OSError, so that the clean-up of `save`, which a killed process never does, fails too."""


class Killer:
    """From the given call that touches the folder on, every one fails: all that a kill leaves."""

    DISK = frozenset(
        {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"}
    )

    def __init__(self) -> None:
        self.folder, self.calls_left = "", 0
        sys.addaudithook(self)  # cannot be removed: without a folder it does nothing

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.DISK and self.folder and str(arguments[0]).startswith(self.folder):
            if self.calls_left == 0:
                raise Killed(event)
            self.calls_left -= 1

    def save(self, root: Path, step: int, calls: int) -> bool:
        """Whether `save` came to its end with so many calls."""
        self.folder, self.calls_left = str(root), calls
        try:
            save(root, step, {"policy": {"w": torch.full((3,), 2.0)}}, {"new": True}, keep=1)
        except Killed:
            return False
        finally:
            self.folder = ""
        return True


@pytest.mark.parametrize("step", [4, 5])
def test_a_kill_at_any_moment_leaves_one_whole_checkpoint(tmp_path: Path, step: int) -> None:
    """Replacing step 4, and rotating it out: the old one or the new one, never a mixture."""
    killer, outcomes, moment, is_done = Killer(), set(), 0, False
    while not is_done:
        root = tmp_path / str(moment)
        save(root, 4, {"policy": {"w": torch.ones(3)}}, {"new": False}, keep=1)
        is_done = killer.save(root, step, moment)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no damaged checkpoint was ever visible
            found = latest(root)
        assert found is not None
        whole = load(found)
        assert whole.tensors["policy"]["w"].tolist() == [2.0 if whole.state["new"] else 1.0] * 3
        outcomes.add(whole.state["new"])
        # The next save clears whatever the kill left.
        after = save(root, 6, {}, {}, keep=1)
        assert _names(root) == [after.name]
        moment += 1
    assert outcomes == {True, False} and moment > 15


def test_a_failed_save_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1, keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        _save(tmp_path, 2, keep=1)
    assert _names(tmp_path) == ["checkpoint-1"]
    monkeypatch.undo()
    assert _same(load(tmp_path / "checkpoint-1").tensors, _tensors(1))


def test_a_reader_does_not_disturb_a_writer(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    shutil.copytree(path, tmp_path / ".tmp-checkpoint-2-123")
    assert latest(tmp_path) == path
    assert (tmp_path / ".tmp-checkpoint-2-123").exists()


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    path = _save(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert {n: e["bytes"] for n, e in manifest["files"].items()} == {
        n: (path / n).stat().st_size for n in FILES if n != "manifest.json"
    }
