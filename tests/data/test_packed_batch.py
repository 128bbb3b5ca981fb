"""Packing and the shift, against a definition in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.pack import (
    Packed,
    cut_by_tokens,
    epoch_order,
    epoch_steps,
    last_rows,
    pack_groups,
    pack_sequences,
    predictions,
    step_rows,
    stream_rows,
)
from engine.errors import DataError

TOKENS = st.lists(st.integers(0, 99), max_size=5)
GROUPS = st.lists(
    st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.lists(TOKENS, max_size=9)),
    max_size=6,
)


def context(batch: Packed, row: int) -> list[int]:
    """The tokens that a hidden row has seen, read off the packed batch alone."""
    cu = batch.cu_seqlens.tolist()
    segment = max(s for s in range(len(cu) - 1) if cu[s] <= row < cu[s + 1])
    seen = batch.tokens[cu[segment] : row + 1].tolist()
    prefix = segment if batch.prefix is None else int(batch.prefix[segment])
    if prefix != segment:
        seen = batch.tokens[cu[prefix] : cu[prefix + 1]].tolist() + seen
    return seen


def test_positions_restart_at_every_sequence() -> None:
    batch = pack_sequences([[5, 6, 7], [], [8], [9, 9]])
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 4, 6]
    assert batch.prefix is None and batch.num_segments == 4
    assert batch.lengths.tolist() == [3, 0, 1, 2]
    assert (batch.tokens.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)


def test_answers_go_on_where_the_prompt_stops() -> None:
    batch = pack_groups([([1, 2], [[3], [], [4, 5]]), ([6], [[7, 8]])])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.positions.tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 3, 5, 6, 8]
    assert batch.prefix is not None and batch.prefix.tolist() == [0, 0, 0, 0, 4, 4]


def test_no_sequences_is_an_empty_batch() -> None:
    for batch in (pack_sequences([]), pack_groups([])):
        assert batch.tokens.tolist() == [] and batch.cu_seqlens.tolist() == [0]
        assert predictions(batch).cu.tolist() == [0]


@given(GROUPS)
@settings(deadline=None, max_examples=60)
def test_the_shift_predicts_each_token_from_exactly_the_tokens_before_it(groups) -> None:
    batch = pack_groups(groups)
    answers = [s for s in range(batch.num_segments) if int(batch.prefix[s]) != s]
    shift = predictions(batch, answers)
    flat = [(prompt, answer) for prompt, answers in groups for answer in answers]
    assert shift.cu.diff().tolist() == [len(answer) for _, answer in flat]
    pairs = iter(zip(shift.rows.tolist(), shift.targets.tolist(), strict=True))
    for prompt, answer in flat:
        for t, token in enumerate(answer):
            row, target = next(pairs)
            assert target == token
            assert context(batch, row) == list(prompt) + answer[:t]


@given(st.lists(TOKENS, max_size=7))
@settings(deadline=None, max_examples=60)
def test_grouped_and_separate_packing_ask_for_the_same_predictions(sequences) -> None:
    batch = pack_sequences(sequences)
    shift = predictions(batch)
    assert shift.cu.diff().tolist() == [max(len(s) - 1, 0) for s in sequences]
    assert shift.targets.tolist() == [token for s in sequences for token in s[1:]]
    want = [s[: t + 1] for s in sequences for t in range(len(s) - 1)]
    assert [context(batch, row) for row in shift.rows.tolist()] == want


def test_skipped_tokens_are_context_only() -> None:
    batch = pack_sequences([[1, 2, 3, 4], [5, 6], [7]])
    shift = predictions(batch, skip_first=[2, 0, 5])
    assert shift.targets.tolist() == [3, 4, 6]
    assert shift.rows.tolist() == [1, 2, 4]
    assert shift.cu.tolist() == [0, 2, 3, 3]
    grouped = pack_groups([([1, 2], [[3, 4], [5, 6, 7]])])
    shift = predictions(grouped, [2, 1], skip_first=[1, 0])
    assert shift.targets.tolist() == [6, 7, 3, 4]
    assert shift.rows.tolist() == [4, 5, 1, 2]


def test_score_row_is_the_last_token_or_that_of_the_prompt() -> None:
    batch = pack_groups([([1, 2], [[3], []]), ([4], [[5, 6]])])
    assert last_rows(batch).tolist() == [1, 2, 1, 3, 5]
    assert last_rows(batch, [4, 2]).tolist() == [5, 1]
    with pytest.raises(DataError, match=r"segments \[1\].*no row"):
        last_rows(pack_sequences([[1], []]))


@given(st.lists(st.integers(0, 40), max_size=40), st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_micro_batches_hold_every_item_once_within_the_budget(lengths, budget) -> None:
    cut = cut_by_tokens(lengths, budget)
    assert sorted(i for batch in cut for i in batch) == list(range(len(lengths)))
    for batch in cut:
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
        assert [lengths[i] for i in batch] == sorted((lengths[i] for i in batch), reverse=True)
    assert cut == cut_by_tokens(lengths, budget)


def test_first_fit_fills_the_gaps() -> None:
    assert cut_by_tokens([3, 9, 7, 1, 30], 10) == [[4], [1, 3], [2, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_groups([([1], [[2]]), ([], [[3]])]), "group 1: the prompt has no tokens"),
        (lambda: predictions(pack_sequences([[1, 2]]), [1]), r"segments: got \[1\].*0\.\.0"),
        (lambda: predictions(pack_sequences([[1, 2]]), skip_first=[0, 0]), "skip_first"),
        (lambda: predictions(pack_sequences([[1, 2]]), skip_first=[-1]), "skip_first"),
        (lambda: cut_by_tokens([1], 0), "token budget: got 0"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, message) -> None:
    with pytest.raises(DataError, match=message):
        call()


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_every_pass_visits_every_row_once(n, batch_size, epoch) -> None:
    per_epoch = epoch_steps(n, batch_size)
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    batches = [step_rows(n, batch_size, 7, step) for step in steps]
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert all(len(batch) == min(batch_size, n) for batch in batches[:-1])
    assert [i for batch in batches for i in batch] == epoch_order(n, 7, epoch).tolist()


@given(st.integers(1, 20), st.integers(1, 50))
@settings(deadline=None, max_examples=60)
def test_wrapped_batches_are_full_and_one_stream(n, batch_size) -> None:
    batches = [step_rows(n, batch_size, 3, step, wrap=True) for step in range(4)]
    assert [len(batch) for batch in batches] == [batch_size] * 4
    stream = [i for batch in batches for i in batch]
    for start in range(0, len(stream) - n + 1, n):
        assert sorted(stream[start : start + n]) == list(range(n))
    assert stream == stream_rows(n, 3, range(4 * batch_size))


def test_orders_differ_by_seed_and_pass_and_never_change() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    # Written down once: another version of numpy must not reorder a run that is resumed.
    assert epoch_order(8, 1, 2).tolist() == [1, 3, 4, 7, 6, 5, 2, 0]
    first = [epoch_order(50, 0, epoch)[0] for epoch in range(2000)]
    assert len(set(first)) == 50


@pytest.mark.parametrize(
    "call",
    [
        lambda: epoch_steps(0, 4),
        lambda: epoch_steps(3, 0),
        lambda: step_rows(3, 2, 0, -1),
        lambda: epoch_order(3, -1, 0),
        lambda: stream_rows(0, 0, [0]),
    ],
)
def test_wrong_cursors_are_refused(call) -> None:
    with pytest.raises(DataError, match="got"):
        call()
