"""Checks that every backend of an op makes at its border: ValueError with what was given and what is wanted."""

import torch
from torch import Tensor


def check_vector(name: str, x: Tensor, size: int, dtype: torch.dtype) -> None:
    if x.shape != (size,):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want ({size},)")
    if x.dtype != dtype:
        raise ValueError(f"{name}: got dtype {x.dtype}, want {dtype}")


def check_offsets(name: str, cu: Tensor, total: int) -> None:
    """int32 (S+1,), cu[0] = 0, never decreasing, cu[-1] = total.

    The values are checked on the CPU only: on a GPU reading them would wait for all that was launched before.
    """
    if cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() < 1:
        raise ValueError(
            f"{name}: got {cu.dtype} of shape {tuple(cu.shape)}, want int32 of shape (S+1,); "
            "lengths -> torch.cumsum(lengths, 0) with a leading 0"
        )
    if cu.device.type != "cpu":
        return
    if int(cu[0]) != 0 or int(cu[-1]) != total or bool((cu[1:] < cu[:-1]).any()):
        raise ValueError(f"{name}: got {cu.tolist()[:16]}, want 0 ... {total}, never decreasing")
