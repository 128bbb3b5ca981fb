"""Where a model computes: the choice of a device, and copies to it for which nobody waits.

Batches, offsets and random numbers are made on the host and copied once, where a model takes them over. Reading a
value back waits for everything that was launched before it, so results stay on the device until a step or a phase is
done.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels._backend import forced_backend

NAMES = ("auto", "cpu", "cuda")
HOST = torch.device("cpu")


def choose_device(name: str = "auto") -> torch.device:
    """The device of a name; "cuda" is AMD's too.

    auto: what ENGINE_DEVICE says, else the GPU where torch sees one and no backend was asked for that runs on the CPU
    only, else the CPU.

    Raises:
        ConfigError: another name, or a GPU where torch sees none.
    """
    if name == "auto":
        name = os.environ.get("ENGINE_DEVICE", "auto")
    if name == "auto":
        usable = torch.cuda.is_available() and forced_backend() != "cpp"
        name = "cuda" if usable else "cpu"
    if name not in NAMES:
        raise ConfigError(f"device: got {name!r}, want one of {', '.join(NAMES)}")
    if name == "cpu":
        return HOST
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device: got 'cuda', but torch {torch.__version__} sees no GPU; install a build of torch for"
            " this GPU and its driver, or use --device cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` where `device` computes with it, itself if it is there: never waits for the device."""
    if device.type == "cpu" or x.device.type != "cpu":
        return x if x.device.type == device.type else x.to(device)
    # from pinned memory the copy is queued; torch keeps that memory until the copy is done
    source = x.pin_memory() if device.type == "cuda" else x
    return source.to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """`x` in the host's memory, itself if it is there: waits for the device."""
    return x.cpu()


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given: where a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
