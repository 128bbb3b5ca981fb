"""The other side of bench.rollout: a peer in its own environment, one JSON order a line in, one JSON answer a line out.

    PEER_PYTHON bench/peer.py hf|vllm --model FOLDER --dtype bfloat16 --threads 2

Orders: {"prompts": [[ids]], "max_new_tokens": n, "stop": false|true} -> {"seconds": s, "tokens": n}, all prompts at
temperature 1 without filters, to the last token or to the end-of-sequence token. It imports nothing of the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

Generate = Callable[[list[list[int]], int, bool], int]  # -> new tokens, padding not counted
BATCH = 64  # sequences at once


def hugging_face(args: argparse.Namespace) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.eval()
    eos = model.generation_config.eos_token_id
    stops = [eos] if isinstance(eos, int) else list(eos or [])

    def batch(prompts: list[list[int]], new: int, stop: bool) -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=1 if stop else new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )
        rows = out[:, width:].tolist()
        ends = [[i + 1 for i, t in enumerate(row) if stop and t in stops][:1] for row in rows]
        return sum(end[0] if end else len(row) for end, row in zip(ends, rows, strict=True))

    def generate(prompts: list[list[int]], new: int, stop: bool) -> int:
        parts = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
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
        max_num_seqs=BATCH,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], new: int, stop: bool) -> int:
        law = SamplingParams(
            temperature=1.0, max_tokens=new, min_tokens=0 if stop else new, ignore_eos=not stop
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
    answers.write(json.dumps({"ready": time.perf_counter() - began}) + "\n")
    answers.flush()
    serve(generate, sys.stdin, answers)


if __name__ == "__main__":
    main()
