"""The figures of a report, made with plotly. Each takes the runs and gives a figure, or None."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from engine.report_run import Run, Series
from engine.run.console import printable

COLUMNS = 3
PANEL_HEIGHT = 205
MAX_POINTS = 600  # more are averaged in bins: a panel has no more columns
SMOOTH_FROM = 40  # noisy curves of so many points get a smoothed line on top
INK, GRID, MUTED = "#22303c", "#e8ecf0", "#66727f"
PHASE_COLORS = ("#2f6fb7", "#d0622b", "#2e8b6d", "#8659ad", "#b08a1e", "#c2476f", "#9aa5b1")
TOTALS = ("timing/iteration", "timing/step")
PHASES = {"before": "#9aa5b1", "train": "#2f6fb7", "during": "#2f6fb7", "after": "#d0622b"}
# Counts of work done so far: straight lines that say nothing; they are in the table of values.
COUNTERS = frozenset({"episode", "epoch", "num_tokens", "policy/weights_version"})

Figure = Any  # plotly ships no types


# Titles of the groups of curves by a metric's first word, in the order of the page. Names without a
# slash are those of SFT and RM training.
TITLES = {
    "objective": "Reward and KL",
    "rewards": "Reward and KL",
    "loss": "Loss and accuracy",
    "eval": "Validation",
    "policy": "Policy",
    "val": "Value model",
    "completions": "Answers",
    "learning rate": "Learning rate and gradients",
    "parity": "Sampler against trainer",
    "perf": "Speed and memory",
    "other": "Other",
}


def group_of(name: str) -> str:
    """The title of the group that a metric's curve belongs to."""
    first, _, _ = name.partition("/")
    words = name.replace("/", "_").split("_")
    if "lr" in words or {"learning", "rate"} <= set(words) or {"grad", "norm"} <= set(words):
        return TITLES["learning rate"]
    return TITLES["loss"] if "/" not in name else TITLES.get(first, TITLES["other"])


