"""Models from Hugging Face folders, and back.

A folder is ``config.json``, ``model.safetensors`` (or shards with an index) and, often,
``generation_config.json``. Nothing is unpickled and no code of a folder is run. A policy is an
``AutoModelForCausalLM``, a scalar model an ``AutoModelForSequenceClassification`` with one label.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor

from engine.errors import ModelError
from engine.kernels._backend import kernels_usable
from engine.run.device import HOST, choose_device, to_host
from engine.run.distributed import ALONE, Ranks

from .architectures import Architecture, read_architecture
from .folder import match, open_folder, read_json
from .heads import ScalarModel, choose_pad_token, new_score_weight
from .names import NAMINGS, Head, Spec, parameter_specs, place_of
from .storage import Weights
from .transformer import AnyModel, Model, clone

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SCORE_CONSTANT = "engine_score_constant"
GENERATION_CONFIG = "generation_config.json"


def resolve_dtype(name: str, device: torch.device = HOST) -> torch.dtype:
    """Storage dtype of a name: "bfloat16", "float32", or "auto".

    auto: bfloat16 on a GPU, and where our C++ kernels do the products (float32 arithmetic on half
    the bytes); on the torch definitions bfloat16 only on a CPU with instructions for it, since
    torch's products are slow without.

    Raises:
        ModelError: another name.
    """
    if name == "auto" and device.type != "cpu":
        return torch.bfloat16
    if name == "auto":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if kernels_usable() or native else torch.float32
    if name not in DTYPES:
        raise ModelError(f"dtype: got {name!r}, want auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def resolve_folder(folder: str | Path) -> Path:
    """A local folder as it is; else the snapshot of a hub id, safetensors and JSON of its top level
    only.

    Raises:
        ModelError: neither a folder nor an id that the hub has.
    """
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    pieces = str(folder).split("/")
    if path.exists() or len(pieces) > 2 or not all(pieces):
        raise ModelError(f"model: got {str(folder)!r}, want a folder that exists, or a hub id")
    try:
        patterns = ["*.safetensors", "*.json"]
        snapshot = huggingface_hub.snapshot_download(
            str(folder), allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except (OSError, ValueError) as error:  # what the hub's client and its HTTP errors derive from
        raise ModelError(
            f"model: got {str(folder)!r}, which is no folder here, and the hub does not give it:"
            f" {error}"
        ) from error
    return Path(snapshot)


def load_policy(
    folder: str | Path,
    dtype: str = "auto",
    trainable: bool = False,
    device: str = "auto",
    ranks: Ranks = ALONE,
) -> Model:
    """The language model of a folder or hub id.

    Args:
        folder: a Hugging Face folder, or the id of one on the hub.
        dtype: storage of the compute copy: "auto", "bfloat16" or "float32".
        trainable: keep float32 masters.
        device: "cpu", "cuda", or "auto": the GPU where there is one.
        ranks: the processes that train it together: each keeps its part of the masters. A frozen model is whole.

    Raises:
        ModelError: a setting that is not supported, or tensors that do not fit it, each named.
        ConfigError: a device that is not there.
    """
    path = resolve_folder(folder)
    config, a, weights = _load(path, dtype, trainable, device, ranks, "lm_head")
    return Model(a, weights, config, _generation_config(path))


def load_scalar(
    folder: str | Path,
    dtype: str = "auto",
    trainable: bool = False,
    device: str = "auto",
    ranks: Ranks = ALONE,
) -> ScalarModel:
    """The scalar model of a folder; arguments and errors as ``load_policy``."""
    path = resolve_folder(folder)
    config, a, weights = _load(path, dtype, trainable, device, ranks, "score")
    constant = config.get(SCORE_CONSTANT, 0.0)
    if isinstance(constant, bool) or not isinstance(constant, int | float):
        raise ModelError(f"{path}/config.json: {SCORE_CONSTANT}: got {constant!r}, want a number")
    return ScalarModel(a, weights, config, _generation_config(path), constant=float(constant))


def scalar_from_policy(
    folder: str | Path,
    seed: int,
    dtype: str = "auto",
    trainable: bool = True,
    device: str = "auto",
    ranks: Ranks = ALONE,
) -> ScalarModel:
    """A scalar model with the trunk of a language model and a new head; arguments and errors as
    ``load_policy``.

    Args:
        seed: of the head's numbers.
    """
    path = resolve_folder(folder)
    config, a, weights = _load(path, dtype, trainable, device, ranks, "score", seed)
    return ScalarModel(a, weights, config, _generation_config(path))


def _load(
    path: Path,
    dtype: str,
    trainable: bool,
    device: str,
    ranks: Ranks,
    head: Head,
    head_seed: int | None = None,
) -> tuple[dict[str, Any], Architecture, Weights]:
    place_of_weights = choose_device(device)
    config = read_json(path / "config.json")
    a = read_architecture(config)
    specs = parameter_specs(a, head)
    with open_folder(path) as stored:
        found = match(specs, a, stored, new_head=head_seed is not None)

        def read(name: str) -> Tensor:
            if name not in found:  # the new head
                return new_score_weight(a.hidden_size, int(head_seed or 0))
            place, file_name = found[name]
            return place.read(stored.read(file_name), a.head_dim)

        storage = resolve_dtype(dtype, place_of_weights)
        if trainable:
            return config, a, trained_weights(specs, read, storage, place_of_weights, ranks)
        return config, a, Weights(specs, read, storage, False, place_of_weights)


def trained_weights(
    specs: Mapping[str, Spec],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
) -> Weights:
    """Weights with masters: of one process, or cut over the ranks."""
    if ranks.mesh is None:
        return Weights(specs, read, dtype, True, device)
    from .sharded import ShardedWeights  # FSDP's import, which one process does without

    return ShardedWeights(specs, read, dtype, ranks.mesh, device)


def trained_copy(model: AnyModel, ranks: Ranks) -> AnyModel:
    """A trainable model that starts from a frozen or trained one of one process."""
    if ranks.mesh is None:
        return clone(model, trainable=True)
    own = model.weights
    return replace(model, weights=trained_weights(own.specs, own.stored, own.dtype, own.device, ranks))


def _generation_config(path: Path) -> dict[str, Any] | None:
    file = path / GENERATION_CONFIG
    return read_json(file) if file.is_file() else None


def save_policy(
    model: Model, folder: str | Path, tokenizer: Any | None = None, max_shard_size: str = "5GB"
) -> None:
    """Writes a folder that ``AutoModelForCausalLM`` and ``load_policy`` read, in the storage dtype.

    Args:
        tokenizer: a transformers tokenizer to save beside it.
        max_shard_size: weights above this are cut into several files with an index.

    Raises:
        StaleWeightsError: masters that were changed without ``refresh``.
    """
    if isinstance(model, ScalarModel):
        raise ModelError("save_policy: got a scalar model; use save_scalar")
    causal_class = NAMINGS[model.architecture.family].causal_class
    _write(model, Path(folder), {"architectures": [causal_class]}, max_shard_size, _ends(model, tokenizer))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def save_scalar(
    model: ScalarModel,
    folder: str | Path,
    tokenizer: Any | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Writes a folder that ``AutoModelForSequenceClassification`` and ``load_scalar`` read.

    transformers gives the score without the constant, which is ``engine_score_constant`` in
    ``config.json``. The pad token (see ``choose_pad_token``) is written to the config and to the
    saved tokenizer; where a model has no token to pad with, a warning says that transformers scores
    one sequence at a time.
    """
    pad = choose_pad_token(model.config, tokenizer, _ends(model, tokenizer))
    if pad is None:
        warnings.warn(
            f"{folder}: no token but the end-of-sequence token could be the pad token; transformers"
            " will score one sequence at a time (this engine needs no pad token)",
            stacklevel=2,
        )
    changes = {
        "architectures": [NAMINGS[model.architecture.family].scalar_class],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "pad_token_id": pad,
        SCORE_CONSTANT: model.constant,
    }
    _write(model, Path(folder), changes, max_shard_size, _ends(model, tokenizer))
    if tokenizer is not None:
        saved = tokenizer
        if pad is not None and pad != tokenizer.pad_token_id:
            saved = copy.deepcopy(tokenizer)
            saved.pad_token = tokenizer.convert_ids_to_tokens(pad)
        saved.save_pretrained(str(folder))


