"""Pages and places: nothing leaks, nothing is written by two, everything that fits runs."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.generate.scheduler import Limits, Request, Scheduler, pages_needed

GB = 1e-9  # one byte, so that kv_cache_gb counts pages when page_bytes is 1


def scheduler(requests, new, num_pages, max_active=64, page_size=4, prefill_tokens=4096):
    limits = Limits(max_active, num_pages * GB * 1.0001, prefill_tokens)
    return Scheduler(requests, new, limits, page_bytes=1, page_size=page_size)


def check_owners(running, requests, page_size):
    """Each page's users; a page that a sample may write (position >= P) is that sample's alone."""
    users = Counter(page for start in running for page in set(start.pages))
    for start in running:
        assert len(set(start.pages)) == len(start.pages)
        for page in start.pages[requests[start.request].length // page_size :]:
            assert users[page] == 1, f"page {page} is writable by {users[page]} sequences"
    return users


requests_strategy = st.lists(
    st.builds(Request, st.integers(1, 23), st.integers(1, 5)), min_size=0, max_size=8
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), requests=requests_strategy, new=st.integers(1, 17))
def test_every_sample_runs_once_and_no_page_leaks(data, requests, new):
    page_size = data.draw(st.integers(1, 5))
    needs = [pages_needed(r.length, new, page_size) for r in requests]
    least = max((n.alone(r.samples) for r, n in zip(requests, needs, strict=True)), default=1)
    num_pages = data.draw(st.integers(least, least * 4))
    max_active = data.draw(st.integers(1, 7))
    prefill_tokens = data.draw(st.integers(1, 60))
    plan = scheduler(requests, new, num_pages, max_active, page_size, prefill_tokens)
    assert plan.num_pages <= num_pages
    running, order, prefilled = [], [], {}
    while not plan.done:
        admission = plan.admit()
        for prefill in admission.prefills:
            assert prefill.request not in prefilled, "a prompt was computed twice"
            prefilled[prefill.request] = prefill.pages
            assert len(prefill.pages) == -(-requests[prefill.request].length // page_size)
        lengths = [requests[p.request].length for p in admission.prefills]
        assert len(lengths) < 2 or sum(lengths) <= prefill_tokens
        for start in admission.starts:
            request = requests[start.request]
            shared = request.length // page_size
            assert start.pages[:shared] == prefilled[start.request][:shared]
            assert len(start.pages) == -(-(request.length + new - 1) // page_size)
            if request.length % page_size:  # the prompt's last page: copied, or taken over
                original = prefilled[start.request][-1]
                assert start.copy == (original, start.pages[shared]) or (
                    start.copy is None
                    and start.pages[shared] == original
                    and start.sample == request.samples - 1
                )
            else:
                assert start.copy is None
        running.extend(admission.starts)
        order.extend((s.request, s.sample) for s in admission.starts)
        assert len(running) <= max_active
        users = check_owners(running, requests, page_size)
        assert all(plan.pool.holders[page] >= count for page, count in users.items())
        assert running, "nothing runs and nothing starts"
        index = data.draw(st.integers(0, len(running) - 1))
        plan.finish(running.pop(index))
    assert order == [(i, k) for i, r in enumerate(requests) for k in range(r.samples)]
    assert plan.pool.holders == [0] * plan.num_pages
    assert plan.pool.num_free == plan.num_pages


def test_the_prompt_pages_are_shared_and_only_the_partial_page_is_copied():
    plan = scheduler([Request(10, 3)], new=5, num_pages=50)  # 2 full pages of 4, 2 tokens more
    admission = plan.admit()
    (prefill,) = admission.prefills
    first, second, last = admission.starts
    assert len(prefill.pages) == 3
    assert first.pages[:2] == second.pages[:2] == last.pages[:2] == prefill.pages[:2]
    assert first.copy == (prefill.pages[2], first.pages[2])
    assert second.copy == (prefill.pages[2], second.pages[2])
    assert last.copy is None and last.pages[2] == prefill.pages[2]
    assert len({p for s in admission.starts for p in s.pages}) == 2 + 3 * 2


def test_samples_that_do_not_fit_wait_with_their_prompt_computed():
    plan = scheduler([Request(8, 4), Request(3, 1)], new=4, num_pages=50, max_active=3)
    admission = plan.admit()
    assert [s.sample for s in admission.starts] == [0, 1, 2]
    assert plan.admit().starts == ()
    plan.finish(admission.starts[1])
    later = plan.admit()
    assert later.prefills == () and [(s.request, s.sample) for s in later.starts] == [(0, 3)]
    plan.finish(later.starts[0])
    last = plan.admit()
    assert [p.request for p in last.prefills] == [1] and [s.request for s in last.starts] == [1]


def test_pages_bound_what_runs_at_once():
    plan = scheduler([Request(8, 1)] * 5, new=1, num_pages=5)  # 2 pages each
    first = plan.admit()
    assert [p.request for p in first.prefills] == [0, 1]
    for start in first.starts:
        plan.finish(start)
    assert [p.request for p in plan.admit().prefills] == [2, 3]


def test_a_prefill_is_cut_by_its_token_budget_and_a_longer_prompt_goes_alone():
    plan = scheduler([Request(30, 1), Request(6, 1), Request(6, 1)], 1, 100, prefill_tokens=10)
    assert [[p.request for p in plan.admit().prefills] for _ in range(4)] == [[0], [1], [2], []]


def test_what_can_never_fit_is_an_error_beforehand_with_the_figures():
    with pytest.raises(ConfigError, match=r"prompt 1 \(9 tokens\) .*=8 needs 4 pages of 4"):
        scheduler([Request(1, 1), Request(9, 1)], new=8, num_pages=3)
    scheduler([Request(1, 1), Request(9, 1)], new=8, num_pages=4)


@pytest.mark.parametrize("setting", ["max_active", "kv_cache_gb", "prefill_tokens"])
def test_limits_below_one_are_errors(setting):
    with pytest.raises(ConfigError, match=f"{setting}: got 0"):
        Limits(**{setting: 0})


def test_the_cache_is_no_larger_than_the_work():
    plan = scheduler([Request(8, 2)] * 100, new=5, num_pages=10**6, max_active=3)
    assert plan.num_pages == 3 * 3 + 2
