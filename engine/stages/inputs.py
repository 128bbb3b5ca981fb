"""A stage's config -> its tokenizer and its data, with what was left out and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import PPOConfig, RMConfig, RunConfig, SFTConfig
from engine.data.pack import step_rows
from engine.data.prompts import Prompt, load_prompts, not_for_rewards
from engine.data.rankings import RankedGroup, load_rankings
from engine.data.rows import Dataset, DataSource
from engine.data.split import hold_back
from engine.data.text import Example, PretrainRows, load_pretrain, load_sft
from engine.errors import ConfigError, DataError, ModelError
from engine.model.weights import resolve_folder
from engine.run.resume import digest, folder_identity, rows_identity
from engine.run.streams import generator

EVAL_PTX_ROWS = 64  # rows of held-out text that a validation scores


@dataclass(frozen=True)
class SFTData:
    """Demonstrations, held-back ones, and text for the RL-init variant."""

    train: Sequence[Example]
    validation: Sequence[Example]
    ptx: PretrainRows | None
    eval_ptx: Sequence[Sequence[int]]
    reports: tuple[str, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row that may be in a batch."""
        texts = [self.ptx.length] if self.ptx is not None else []
        held = [len(row) for row in self.eval_ptx]
        return [len(row.tokens) for row in (*self.train, *self.validation)] + texts + held

    @property
    def longest_prompt(self) -> int:
        return max((row.prompt_length for row in (*self.train, *self.validation)), default=0)

    def eval_prompts(self) -> list[Prompt]:
        """The prompts of the validation demonstrations (of the training ones without validation)."""
        rows = [row for row in self.validation or self.train if row.prompt_length > 0]
        return [
            Prompt(row.tokens[: row.prompt_length], "", None, {}, row.source)
            for row in {row.key: row for row in rows}.values()
        ]


