"""Operations by hand, and the lines at the end of a run."""


from engine.run.flops import Totals, Work, forward_flops, grouped, layer_entries, padded_tokens


class Tiny:
    vocab_size, hidden_size, num_layers, num_heads, num_kv_heads = 11, 6, 2, 3, 1
    head_dim, intermediate_size, gated, qk_norm, parallel_residual = 2, 5, True, False, False


def test_one_token_is_twice_the_entries_and_one_pair():
    # q 6x6, k and v 2x6, o 6x6, gate, up and down 5x6
    assert layer_entries(Tiny()) == 36 + 12 + 12 + 36 + 90
    # 4 operations a channel of a (query, key) pair and query head: 4 * 3 * 2
    assert forward_flops(Tiny(), [(0, 1)], 1, 11) == 2 * (2 * 186 + 24) + 2 * 11 * 6


def test_answers_see_their_prompt_and_it_is_counted_once():
    segments = grouped([4], [[2, 3]])
    assert segments == [(0, 4), (4, 2), (4, 3)]
    pairs = 10 + (5 + 6) + (5 + 6 + 7)
    assert forward_flops(Tiny(), segments, 0, 1) == 2 * (2 * 9 * 186 + 24 * pairs)
    apart = forward_flops(Tiny(), [(0, 6), (0, 7)], 0, 1)
    once = forward_flops(Tiny(), [(0, 4)], 0, 1)
    assert forward_flops(Tiny(), segments, 0, 1) == apart - once


def test_padding_is_the_longest_row_for_all():
    assert padded_tokens([3, 9, 1]) == 27
    assert padded_tokens([]) == 0


def test_totals_are_sums_by_phase_and_a_phase_without_tokens_is_left_out():
    totals = Totals()
    assert totals.add("training", Work(3e12, 100, 150), 2.0) == {
        "perf/training_flops": 3e12,
        "perf/training_flops_per_s": 1.5e12,
        "perf/training_padded_over_real": 1.5,
    }
    assert totals.add("reward", Work(0.0, 0, 0), 1.0) == {}
    totals.add("training", Work(1e12, 100, 350), 6.0)
    (line,) = totals.lines()
    assert line == (
        "training: 4 TFLOP in 8.0 s, 0.5 TFLOP/s; 200 tokens,"
        " padded batches would have had 2.50 times as many"
    )
