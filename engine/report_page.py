"""The HTML of a report: one page, no external resource, all text of models and files escaped."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from engine.report_run import Run
from engine.run.console import number, printable

MAX_PAIRS = 12
KL_FULL = 2.0  # nats at which a token's colour is full
# What a reader wants to know first, by stage; those that a run has are shown, at most CARDS.
HEADLINES = {
    "ppo": (
        "eval/score",
        "eval/kl",
        "objective/scores",
        "objective/kl",
        "val/eos_rate",
        "completions/mean_length",
        "eval/ptx_perplexity",
        "perf/tokens_per_s",
    ),
    "rm": ("eval/accuracy", "eval/log_loss", "accuracy", "loss", "margin", "perf/tokens_per_s"),
    "sft": ("eval/loss", "loss", "eval/ptx_loss", "perf/tokens_per_s"),
}
CARDS = 6

STYLE = """
:root { --ink:#22303c; --muted:#66727f; --line:#e2e7ec; --paper:#fff; --back:#f5f7f9; }
* { box-sizing:border-box }
body { margin:0; background:var(--back); color:var(--ink); line-height:1.5;
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif }
main { max-width:1220px; margin:0 auto; padding:28px 24px 80px }
h1 { font-size:26px; margin:0 0 4px; letter-spacing:-.01em }
h2 { font-size:18px; margin:0 0 4px; letter-spacing:-.005em }
p.about { margin:0 0 10px; max-width:100ch }
.about { color:var(--muted); font-size:13.5px }
nav { position:sticky; top:0; z-index:5; background:rgba(245,247,249,.94); padding:9px 0;
  margin:14px 0 6px; border-bottom:1px solid var(--line); font-size:13px;
  display:flex; flex-wrap:wrap; gap:2px 16px }
nav a { color:var(--muted); text-decoration:none; white-space:nowrap }
nav .runs { flex-basis:100%; color:var(--ink) }
nav a:hover { color:var(--ink); text-decoration:underline }
section { background:var(--paper); border:1px solid var(--line); border-radius:10px;
  padding:18px 20px; margin:16px 0; scroll-margin-top:52px }
.chip { display:inline-block; width:11px; height:11px; border-radius:3px; margin-right:7px }
.run + .run { margin-top:22px }
.stage { font-size:12px; border:1px solid var(--line); border-radius:20px; padding:1px 9px;
  margin-left:8px; color:var(--muted); text-transform:uppercase; letter-spacing:.04em }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(168px,1fr)); gap:10px;
  margin:10px 0 4px }
.card { border:1px solid var(--line); border-radius:8px; padding:9px 12px }
.card .name { font-size:12px; color:var(--muted); overflow-wrap:anywhere }
.card .value { font-size:21px; font-weight:600; font-variant-numeric:tabular-nums }
.card .from { font-size:12.5px; color:var(--muted); font-variant-numeric:tabular-nums }
.note { color:#8a5a00; background:#fff7e6; border-radius:6px; padding:3px 9px; font-size:13px;
  display:inline-block; margin:4px 6px 0 0 }
table { border-collapse:collapse; font-size:13px; width:100% }
th,td { text-align:left; padding:4px 12px 4px 0; border-bottom:1px solid var(--line);
  vertical-align:top; overflow-wrap:anywhere }