def _ends(model: Model, tokenizer: Any | None) -> frozenset[int]:
    """Every token that the model or its tokenizer calls the end of a sequence."""
    own = None if tokenizer is None else tokenizer.eos_token_id
    return model.eos_token_ids | (frozenset() if own is None else {own})


def _ending_config(model: Model, ends: frozenset[int]) -> Mapping[str, Any] | None:
    """generation_config.json with every end: answers were sampled up to the tokenizer's, which the base may not name.

    transformers takes the ends of config.json only where there is no generation config; None: there was none, and it
    says them all.
    """
    given = model.generation_config
    source = model.config if given is None else given
    stored = source.get("eos_token_id")
    known = stored if isinstance(stored, list) else [] if stored is None else [stored]
    if ends <= set(known):
        return given
    if given is None:
        given = {name: source[name] for name in ("bos_token_id", "pad_token_id") if source.get(name) is not None}
    changed = {**given, "eos_token_id": [*known, *sorted(ends - set(known))] if len(ends) > 1 else min(ends)}
    changed.pop("_from_model_config", None)  # it says that config.json has the same
    return changed


def _write(
    model: Model, folder: Path, changes: Mapping[str, Any], max_shard_size: str, ends: frozenset[int]
) -> None:
    model.weights.check()
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(model.dtype).removeprefix("torch.")
    # the older spelling is kept up to date where a config has it
    spellings = ("dtype", "torch_dtype") if "torch_dtype" in model.config else ("dtype",)
    dtypes = dict.fromkeys(spellings, dtype)
    _write_json(folder / "config.json", {**model.config, **dtypes, **changes})
    generation = _ending_config(model, ends)
    if generation is not None:  # of a scalar model too: it names the ends
        _write_json(folder / GENERATION_CONFIG, generation)
    huggingface_hub.save_torch_state_dict(
        _file_tensors(model), folder, max_shard_size=max_shard_size, metadata={"format": "pt"}
    )


def _file_tensors(model: Model) -> dict[str, Tensor]:
    """The tensors of the file by stored name, fused and turned as the family has them."""
    a = model.architecture
    pieces: dict[str, list[str]] = {}
    for name in model.weights.specs:
        pieces.setdefault(place_of(a.family, name)[1], []).append(name)
    stored: Callable[[str], Tensor] = lambda name: to_host(model.weights.stored(name))  # noqa: E731
    return {
        file_name: place_of(a.family, names[0])[0].write([stored(n) for n in names], a.head_dim)
        for file_name, names in pieces.items()
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(dict(value), indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
