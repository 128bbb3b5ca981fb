"""What the head's ops share beside their kernels: table rows, rows of a batch at once, the library's products."""

import torch
from torch import Tensor

from ._launch import Config, config

# Rows at once, at least: their hidden states stay in the second cache while the vocabulary goes by.
ROWS, HIDDEN_BYTES = 4096, 16 << 20


def check_vocabulary(dense: Tensor) -> None:
    if dense.shape[0] == 0:
        raise ValueError("weight: got no rows, want a vocabulary of one token or more")


def table(name: str, weight: Tensor) -> Config:
    """The row for a vocabulary, in float32's own table where products cannot use tensor cores."""
    suffix = "_float32" if weight.dtype == torch.float32 else ""
    return config(name + suffix, weight.shape[0], weight.device)


def without_pieces(tuned: Config) -> tuple[Config, int, int]:
    """What the kernels are given; the tiles of a piece; and the programs that there must be at least to join them."""
    blocks = dict(tuned.blocks)
    piece, many = blocks.pop("PIECE"), blocks.pop("MANY")
    return Config(blocks, tuned.num_warps, tuned.num_stages), piece, many


def rows_at_once(hidden: Tensor) -> int:
    """ROWS, or up to four times as many while their hidden states are within HIDDEN_BYTES."""
    rows = HIDDEN_BYTES // max(1, hidden.shape[1] * hidden.element_size()) // ROWS * ROWS
    return max(ROWS, min(rows, 4 * ROWS))


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, summed and given in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32 and by the product itself, so that the sum passes memory once."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), out=total)