th { color:var(--muted); font-weight:600 }
td.n,th.n { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
tr.differs td { background:#fff7e6 }
td.key { font-family:ui-monospace,Menlo,Consolas,monospace; font-size:12.5px; width:30% }
details summary { cursor:pointer; color:var(--muted); font-size:13.5px; padding:3px 0 }
.scroll { overflow-x:auto }
.pair { border-top:1px solid var(--line); padding:12px 0 }
.prompt { white-space:pre-wrap; overflow-wrap:anywhere; max-height:160px; overflow-y:auto;
  font-size:13.5px; background:var(--back); border-radius:6px; padding:7px 10px; margin:0 0 8px }
.answers { display:grid; grid-template-columns:1fr 1fr; gap:14px }
@media (max-width:760px) { .answers { grid-template-columns:1fr } }
.answer .head { font-size:12.5px; color:var(--muted); margin-bottom:3px }
.answer .head b { color:var(--ink); font-size:14px }
.text { white-space:pre-wrap; overflow-wrap:anywhere; font-size:14px; line-height:1.65;
  max-height:380px; overflow-y:auto }
.text span { border-radius:3px }
.nl { color:#b3bcc5 }
.scale { display:inline-block; width:190px; height:10px; border-radius:5px; margin:0 8px;
  vertical-align:-1px; background:linear-gradient(90deg,
  rgba(47,111,183,.75),rgba(47,111,183,0) 50%,rgba(217,95,2,0) 50%,rgba(217,95,2,.75)) }
footer { color:var(--muted); font-size:12.5px; margin-top:18px }
"""
# Nothing may be fetched, whatever a file of the run held: the browser enforces it.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)


def text(value: object) -> str:
    """Any text, escaped for HTML, control characters written out."""
    return html.escape(printable(str(value)))


def page(title: str, script: str, sections: Sequence[tuple[str, str, str]], runs: list[Run]) -> str:
    """The whole file. `sections` are (title, a sentence about it, its HTML)."""
    links = "".join(f'<a href="#s{i}">{text(name)}</a>' for i, (name, _, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{text(name)}</h2>'
        + (f'<p class="about">{about}</p>' if about else "")
        + f"{content}</section>"
        for i, (name, about, content) in enumerate(sections)
    )
    made = time.strftime("%Y-%m-%d %H:%M")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style>"
        f"<script>{script}</script></head><body><main>"
        f"<h1>{text(title)}</h1><nav>{legend(runs)}{links}</nav>{body}"
        f"<footer>Made by engine.report on {made}. This file is complete: it loads nothing."
        "</footer></main></body></html>\n"
    )


def breakable(name: str) -> str:
    """A metric's name that may be broken after a slash or an underscore."""
    return text(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def chip(run: Run) -> str:
    return f'<span class="chip" style="background:{run.color}"></span>'


def legend(runs: Sequence[Run]) -> str:
    """The runs' colours, which stay in sight; one run needs none."""
    names = " &nbsp; ".join(f"{chip(run)}{text(run.name)}" for run in runs)
    return f'<span class="runs">{names}</span>' if len(runs) > 1 else ""


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def overview(runs: Sequence[Run]) -> str:
    """A block a run: what it is, and its headline numbers from first to last."""
    out = []
    for run in runs:
        names = HEADLINES.get(run.stage, tuple(run.series))
        cards = []
        for name in [n for n in names if n in run.series][:CARDS]:
            first, last = run.series[name].ends()
            single = len(run.series[name].values) == 1
            cards.append(
                f'<div class="card"><div class="name">{breakable(name)}</div>'
                f'<div class="value">{number(last)}</div><div class="from">'
                + ("one value" if single else f"from {number(first)}")
                + "</div></div>"
            )
        notes = "".join(f'<span class="note">{text(note)}</span>' for note in run.notes)
        out.append(
            f'<div class="run">{chip(run)}<b>{text(run.name)}</b><span class="stage">{text(run.stage)}</span>'
            f'<span class="about" style="margin-left:10px">{run.last_step:,} steps, '
            f'{duration(run.seconds)}</span><div class="cards">{"".join(cards)}</div>{notes}</div>'
        )
    return "".join(out)


def values(runs: Sequence[Run]) -> str:
    """Every metric of every run: first, last, lowest, highest."""
    rows = []
    for name in sorted({name for run in runs for name in run.series}):
        for run in runs:
            if name in run.series:
                series = run.series[name]
                first, last = series.ends()
                cells = (first, last, series.values.min(), series.values.max())
                rows.append(
                    f'<tr><td class="key">{text(name)}</td><td>{chip(run)}{text(run.name)}</td>'
                    + "".join(f'<td class="n">{number(float(cell))}</td>' for cell in cells)
                    + f'<td class="n">{len(series.values):,}</td></tr>'
                )
    head = "".join(f'<th class="n">{h}</th>' for h in ("first", "last", "min", "max", "points"))
    return _folded(
        f"rows: {len(rows)}", f"<table><tr><th>metric</th><th>run</th>{head}</tr>{''.join(rows)}"
    )


def settings(runs: Sequence[Run], of: Callable[[Run], dict[str, str]], folded: bool) -> str:
    """A table of keys against runs; rows where the runs differ are marked and come first."""
    found = [of(run) for run in runs]
    keys = list(dict.fromkeys(key for each in found for key in each))
    rows: dict[bool, list[str]] = {True: [], False: []}
    for key in keys:
        cells = [each.get(key) for each in found]
        differs = len(set(cells)) > 1
        shown = "".join(f"<td>{'–' if c is None else text(c)}</td>" for c in cells)
        mark = ' class="differs"' if differs else ""
        rows[differs].append(f'<tr{mark}><td class="key">{text(key)}</td>{shown}</tr>')
    head = "".join(f"<th>{chip(run)}{text(run.name)}</th>" for run in runs)
    table = f"<table><tr><th></th>{head}</tr>{''.join(rows[True] + rows[False])}"
    return (
        _folded(f"keys: {len(keys)}", table)
        if folded
        else f'<div class="scroll">{table}</table></div>'
    )


def journal(runs: Sequence[Run]) -> str:
    """What the runs said, with the time."""
    rows = []
    for run in runs:
        for event in run.events:
            if isinstance(event.get("time"), (int, float)) and "text" in event:
                at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
                said = f"<td>{chip(run)}{text(event['text'])}</td>"
                rows.append(f'<tr><td class="n">{at}</td>{said}</tr>')
    return _folded(f"{len(rows)} lines", f"<table>{''.join(rows)}") if rows else ""


def _folded(summary: str, table: str) -> str:
    return (
        f'<details><summary>{summary}</summary><div class="scroll">{table}</table></div></details>'
    )


def answers(run: Run) -> str:
    """Answers before and after training, side by side; where no prompt was answered at both times,
    those of the first and the last step with samples."""
    before, after = (_by_prompt(run, phase) for phase in ("before", "after"))
    both = [prompt for prompt in before if prompt in after]
    if both:
        pairs: Iterable[tuple[Any, Any]] = ((before[p], after[p]) for p in both[:MAX_PAIRS])
        what = f"the first {min(len(both), MAX_PAIRS)} of {len(both)} prompts, as they came"
    elif run.samples:
        first, last = run.samples[0]["step"], run.samples[-1]["step"]
        early = [row for row in run.samples if row["step"] == first][:MAX_PAIRS]
        late = [row for row in run.samples if row["step"] == last][:MAX_PAIRS]
        pairs = [(row, None) for row in early] if first == last else _zipped(early, late)
        what = f"answers of the steps {first} and {last}: no prompt was answered at both times"
    else:
        return ""
    blocks = "".join(_pair(left, right) for left, right in pairs)
    scale = (
        f"−{KL_FULL:g} nats<span class='scale'></span>+{KL_FULL:g} nats: the trained policy finds "
        "the token less (blue) or more (orange) likely than the reference does; point at a token "
        "for its value"
    )
    return f'<p class="about">{chip(run)}{text(run.name)}: {what}. {scale}.</p>{blocks}'


def _by_prompt(run: Run, phase: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in run.samples:
        if row.get("phase") == phase:
            found.setdefault(str(row.get("prompt", "")), row)
    return found


def _zipped(early: list[Any], late: list[Any]) -> list[tuple[Any, Any]]:
    size = max(len(early), len(late))
    fill = [None] * size
    return list(zip((early + fill)[:size], (late + fill)[:size], strict=True))


def _pair(left: dict[str, Any] | None, right: dict[str, Any] | None) -> str:
    rows = [row for row in (left, right) if row is not None]
    prompts = list(dict.fromkeys(str(row.get("prompt", "")) for row in rows))
    if len(prompts) == 1:
        shared = f'<div class="prompt">{text(prompts[0])}</div>'
        columns = "".join(f'<div class="answer">{answer(row)}</div>' for row in rows)
    else:
        shared = ""
        columns = "".join(
            f'<div class="answer"><div class="prompt">{text(row.get("prompt", ""))}</div>'
            f"{answer(row)}</div>"
            for row in rows
        )
    return f'<div class="pair">{shared}<div class="answers">{columns}</div></div>'


def answer(row: dict[str, Any]) -> str:
    """One answer: phase, step, reward, length, sum of its KL, and its tokens in colour."""
    parts = [f"{text(row.get('phase', ''))} · step {text(row['step'])}"]
    if isinstance(row.get("reward"), (int, float)):
        parts.append(f"reward <b>{number(row['reward'])}</b>")
    if isinstance(row.get("length"), int):
        parts.append(f"{row['length']} tokens")
    tokens, kl = row.get("tokens"), row.get("kl")
    content = text(row["completion"])
    if isinstance(tokens, list) and isinstance(kl, list) and len(tokens) == len(kl):
        known = [x for x in kl if isinstance(x, (int, float))]
        parts.append(f"KL {number(sum(known))}")
        content = "".join(_token(str(t), x) for t, x in zip(tokens, kl, strict=True))
    return f'<div class="head">{" · ".join(parts)}</div><div class="text">{content}</div>'


def _token(token: str, kl: object) -> str:
    shown = text(token).replace("\n", '<span class="nl">↵</span>\n')
    if not isinstance(kl, (int, float)):  # null: it was not finite
        return f'<span title="no KL">{shown}</span>'
    alpha = 0.75 * min(1.0, abs(kl) / KL_FULL)
    color = "217,95,2" if kl > 0 else "47,111,183"
    style = f"background:rgba({color},{alpha:.2f})"
    return f'<span style="{style}" title="{kl:+.3f} nats">{shown}</span>'
