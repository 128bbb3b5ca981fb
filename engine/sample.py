"""python -m engine.sample: K completions a prompt, written as a candidates file to rank.

    python -m engine.sample --model_name_or_path runs/sft --dataset_name prompts.jsonl \\
        --num_samples 4 --output candidates.jsonl [--rank_with my_scorers:length]

A row of the file (JSON lines): ``prompt`` (text or messages), ``responses`` [K], ``tokens`` [K][T],
``logprobs`` [K][T], ``finish_reasons`` [K], ``episode_ids`` [K], ``seed``, ``temperature``,
``model``, and the other columns of the prompt's row. With ``--rank_with`` also ``scores`` [K] and
``ranks`` [K] (lower is better, 0 the best, equal is a tie): such a file is a rankings data set.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jsonargparse

from engine.config import RunConfig
from engine.config_sample import SampleConfig
from engine.errors import EngineError, OutputError

if TYPE_CHECKING:  # torch is imported when the machine is settled, in main
    from engine.data.prompts import Prompt
    from engine.hybrid import HybridEngine
    from engine.stages.ppo.reward_sources import RewardFunction

PER_SAMPLE = ("responses", "tokens", "logprobs", "finish_reasons", "episode_ids")
RESERVED = {"prompt", *PER_SAMPLE, "seed", "temperature", "model", "scores", "ranks"}


def ranks_of(scores: Sequence[float], tie_margin: float = 0.0) -> list[int]:
    """Ranks of scores: the highest score has rank 0, the next group rank 1, and so on.

    Going down, a score belongs to the group it meets if it is at most ``tie_margin`` below the
    group's best; a tie so never joins two scores that are further apart.
    """
    ranks = [0] * len(scores)
    best, rank = math.inf, -1
    for index in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if best - scores[index] > tie_margin:
            best, rank = scores[index], rank + 1
        ranks[index] = rank
    return ranks


def ranked(
    row: Mapping[str, Any],
    scores: Sequence[float | None],
    tie_margin: float,
    left_out: Counter[str],
) -> dict[str, Any] | None:
    """``row`` with ``scores`` and ``ranks``, or None if it has fewer than two completions to rank.

    A completion without a score (None) or without text, which nothing can be trained on, is left
    out; ``left_out`` counts them, and the rows, by reason.
    """
    kept: list[tuple[int, float]] = []
    for index, (response, score) in enumerate(zip(row["responses"], scores, strict=True)):
        if score is None:
            left_out["completions without a score"] += 1
        elif not response.strip():
            left_out["empty completions"] += 1
        else:
            kept.append((index, float(score)))
    if len(kept) < 2:
        left_out["prompts with fewer than two completions to rank"] += 1
        return None
    result = {
        name: [value[i] for i, _ in kept] if name in PER_SAMPLE else value
        for name, value in row.items()
    }
    values = [score for _, score in kept]
    return {**result, "scores": values, "ranks": ranks_of(values, tie_margin)}


def as_sampled(engine: HybridEngine, prompt: Prompt) -> str | list[dict[str, Any]]:
    """What was answered: the messages, or where a row has a text beside them and the model no template, the text."""
    from engine.data.chat import transcript

    messages = prompt.messages
    if messages is None or not (engine.tokenizer.chat_template or prompt.text == transcript(messages)):
        return prompt.text
    return [dict(message) for message in messages]


def plain(value: Any) -> Any:
    """A value of a data set with null for NaN and the infinities, for which JSON has no numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def not_json(prompts: Sequence[Prompt]) -> list[str]:
    """The columns that the file has in another form than the data: dates and bytes of parquet, NaN."""

    def is_json(value: Any) -> bool:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            return False
        return True

    found = {name for prompt in prompts for name, value in prompt.columns.items() if not is_json(value)}
    return sorted(found - RESERVED)


def candidate_rows(
    engine: HybridEngine, prompts: Sequence[Prompt], first: int, config: SampleConfig
) -> list[dict[str, Any]]:
    """One row a prompt; ``first`` is the number of the first of these prompts.

    Sample k of prompt i has the episode id i * K + k, so ``--batch`` changes nothing.
    """
    count = config.num_samples
    out = engine.generate(
        [prompt.tokens for prompt in prompts],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        n=count,
        seed=config.seed,
        episode_ids=range(first * count, (first + len(prompts)) * count),
        top_k=config.top_k,
        top_p=config.top_p,
    )
    rows = []
    for index, prompt in enumerate(prompts):
        samples = out[index * count : (index + 1) * count]
        own = {
            "prompt": as_sampled(engine, prompt),
            "responses": [sample.text for sample in samples],
            "tokens": [sample.tokens for sample in samples],
            "logprobs": [sample.logprobs.tolist() for sample in samples],
            "finish_reasons": [sample.finish_reason for sample in samples],
            "episode_ids": [sample.episode_id for sample in samples],
            "seed": config.seed,
            "temperature": config.temperature,
            "model": config.model_name_or_path,
        }
        rows.append({**own, **{k: plain(v) for k, v in prompt.columns.items() if k not in RESERVED}})
    return rows


