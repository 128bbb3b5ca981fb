"""Which implementation of an op runs: the C++ extension or the torch definition.

An op has one schema, defined beside its contract with `define`; C++ registers its CPU kernels for that schema when
`engine._C` is loaded. `choose` is the one place that decides:

- an explicit choice (`ENGINE_BACKEND`, or `with backend("reference")`) that cannot run is an error;
- without one, C++ runs where it can: float64 belongs to the definition, and where the extension is missing a warning
  says so once.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("cpp", "reference")
LIBRARY = torch.library.Library("engine", "FRAGMENT")
REGISTRY: dict[str, str] = {}  # op -> schema, for `python -m engine.ops`
CLASSES: dict[str, str] = {}  # op that keeps a state -> its class in torch.classes.engine

_forced: ContextVar[str | None] = ContextVar("engine_backend", default=None)


class BackendError(RuntimeError):
    """A backend that was asked for cannot run here."""


def define(schema: str, fake: Callable[..., object]) -> None:
    """Registers an op's schema and its fake (shapes and dtypes only); C++ adds the CPU kernel."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    torch.library.register_fake(f"engine::{name}", fake, lib=LIBRARY)
    REGISTRY[name] = schema


def define_class(op: str, name: str) -> None:
    """Says that C++ registers a class for an op that keeps a state between its calls: no schema, no definition."""
    CLASSES[op] = name


def has_cpu_kernel(op: str) -> bool:
    """Has the loaded extension registered the op's CPU kernel?"""
    if op not in CLASSES:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"engine::{op}", "CPU")
    try:
        torch._C._get_custom_class_python_wrapper("engine", CLASSES[op])
    except RuntimeError:
        return False
    return True


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or why there is none. ENGINE_CPU_CLASS picks a lower class of CPU than the machine's."""
    try:
        module = importlib.import_module("engine._C")
    except ImportError as error:
        return None, (
            f"the C++ extension is not built ({error}); with a C++ compiler, reinstall with"
            " pip install --no-build-isolation -e ."
        )
    wanted = os.environ.get("ENGINE_CPU_CLASS")
    if wanted:
        module.set_cpu_class(wanted)
    return module, ""


def extension() -> ModuleType | None:
    return _load()[0]


def why_no_extension() -> str:
    return _load()[1]


def cpu_class() -> str:
    """The class of CPU kernels in use: amx, avx512, avx2, plain; `reference` without the extension."""
    module = extension()
    return module.cpu_class() if module else "reference"


def forced_backend() -> str | None:
    name = _forced.get() or os.environ.get("ENGINE_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise BackendError(f"ENGINE_BACKEND: got {name!r}, want one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside the block every op runs on `name`, or fails saying why it cannot."""
    if name not in BACKENDS:
        raise BackendError(f"backend: got {name!r}, want one of {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"engine runs on the torch definitions, which are slower: {reason}", stacklevel=3)


def kernels_usable() -> bool:
    """Do the C++ kernels do the products in this context? (Decides storage: docs/design.md section 6.)"""
    return forced_backend() != "reference" and extension() is not None


def choose(op: str, *tensors: Tensor | None) -> str:
    """The backend for these arguments: "cpp" or "reference"."""
    forced = forced_backend()
    if forced == "reference":
        return "reference"
    given = [t for t in tensors if t is not None]
    refusal = ""
    if any(t.dtype == torch.float64 for t in given):
        refusal = "float64 runs on the reference backend only"
    elif any(t.device.type not in ("cpu", "meta") for t in given):
        refusal = (
            f"device {next(t.device for t in given if t.device.type != 'cpu')} has no C++ kernel"
        )
    elif extension() is None:
        refusal = why_no_extension()
        if forced is None:
            _warn_once(refusal)
    if not refusal:
        return "cpp"
    if forced == "cpp":
        raise BackendError(f"op {op!r}: backend 'cpp' was asked for and cannot run: {refusal}")
    return "reference"
