"""Which implementation of an op runs: C++ (on the CPU), Triton (on a GPU), or the torch definition.

An op has one schema, defined beside its contract with `define`. C++ registers its CPU kernels for that schema when
`engine._C` is loaded; on a GPU the dispatcher comes to `kernels/triton/<op>.py`, which is imported at the first launch
(Triton's import takes longer than a decode step). `choose` is the one place that decides:

- an explicit choice (`ENGINE_BACKEND`, or `with backend("reference")`) that cannot run is an error;
- without one, the device's kernels run where they can: float64 belongs to the definition, and where kernels are
  missing a warning says so once.

`ENGINE_BACKEND=triton` with tensors on the CPU runs the Triton kernels in Triton's interpreter: it proves their
numbers, slowly, and needs TRITON_INTERPRET=1.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _cuda

BACKENDS = ("cpp", "triton", "reference")
LIBRARY = torch.library.Library("engine", "FRAGMENT")
REGISTRY: dict[str, str] = {}  # op -> schema, for `python -m engine.ops`
ROOMS: dict[str, str] = {}  # op -> the stem of its files: gae_backward -> gae
CLASSES: dict[str, str] = {}  # op that keeps a state -> its class in torch.classes.engine

_forced: ContextVar[str | None] = ContextVar("engine_backend", default=None)


class BackendError(RuntimeError):
    """A backend that was asked for cannot run here."""


def define(schema: str, fake: Callable[..., object]) -> None:
    """Registers an op's schema, its fake (shapes and dtypes only) and its way to Triton; C++ adds the CPU kernel.

    `fake` is defined in the op's own file, whose stem is the op's room.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    torch.library.register_fake(f"engine::{name}", fake, lib=LIBRARY)
    REGISTRY[name] = schema
    ROOMS[name] = fake.__module__.rpartition(".")[2]
    if has_triton_kernel(ROOMS[name]):
        LIBRARY.impl(name, functools.partial(_run_on_gpu, name), "CUDA")  # AMD's too


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


def has_triton_kernel(room: str) -> bool:
    """Is there a kernels/triton/<room>.py?"""
    return (Path(__file__).parent / "triton" / f"{room}.py").is_file()


@functools.cache
def why_no_triton() -> str:
    """Empty where triton can be imported."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'rlhf-engine[gpu]'"
    return ""


def triton_kernels(room: str) -> ModuleType:
    """kernels/triton/<room>.py. Raises BackendError without triton."""
    if why_no_triton():
        raise BackendError(f"op {room!r}: its GPU kernel cannot run: {why_no_triton()}")
    return importlib.import_module(f"engine.kernels.triton.{room}")


def _run_triton(op: str, *arguments: Any) -> Any:
    return getattr(triton_kernels(ROOMS[op]), op)(*arguments)


def _run_on_gpu(op: str, *arguments: Any) -> Any:
    """CUDA C++ where it was built for this op and Triton was not asked for by name, else Triton."""
    if forced_backend() is None and _cuda.has_cuda_kernel(op) and _cuda.takes(*arguments):
        return _cuda.cuda_kernel(op)(*arguments)
    return _run_triton(op, *arguments)


class _Interpreted(TorchDispatchMode):
    """Takes the engine's ops to their Triton kernels where the dispatcher would go to C++: with tensors on the CPU.

    A mode lies below autograd, so gradients run through the same registrations as on a GPU.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "engine":
            return _run_triton(func._opname, *args)
        return func(*args, **(kwargs or {}))


def _interpret(op: str, *arguments: Any) -> Any:
    with _Interpreted():
        return getattr(torch.ops.engine, op)(*arguments)


def kernel(op: str) -> Callable[..., Any]:
    """`torch.ops.engine.<op>`, for a call that `choose` did not send to the definition, and for its backward."""
    if forced_backend() == "triton" and not torch.cuda.is_available():
        return functools.partial(_interpret, op)
    return getattr(torch.ops.engine, op)


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
    return forced_backend() in (None, "cpp") and extension() is not None


def _refusal_of_cpp(given: list[Tensor]) -> str:
    elsewhere = [t.device for t in given if t.device.type not in ("cpu", "meta")]
    if elsewhere:
        return f"device {elsewhere[0]} has no C++ kernel"
    return why_no_extension()


def _refusal_of_triton(op: str, given: list[Tensor]) -> str:
    if not has_triton_kernel(op):
        return "it has no Triton kernel"
    if why_no_triton():
        return why_no_triton()
    if any(t.device.type == "cpu" for t in given) and os.environ.get("TRITON_INTERPRET") != "1":
        return "its tensors are on the CPU, where Triton only interprets; set TRITON_INTERPRET=1 before the start"
    return ""


def choose(op: str, *tensors: Tensor | None) -> str:
    """The backend for these arguments: "cpp", "triton" or "reference"."""
    forced = forced_backend()
    if forced == "reference":
        return "reference"
    given = [t for t in tensors if t is not None]
    wanted = forced or ("triton" if any(t.is_cuda for t in given) else "cpp")
    if any(t.dtype == torch.float64 for t in given):
        refusal = "float64 runs on the reference backend only"
    else:
        refusal = _refusal_of_cpp(given) if wanted == "cpp" else _refusal_of_triton(op, given)
        if refusal and forced is None:
            _warn_once(refusal)
    if not refusal:
        return wanted
    if forced:
        raise BackendError(f"op {op!r}: backend {forced!r} was asked for and cannot run: {refusal}")
    return "reference"
