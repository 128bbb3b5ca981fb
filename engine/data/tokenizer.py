"""A folder's tokenizer, through transformers, without loading half of it.

``AutoTokenizer`` makes the model's config object first, whose class imports torch's compiler, its distributed tensors
and sympy: 1.5 s of every start. It wants three names from it: the model's type, its folder, and the tokenizer's class
where ``tokenizer_config.json`` does not say it. So it gets a config that has the first two, where the third is said.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelError


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's (or hub id's) tokenizer, as ``AutoTokenizer.from_pretrained`` gives it; never remote code.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer  # takes a second to import

    try:
        folder = Path(folder).expanduser()
        config = _named_config(folder)
        return AutoTokenizer.from_pretrained(str(folder), config=config, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain ones for an odd file
        raise ModelError(
            f"{folder}: no tokenizer that transformers can read without remote code: {error}; "
            "save one there with tokenizer.save_pretrained(folder)"
        ) from error


def _named_config(folder: Path) -> Any | None:
    """A config of the model's type and place, or None where the model's own has to be looked at."""
    from transformers.configuration_utils import PreTrainedConfig

    try:
        model, tokenizer = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("config.json", "tokenizer_config.json")
        )
        known = model["model_type"], tokenizer["tokenizer_class"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not all(isinstance(name, str) for name in known) or "auto_map" in tokenizer:
        return None

    class NamedConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed
        model_type = known[0]

    return NamedConfig(name_or_path=str(folder))
