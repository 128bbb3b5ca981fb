"""Whole runs in processes of their own, and the memory that they took: for the tests of the estimate."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from small_engines import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
from engine.train import main
code = main(sys.argv[1:])
from engine.run.memory import peak_resident_bytes
print("peak", peak_resident_bytes())
sys.exit(code)
"""


def save_model(folder: Path, layers: int, hidden: int, inner: int, vocabulary: int, heads: int) -> Path:
    """A random llama in bfloat16 with the byte tokenizer."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=max(vocabulary, len(tokenizer)),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(folder: Path, letters: int, count: int) -> dict[str, str]:
    """Data of all stages, one token a letter, as files."""
    named = {
        "sft": [{"prompt": f"{i}", "completion": "a" * letters} for i in range(count)],
        "rankings": [
            {"prompt": "p" * letters, "responses": ["a" * (letters // 4), f"{i}"], "ranks": [0, 1]}
            for i in range(count)
        ],
        "prompts": [{"prompt": f"{i} " + "p" * (letters // 4)} for i in range(count)],
    }
    for name, found in named.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return {name: str(folder / f"{name}.jsonl") for name in named}


def run(stage: str, **options: object) -> tuple[float, float, str]:
    """(peak in 10^9 bytes as measured, as estimated at the start, everything printed)."""
    words = ["--stage", stage, "--threads", "1"]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    measured = int(re.findall(r"^peak (\d+)$", done.stdout, flags=re.MULTILINE)[-1]) / 1e9
    estimated = float(re.findall(r"estimated peak ([\d.]+) GB", done.stdout)[0])
    return measured, estimated, done.stdout
