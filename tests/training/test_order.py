import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.training.order import (
    Draw,
    key,
    micro_batches,
    num_steps_of,
    permutation,
    round_contexts,
    window,
)


def test_a_key_is_the_first_63_bits_of_a_sha256_and_the_same_on_every_machine():
    digest = hashlib.sha256(b"str:order\x1fint:7\x1fint:0").hexdigest()
    assert key("order", 7, 0) == int(digest[:16], 16) // 2 == 6633654832481506518


def test_a_key_tells_numbers_from_text_and_one_part_from_two():
    keys = {key(1, 2), key("1", 2), key(12), key("12"), key(2, 1), key("1\x1f2")}
    assert len(keys) == 6


def test_the_order_is_a_function_of_seed_and_epoch():
    first = permutation(3, 0, 8).tolist()
    permutation.cache_clear()
    assert permutation(3, 0, 8).tolist() == first
    assert sorted(first) == list(range(8))
    assert permutation(3, 1, 8).tolist() != first
    assert permutation(4, 0, 8).tolist() != first


def test_the_order_is_the_same_on_every_machine():
    assert permutation(0, 0, 10).tolist() == [5, 3, 8, 6, 1, 2, 9, 4, 0, 7]


@pytest.mark.parametrize(("num_samples", "batch_size"), [(12, 4), (10, 4), (3, 7), (5, 5), (1, 2)])
def test_windows_hold_every_sample_once_an_epoch(num_samples, batch_size):
    num_steps = num_samples * batch_size  # a whole number of epochs: batch_size of them
    stream = [
        d
        for step in range(num_steps)
        for d in window(seed=2, step=step, num_samples=num_samples, batch_size=batch_size)
    ]
    for epoch in range(batch_size * batch_size):
        part = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(d.index for d in part) == list(range(num_samples))
        assert {d.epoch for d in part} == {epoch}
    assert len(stream) == num_steps * batch_size


def test_a_step_needs_no_earlier_step():
    late = window(seed=1, step=41, num_samples=10, batch_size=4)
    permutation.cache_clear()
    assert window(seed=1, step=41, num_samples=10, batch_size=4) == late
    # Places 164 to 167 of the stream are places 4 to 7 of epoch 16.
    assert [d.index for d in late] == permutation(1, 16, 10)[4:8].tolist()


def test_a_sample_has_other_randomness_in_another_epoch_and_under_another_seed():
    draws = [window(seed=s, step=e, num_samples=6, batch_size=6) for s in (0, 1) for e in range(4)]
    assert len({d.seed for step in draws for d in step}) == 2 * 4 * 6
    again = window(seed=0, step=2, num_samples=6, batch_size=6)
    assert {d.index: d.seed for d in again} == {d.index: d.seed for d in draws[2]}


@given(data=st.data())
@settings(derandomize=True, max_examples=200, deadline=None)
def test_micro_batches_of_all_ranks_partition_the_window(data):
    num_samples = data.draw(st.integers(1, 30))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=num_samples, max_size=num_samples))
    batch_size, num_ranks, size = (data.draw(st.integers(1, n)) for n in (40, 6, 8))
    draws = window(seed=0, step=data.draw(st.integers(0, 20)), num_samples=num_samples, batch_size=batch_size)
    ranks = [
        micro_batches(draws, lengths, rank=r, num_ranks=num_ranks, micro_batch_size=size)
        for r in range(num_ranks)
    ]
    everything = [d for cuts in ranks for cut in cuts for d in cut]
    assert sorted(everything, key=lambda d: d.seed) == sorted(draws, key=lambda d: d.seed)
    shares = [sum(map(len, cuts)) for cuts in ranks]
    assert max(shares) - min(shares) <= 1
    for cuts in ranks:
        assert all(len(cut) == size for cut in cuts[:-1])
        mine = [lengths[d.index] for cut in cuts for d in cut]
        assert mine == sorted(mine, reverse=True)


def test_ranks_take_turns_from_the_longest_sample_down():
    draws = [Draw(i, 0, i) for i in range(5)]
    lengths = [1, 5, 2, 4, 3]  # from the longest: samples 1, 3, 4, 2, 0
    cuts = [micro_batches(draws, lengths, rank=r, num_ranks=2, micro_batch_size=2) for r in (0, 1)]
    assert [[[d.index for d in cut] for cut in rank] for rank in cuts] == [[[1, 4], [0]], [[3, 2]]]


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "num_epochs", "expected"),
    [(10, 4, 1.0, 3), (12, 4, 1.0, 3), (10, 4, 2.0, 5), (10, 4, 0.5, 2), (3, 8, 0.1, 1), (110, 11, 1.1, 11)],
)
def test_steps_are_the_samples_to_see_over_the_batch_rounded_up(
    num_samples, batch_size, num_epochs, expected
):
    found = num_steps_of(num_samples=num_samples, batch_size=batch_size, num_epochs=num_epochs)
    assert found == expected


def test_a_window_larger_than_the_data_sees_a_sample_twice_with_other_randomness():
    draws = window(seed=0, step=0, num_samples=3, batch_size=6)
    assert np.bincount([d.index for d in draws]).tolist() == [2, 2, 2]
    assert len({d.seed for d in draws}) == 6


def test_the_contexts_of_a_round_are_all_different_and_an_epochs_rounds_share_none():
    rounds = [round_contexts(seed=1, round_index=r, num_contexts=8, size=3) for r in range(6)]
    assert all(len(set(chosen)) == 3 for chosen in rounds)
    for first in (0, 2, 4):
        assert not set(rounds[first]) & set(rounds[first + 1])
    assert rounds[0] != rounds[2]
    assert sorted(round_contexts(seed=1, round_index=5, num_contexts=8, size=8)) == list(range(8))
