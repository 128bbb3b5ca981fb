"""The other side of bench.rollout: a peer in its own environment, one JSON order a line in, one JSON answer a line out.

    PEER_PYTHON bench/peer.py hf|vllm --model FOLDER --dtype bfloat16 --threads 2

First {"ready": seconds, "versions": {...}}. Orders: {"prompts": [[ids]], "max_new_tokens": n, "stop": [ids]} ->
{"seconds": s, "tokens": n}, all prompts at temperature 1 without filters, to the last token or to the first of the stop
ids (none: every sequence has n new tokens). It imports nothing of the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, TextIO

Generate = Callable[[list[list[int]], int, list[int]], int]  # -> new tokens, padding not counted
HF_BATCH = 64  # sequences at once: padded, and a batch waits for its last sequence
VLLM_BATCH = 128
PACKAGES = {"hf": ("transformers", "torch"), "vllm": ("vllm", "torch")}


def new_tokens(row: list[int], stop: list[int]) -> int:
    """Tokens of one padded row: up to its first stop id, which counts."""
    return next((i + 1 for i, token in enumerate(row) if token in stop), len(row))


def hugging_face(args: argparse.Namespace) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.eval()

    def batch(prompts: list[list[int]], new: int, stop: list[int]) -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        # Without an end-of-sequence token there is nothing to suppress and nothing to wait for: its best case.
        model.generation_config.eos_token_id = stop or None
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )
        return sum(new_tokens(row, stop) for row in out[:, width:].tolist())

    def generate(prompts: list[list[int]], new: int, stop: list[int]) -> int:
        parts = [prompts[i : i + HF_BATCH] for i in range(0, len(prompts), HF_BATCH)]
        return sum(batch(part, new, stop) for part in parts)

    return generate


def vllm(args: argparse.Namespace) -> Generate:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{args.threads - 1}")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    from vllm import LLM, SamplingParams

    model = LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=2048,
        max_num_seqs=VLLM_BATCH,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], new: int, stop: list[int]) -> int:
        law = SamplingParams(
            temperature=1.0, max_tokens=new, ignore_eos=not stop, stop_token_ids=stop
        )
        asked = [{"prompt_token_ids": p} for p in prompts]
        out = model.generate(asked, law, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in out)

    return generate


def serve(generate: Generate, orders: TextIO, answers: TextIO) -> None:
    for line in orders:
        order: dict[str, Any] = json.loads(line)
        began = time.perf_counter()
        tokens = generate(order["prompts"], order["max_new_tokens"], order["stop"])
        answer = {"seconds": time.perf_counter() - began, "tokens": tokens}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["hf", "vllm"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    # The peers' own words go to stderr: stdout is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    began = time.perf_counter()
    generate = {"hf": hugging_face, "vllm": vllm}[args.peer](args)
    # Not of the installed distribution: vLLM's has another name where it is built for CPUs.
    versions = {name: str(import_module(name).__version__) for name in PACKAGES[args.peer]}
    answers.write(json.dumps({"ready": time.perf_counter() - began, "versions": versions}) + "\n")
    answers.flush()
    serve(generate, sys.stdin, answers)


if __name__ == "__main__":
    main()
