"""What `make gpu-check` runs besides kernels: generation, captured and not, a training step, and vLLM where it is.

The functions take the device and the sizes, so that tests run them on the CPU, in Triton's interpreter, on tiny models.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import gpu_check_kernels
from bench.gpu_check import Row

SEQUENCES, PROMPT, NEW = (1, 16, 64, 256), 64, 128
TOKENS, LENGTH = 8192, 512  # of a training step, and of a sequence of it
CACHE_GB = 16.0  # at most; a call takes the pages that its sequences need
VLLM_SECONDS = 1500
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


def random_model(folder: Path) -> Row:
    """SmolLM2-135M's shape with random weights, so that nothing is downloaded."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SMOLLM2))
    model.to(torch.bfloat16).save_pretrained(folder)
    return {"model": "random, SmolLM2-135M's shape", "parameters": model.num_parameters()}


def vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def random_prompts(folder: Path, count: int, length: int) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(count)
    return torch.randint(vocabulary(folder), (count, length), generator=numbers).tolist()


def decode(
    folder: Path, count: int, device: str = "cuda", prompt: int = PROMPT, new: int = NEW
) -> Row:
    """Tokens a second of whole calls, captured and not; an error where both do not give the same numbers to the bit."""
    from engine.generate import graph
    from engine.generate.generator import generate
    from engine.generate.sampling import Sampling
    from engine.generate.scheduler import Limits
    from engine.model.weights import load_policy

    model, limits = load_policy(folder, "bfloat16", device=device), Limits(count, CACHE_GB)
    prompts, results = random_prompts(folder, count, prompt), []
    row: Row = {"workload": "rollout", "sequences": count, "by": "engine"}
    for name, wanted in (("captured", True), ("launched", False)):
        with graph.captured(wanted):
            for repeat in range(3):  # the first captures
                began = time.perf_counter()
                out = generate(model, prompts, Sampling(new), frozenset(), limits=limits)
                seconds = time.perf_counter() - began
                row[f"{name}_first_s" if repeat == 0 else f"{name}_s"] = seconds
        row[f"{name}_tokens_per_s"] = count * new / seconds
        results.append(out)
    decoder = graph._decoders.get(model.weights)
    row["graphs"] = len(decoder._graphs) if decoder is not None else 0
    row["equal_to_the_bit"] = all(
        a.tokens == b.tokens and torch.equal(a.logprobs, b.logprobs)
        for a, b in zip(*results, strict=True)
    )
    graph.release(model)
    if not row["equal_to_the_bit"]:
        row["error"] = "the captured step and the launched one give other numbers"
    elif device == "cuda" and not row["graphs"]:
        row["error"] = "no step was captured"
    return row


def train(folder: Path, device: str = "cuda", tokens: int = TOKENS, length: int = LENGTH) -> Row:
    """Tokens a second of forward, backward and refresh of one micro-batch of sequences of equal length."""
    from engine.data.pack import pack_sequences, predictions
    from engine.model import transformer
    from engine.model.weights import load_policy

    model = load_policy(folder, "bfloat16", trainable=True, device=device)
    batch = pack_sequences(random_prompts(folder, tokens // length, length))
    shift = predictions(batch)

    def step() -> None:
        hidden = transformer.chosen_rows(transformer.forward(model, batch), shift.rows)
        logprob, _ = transformer.logprobs(model, hidden, shift.targets)
        (-logprob.mean()).backward()
        model.refresh()

    row: Row = {"workload": "training step", "by": "engine"}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row |= gpu_check_kernels.timed(step)
    if device == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {**row, "tokens_per_s": tokens / row["ms"] * 1e3}


VLLM = """
import json, sys, time, torch
from vllm import LLM, SamplingParams
folder, counts, prompt, new, vocabulary = sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:])
llm = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.5)
law = SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, logprobs=0, detokenize=False)
for count in counts:
    given = [{"prompt_token_ids": p} for p in torch.randint(vocabulary, (count, prompt)).tolist()]
    for _ in range(3):
        began = time.perf_counter()
        llm.generate(given, law)
        seconds = time.perf_counter() - began
    rate = count * new / seconds
    print(json.dumps({"workload": "rollout", "sequences": count, "by": "vllm", "tokens_per_s": rate}), flush=True)
"""


def vllm(folder: Path, counts: Sequence[int] = SEQUENCES) -> list[Row]:
    """The same calls by vLLM, in a process of its own; the rows it gave, and why there are no more."""
    numbers = [json.dumps(list(counts)), PROMPT, NEW, vocabulary(folder)]
    command = [sys.executable, "-c", VLLM, str(folder), *map(str, numbers)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=VLLM_SECONDS
        )
    except subprocess.TimeoutExpired as late:
        return [{"by": "vllm", "error": f"it did not end within {late.timeout:.0f} s"}]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"workload')]
    if done.returncode or len(rows) < len(counts):
        end = done.stderr[-300:]
        rows.append({"by": "vllm", "error": f"it ended with {done.returncode}: {end}"})
    return rows