@dataclass(frozen=True)
class RMData:
    """Ranked groups, held-back ones, and the answers whose mean score becomes 0."""

    train: Sequence[RankedGroup]
    validation: Sequence[RankedGroup]
    demonstrations: Sequence[RankedGroup]
    reports: tuple[str, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every prompt with its answers."""
        return group_lengths([*self.train, *self.validation, *self.demonstrations])


@dataclass(frozen=True)
class PPOData:
    """Prompts, held-back ones, and text for PPO-ptx."""

    train: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]
    ptx: PretrainRows | None
    eval_ptx: Sequence[Sequence[int]]
    reports: tuple[str, ...]

    @property
    def longest_prompt(self) -> int:
        return max((len(p.tokens) for p in (*self.train, *self.eval_prompts)), default=0)

    def draw(self, count: int, seed: int, iteration: int) -> list[Prompt]:
        """The prompts of an iteration: passes over all of them, each in its own random order."""
        rows = step_rows(len(self.train), count, seed, iteration, wrap=True)
        return [self.train[i] for i in rows]

    def draw_ptx(self, count: int, iteration: int) -> list[list[int]]:
        """The pretraining rows of an iteration."""
        if self.ptx is None:
            return []
        return self.ptx.rows(range(iteration * count, (iteration + 1) * count))


def group_lengths(groups: Sequence[RankedGroup]) -> list[int]:
    """Tokens of each prompt with its answers."""
    return [len(g.prompt) + sum(map(len, g.responses)) for g in groups]


def located(config: RunConfig, path: str) -> str:
    """Relative paths are looked up in data_dir; what is not there may be a hub id."""
    if config.data_dir is None or Path(path).is_absolute():
        return path
    inside = Path(config.data_dir) / path
    if not inside.exists():
        raise ConfigError(
            f"data_dir: {config.data_dir} has no {path}; give the folder that holds it, or the"
            " data set's full path without data_dir"
        )
    return str(inside)


def train_sources(config: RunConfig) -> list[DataSource]:
    if config.dataset_mixture:
        return [replace(s, path=located(config, s.path)) for s in config.dataset_mixture]
    if config.dataset_name is None:
        raise ConfigError("dataset_name: got nothing, want training data (or dataset_mixture)")
    path = located(config, config.dataset_name)
    return [DataSource(path, config.dataset_train_split, config.dataset_config)]


def eval_source(config: RunConfig) -> list[DataSource]:
    assert config.eval_dataset_name is not None
    path = located(config, config.eval_dataset_name)
    return [DataSource(path, config.dataset_test_split, config.dataset_config)]


def limited(config: RunConfig, context: int, response_length: int = 0) -> int:
    """max_length within what the model's context leaves beside an answer of `response_length` tokens."""
    room = context - response_length
    if room < 1:
        raise ConfigError(
            f"response_length: got {response_length}, which leaves no room for a prompt in the model's context of"
            f" {context}; give a shorter one"
        )
    if config.max_length > room:
        limit = f"is {context}"
        if response_length:
            limit = f"of {context} leaves {room} beside response_length {response_length}"
        raise ConfigError(
            f"max_length: got {config.max_length}, the model's context {limit}; want at most that"
        )
    return config.max_length


def with_validation(
    config: RunConfig, load: Any
) -> tuple[Dataset[Any], Sequence[Any], tuple[str, ...]]:
    """Training rows, validation rows, and lines about both. `load(sources)` reads one data set."""
    data = load(train_sources(config))
    lines = ["training data:", *data.report.lines()]
    if config.eval_dataset_name is not None:
        held = load(eval_source(config))
        return data, held, (*lines, "validation data:", *held.report.lines())
    if config.eval_fraction > 0:
        data, held = hold_back(data, config.eval_fraction, config.seed)
        return (
            data,
            held,
            (*lines, f"held back for validation: {len(held)} of {len(held) + len(data)}"),
        )
    return data, (), tuple(lines)


def load_text(
    config: SFTConfig | PPOConfig, tokenizer: Any, context: int
) -> tuple[PretrainRows | None, list[list[int]], tuple[str, ...]]:
    """Pretraining rows, held-out rows, and lines about both."""
    wanted = config.ptx_dataset_name is not None or config.eval_ptx_dataset_name is not None
    if wanted and config.ptx_length > context:
        raise ConfigError(
            f"ptx_length: got {config.ptx_length}, the model's context is {context}; want at most that"
        )

    def load(path: str, split: str, seed: int) -> PretrainRows:
        return load_pretrain(
            [DataSource(located(config, path), split, config.ptx_dataset_config)],
            tokenizer,
            config.ptx_length,
            seed,
            config.bad_rows,
            config.parse_special_tokens,
        )

    ptx, held, lines = None, [], []
    if config.ptx_dataset_name is not None:
        ptx = load(config.ptx_dataset_name, config.ptx_dataset_split, config.seed)
        lines += ["pretraining text:", *ptx.lines()]
    if config.eval_ptx_dataset_name is not None:
        rows = load(config.eval_ptx_dataset_name, config.eval_ptx_dataset_split, 0)
        held = some_of(rows, EVAL_PTX_ROWS, "held-out text")
        lines += ["held-out text:", *rows.lines(), f"  scored: {len(held)} rows"]
    return ptx, held, tuple(lines)


def load_sft_data(config: SFTConfig, tokenizer: Any, context: int) -> SFTData:
    """Everything SFT reads, checked."""
    longest = limited(config, context)

    def load(sources: list[DataSource]) -> Dataset[Example]:
        return load_sft(
            sources,
            tokenizer,
            longest,
            not config.completion_only_loss,
            config.truncate,
            config.bad_rows,
            config.parse_special_tokens,
        )

    train, validation, lines = with_validation(config, load)
    ptx, held, more = load_text(config, tokenizer, context)
    return SFTData(train, validation, ptx, held, lines + more)


def load_rm_data(config: RMConfig, tokenizer: Any, context: int) -> RMData:
    """Everything the reward model reads, checked."""
    longest = limited(config, context)

    def load(sources: list[DataSource]) -> Dataset[RankedGroup]:
        return load_rankings(
            sources, tokenizer, longest, config.bad_rows, config.parse_special_tokens
        )

    train, validation, lines = with_validation(config, load)
    if not any(len(set(group.ranks)) > 1 for group in train):
        raise DataError(
            config.dataset_name or "rankings",
            f"all answers of each of {len(train)} prompts are ties, so there is no pair to learn from; give ranks that"
            " differ",
            "no pairs",
        )
    if config.demonstrations_name is None:
        groups: Sequence[RankedGroup] = train
        if len(train) > config.demonstrations_limit:  # a file's first rows may be all of one kind
            groups = drawn(train, config)
        return RMData(train, validation, [best_answer(group) for group in groups], lines)
    path = located(config, config.demonstrations_name)
    rows = load_sft(
        [DataSource(path, config.demonstrations_split, config.demonstrations_config)],
        tokenizer,
        longest,
        bad_rows=config.bad_rows,
        parse_special_tokens=config.parse_special_tokens,
    )
    chosen = [as_group(row) for row in drawn(rows, config)]
    return RMData(train, validation, chosen, (*lines, "demonstrations:", *rows.report.lines()))


def some_of(rows: Sequence[Any] | PretrainRows, count: int, purpose: str) -> list[Any]:
    """At most `count` of the rows, in their order: the same for every run, and of every part of a mixture."""
    chosen = generator(0, purpose).permutation(len(rows))[:count]
    return [rows[int(i)] for i in sorted(chosen)]


def drawn(rows: Sequence[Any], config: RMConfig) -> list[Any]:
    """demonstrations_limit of the rows (all, where there are fewer), in an order that the seed gives."""
    order = generator(config.seed, "rm demonstrations").permutation(len(rows))
    return [rows[int(i)] for i in order[: config.demonstrations_limit]]


def best_answer(group: RankedGroup) -> RankedGroup:
    at = min(range(len(group.ranks)), key=lambda i: group.ranks[i])
    return RankedGroup(group.prompt, (group.responses[at],), (group.ranks[at],), group.source)


def as_group(row: Example) -> RankedGroup:
    """A demonstration as a prompt with its one answer."""
    prompt, answer = row.tokens[: row.prompt_length], row.tokens[row.prompt_length :]
    return RankedGroup(
        prompt or answer[:1], (answer if prompt else answer[1:],), (0.0,), row.source
    )


def load_ppo_data(config: PPOConfig, tokenizer: Any, context: int) -> PPOData:
    """Everything PPO reads, checked."""
    longest = limited(config, context, config.response_length)

    def load(sources: list[DataSource]) -> Dataset[Prompt]:
        return load_prompts(
            sources, tokenizer, longest, config.bad_rows, config.parse_special_tokens
        )

    train, validation, lines = with_validation(config, load)
    ptx, held, more = load_text(config, tokenizer, context)
    if any(":" in reward.source for reward in config.rewards):
        lines += not_for_rewards((*train, *validation))
    prompts = some_of(validation, config.eval_num_prompts, "validation prompts")
    return PPOData(train, prompts, ptx, held, lines + more)


def identities(config: RunConfig, data: SFTData | RMData | PPOData) -> dict[str, str]:
    """What a run reads besides its config, each in words: a checkpoint remembers them, a resume compares them."""
    found = {}
    for part in fields(data):
        value = getattr(data, part.name)
        if isinstance(value, PretrainRows):
            shape = " x ".join(map(str, value.table.shape))
            found[f"data.{part.name}"] = f"{shape} tokens ({digest([value.table.tobytes()])})"
        elif value is not None and part.name != "reports":
            found[f"data.{part.name}"] = rows_identity([nameless(row) for row in value])
    for name, path in model_folders(config):
        found[f"model.{name}"] = folder_identity(resolve_folder(path))
    return found


def nameless(row: Any) -> Any:
    """A row without the name of the file that it is from: no result depends on that, and a file may be renamed."""
    return replace(row, source="") if is_dataclass(row) and not isinstance(row, type) else row


def check_vocabulary(
    config: RunConfig, data: SFTData | RMData | PPOData, tokenizer: Any, sizes: Mapping[str, int]
) -> None:
    """Every token of the data, and every one that the tokenizer can name, is a row of each model.

    `sizes` is model -> rows of its vocabulary, the trained model first; for that one the data's tokens count, since a
    tokenizer may have more tokens than are ever used. The others read what it samples, which may be any row of it.

    Raises:
        ModelError: a tokenizer of another vocabulary, or a model with fewer rows than the trained one.
    """
    largest = max((largest_token(getattr(data, part.name)) for part in fields(data)), default=0)
    first = next(iter(sizes))
    for model, size in sizes.items():
        token = largest if model == first else max(largest, len(tokenizer) - 1)
        if token >= size:
            raise ModelError(
                f"{model}: the tokenizer of {config.model_name_or_path} gives token {token}, the model has"
                f" 0..{size - 1}; it is the tokenizer of another model: use models and a tokenizer of one family"
            )
        if size < sizes[first]:
            raise ModelError(
                f"{model}: got a vocabulary of {size} rows, want at least the {sizes[first]} of {first}, any of which"
                " may be sampled, padded ones too; train it from a model with as many rows, or pad it with"
                f" resize_token_embeddings({sizes[first]}) of transformers"
            )


def largest_token(rows: Any) -> int:
    """The largest token id of a data set; -1 of what holds none."""
    if isinstance(rows, PretrainRows):
        return int(rows.table.max())
    if isinstance(rows, RankedGroup):
        return max(largest_token(part) for part in (rows.prompt, *rows.responses))
    if isinstance(rows, Example | Prompt):
        return max(rows.tokens, default=-1)
    if isinstance(rows, int):
        return rows
    return -1 if rows is None or isinstance(rows, str) else max(map(largest_token, rows), default=-1)


def model_folders(config: RunConfig) -> list[tuple[str, str]]:
    """(key, folder or hub id) of every model that a run reads as long as it goes on."""
    folders = [("model_name_or_path", config.model_name_or_path)]
    if isinstance(config, SFTConfig) and config.select_by_reward_model:
        folders.append(("select_by_reward_model", config.select_by_reward_model))
    if isinstance(config, PPOConfig):
        if config.reward_model_path:
            folders.append(("reward_model_path", config.reward_model_path))
        for number, reward in enumerate(config.rewards):
            if ":" not in reward.source:
                folders.append((f"rewards.{number}", reward.source))
    return folders
