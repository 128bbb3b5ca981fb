"""A reward function for the runs of a soak. Being imported by the run, it also brings in what has to fail from inside.

The environment says what (`FAULT`, JSON): {"reward": "raises" | "hangs" | "nan", "call": n}, {"disk": n, "folder": f}
or {"point": name, "count": n}; without it nothing fails. So each start has the same config and the same command.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import time
from typing import Any

import bench.soak  # noqa: F401  the helpers of tests/ are found from here on

FAULT = "SOAK_FAULT"
_calls = itertools.count(1)


def judge(prompts: list[str], completions: list[str], topic: list[str], **columns: Any) -> list[float | None]:
    """Variety of letters, and a bonus for the topic; an empty answer is none of its business."""
    scores: list[float | None] = [
        len(set(text)) / 10 + 0.5 * (word[0] in text) if text else None
        for text, word in zip(completions, topic, strict=True)
    ]
    if next(_calls) == _fault.get("call"):
        return failing(str(_fault["reward"]), scores)
    return scores


def failing(kind: str, scores: list[float | None]) -> list[float | None]:
    """What a reward function does that has gone wrong."""
    if kind == "raises":
        raise KeyError("the judge has left")
    if kind == "hangs":
        while True:
            time.sleep(0.05)
    return [*scores[:-1], math.nan]


def arm(fault: dict[str, Any]) -> None:
    """Wraps the engine's functions in this process."""
    if "disk" in fault:
        from full_disk import FullDisk

        disk = FullDisk()
        disk.unannounced()
        disk.folder, disk.left = fault["folder"], fault["disk"]
    if "point" in fault:
        import killing

        killing.arm(fault["point"], killing.Die(fault["count"], int(signal.SIGKILL)))


_fault: dict[str, Any] = json.loads(os.environ.get(FAULT, "{}"))
arm(_fault)