def groups(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Title -> names of the metrics that have more than one value in some run."""
    members: dict[str, list[str]] = {title: [] for title in TITLES.values()}
    for name in dict.fromkeys(name for run in runs for name in run.series):
        own_figure = name.startswith(("timing/", "completions/length_p")) or "calibration/" in name
        if not own_figure and name not in COUNTERS and any(_varies(run, name) for run in runs):
            members[group_of(name)].append(name)
    return {title: names for title, names in members.items() if names}


def _varies(run: Run, name: str) -> bool:
    return name in run.series and np.unique(run.series[name].values).size > 1


def curves(runs: Sequence[Run], names: Sequence[str]) -> Figure:
    """Small panels, one a metric; runs overlaid in their colours."""
    rows = math.ceil(len(names) / COLUMNS)
    figure = make_subplots(
        rows=rows,
        cols=COLUMNS,
        subplot_titles=[label(name) for name in names],
        horizontal_spacing=0.075,
        vertical_spacing=0.26 / rows,
    )
    for i, name in enumerate(names):
        place = {"row": i // COLUMNS + 1, "col": i % COLUMNS + 1}
        for run in runs:
            if name in run.series:
                for trace in _lines(run, run.series[name]):
                    figure.add_trace(trace, **place)
    figure.update_annotations(font={"size": 12, "color": INK})
    figure = styled(figure, PANEL_HEIGHT * rows + 30, hovermode="x")
    return figure.update_layout(margin={"b": 26})


def _lines(run: Run, series: Series) -> list[Figure]:
    steps, values = thinned(series.steps.astype(np.float64), series.values)
    hover = f"%{{y:.4g}}<extra>{label(run.name)}</extra>"
    smooth = is_noisy(values)
    raw = go.Scatter(
        x=steps,
        y=values,
        mode="lines" if len(values) > 25 else "lines+markers",
        line={"color": run.color, "width": 1 if smooth else 1.8},
        marker={"size": 5},
        opacity=0.35 if smooth else 1.0,
        hovertemplate=hover,
        hoverinfo="skip" if smooth else None,
        name=label(run.name),
    )
    if not smooth:
        return [raw]
    raw.hovertemplate = None
    line = {"color": run.color, "width": 2}
    over = go.Scatter(
        x=steps, y=smoothed(values), mode="lines", line=line, hovertemplate=hover, name=run.name
    )
    return [raw, over]


def thinned(
    steps: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most MAX_POINTS points: means over bins of neighbours."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), MAX_POINTS + 1).astype(np.int64)[:-1]
    counts = np.diff(np.append(edges, len(steps)))
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred average over about a tenth of the curve, weights falling off linearly: no lag."""
    reach = max(1, len(values) // 20)
    window = np.concatenate([np.arange(1, reach + 1), np.arange(reach - 1, 0, -1)]).astype(float)
    total = np.convolve(values, window, mode="same")
    smooth: NDArray[np.float64] = total / np.convolve(np.ones_like(values), window, mode="same")
    return smooth


def is_noisy(values: NDArray[np.float64]) -> bool:
    """Whether a smoothed line would add something: a schedule, for one, is smooth already."""
    if len(values) < SMOOTH_FROM:
        return False
    return bool(np.std(values - smoothed(values)) > 0.02 * np.ptp(values))


def lengths(runs: Sequence[Run]) -> Figure | None:
    """Length of the answers: median, the middle half and the middle nine tenths."""
    runs = [run for run in runs if "completions/length_p50" in run.series]
    if not runs:
        return None
    figure = go.Figure()
    for run in runs:
        for low, high, alpha in ((5, 95, 0.10), (25, 75, 0.20)):
            pair = [run.series.get(f"completions/length_p{p}") for p in (low, high)]
            if pair[0] is None or pair[1] is None:
                continue
            x = np.concatenate([pair[0].steps, pair[1].steps[::-1]])
            y = np.concatenate([pair[0].values, pair[1].values[::-1]])
            figure.add_trace(
                go.Scatter(
                    x=x,
                    y=y,
                    fill="toself",
                    line={"width": 0},
                    mode="lines",
                    fillcolor=_rgba(run.color, alpha),
                    hoverinfo="skip",
                )
            )
        median = run.series["completions/length_p50"]
        figure.add_trace(
            go.Scatter(
                x=median.steps,
                y=median.values,
                mode="lines",
                line={"color": run.color, "width": 2},
                hovertemplate=f"median %{{y:.0f}} tokens<extra>{label(run.name)}</extra>",
            )
        )
    figure.update_yaxes(title="tokens", rangemode="tozero")
    return styled(figure, 300, hovermode="x")


def phases(run: Run) -> dict[str, Series]:
    """Seconds by phase: the parts of a step or iteration, what they leave of it, and the rest."""
    found = {n: s for n, s in run.series.items() if n.startswith("timing/")}
    total = next((found.pop(n) for n in TOTALS if n in found), None)
    if total is None:
        return {name.removeprefix("timing/"): s for name, s in found.items()}
    # Those of every step lie inside it; an evaluation does not, and comes last.
    inside = {n: s for n, s in found.items() if np.array_equal(s.steps, total.steps)}
    rest = total.values - sum(series.values for series in inside.values())
    parts = dict(inside)
    if rest.sum() > 0.005 * total.values.sum():
        parts["other" if inside else "step"] = Series(
            total.steps, np.maximum(rest, 0.0), total.times
        )
    parts |= {name: series for name, series in found.items() if name not in inside}
    return {name.removeprefix("timing/"): series for name, series in parts.items()}


def time_totals(runs: Sequence[Run]) -> Figure | None:
    """Seconds of the whole run by phase, one bar a run."""
    found = {run.name: phases(run) for run in runs}
    names = list(dict.fromkeys(name for parts in found.values() for name in parts))
    if not names:
        return None
    figure = go.Figure()
    for i, name in enumerate(names):
        seconds = [float(p[name].values.sum()) if name in p else 0.0 for p in found.values()]
        whole = [sum(float(s.values.sum()) for s in p.values()) or 1.0 for p in found.values()]
        share = [100 * s / w for s, w in zip(seconds, whole, strict=True)]
        figure.add_trace(
            go.Bar(
                y=[label(run_name) for run_name in found],
                x=seconds,
                orientation="h",
                name=label(name),
                marker={"color": PHASE_COLORS[i % len(PHASE_COLORS)]},
                customdata=share,
                texttemplate="%{customdata:.0f} %",
                textposition="inside",
                insidetextanchor="middle",
                hovertemplate=f"{label(name)}: %{{x:.4g}} s (%{{customdata:.1f}} %)<extra></extra>",
            )
        )
    figure.update_layout(barmode="stack", bargap=0.35, uniformtext={"minsize": 10, "mode": "hide"})
    figure.update_xaxes(title="seconds")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return styled(figure, 130 + 44 * len(runs), legend=True)


def time_curves(run: Run) -> Figure | None:
    """Seconds of each step by phase, stacked; phases that do not occur every step are left out."""
    parts = phases(run)
    longest = max((len(s.steps) for s in parts.values()), default=0)
    if longest < 2:
        return None
    figure = go.Figure()
    for i, (name, series) in enumerate(parts.items()):
        if len(series.steps) < longest:
            continue
        steps, values = thinned(series.steps.astype(np.float64), series.values)
        color = PHASE_COLORS[i % len(PHASE_COLORS)]
        figure.add_trace(
            go.Scatter(
                x=steps,
                y=values,
                stackgroup="time",
                mode="lines",
                name=label(name),
                line={"width": 0.6, "color": color},
                fillcolor=_rgba(color, 0.75),
                hovertemplate=f"{label(name)} %{{y:.3g}} s<extra></extra>",
            )
        )
    figure.update_yaxes(title="seconds a step", rangemode="tozero")
    figure.update_xaxes(title="step")
    return styled(figure, 290, legend=True, hovermode="x unified")


def reward_against_length(runs: Sequence[Run]) -> Figure | None:
    """One point a sampled answer: colours are phases, or runs where there are several."""
    figure = go.Figure()
    for run in runs:
        by_phase: dict[str, list[dict[str, Any]]] = {}
        for row in run.samples:
            if all(isinstance(row.get(key), (int, float)) for key in ("reward", "length")):
                by_phase.setdefault(str(row.get("phase", "samples")), []).append(row)
        for phase, rows in by_phase.items():
            single = len(runs) == 1
            color = PHASES.get(phase, run.color) if single else run.color
            symbol = "circle-open" if phase == "before" else "circle"
            figure.add_trace(
                go.Scatter(
                    x=[row["length"] for row in rows],
                    y=[row["reward"] for row in rows],
                    mode="markers",
                    name=label(phase if single else f"{run.name}: {phase}"),
                    marker={"color": color, "size": 7, "symbol": symbol, "opacity": 0.7},
                    text=[f"step {row['step']}<br>{_excerpt(row['completion'])}" for row in rows],
                    hovertemplate="reward %{y:.3f}, %{x} tokens<br>%{text}<extra></extra>",
                )
            )
    if not figure.data:
        return None
    figure.update_xaxes(title="tokens of the answer", rangemode="tozero")
    figure.update_yaxes(title="reward")
    return styled(figure, 420, legend=True)


def calibration(runs: Sequence[Run]) -> Figure | None:
    """Reward models: how often the preferred answer won, against the predicted probability."""
    figure = go.Figure()
    for run in runs:
        for split in ("eval/", ""):
            names = [n for n in run.series if n.startswith(f"{split}calibration/")]
            bins = run.at_last((*names, f"{split}num_pairs"))  # a bin may be empty, then it is not there
            stems = sorted({n.rsplit("/", 1)[0] for n in names}, key=lambda s: int(s.split("/")[-1]))
            stems = [s for s in stems if {f"{s}/predicted", f"{s}/observed"} <= bins.keys()]
            if stems:
                figure.add_trace(_calibration_trace(run, split, stems, bins))
    if not figure.data:
        return None
    line = {"color": MUTED, "width": 1, "dash": "dot"}
    figure.add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line=line, layer="below")
    lowest = min(0.5, *(float(min(*t.x, *t.y)) for t in figure.data)) - 0.03
    figure.update_xaxes(title="predicted probability", range=[lowest, 1.03])
    figure.update_yaxes(title="share that agreed", range=[lowest, 1.03])
    return styled(figure, 460, legend=True).update_layout(width=620)


def _calibration_trace(run: Run, split: str, stems: Sequence[str], bins: Mapping[str, float]) -> Figure:
    pairs = [bins.get(f"{stem}/num_pairs", math.nan) for stem in stems]
    which = "validation" if split else "training"
    return go.Scatter(
        x=[bins[f"{stem}/predicted"] for stem in stems],
        y=[bins[f"{stem}/observed"] for stem in stems],
        mode="lines+markers",
        name=label(f"{run.name}: {which}"),
        line={"color": run.color, "width": 1.5, "dash": "solid" if split else "dash"},
        marker={"size": [6 + min(14.0, math.sqrt(p)) if p == p else 9 for p in pairs]},
        customdata=pairs,
        hovertemplate="predicted %{x:.3f}, observed %{y:.3f}, %{customdata:,.0f} pairs",
    )


def accuracy_by_part(runs: Sequence[Run]) -> Figure | None:
    """Reward models: validation accuracy in all and by K and source, with two standard errors."""
    pattern = re.compile(r"eval/(?:by_(k|source)/(.+)/)?accuracy")
    figure = go.Figure()
    for run in runs:
        values = run.at_last([n for n in run.series if pattern.fullmatch(n.removesuffix("_stderr"))])
        found = {name: match for name in values if (match := pattern.fullmatch(name))}
        if len(found) < 2:
            continue
        part = {"k": "K = {}", "source": "{}"}
        figure.add_trace(
            go.Bar(
                x=[label(part[m[1]].format(m[2])) if m[1] else "all" for m in found.values()],
                y=[values[name] for name in found],
                error_y={"array": [2 * values.get(f"{name}_stderr", 0.0) for name in found]},
                marker={"color": _rgba(run.color, 0.75)},
                name=label(run.name),
                hovertemplate="%{x}: %{y:.3f} ± %{error_y.array:.3f}",
            )
        )
    if not figure.data:
        return None
    line = {"color": MUTED, "width": 1, "dash": "dot"}
    figure.add_hline(y=0.5, line=line)
    figure.update_yaxes(range=[0, 1])
    return styled(figure, 300, legend=len(runs) > 1)


def label(text: str) -> str:
    """Text for a place where plotly reads HTML: names come from files."""
    return html.escape(printable(text))


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    lines = [text[i : i + 70] for i in range(0, min(len(text), 210), 70)]
    return "<br>".join(label(line) for line in lines) + (" …" if len(text) > 210 else "")


def _rgba(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def styled(figure: Figure, height: int, legend: bool = False, hovermode: str = "closest") -> Figure:
    """The one look of all figures."""
    figure.update_layout(
        height=height,
        margin={"l": 56, "r": 16, "t": 40, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, Segoe UI, sans-serif", "size": 12, "color": INK},
        showlegend=legend,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        hovermode=hovermode,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#c3cad1", "activecolor": INK},
        hoverlabel={"bgcolor": "white", "bordercolor": GRID, "align": "left"},
    )
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "exponentformat": "e",
        "linecolor": GRID,
        "tickfont": {"size": 10.5, "color": MUTED},
        "title": {"font": {"size": 11.5, "color": MUTED}},
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure
