"""Order: every example once an epoch, a function of seed and step alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.training.order import Order, epoch_order, evenly_spaced


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_every_example_once_an_epoch(count, per_step, seed, is_shuffled):
    order = Order(count, per_step, seed, is_shuffled)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.indices(step) for step in steps]
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        assert all(len(batch) == per_step for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= per_step


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_any_step_can_be_asked_first():
    order = Order(10, 3, seed=5, is_shuffled=True)
    backwards = [order.indices(step) for step in reversed(range(8))][::-1]
    assert backwards == [order.indices(step) for step in range(8)]


def test_position_names_the_first_example():
    order = Order(10, 3, seed=0, is_shuffled=False)
    assert [order.position(step) for step in (0, 3, 4, 5)] == [(0, 0), (0, 9), (1, 0), (1, 3)]
    assert order.indices(3) == [9]


@pytest.mark.parametrize(
    ("num_steps", "count", "with_end", "points"),
    [(12, 3, False, {3, 6, 9}), (12, 4, True, {3, 6, 9, 12}), (2, 5, True, {1, 2}), (1, 3, False, set()), (7, 0, False, set())],
)
def test_points_are_spread_evenly(num_steps, count, with_end, points):
    assert evenly_spaced(num_steps, count, with_end=with_end) == points
