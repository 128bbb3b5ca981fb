"""`--dry_run`: reads the config, the data and the model's header, and says what would run. Writes nothing."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine import ops
from engine.config import PPOConfig, RMConfig, RunConfig, SFTConfig
from engine.data.tokenizer import load_tokenizer
from engine.model.weights import resolve_dtype
from engine.run.console import printable
from engine.run.device import choose_device
from engine.run.distributed import ALONE, Ranks, join
from engine.run.memory import parameters
from engine.run.session import set_threads
from engine.stages import duration, estimates, resources
from engine.stages.epochs import total_steps
from engine.stages.inputs import (
    PPOData,
    RMData,
    SFTData,
    load_ppo_data,
    load_rm_data,
    load_sft_data,
)
from engine.stages.select import check_selection
from engine.stages.sft import epochs_config


def machine(device: torch.device, threads: int) -> str:
    """What computes, in words."""
    cpu = f"class {ops.cpu_class()}, {threads} threads"
    return cpu if device.type == "cpu" else f"{torch.cuda.get_device_name(device)}; CPU: {cpu}"


def describe(stage: str, config: RunConfig, ranks: Ranks = ALONE) -> list[tuple[str, str]]:
    """What would run, as (name, value)."""
    device = choose_device(config.device)
    model = estimates.describe(config.model_name_or_path, "lm_head")
    family, count = model.architecture.family, parameters(model.specs)
    rows = [
        ("stage", stage),
        ("model", f"{family}, {count / 1e6:.1f}M parameters, {config.model_name_or_path}"),
        ("storage", str(resolve_dtype(config.dtype, device)).removeprefix("torch.")),
        ("machine", machine(device, set_threads(ranks.threads(config.threads)))),
        ("output", config.output_dir),
    ]
    tokenizer, context = load_tokenizer(config.model_name_or_path), model.architecture.max_positions
    if isinstance(config, PPOConfig):
        return rows + of_ppo(config, load_ppo_data(config, tokenizer, context), ranks)
    if isinstance(config, RMConfig):
        return rows + of_reward_model(config, load_rm_data(config, tokenizer, context), ranks)
    assert isinstance(config, SFTConfig)
    data = load_sft_data(config, tokenizer, context)
    check_selection(config, data, context)
    return rows + of_sft(config, data, ranks)


def of_ppo(config: PPOConfig, data: PPOData, ranks: Ranks = ALONE) -> list[tuple[str, str]]:
    steps = config.num_iterations * config.num_mini_batches * config.num_ppo_epochs
    return [
        ("memory", resources.settle_ppo(config, data, ranks)[1]),
        ("prompts", f"{len(data.train)}, validation {len(data.eval_prompts)}"),
        ("iterations", f"{config.num_iterations} of {config.batch_size} episodes"),
        ("optimizer steps", str(steps)),
        ("time", duration.said(duration.of_ppo(config, data), config, ranks)),
        *(("data", line) for line in data.reports),
    ]


def of_reward_model(config: RMConfig, data: RMData, ranks: Ranks = ALONE) -> list[tuple[str, str]]:
    return [
        ("memory", resources.settle_epochs(config, "score", data.lengths, ranks=ranks)[1]),
        ("ranked prompts", f"{len(data.train)}, validation {len(data.validation)}"),
        ("steps", str(total_steps(config, len(data.train)))),
        ("time", duration.said(duration.of_reward_model(config, data), config, ranks)),
        *(("data", line) for line in data.reports),
    ]


def of_sft(config: SFTConfig, data: SFTData, ranks: Ranks = ALONE) -> list[tuple[str, str]]:
    settled = resources.settle_epochs(
        config, "lm_head", data.lengths, data.longest_prompt, ranks
    )
    return [
        ("memory", settled[1]),
        ("demonstrations", f"{len(data.train)}, validation {len(data.validation)}"),
        ("tokens an epoch", str(sum(len(example.tokens) for example in data.train))),
        ("steps", str(total_steps(epochs_config(config), len(data.train)))),
        ("time", duration.said(duration.of_sft(config, data), config, ranks)),
        *(("data", line) for line in data.reports),
    ]


def print_plan(stage: str, config: RunConfig) -> None:
    table = Table(title="dry run: nothing is trained or written", show_header=False)
    ranks = join(config.device, config.replicate)
    for name, value in describe(stage, config, ranks):
        table.add_row(name, Text(printable(value)))  # a path or a row may hold mark-up
    if ranks.is_first:
        Console().print(table)
