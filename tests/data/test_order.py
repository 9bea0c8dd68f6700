"""The order of the samples: a permutation per epoch, the same for every division into ranks."""

import numpy as np
import pytest

from fastmim.data import SampleOrder


def step_ids(step, *, world, accumulate, n=50, batch=12, seed=7):
    """All samples of one step, micro-step-major, then rank."""
    orders = [
        SampleOrder(n, batch, accumulate=accumulate, world=world, rank=rank, seed=seed)
        for rank in range(world)
    ]
    return np.concatenate([order.ids(step, a)[1] for a in range(accumulate) for order in orders])


def epoch_ids(epoch, seed=7):
    return np.concatenate([step_ids(step, world=1, accumulate=1, seed=seed) for step in epoch_steps(epoch)])


def epoch_steps(epoch):
    return range(4 * epoch, 4 * epoch + 4)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (2, 1), (2, 3), (4, 1), (3, 4)])
def test_ranks_and_micro_steps_only_cut_the_same_sequence(world, accumulate):
    for step in (0, 3, 4, 11):
        expected = step_ids(step, world=1, accumulate=1)
        assert np.array_equal(step_ids(step, world=world, accumulate=accumulate), expected)


def test_every_epoch_is_another_permutation_and_leaves_out_others():
    order = SampleOrder(50, 12, seed=7)
    assert (order.steps_per_epoch, order.left_out, order.micro) == (4, 2, 12)
    assert [order.ids(step)[0] for step in (0, 3, 4, 8)] == [0, 0, 1, 2]
    epochs = [epoch_ids(epoch) for epoch in range(6)]
    for ids in epochs:
        assert len(set(ids.tolist())) == 48 and ids.min() >= 0 and ids.max() < 50
        assert ids.dtype == np.int64
    assert len({tuple(ids) for ids in epochs}) == 6
    assert len({frozenset(range(50)) - set(ids.tolist()) for ids in epochs}) > 1


def test_it_is_a_function_of_seed_and_step_not_of_history():
    order = SampleOrder(50, 12, seed=7)
    walked = [order.ids(step)[1] for step in range(9)]
    for step in (8, 0, 5):  # backwards too
        assert np.array_equal(SampleOrder(50, 12, seed=7).ids(step)[1], walked[step])
        assert np.array_equal(order.ids(step)[1], walked[step])
    assert not np.array_equal(epoch_ids(0, seed=7), epoch_ids(0, seed=8))


GOLDEN = [[3, 5, 2, 9, 7, 0, 8, 6, 1, 4], [0, 6, 5, 3, 4, 9, 7, 8, 2, 1]]


def test_these_numbers_are_kept():
    # checkpoints rely on it: another NumPy must give the same order
    assert SampleOrder(10, 10, seed=1).ids(0)[1].tolist() == GOLDEN[0]
    assert SampleOrder(10, 10, seed=1).ids(1)[1].tolist() == GOLDEN[1]


def test_places_are_uniform():
    # where sample 0 comes in 2000 epochs: chi-square with 7 degrees of freedom, p = 0.001
    order = SampleOrder(8, 8, seed=5)
    places = [int(np.flatnonzero(order.ids(epoch)[1] == 0)[0]) for epoch in range(2000)]
    counts = np.bincount(places, minlength=8)
    assert ((counts - 250) ** 2 / 250).sum() < 24.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 51}, "at most the 50 samples"),
        ({"batch": 10, "world": 3}, "3 ranks x 1 micro-steps = 3, got 10; 9 or 12 would fit"),
        ({"batch": 2, "world": 2, "accumulate": 2}, "got 2; 4 would fit"),
        ({"batch": 50, "world": 64}, "no batch of at most 50 samples would fit"),
        ({"batch": 0}, "counts >= 1"),
        ({"batch": 4, "rank": 1}, "rank below world"),
        ({"batch": 4, "seed": -1}, "seed"),
    ],
)
def test_refuses_what_does_not_divide(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleOrder(50, **arguments)


def test_refuses_steps_that_are_none():
    order = SampleOrder(50, 12, accumulate=2)
    for place in [(-1, 0), (0, 2), (0, -1)]:
        with pytest.raises(ValueError, match="micro_step < 2"):
            order.ids(*place)
