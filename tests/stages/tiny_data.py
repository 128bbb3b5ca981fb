"""Small data sets of the three stages, as files, for tests of whole stages on tiny random models."""

import json
import random
from pathlib import Path

WORDS = ["red", "big", "cat", "dog", "tree", "house", "runs", "sees", "finds", "the", "a", "two"]


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_all(folder: Path, count: int = 12, seed: int = 0) -> dict[str, str]:
    """sft, rankings (K of 2 to 5, ties), prompts and plain text; returns their paths by name."""
    rng = random.Random(seed)
    sft = [{"prompt": words(rng, 1, 3), "completion": words(rng, 1, 4)} for _ in range(count)]
    rankings = []
    for i in range(count):
        k = 2 + i % 4
        ranks = [rng.randint(1, 3) for _ in range(k)]
        ranks[0] = 0  # at least one pair that is not a tie
        answers = [words(rng, 1, 3) for _ in range(k)]
        rankings.append({"prompt": words(rng, 1, 3), "responses": answers, "ranks": ranks})
    prompts = [{"prompt": words(rng, 1, 3), "topic": rng.choice(WORDS)} for _ in range(count)]
    text = [{"text": words(rng, 30, 60)} for _ in range(count)]
    named = {"sft": sft, "rankings": rankings, "prompts": prompts, "text": text}
    return {name: write(folder / f"{name}.jsonl", rows) for name, rows in named.items()}
