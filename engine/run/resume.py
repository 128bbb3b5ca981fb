"""Whether a checkpoint and a config are of one run: what differs, key by key, and what of that changes the result."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, ConfigError

# Keys that change no weight of a run: places, records, and how much is computed at once (threads, processes and cuts
# move the last bits of a sum on some machines, no sample). Data sets are compared by what is in them, not by where they
# lie. A choice among checkpoints comes after training, often of a finished run, since its model makes the reward model.
WITHOUT_EFFECT = frozenset(
    {"output_dir", "resume_from_checkpoint", "allow_config_change", "progress",
     "threads", "replicate",
     "micro_batch_tokens", "activation_checkpointing", "peak_memory_gb", "max_active", "kv_cache_gb",
     "save_steps", "save_total_limit", "save_samples",
     "select_by_reward_model", "select_num_prompts", "select_response_length",
     "logging_steps", "eval_steps", "max_skipped_steps", "reward_timeout_s",
     "data_dir", "dataset_name", "dataset_config", "dataset_train_split", "dataset_mixture",
     "eval_dataset_name", "dataset_test_split", "ptx_dataset_name", "ptx_dataset_split", "ptx_dataset_config",
     "eval_ptx_dataset_name", "eval_ptx_dataset_split",
     "demonstrations_name", "demonstrations_split", "demonstrations_config"}
)  # fmt: skip
BLOCK, BLOCKS = 4096, 16  # of a weight file: training changes every block


def digest(parts: Iterable[str | bytes]) -> str:
    """sha256 of the parts in order, twelve digits of it."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:12]


def rows_identity(rows: Sequence[Any]) -> str:
    """What a data set is, in words: number of rows and a digest of their contents in order."""
    return f"{len(rows)} rows ({digest(repr(row) for row in rows)})"


def folder_identity(folder: Path) -> str:
    """What a model folder is: a digest of its JSON files, and of size and sixteen blocks of each weight file."""
    parts: list[str | bytes] = []
    for path in sorted(folder.iterdir()):
        if path.name in ("config.json", "generation_config.json", "tokenizer.json"):
            parts += [path.name, path.read_bytes()]
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            parts += [path.name, str(size)]
            with path.open("rb") as file:
                for number in range(BLOCKS):
                    file.seek(max(size - BLOCK, 0) * number // (BLOCKS - 1))
                    parts.append(file.read(BLOCK))
    return digest(parts)


def with_effect(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config, or the models of its keys, that change the result: what a checkpoint remembers."""
    return {key: value for key, value in config.items() if key.removeprefix("model.") not in WITHOUT_EFFECT}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Key -> "was x, is y" of every key that differs; null is as absent: off, as before there was such a key."""
    wanted = json.loads(json.dumps(dict(now)))
    out = {}
    for key in sorted(saved.keys() | wanted.keys()):
        if saved.get(key) == wanted.get(key):
            continue
        was, now_is = (json.dumps(d[key]) if key in d else "absent" for d in (saved, wanted))
        out[key] = f"was {was}, is {now_is}"
    return out


def check_same_run(
    where: Path,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    allowed: Sequence[str],
) -> list[str]:
    """The differences that `allowed` lets pass, as lines.

    Raises:
        CheckpointError: a difference that is not allowed (every one is listed), or a state without what to compare.
        ConfigError: an allowed key that is none.
    """
    saved = {name: state.get(name) for name in ("config", "inputs")}
    if not all(isinstance(value, dict) for value in saved.values()):
        raise CheckpointError(
            f"{where}: does not say which config and inputs it is of; it was written by another version of the engine"
        )
    then = {name: with_effect(value or {}) for name, value in saved.items()}
    known_inputs = sorted(then["inputs"].keys() | inputs.keys())
    known = sorted({*then["config"], *config, *known_inputs})
    for key in allowed:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"allow_config_change: got {key!r}, want keys of the config or {', '.join(known_inputs)}{hint}"
            )
    found = differences(then["config"], with_effect(config))
    found |= differences(then["inputs"], with_effect(inputs))
    refused = {key: text for key, text in found.items() if key not in allowed}
    if refused:
        lines = "\n".join(f"  {key}: {text}" for key, text in refused.items())
        flags = " ".join(f"--allow_config_change {key}" for key in refused)
        raise CheckpointError(
            f"{where}: going on with this config would give another result than the run that it is of:\n{lines}\n"
            f"give the old values, start in another output_dir, or go on all the same with {flags}"
        )
    return [f"changed since the checkpoint, as allowed: {key}: {found[key]}" for key in found]
