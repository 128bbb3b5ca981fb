"""The report on made-up runs of every stage: what it shows, what it escapes, what it refuses."""

import html
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from engine import report
from engine.errors import EngineError
from engine.report import main, write_report
from engine.report_figures import (
    MAX_POINTS,
    accuracy_by_part,
    calibration,
    group_of,
    groups,
    is_noisy,
    phases,
    smoothed,
    thinned,
)
from engine.report_page import duration
from engine.report_run import COLORS, read_run, read_runs
from engine.run.log import RunLog, read_records

EVIL = "<script>alert(1)</script> & <img src=x onerror=alert(2)> \x1b[31m\u202e 日本"
PROMPTS = [f"Review {i}: the film was" for i in range(5)]


def _row(step: int, phase: str, prompt: str, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    tokens = [" good", " <b>", "\n", " film", EVIL][: 2 + seed % 4]
    return {
        "step": step,
        "phase": phase,
        "prompt": prompt,
        "completion": "".join(tokens),
        "tokens": tokens,
        "reward": float(random.normal() + step / 50),
        "length": len(tokens),
        "kl": [float(x) for x in random.normal(0, 1, len(tokens))],
    }


def _ppo(folder: Path, seed: int = 0, steps: int = 60) -> Path:
    random = np.random.default_rng(seed)
    with RunLog(folder, quiet=True) as log:
        log.event("prompts: 512 rows, 3 left out (2 empty, 1 too long)")
        log.metrics(0, {"eval/score": -0.9, "eval/kl": 0.0, "timing/evaluate": 4.0})
        log.samples(0, [_row(0, "before", p, i) for i, p in enumerate(PROMPTS)], name="before")
        for step in range(1, steps + 1):
            done, noise = step / steps, random.normal(0, 0.08, 8)
            lengths = {
                f"completions/length_p{p}": 12 + p / 4 * (1 + done) + 3 * noise[0]
                for p in (0, 5, 25, 50, 75, 95, 100)
            }
            log.metrics(
                step,
                lengths
                | {
                    "objective/scores": 2 * done - 1 + noise[1],
                    "objective/kl": 9 * done**0.7 + noise[2],
                    "objective/entropy": 40 - 11 * done + 9 * noise[3],
                    "loss/policy_avg": -0.02 + noise[4] / 9,
                    "loss/value_avg": math.exp(-3 * done) + noise[5] / 9,
                    "policy/clipfrac_avg": 0.1 + noise[6] / 4,
                    "policy/grad_norm": math.nan if step == 7 else 1 + noise[7],
                    "val/ratio": 1 + noise[1] / 99,
                    "val/eos_rate": 1.0,
                    "lr": 1e-5 * min(1.0, step / 10),
                    "episode": float(step * 64),
                    "completions/mean_length": 22 + 6 * done + noise[3],
                    "parity/max_abs_logprob_diff": 0.0,
                    "timing/rollout": 6 + noise[2],
                    "timing/score": 2.0,
                    "timing/update": 5 + noise[4],
                    "timing/iteration": 14 + noise[2] + noise[4],
                    "perf/tokens_per_s": 900 + 300 * noise[5],
                },
            )
            if step % 20 == 0:
                rows = [_row(step, "train", f"other {i}", 31 * step + i) for i in range(4)]
                log.samples(step, rows)
        log.metrics(steps, {"eval/score": 1.1, "eval/kl": 8.5, "timing/evaluate": 4.4})
        after = [_row(steps, "after", p, 100 + i) for i, p in enumerate(reversed(PROMPTS))]
        log.samples(steps, after, name="after")
    config = {"learning_rate": 1e-5, "seed": seed, "reward": {"path": EVIL, "weights": [1.0]}}
    (folder / "config.yaml").write_text("# stage: ppo\n" + yaml.safe_dump(config))
    (folder / "versions.json").write_text(json.dumps({"stage": "ppo", "torch": "2.13.0"}))
    return folder


def _rm(folder: Path) -> Path:
    with RunLog(folder, quiet=True) as log:
        for step in range(1, 20):
            log.metrics(
                step, {"loss": 1 / step, "accuracy": 0.5 + step / 99, "learning_rate": 1e-5}
            )
        bins = {}
        for b in range(5):
            bins[f"eval/calibration/{b}/predicted"] = 0.55 + b / 10
            bins[f"eval/calibration/{b}/observed"] = 0.52 + b / 11
            bins[f"eval/calibration/{b}/num_pairs"] = 40 - 5 * b
        for name, share in (
            ("", 0.66),
            ("by_k/2/", 0.6),
            ("by_k/9/", 0.7),
            ("by_source/a<b/", 0.5),
        ):
            bins[f"eval/{name}accuracy"] = share
            bins[f"eval/{name}accuracy_stderr"] = 0.02
        log.metrics(19, {"eval/log_loss": 0.6, **bins})
    (folder / "versions.json").write_text(json.dumps({"stage": "rm"}))
    return folder


def _sft(folder: Path, steps: int = 1500) -> Path:
    with RunLog(folder, quiet=True) as log:
        log._opened().add_scalar = lambda *_, **__: None  # type: ignore[method-assign]
        for step in range(1, steps + 1):
            values = {"loss": 3 / step**0.2, "grad_norm": 1 + step % 7, "timing/step": 0.5}
            log.metrics(step, values | {"num_tokens": step})
        log.metrics(steps, {"eval/loss": 1.5, "timing/evaluate": 9.0})
    (folder / "versions.json").write_text(json.dumps({"stage": "sft"}))
    return folder


@pytest.fixture(autouse=True)
def short_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without plotly's 5 MB the pages parse faster; the fixture `page` has them."""
    monkeypatch.setattr(report, "get_plotlyjs", lambda: "")


@pytest.fixture(scope="module")
def ppo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _ppo(tmp_path_factory.mktemp("runs") / "ppo-<i>1")


@pytest.fixture(scope="module")
def page(ppo_folder: Path) -> str:
    return write_report([ppo_folder]).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every element with its attributes, and the text outside scripts and styles."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", [""]
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open[-1] not in ("script", "style"):
            self.text += data


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    tags = Tags(page)
    assert tags.open == [""]
    for tag, attributes in tags.elements:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert page.count("plotly.js v") == 1  # the library is there, once
    assert "default-src 'none'" in page
    assert sum(tag == "section" for tag, _ in tags.elements) > 10


def test_text_of_models_and_files_is_escaped(page: str) -> None:
    tags = Tags(page)
    assert (
        "<script>alert(1)</script> & <img src=x onerror=alert(2)> \\x1b[31m\\u202e 日本"
        in tags.text
    )
    assert "ppo-<i>1" in tags.text
    assert not any(tag in ("b", "i", "img") and attributes for tag, attributes in tags.elements)
    assert "<i>1" not in page and "<img src=x" not in page and "alert(1)</script>" not in page
    assert not any(c in page for c in "\x1b\u202e")


def test_sections_of_a_ppo_run(page: str) -> None:
    text = Tags(page).text
    for title in (
        "Reward and KL",
        "Loss and accuracy",
        "Validation",
        "Policy",
        "Value model",
        "Learning rate and gradients",
        "Reward against length",
        "Answers before and after",
        "Time by phase",
        "Configuration",
        "Versions",
        "Journal",
    ):
        assert f"{title}" in text, title
    assert "Calibration" not in text  # of reward models only
    assert "2.13.0" in text and "3 left out (2 empty, 1 too long)" in text
    assert "not drawn: policy/grad_norm (1)" in text


def test_answers_are_paired_by_prompt_and_coloured_by_kl(ppo_folder: Path, page: str) -> None:
    blocks = page.split('<div class="pair">')[1:]
    assert len(blocks) == len(PROMPTS)
    for prompt, block in zip(PROMPTS, blocks, strict=True):
        shown = html.unescape(re.sub(r"<[^>]+>", "", block))
        assert prompt in shown and "before · step 0" in shown and "after · step 60" in shown
    after, _ = read_records(ppo_folder / "samples/after-60.jsonl")
    for row in after:
        block = blocks[PROMPTS.index(row["prompt"])]
        assert f"reward <b>{row['reward']:.4g}</b>" in block.split("after")[1]
    rows, _ = read_records(ppo_folder / "samples/before-0.jsonl")
    first = rows[0]
    for token, kl in zip(first["tokens"], first["kl"], strict=True):
        color = "217,95,2" if kl > 0 else "47,111,183"
        alpha = 0.75 * min(1.0, abs(kl) / 2)
        want = f'<span style="background:rgba({color},{alpha:.2f})" title="{kl:+.3f} nats">'
        assert want + html.escape(token) in blocks[0]
    assert f"KL {sum(first['kl']):.4g}" in blocks[0]


def test_without_a_common_prompt_the_first_and_last_answers_are_shown(tmp_path: Path) -> None:
    folder = _sft(tmp_path / "x", steps=3)
    with RunLog(folder, quiet=True) as log:
        log.resume(3)
        log.samples(1, [{"completion": "early", "reward": None, "kl": [None], "tokens": ["e\n"]}])
        log.samples(3, [{"completion": "late"}, {"no completion": 1}])
    content = write_report([folder]).read_text()
    text = Tags(content).text
    assert "answers of the steps 1 and 3" in text and "e↵" in text and "late" in text
    assert "1 rows are not samples" in text


def _panels(page: str) -> Iterator[str]:
    yield from re.findall(r'"text":"([^"]*)"', page)


def test_several_runs_are_overlaid(tmp_path: Path, ppo_folder: Path) -> None:
    other = _ppo(tmp_path / "b" / "run", seed=1)
    rm = _rm(tmp_path / "c" / "run")
    output = write_report([ppo_folder, other, rm], tmp_path / "deep" / "all.html")
    text = Tags(output.read_text()).text
    assert output == tmp_path / "deep" / "all.html"
    assert "b/run" in text and "c/run" in text
    assert "Calibration" in text and "Marked rows differ" in text
    content = output.read_text()
    assert all(color in content for color in COLORS[:3])
    assert re.search(r'<tr class="differs"><td class="key">seed</td><td>0</td><td>1</td>', content)
    titles = list(_panels(content))
    assert titles.count("objective\\u002fkl") == 1  # one panel for all runs


def test_stage_sft_and_rm(tmp_path: Path) -> None:
    for folder in (_sft(tmp_path / "sft"), _rm(tmp_path / "rm")):
        text = Tags(write_report([folder]).read_text()).text
        assert "Loss and accuracy" in text and "All values" in text
        assert ("Calibration" in text) == ("Accuracy by part" in text) == (folder.name == "rm")
        assert "Answers before and after" not in text and "Configuration" not in text


def test_accuracy_by_part(tmp_path: Path) -> None:
    (bars,) = accuracy_by_part(read_runs([_rm(tmp_path)])).data
    assert list(bars.x) == ["all", "K = 2", "K = 9", "a&lt;b"]
    assert list(bars.y) == [0.66, 0.6, 0.7, 0.5] and set(bars.error_y.array) == {0.04}


def test_figures_of_an_evaluation_take_all_values_from_the_last_one(tmp_path: Path) -> None:
    """A bin that has no pair then keeps no point of an earlier evaluation, nor a part its error."""
    folder = _rm(tmp_path)
    last = {"eval/num_pairs": 3.0, "eval/accuracy": 0.8, "eval/by_k/2/accuracy": 0.9, "eval/accuracy_stderr": 0.1}
    last |= {f"eval/calibration/{b}/{n}": 0.5 + b / 10 for b in (1, 3) for n in ("predicted", "observed")}
    with RunLog(folder, quiet=True) as log:
        log.resume(19)
        log.metrics(25, last)
    runs = read_runs([folder])
    (points,) = calibration(runs).data
    assert list(points.x) == list(points.y) == [0.6, 0.8] and np.isnan(points.customdata).all()
    (bars,) = accuracy_by_part(runs).data
    assert (list(bars.x), list(bars.y), list(bars.error_y.array)) == (["all", "K = 2"], [0.8, 0.9], [0.2, 0.0])
    with RunLog(folder, quiet=True) as log:
        log.resume(25)
        log.metrics(30, {"eval/num_pairs": 3.0})  # scores that are not finite lie in no bin
    assert calibration(read_runs([folder])) is None


def test_groups_leave_out_constants_and_counters(ppo_folder: Path) -> None:
    found = groups(read_runs([ppo_folder]))
    assert found["Reward and KL"] == ["objective/scores", "objective/kl", "objective/entropy"]
    assert found["Learning rate and gradients"] == ["policy/grad_norm", "lr"]
    names = {name for members in found.values() for name in members}
    assert not names & {"episode", "val/eos_rate", "parity/max_abs_logprob_diff"}
    assert not any("timing" in n or "length_p" in n for n in names)
    assert group_of("loss") == group_of("margin") == group_of("loss/ptx_avg") == "Loss and accuracy"
    assert group_of("eval/loss") == "Validation" and group_of("k4/accuracy") == "Other"


def test_phases_add_up_to_the_step(ppo_folder: Path) -> None:
    run = read_run(ppo_folder, "x", COLORS[0])
    parts = phases(run)
    assert list(parts) == ["rollout", "score", "update", "other", "evaluate"]
    inside = sum(parts[n].values.sum() for n in ("rollout", "score", "update", "other"))
    assert inside == pytest.approx(run.series["timing/iteration"].values.sum(), rel=1e-9)
    assert parts["other"].values == pytest.approx(np.ones(60), rel=1e-6)


def test_thinning_and_smoothing_keep_the_mean() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=4321)
    steps, thin = thinned(np.arange(4321.0), values)
    assert len(thin) == MAX_POINTS and (np.diff(steps) > 0).all()
    assert thin.mean() == pytest.approx(values.mean(), abs=2e-3)
    assert thinned(np.arange(3.0), values[:3])[1].tolist() == values[:3].tolist()
    assert smoothed(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    assert np.std(smoothed(values)) < 0.2
    ramp = np.linspace(0.0, 1.0, 200)
    assert smoothed(ramp)[20:-20] == pytest.approx(ramp[20:-20])  # no lag
    assert is_noisy(values) and not is_noisy(ramp) and not is_noisy(values[:10])


def test_a_folder_without_metrics_is_refused_with_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineError, match="no such folder"):
        write_report([tmp_path / "nothing"])
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(EngineError, match=r"metrics.jsonl is missing.*model.safetensors"):
        write_report([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "loss": null}\n{"st')
    assert main([str(tmp_path)]) == 2
    assert "no record with a finite metric" in capsys.readouterr().err
    with pytest.raises(EngineError, match="no run folder"):
        write_report([])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _rm(tmp_path / "rm")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "ti')  # the run is still writing
    assert main([str(folder)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == folder / "report.html"
    assert "1 lines are not whole" in Tags(path.read_text()).text


def test_it_does_without_torch(tmp_path: Path) -> None:
    code = "import sys; from engine.report import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(_rm(tmp_path / "rm"))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split()[-1] == "False"


def test_names_of_runs_differ(tmp_path: Path) -> None:
    folders = [_rm(tmp_path / a / "out") for a in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/out", "b/out"]
    assert len({run.name for run in read_runs([folders[0], folders[0]])}) == 2


def test_duration() -> None:
    assert [duration(s) for s in (0.25, 61, 7325)] == ["0.2 s", "1 min 1 s", "2 h 2 min"]


def test_an_output_that_cannot_be_written_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _rm(tmp_path / "rm")
    (tmp_path / "file").write_text("")
    assert main([str(folder), "--output", str(tmp_path)]) == 1
    assert f"output: got '{tmp_path}', which is a folder" in capsys.readouterr().err
    assert main([str(folder), "--output", str(tmp_path / "file" / "report.html")]) == 1
    assert "engine.report: " in capsys.readouterr().err
