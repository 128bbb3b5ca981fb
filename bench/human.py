"""`python -m bench.human --data_dir DIR --model M --output_dir RUN`: the preset `human`, SFT to PPO.

PPO runs with and without the pretraining term; what came out goes to bench/results/human-<class>.json.

Every stage goes on where it was when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine import ops
from engine.run.session import versions

STAGES = ("sft", "rm", "ppo", "ppo-without-ptx")


def command(stage: str, args: argparse.Namespace) -> list[str]:
    out = Path(args.output_dir)
    model = args.model if stage == "sft" else str(out / "sft")
    words = [
        sys.executable, "-m", "engine.train", "--stage", stage.split("-")[0], "--preset", "human",
        "--data_dir", args.data_dir, "--model_name_or_path", model, "--output_dir", str(out / stage),
        "--resume_from_checkpoint", "true",
    ]  # fmt: skip
    if stage.startswith("ppo"):
        words += ["--reward_model_path", str(out / "rm")]
    if stage == "ppo-without-ptx":
        words += ["--ptx_coef", "0"]
    return words


def run_stage(stage: str, args: argparse.Namespace) -> None:
    folder = Path(args.output_dir) / stage
    if (folder / "seconds.json").exists():
        return
    began = time.perf_counter()
    subprocess.run(command(stage, args), check=True)
    seconds = {"seconds": round(time.perf_counter() - began, 1)}
    (folder / "seconds.json").write_text(json.dumps(seconds) + "\n")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return [row for row in rows if key in row][-1]


def ranking_result(folder: Path) -> dict[str, Any]:
    """Validation accuracy with its standard error: in all, by source, by K."""
    row = last(records(folder), "eval/accuracy")
    out: dict[str, Any] = {
        name: row[f"eval/{name}"]
        for name in ("accuracy", "accuracy_stderr", "log_loss", "num_pairs")
    }
    for name, value in row.items():
        for part in ("by_source", "by_k"):
            if name.startswith(f"eval/{part}/"):
                key, _, metric = name.removeprefix(f"eval/{part}/").rpartition("/")
                out.setdefault(part, {}).setdefault(key, {})[metric] = value
    return out


def ppo_result(folder: Path) -> dict[str, Any]:
    """Validation over training, and the first and last iterations."""
    rows = records(folder)
    names = ("eval/score", "eval/kl", "eval/ptx_perplexity", "eval/eos_rate", "eval/mean_length")
    course = [
        {"iteration": row["step"], **{n.removeprefix("eval/"): row[n] for n in names}}
        for row in rows
        if "eval/score" in row
    ]
    steps = [row for row in rows if "objective/kl" in row]
    keys = ("objective/scores", "objective/raw_scores", "objective/kl", "objective/rlhf_reward",
            "val/explained_variance",
            "policy/grad_norm_ppo", "policy/grad_norm_ptx", "parity/max_abs_logprob_diff",
            "perf/rollout_tokens_per_s", "perf/update_tokens_per_s", "perf/peak_memory_gb",
            "timing/rollout", "timing/score", "timing/update", "timing/iteration")  # fmt: skip
    first, final = steps[0], steps[-1]
    return {
        "validation": course,
        "first_iteration": {k: first[k] for k in keys if k in first},
        "last_iteration": {k: final[k] for k in keys if k in final},
        "max_first_minibatch_ratio_deviation": max(
            row["parity/first_minibatch_ratio_deviation"] for row in steps
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--output_dir", default="runs/human")
    parser.add_argument("--results", default="bench/results")
    args = parser.parse_args()
    for stage in STAGES:
        run_stage(stage, args)
    out = Path(args.output_dir)
    sft = [row["eval/loss"] for row in records(out / "sft") if "eval/loss" in row]
    result = {
        "versions": versions(),
        "seconds": {
            s: json.loads((out / s / "seconds.json").read_text())["seconds"] for s in STAGES
        },
        "sft_validation_loss": sft,
        "reward_model": ranking_result(out / "rm"),
        "ppo_ptx": ppo_result(out / "ppo"),
        "ppo": ppo_result(out / "ppo-without-ptx"),
    }
    path = Path(args.results) / f"human-{ops.cpu_class()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
