"""The order of the data: repeated epochs, mixing within a window, and continuing in the middle."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diffmem.training.order import DataOrder
from diffmem.training.seeds import seed_of


def test_window_0_repeats_one_shuffle():
    order = DataOrder(10, seed=3)
    taken = order.take(37)
    assert sorted(taken[:10]) == list(range(10))
    assert not np.array_equal(taken[:10], np.arange(10))
    assert np.array_equal(taken, np.tile(taken[:10], 4)[:37])
    assert not np.array_equal(taken[:10], DataOrder(10, seed=4).take(10))


def test_a_window_mixes_but_not_far():
    size, reach = 200, 20
    taken = DataOrder(size, seed=0, window=reach / size).take(20 * size)
    epochs = taken.reshape(-1, size)
    assert not np.array_equal(epochs[0], epochs[1])
    # In the long run every image comes equally often, and none returns before an epoch less the window has passed.
    counts = np.bincount(taken, minlength=size)
    assert counts.min() > 10
    assert counts.max() < 30
    last = {}
    for place, item in enumerate(taken.tolist()):
        assert place - last.get(item, -size) > size - reach
        last[item] = place


@given(
    size=st.integers(1, 30),
    window=st.sampled_from([0.0, 0.3, 1.0]),
    first=st.integers(0, 70),
    blocks=st.lists(st.integers(0, 20), max_size=4),
)
def test_blocks_and_states_change_nothing(size, window, first, blocks):
    whole = DataOrder(size, 5, window).take(first + sum(blocks))
    order = DataOrder(size, 5, window)
    assert np.array_equal(order.take(first), whole[:first])
    state, numbers = json.loads(json.dumps(order.state())), order.order.copy()
    order.take(11)
    again = DataOrder(size, 9, window)
    again.restore(state, numbers)
    assert np.array_equal(again.take(sum(blocks)), whole[first:])


def test_no_two_steps_share_a_seed():
    seeds = {seed_of(0, "noise", step) for step in range(50_000)}
    assert len(seeds) == 50_000
    assert seed_of(0, "noise", 5) != seed_of(0, "dropout", 5)
    assert seed_of(0, "noise", 5) != seed_of(1, "noise", 5)
    assert all(0 <= seed < 2**32 for seed in seeds)
