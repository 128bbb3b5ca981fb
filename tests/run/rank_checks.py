"""What ranks check together, started by tests/several_processes.py: sharded weights against those of one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.data.pack import pack_sequences, predictions
from engine.errors import ConfigError, DataError, EngineError, ModelError
from engine.model import heads, transformer
from engine.model.checkpointing import MODES, Checkpointing
from engine.model.sharded import _Part
from engine.model.weights import load_policy, scalar_from_policy
from engine.run.distributed import ALONE, Ranks, join, local
from engine.run.ema import EMA
from engine.run.optim import Optimizer, OptimizerConfig, global_norm

STEPS = 2


def sequences(ranks: Ranks, step: int) -> list[list[int]]:
    """One a rank, of its own length."""
    return [[(r * 7 + i * 3 + step) % 60 for i in range(9 + r)] for r in range(ranks.size)]


def backward(
    model: Any, sequence: list[int], weight: float, mode: Checkpointing = "selective"
) -> torch.Tensor:
    batch = pack_sequences([sequence])
    shift = predictions(batch)
    hidden = transformer.forward(model, batch, rows=shift.rows, checkpointing=mode)
    logprob, _ = transformer.logprobs(model, hidden, shift.targets, 1.0)
    (-logprob.sum() * weight).backward()
    return logprob.detach()


def distance(sharded: Any, one: torch.Tensor) -> float:
    """Largest difference over the largest number."""
    return float((sharded.full_tensor() - one).abs().max() / one.abs().max().clamp(min=1e-30))


def optimizer(model: Any) -> tuple[Optimizer, EMA]:
    average = EMA(model.parameters(), 0.9)
    return Optimizer(model.parameters(), OptimizerConfig(weight_decay=0.1), model.weights, average), average


def weights(folder: str, dtype: str, replicate: int) -> None:
    """Log-probs to the bit, gradients, steps and averages to rounding, in storage bfloat16 too."""
    torch.set_num_threads(1)
    ranks = join("cpu", replicate)
    sharded = load_policy(Path(folder), dtype, True, "cpu", ranks)
    one = load_policy(Path(folder), dtype, True, "cpu")
    (ours, our_average), (theirs, their_average) = optimizer(sharded), optimizer(one)
    for step in range(STEPS):
        ours.zero_grad(), theirs.zero_grad()
        rows = sequences(ranks, step)
        mine = backward(sharded, rows[ranks.rank], 1.0)
        backward(sharded, rows[0], 0.0)  # a filler
        whole = [backward(one, row, 1.0) for row in rows]
        if step == 0:
            assert torch.equal(mine, whole[ranks.rank])
        masters = one.parameters()
        for name, p in sharded.parameters().items():
            assert p.grad.dtype == torch.float32
            assert distance(p.grad, masters[name].grad) < 1e-5, name
        assert ours.grad_norm() == pytest.approx(theirs.grad_norm(), rel=1e-6)
        before = sharded.version
        assert ours.step(1e-3, 1.0).grad_norm == pytest.approx(theirs.step(1e-3, 1.0).grad_norm, rel=1e-6)
        assert sharded.version == before + 1
        for name, p in sharded.parameters().items():
            assert distance(p, masters[name]) < 1e-5, name
            assert distance(our_average.averages[name], their_average.averages[name]) < 1e-5, name
    held = sum(p.to_local().numel() for p in sharded.parameters().values())
    assert held <= 0.75 * sum(p.numel() for p in one.parameters().values()) * replicate
    gathered = transformer.whole(sharded)
    assert gathered.version == sharded.version and not gathered.trainable
    for name in sharded.parameters():
        stored = sharded.parameters()[name].detach().full_tensor().to(gathered.weights.stored(name).dtype)
        assert torch.equal(gathered.weights.stored(name), stored), name
    refusals(sharded, rows[0])


def refusals(model: Any, sequence: list[int]) -> None:
    """What sharded weights cannot do is an error that says what to do."""
    with torch.no_grad(), pytest.raises(ModelError, match="whole"):
        transformer.forward(model, pack_sequences([sequence]))
    with pytest.raises(ModelError, match="whole"):
        model.weights.packed("layers.0.mlp.up_proj.weight")
    with pytest.raises(ModelError, match="whole"):
        model.weights.stored("norm.weight")
    with pytest.raises(ModelError, match="folder"):
        transformer.clone(model, trainable=True)


@contextmanager
def counting(owner: Any, name: str) -> Iterator[list[str]]:
    """Inside, calls of owner.name are counted."""
    was, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return was(*arguments, **options)

    setattr(owner, name, counted)
    try:
        yield calls
    finally:
        setattr(owner, name, was)


def modes(folder: str) -> None:
    """Whatever is kept for the backward, and though a layer is gathered again for it: the gradient of one process, and
    the same bits."""
    torch.set_num_threads(1)
    ranks = join("cpu")
    sharded, one = (load_policy(Path(folder), "bfloat16", True, "cpu", r) for r in (ranks, ALONE))
    rows, bits = sequences(ranks, 0), []
    for row in rows:
        backward(one, row, 1.0)
    for mode in MODES:
        for p in sharded.parameters().values():
            p.grad = None
        with counting(_Part, "forward") as entered:
            backward(sharded, rows[ranks.rank], 1.0, mode)
        assert len(entered) == sharded.architecture.num_layers + 1  # what is computed again is so inside its part
        backward(sharded, rows[0], 0.0, mode)
        for name, p in sharded.parameters().items():
            assert distance(p.grad, one.parameters()[name].grad) < 1e-5, (mode, name)
        bits.append([local(p.grad).clone() for p in sharded.parameters().values()])
    assert all(torch.equal(a, b) for other in bits[1:] for a, b in zip(bits[0], other, strict=True))


def score_head(folder: str) -> None:
    """A head that is a part of its own, float32 in bfloat16 storage, with rows on the first rank only."""
    torch.set_num_threads(1)
    ranks = join("cpu")
    ours, one = (scalar_from_policy(Path(folder), 3, "bfloat16", True, "cpu", r) for r in (ranks, ALONE))
    rows = sequences(ranks, 0)
    for model, given in ((ours, [rows[ranks.rank]]), (one, rows)):
        for row in given:
            heads.scores(model, transformer.forward(model, pack_sequences([row]))).square().sum().backward()
    for name, p in ours.parameters().items():
        assert distance(p.grad, one.parameters()[name].grad) < 1e-5, name
    norm = global_norm(p.grad for p in one.parameters().values())
    assert global_norm(p.grad for p in ours.parameters().values()) == pytest.approx(norm, rel=1e-6)
    assert ours.parameters()["score.weight"].to_local().shape[0] == (1 if ranks.is_first else 0)


def raised(error: Exception) -> None:
    raise error


def talk() -> None:
    """Sums, texts and ragged vectors between ranks."""
    ranks = join("cpu")
    n, me = ranks.size, ranks.rank
    assert ranks.sums([1.0, float(me)]) == [n, n * (n - 1) / 2]
    assert ranks.largest(float(-me)) == 0.0 and ranks.any(me == n - 1) and not ranks.any(False)
    assert ranks.text_of_first(f"from {me} é") == "from 0 é" and ranks.text_of_first("") == ""
    assert ranks.of_first(torch.tensor([float(me)])).tolist() == [0.0]
    assert ranks.smallest(float(me)) == 0.0
    assert ranks.by_first(lambda: {"of": me, "text": "é"}) == {"of": 0, "text": "é"}
    for error, kind in (
        (ConfigError("no"), ConfigError), (DataError("row 3", "no"), EngineError), (OSError(28, "no"), Exception),
    ):  # fmt: skip
        with pytest.raises(kind, match="no"):
            ranks.by_first(lambda error=error: raised(error) if me == 0 else pytest.fail("not the first"))
    own = [torch.full((i,), i + 0.25) for i in ranks.share(5)]
    assert [x.tolist() for x in ranks.ragged(own, 5)] == [[i + 0.25] * i for i in range(5)]
    assert ranks.ragged([], 0) == []
    assert ranks.threads(3) == 3 and ranks.threads(None) >= 1
