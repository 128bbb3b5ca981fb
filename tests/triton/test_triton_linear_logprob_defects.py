"""Seeded defects of linear_logprob's kernels: each is caught by the comparison with float64."""

from head_cases import blocks
from mutations import mutations
from test_triton_linear_logprob import check

from engine.kernels.triton import linear_logprob as kernels

DEFECTS = {
    "weight read behind its last row": ("column + n < V, H, BLOCK_M", "column + n < V + 1, H, BLOCK_M"),
    "columns behind the vocabulary counted": (
        'return tl.where((n < V)[None, :], z, float("-inf"))',
        "return z",
    ),
    "weight read behind its rows": ("w_mask = w_mask & ", "w_mask = "),
    "depth not masked": ("h_mask = h_mask & (k0 + k < H)[None, :]", "h_mask = h_mask"),
    "hidden states read behind their rows": (
        "h_mask, w_mask = row_inside[:, None],",
        "h_mask, w_mask = m[:, None] >= 0,",
    ),
    "temperature forgotten": ("z = sums * tl.cast(inverse_temperature, tl.float32)", "z = sums"),
    "bias not divided by the temperature": (
        "if bias is not None:\n        sums +=",
        "if bias is not None:\n        sums += (1 / inverse_temperature) *",
    ),
    "the target's neighbour": ("tl.where(here, y, 0)", "tl.where(here, y ^ 1, 0)"),
    "no target in the left half": ("target, left, column, V", "target - V, left, column, V"),
    "the right half's target one half too far": ("target, right, column + half", "target, right, column"),
    "the right half where the left one is": (
        "right = logits(right, bias, inverse_temperature, column + half, V)",
        "right = logits(right, bias, inverse_temperature, column, V)",
    ),
    "the left half's maximum for the right one": (
        "_joined(most, total, weighted, m_right, s_right, b_right)",
        "_joined(most, total, weighted, m_left, s_right, b_right)",
    ),
    "a half over the other": ("_store_statistics(out + N, plane", "_store_statistics(out, plane"),
    "maximum not subtracted": ("e = tl.exp(below)", "e = tl.exp(z)"),
    "-inf times 0 in a tile": (
        "b = tl.sum(tl.where(e == 0.0, 0.0, e * below), 1)",
        "b = tl.sum(e * below, 1)",
    ),
    "a tile of -inf": (
        'below = z - tl.where(m == float("-inf"), 0.0, m)[:, None]',
        "below = z - m[:, None]",
    ),
    "planes of statistics swapped": (
        "tl.store(out + plane, s, mask=inside)\n    tl.store(out + 2 * plane, b",
        "tl.store(out + 2 * plane, s, mask=inside)\n    tl.store(out + plane, b",
    ),
    "merge starts from 0": (
        'most = tl.full((BLOCK_R,), float("-inf"), tl.float32)',
        "most = tl.zeros((BLOCK_R,), tl.float32)",
    ),
    "sum not rescaled": ("total = scale * total", "total = total"),
    "weighted sum not shifted": (
        "scale * (weighted + total * (most - shift))",
        "scale * weighted",
    ),
    "a tile's weighted sum not shifted": ("scales * (b + s * lower)", "scales * b"),
    "halves behind the last": (
        "mask = (t < TILES)[:, None] & inside[None, :]",
        "mask = (t < TILES + 1)[:, None] & inside[None, :]",
    ),
    "maximum of the last tiles alone": (
        "higher = tl.maximum(most, tl.max(m, 0))",
        "higher = tl.max(m, 0)",
    ),
    "first tiles without mass": (
        "weighted = tl.where(scale == 0.0, 0.0, scale * (weighted + total * (most - shift)))",
        "weighted = scale * (weighted + total * (most - shift))",
    ),
    "a piece's sum not rescaled": ("scale * total + scales * s", "total + scales * s"),
    "a piece's weighted sum not shifted": (
        "scale * (weighted + total * before)",
        "scale * weighted",
    ),
    "a joined tile's weighted sum not shifted": ("scales * (s * lower + b)", "scales * b"),
    "the last tile's maximum for a piece": ("higher = tl.maximum(most, m)", "higher = m"),
    "a piece's first tiles without mass": (
        "weighted = tl.where(scale == 0.0, 0.0, scale * (weighted + total * before))",
        "weighted = scale * (weighted + total * before)",
    ),
    "pieces that share tiles": ("(piece * PIECE + tile) * BLOCK_N", "(piece + tile) * BLOCK_N"),
    "merged pieces that share tiles": (
        "t = t0 + tl.arange(0, BLOCK_T) * JOIN + i",
        "t = t0 + tl.arange(0, BLOCK_T) + i",
    ),
    "pieces merged twice": ("range(0, TILES, BLOCK_T * JOIN)", "range(0, TILES, BLOCK_T)"),
    "sign of the entropy": (
        "tl.store(entropy + row, log_total - weighted / total",
        "tl.store(entropy + row, log_total + weighted / total",
    ),
    "a gradient's sum of logs forgotten": (
        "log_p = log_p - tl.load(log_sum + m, mask=row_inside, other=0.0)[:, None]",
        "log_p = log_p",
    ),
    "a gradient at the token after": (
        "tl.where(y[:, None] == n[None, :], 1.0, 0.0)",
        "tl.where(y[:, None] + 1 == n[None, :], 1.0, 0.0)",
    ),
    "sign of the entropy's gradient": ("slope -= g_entropy", "slope += g_entropy"),
    "entropy's gradient not centred": ("p * (log_p + mean)", "p * log_p"),
    "a gradient where p is 0": (
        "tl.where(p == 0.0, 0.0, p * (log_p + mean))",
        "p * (log_p + mean)",
    ),
    "a gradient without temperature": (
        "slope * tl.cast(inverse_temperature, tl.float32), 0.0",
        "slope, 0.0",
    ),
    "rows behind the last in the bias": (
        "slope = tl.where(row_inside[:, None], slope * tl.cast(inverse_temperature, tl.float32), 0.0)",
        "slope = slope * tl.cast(inverse_temperature, tl.float32)",
    ),
    "slabs overwrite each other": (
        "add_product(dh, dz[:, :used], dense[columns])",
        "product(dz[:, :used], dense[columns], out=dh)",
    ),
    "the right half's gradient over the left one's": ("at + half, right_sums", "at, right_sums"),
    "the right half's gradient at the left one's target": ("column + half, at + half", "column, at + half"),
    "the right half's bias over the left one's": ("right_sums = at_sums + half", "right_sums = at_sums"),
    "the first slab again": ("dense[columns])", "dense[:used])"),
    "blocks of rows overwrite each other": (
        "at_sums = bias_sums + block * WIDTH + slab_column",
        "at_sums = bias_sums + slab_column",
    ),
}


@mutations(kernels, DEFECTS)
def test_defects_are_caught():
    """Pieces of two tiles in pairs, joined by their programs and where they are merged: far below 0 with a tail of
    -inf, far above with -inf in the first pair, plain."""
    for many in (1, 100):
        with blocks(n=16, piece=2, many=many, slab=64):
            check(17, 75, 21, temperature=0.7, shift=-300.0, dead=slice(30, 75))
            check(5, 75, 21, temperature=0.7, shift=300.0, dead=slice(0, 66))
            check(5, 75, 21, temperature=0.7, rise=3.0)
