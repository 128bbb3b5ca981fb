"""What a run computes and how long that takes here at the least, for --dry_run: before anybody waits for it.

    time >= operations / rate of products

Operations are those of `engine/run/flops.py`, without validations; PPO's are those of its first iteration's prompts
with answers of the full length, as many times as there are iterations. The rate is that of this machine's products as
training makes them, measured for a moment; training as a whole reaches about two thirds of it.
"""

from __future__ import annotations

import time

import torch

from engine.config import EpochConfig, PPOConfig, SFTConfig
from engine.kernels.linear import linear, pack_weight
from engine.model.weights import resolve_dtype
from engine.run.device import choose_device, wait_for
from engine.run.distributed import Ranks
from engine.run.flops import forward_flops, grouped
from engine.run.memory import Sizes
from engine.stages.epochs import total_steps
from engine.stages.estimates import describe
from engine.stages.inputs import PPOData, RMData, SFTData
from engine.stages.ppo.flops import iteration_work
from engine.stages.sft import epochs_config

ROWS, TURNS, SECONDS = 1024, 3, 0.5  # of a product that is timed: its rows, at least so often and so long
GIGA, PETA = 1e9, 1e15


def of_ppo(config: PPOConfig, data: PPOData) -> float:
    """Operations of the run."""
    policy = describe(config.model_name_or_path, "lm_head").architecture
    models = [source.source for source in config.rewards if ":" not in source.source]
    if config.reward_model_path:
        models.insert(0, config.reward_model_path)
    judges = [describe(folder, "score").architecture for folder in models]
    value = judges[0] if judges else policy
    if config.value_model_path:
        value = describe(config.value_model_path, "score").architecture
    drawn = data.draw(config.batch_size // config.num_samples, config.seed, 0)
    answers = [[config.response_length] * config.num_samples for _ in drawn]
    text = data.draw_ptx(round(config.batch_size * config.ptx_per_episode), 0)
    work = iteration_work(
        policy, value, judges, [len(p.tokens) for p in drawn], answers, [len(row) for row in text], config
    )
    return config.num_iterations * sum(part.flops for part in work.values())


def of_reward_model(config: EpochConfig, data: RMData) -> float:
    """Operations of the run."""
    a = describe(config.model_name_or_path, "score").architecture
    answers = [[len(r) for r in group.responses] for group in data.train]
    segments = grouped([len(group.prompt) for group in data.train], answers)
    passes = total_steps(config, len(data.train)) * config.batch_size / len(data.train)
    return passes * 3 * forward_flops(a, segments, sum(map(len, answers)), 1)


def of_sft(config: SFTConfig, data: SFTData) -> float:
    """Operations of the run."""
    a, counted = describe(config.model_name_or_path, "lm_head").architecture, epochs_config(config)
    steps = total_steps(counted, len(data.train))
    lengths = [len(row.tokens) for row in data.train]
    targets = sum(len(row.tokens) - max(row.response_start, 1) for row in data.train)
    rows = forward_flops(a, [(0, n) for n in lengths], targets, a.vocab_size)
    length = config.ptx_length
    texts = config.ptx_rows * forward_flops(a, [(0, length)], length - 1, a.vocab_size)
    return 3 * steps * (rows * counted.batch_size / len(data.train) + texts)


def product_rate(config: EpochConfig | PPOConfig, a: Sizes) -> float:
    """Operations a second of the product that a layer has most of, in the storage dtype."""
    device = choose_device(config.device)
    x = torch.randn(ROWS, a.hidden_size, device=device)
    weight = torch.randn(a.intermediate_size, a.hidden_size, device=device)
    packed = pack_weight(weight, resolve_dtype(config.dtype, device))
    best, began, turns = float("inf"), time.perf_counter(), 0
    while turns < TURNS or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        linear(x, packed)
        wait_for(device)
        best, turns = min(best, time.perf_counter() - start), turns + 1
    return 2.0 * ROWS * weight.numel() / best


def said(operations: float, config: EpochConfig | PPOConfig, ranks: Ranks) -> str:
    """A line about the whole run, for all of its processes together."""
    a = describe(config.model_name_or_path, "lm_head").architecture
    rate = ranks.size * ranks.smallest(product_rate(config, a))
    minutes = max(1, round(operations / rate / 60))
    days, hours = minutes // 1440, minutes // 60 % 24
    text = f"{days} d {hours} h" if days else f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"
    full = " with answers of the full length" if isinstance(config, PPOConfig) else ""
    return (
        f"{text} if all {operations / PETA:.3g} PFLOP{full} ran as fast as products do here, {rate / GIGA:.3g} GFLOP/s;"
        " half as long again is usual"
    )
