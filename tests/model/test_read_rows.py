"""The forward of the rows that are read: the same bits as the whole one, without the other rows' work."""

import pytest
import torch
from families import CASES, VOCABULARY, save

from engine.data.pack import pack_groups, predictions
from engine.kernels._backend import kernels_usable
from engine.model import transformer
from engine.model.dropout import Dropout
from engine.model.storage import Weights
from engine.model.weights import load_policy

GROUPS = [
    ([1, 2, 3, 4, 5, 6, 7], [[8, 9], [10], [11, 12, 13]]),
    ([VOCABULARY - 1, 3], [[], [4, 4, 4, 4]]),
]
NUM_ROWS = 19

exact = pytest.mark.skipif(not kernels_usable(), reason="torch's products are not batch-invariant")


@exact
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_rows_have_the_bits_of_the_whole_forward(case, dtype, tmp_path):
    save(case, tmp_path)
    model = load_policy(tmp_path, dtype)
    batch = pack_groups(GROUPS)
    whole = transformer.forward(model, batch)
    assert len(whole) == NUM_ROWS
    shared = predictions(batch, [1, 2, 3, 6]).rows  # a prompt's last row stands once an answer
    assert len(shared.unique()) < len(shared)
    for rows in (shared, torch.tensor([18, 0, 7]), torch.tensor([3]), torch.arange(NUM_ROWS).flip(0)):
        assert torch.equal(transformer.forward(model, batch, rows=rows), whole[rows])


@exact
@torch.no_grad()
def test_dropout_of_rows_is_dropout_of_the_whole(tmp_path):
    save("llama", tmp_path)
    model = load_policy(tmp_path, "float32")
    batch, rows = pack_groups(GROUPS), torch.tensor([2, 9, 17])
    dropout = Dropout(0.4, 5, 2, ((3, 15), (1, 4)))
    whole = transformer.forward(model, batch, dropout)
    assert torch.equal(transformer.forward(model, batch, dropout, rows), whole[rows])
    assert not torch.equal(whole, transformer.forward(model, batch))


@torch.no_grad()
def test_only_these_rows_pass_what_is_behind_the_last_attention(tmp_path, monkeypatch):
    save("llama", tmp_path)
    model = load_policy(tmp_path, "float32")
    seen: list[tuple[str, int]] = []
    project = Weights.project

    def counting(self, x, modules, *more):
        seen.extend((module, len(x)) for module in modules)
        return project(self, x, modules, *more)

    monkeypatch.setattr(Weights, "project", counting)
    transformer.forward(model, pack_groups(GROUPS), rows=torch.tensor([9, 4, 9]))
    last = {m.split(".")[-1]: n for m, n in seen if m.startswith("layers.1.")}
    assert last == {"q_proj": 2, "k_proj": NUM_ROWS, "v_proj": NUM_ROWS, "o_proj": 2,
                    "gate_proj": 2, "up_proj": 2, "down_proj": 2}  # fmt: skip
    assert {n for m, n in seen if m.startswith("layers.0.")} == {NUM_ROWS}


def test_no_rows_leave_zero_gradients(tmp_path):
    """A micro-batch without a target: every parameter has a gradient, and none is anything but 0."""
    save("qwen3", tmp_path)
    model = load_policy(tmp_path, "float32", trainable=True)
    none = torch.empty(0, dtype=torch.int64)
    hidden = transformer.forward(model, pack_groups(GROUPS), rows=none)
    logprob, _ = transformer.logprobs(model, hidden, none)
    assert logprob.shape == (0,)
    logprob.sum().backward()
    for name, parameter in model.parameters().items():
        assert parameter.grad is not None and not parameter.grad.any(), name