def score_rows(
    function: RewardFunction, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]
) -> list[list[float | None]]:
    """The scorer's value of every completion, by row: one call, as PPO calls its reward functions.

    Raises:
        EngineError: it raised, or gave something else than a finite number or None for each.
    """
    from engine.stages.ppo.reward_sources import call_function

    pairs = [(p, text) for p, row in zip(prompts, rows, strict=True) for text in row["responses"]]
    values = call_function("rank_with", function, [p for p, _ in pairs], [text for _, text in pairs])
    left = iter([None if math.isnan(value) else value for value in values.tolist()])
    return [[next(left) for _ in row["responses"]] for row in rows]


def check_output(config: SampleConfig) -> None:
    """Whether the candidates file may be written: asked before the work. An earlier one may hold ranks made by hand.

    Raises:
        OutputError: it cannot be written, is there already without `overwrite`, or is a file of the prompts.
    """
    from engine.run.files import check_output_file

    output, prompts = Path(config.output), Path(config.dataset_name).expanduser()
    check_output_file(output)
    if not output.exists():
        return
    places = (output, *output.resolve().parents)
    if prompts.exists() and any(place.samefile(prompts) for place in places):
        raise OutputError(
            f"output: got {config.output!r}, a file of dataset_name {config.dataset_name!r}, whose rows would be lost;"
            " give another --output"
        )
    if not config.overwrite:
        raise OutputError(
            f"output: got {config.output!r}, which is there already; move it away, give another --output, or replace"
            " it with --overwrite true"
        )


def sample(config: SampleConfig) -> Path:
    """Write the candidates file; it appears under its name when it is complete.

    Raises:
        EngineError: a broken row of prompts, a scorer or a model that cannot be used, or an output that cannot be
            written or is there already.
    """
    from engine.data.prompts import load_prompts, not_for_rewards
    from engine.data.rows import DataSource
    from engine.generate.scheduler import Limits
    from engine.hybrid import HybridEngine
    from engine.run.session import set_threads
    from engine.stages.ppo.reward_sources import import_function

    check_output(config)
    output = Path(config.output)
    set_threads(config.threads)
    function = import_function(config.rank_with) if config.rank_with else None
    limits = Limits(config.max_active, config.kv_cache_gb)
    engine = HybridEngine.from_pretrained(
        config.model_name_or_path, config.dtype, limits=limits, device=config.device
    )
    room = engine.model.architecture.max_positions - config.max_new_tokens
    data = load_prompts(
        [DataSource(config.dataset_name, config.dataset_split)],
        engine.tokenizer,
        room,
        config.bad_rows,
        config.parse_special_tokens,
    )
    for line in data.report.lines():
        tell(line)
    prompts = data.items[: config.num_prompts]
    replaced = sorted({name for prompt in prompts for name in prompt.columns} & RESERVED)
    if replaced:
        tell(f"columns of the prompts that the file's own replace: {', '.join(replaced)}")
    if changed := not_json(prompts):
        told = "columns with values that JSON has not, written as text or, for NaN, as null"
        tell(f"{told}: {', '.join(changed)}")
    for line in not_for_rewards(prompts) if function else ():
        tell(line)
    left_out: Counter[str] = Counter()
    write_lines(output, all_rows(engine, prompts, function, config, left_out))
    for reason, number in sorted(left_out.items()):
        tell(f"left out, {reason}: {number}")
    return output


def all_rows(
    engine: HybridEngine,
    prompts: Sequence[Prompt],
    function: RewardFunction | None,
    config: SampleConfig,
    left_out: Counter[str],
) -> Iterator[dict[str, Any]]:
    """The rows of the file, a batch of prompts at a time."""
    began, tokens = time.perf_counter(), 0
    for first in range(0, len(prompts), config.batch):
        chosen = prompts[first : first + config.batch]
        rows = candidate_rows(engine, chosen, first, config)
        tokens += sum(len(sequence) for row in rows for sequence in row["tokens"])
        rate = tokens / (time.perf_counter() - began)
        tell(f"{first + len(chosen)} of {len(prompts)} prompts, {rate:.0f} tokens/s")
        if function is None:
            yield from rows
            continue
        for row, scores in zip(rows, score_rows(function, rows, chosen), strict=True):
            result = ranked(row, scores, config.tie_margin, left_out)
            if result is not None:
                yield result


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows as JSON lines beside ``path`` and move them there at the end."""
    from engine.data.prepare import json_line

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json_line(row))
            file.flush()
    os.replace(aside, path)


def tell(line: str) -> None:
    """A line on the terminal's error stream, so that output can be piped."""
    from engine.run.console import printable

    print(f"sample: {printable(line)}", file=sys.stderr)


def parse(argv: Sequence[str] | None = None) -> SampleConfig:
    """argv -> config. Exits with a message on bad usage."""
    from engine.train import Parser

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="python -m engine.sample", description=SampleConfig.__doc__, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(SampleConfig)
    values = parser.instantiate(parser.parse_args(argv)).as_dict()
    return SampleConfig(**{key: value for key, value in values.items() if key != "config"})


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad usage, 1 failed."""
    from engine.train import EXIT_FAILED, EXIT_USAGE, settle_machine

    try:
        config = parse(argv)
    except EngineError as error:
        tell(str(error))
        return EXIT_USAGE
    settle_machine(cast(RunConfig, config))  # reads keys that both have: threads, cpu_class
    try:
        tell(f"written: {sample(config)}")
    except (EngineError, OSError) as error:
        tell(str(error))
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
