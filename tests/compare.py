"""The one tolerance rule (docs/design.md section 5).

Against a float64 truth T, with R the plain torch result in the storage dtype, every element satisfies
|ours - T| <= 2 |R - T| + floor. The floor covers elements where torch happens to be exact: `units` roundings of the
storage dtype at the size of the largest finite |T|. Positions of inf and nan agree.
"""

import torch
from torch import Tensor


def worst(difference: Tensor, bound: Tensor) -> tuple[int, ...]:
    flat = int((difference - bound).flatten().argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), difference.shape))


def assert_close(
    ours: Tensor, reference: Tensor, truth: Tensor, name: str = "result", units: float = 2.0
) -> None:
    """ours and reference in any dtype, truth in float64, all of one shape."""
    assert ours.shape == truth.shape, (
        f"{name}: shape {tuple(ours.shape)}, want {tuple(truth.shape)}"
    )
    assert truth.dtype == torch.float64, f"{name}: truth is {truth.dtype}, want float64"
    if truth.numel() == 0:
        return
    storage = reference.dtype
    o, r = ours.detach().double(), reference.detach().double()
    t = truth.detach()
    for kind, positions in (("nan", torch.isnan), ("inf", torch.isinf)):
        differ = positions(o) != positions(t)
        assert not differ.any(), (
            f"{name}: {kind} at {differ.nonzero()[0].tolist()} on one side only"
        )
    assert torch.equal(o[torch.isinf(t)], t[torch.isinf(t)]), f"{name}: infinities of other sign"
    finite = torch.isfinite(t)
    if not finite.any():
        return
    scale = t[finite].abs().max()
    floor = units * torch.finfo(storage).eps * float(scale) + torch.finfo(storage).tiny
    difference = torch.where(finite, (o - t).abs(), 0.0)
    bound = 2 * torch.where(finite & torch.isfinite(r), (r - t).abs(), 0.0) + floor
    if (difference > bound).any():
        at = worst(difference, bound)
        raise AssertionError(
            f"{name}{list(at)}: ours {o[at]:.9g}, torch {storage} {r[at]:.9g}, truth {t[at]:.9g}; "
            f"|ours - truth| = {difference[at]:.3g} > {bound[at]:.3g} (floor {floor:.3g})"
        )
