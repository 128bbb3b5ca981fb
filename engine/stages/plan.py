"""`--dry_run`: reads the config, the data and the model's header, and says what would run. Writes nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine import ops
from engine.config import PPOConfig, RMConfig, RunConfig, SFTConfig
from engine.data.tokenizer import load_tokenizer
from engine.model.architectures import read_architecture
from engine.model.folder import read_json
from engine.model.weights import resolve_dtype, resolve_folder
from engine.run.console import printable
from engine.run.device import choose_device
from engine.run.session import set_threads
from engine.stages.epochs import total_steps
from engine.stages.inputs import load_ppo_data, load_rm_data, load_sft_data
from engine.stages.memory import count_parameters, memory_items


def machine(device: torch.device, threads: int) -> str:
    """What computes, in words."""
    cpu = f"class {ops.cpu_class()}, {threads} threads"
    return cpu if device.type == "cpu" else f"{torch.cuda.get_device_name(device)}; CPU: {cpu}"


def describe(stage: str, config: RunConfig) -> list[tuple[str, str]]:
    """What would run, as (name, value)."""
    device = choose_device(config.device)
    folder = resolve_folder(config.model_name_or_path)
    architecture = read_architecture(read_json(Path(folder) / "config.json"))
    count = count_parameters(architecture, "lm_head")
    items = memory_items(config)
    rows = [
        ("stage", stage),
        (
            "model",
            f"{architecture.family}, {count / 1e6:.1f}M parameters, {config.model_name_or_path}",
        ),
        ("storage", str(resolve_dtype(config.dtype, device)).removeprefix("torch.")),
        ("machine", machine(device, set_threads(config.threads))),
        ("memory, about", f"{sum(size for _, size in items) / 1e9:.3g} GB; most: {items[0][0]}"),
        ("output", config.output_dir),
    ]
    tokenizer, context = (
        load_tokenizer(config.model_name_or_path),
        architecture.max_positions,
    )
    if isinstance(config, PPOConfig):
        prompts = load_ppo_data(config, tokenizer, context)
        rows += [
            ("prompts", f"{len(prompts.train)}, validation {len(prompts.eval_prompts)}"),
            ("iterations", f"{config.num_iterations} of {config.batch_size} episodes"),
            (
                "optimizer steps",
                str(config.num_iterations * config.num_mini_batches * config.num_ppo_epochs),
            ),
        ]
        return rows + [("data", line) for line in prompts.reports]
    if isinstance(config, RMConfig):
        groups = load_rm_data(config, tokenizer, context)
        rows.append(("ranked prompts", f"{len(groups.train)}, validation {len(groups.validation)}"))
        rows.append(("steps", str(total_steps(config, len(groups.train)))))
        return rows + [("data", line) for line in groups.reports]
    assert isinstance(config, SFTConfig)
    examples = load_sft_data(config, tokenizer, context)
    tokens = sum(len(example.tokens) for example in examples.train)
    rows.append(("demonstrations", f"{len(examples.train)}, validation {len(examples.validation)}"))
    rows.append(("tokens an epoch", str(tokens)))
    rows.append(("steps", str(total_steps(config, len(examples.train)))))
    return rows + [("data", line) for line in examples.reports]


def print_plan(stage: str, config: RunConfig) -> None:
    table = Table(title="dry run: nothing is trained or written", show_header=False)
    for name, value in describe(stage, config):
        table.add_row(name, Text(printable(value)))  # a path or a row may hold mark-up
    Console().print(table)
