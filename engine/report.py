"""python -m engine.report RUN [RUN ...] [--output file.html]: run folders -> one HTML file.

The file is complete: it needs no network and no other file. Several runs are drawn over each other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.io
from plotly.offline import get_plotlyjs

from engine import report_figures as figures
from engine import report_page as html
from engine.errors import EngineError, OutputError
from engine.report_run import Run, read_runs
from engine.run.files import check_output_file

ABOUT = {
    "Reward and KL": "Over all episodes of an iteration; KL is summed over each answer.",
    "Sampler against trainer": "How far the sampler's log-probs are from the trainer's.",
    "Learning rate and gradients": "Norms are those before clipping.",
}
# Only buttons that work without a network.
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
}
FILE = "report.html"
MAX_TIME_CURVES = 4


def write_report(folders: Path | str | Sequence[Path | str], output: Path | str | None = None) -> Path:
    """Write the report of one run or of several and return its path (default: report.html in the run's folder,
    or here for several runs). Raises `EngineError` for a folder without metrics, `OutputError` where the file cannot
    be written."""
    given = [folders] if isinstance(folders, (str, Path)) else folders
    if not given:
        raise EngineError("report: got no run folder, want at least one")
    runs = read_runs(given)
    path = Path(output) if output is not None else _default_output(runs)
    check_output_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(runs), encoding="utf-8")
    return path


def render(runs: list[Run]) -> str:
    """The whole page."""
    drawn = _Drawn()
    sections = [
        ("Overview", "Means over the first and the last 5 % of steps.", html.overview(runs))
    ]
    for title, names in figures.groups(runs).items():
        content = drawn.html(figures.curves(runs, names))
        if title == "Answers":
            content += drawn.html(figures.lengths(runs))
        sections.append((title, ABOUT.get(title, ""), content))
    sections += [
        ("Accuracy by part", _PARTS, drawn.html(figures.accuracy_by_part(runs))),
        ("Calibration", _CALIBRATION, drawn.html(figures.calibration(runs))),
        ("Reward against length", _SCATTER, drawn.html(figures.reward_against_length(runs))),
        ("Answers before and after", "", "".join(html.answers(run) for run in runs)),
        ("Time by phase", "", _time(runs, drawn)),
        ("All values", "", html.values(runs)),
        (
            "Configuration",
            _DIFFER if len(runs) > 1 else "",
            html.settings(runs, lambda r: r.config, len(runs) == 1),
        ),
        ("Versions", "", html.settings(runs, lambda r: r.versions, False)),
        ("Journal", "", html.journal(runs)),
    ]
    have = {
        "Configuration": any(run.config for run in runs),
        "Versions": any(run.versions for run in runs),
    }
    shown = [s for s in sections if s[2] and have.get(s[0], True)]
    title = " · ".join(run.name for run in runs)
    return html.page(title, get_plotlyjs(), shown, runs)


_CALIBRATION = (
    "Pairs by the probability that the reward model gave to the answer it preferred, against how "
    "often people preferred it too. On the dotted line the model is as sure as it should be."
)
_PARTS = "Validation pairs in the right order, with two standard errors; guessing reaches 0.5."
_SCATTER = "One point a recorded answer. A slope that grows over training is a bias to length."
_DIFFER = "Marked rows differ between the runs."


class _Drawn:
    """Turns figures into HTML with ids that are the same each time."""

    def __init__(self) -> None:
        self.count = 0

    def html(self, figure: Any) -> str:
        if figure is None:
            return ""
        self.count += 1
        return str(
            plotly.io.to_html(
                figure,
                include_plotlyjs=False,  # once for the whole page, in its head
                full_html=False,
                div_id=f"figure-{self.count}",
                config=CONFIG,
            )
        )


def _time(runs: Sequence[Run], drawn: _Drawn) -> str:
    parts = [drawn.html(figures.time_totals(runs))]
    for run in runs[:MAX_TIME_CURVES]:
        curve = drawn.html(figures.time_curves(run))
        if curve:
            parts.append(f'<p class="about">{html.chip(run)}{html.text(run.name)}</p>{curve}')
    return "".join(parts)


def _default_output(runs: Sequence[Run]) -> Path:
    return runs[0].folder / FILE if len(runs) == 1 else Path(FILE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or with a sentence on stderr 2 (nothing to report) or 1 (the disk refuses)."""
    parser = argparse.ArgumentParser(prog="python -m engine.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of an engine.train run")
    parser.add_argument(
        "--output", help=f"file to write (default: RUN/{FILE}; {FILE} here for several runs)"
    )
    given = parser.parse_args(arguments)
    try:
        path = write_report(given.runs, given.output)
    except (EngineError, OSError) as error:
        print(f"engine.report: {error}", file=sys.stderr)
        return 1 if isinstance(error, OutputError | OSError) else 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
