"""Batches of similar length: every sample once, little padding, the same order at any time."""

import pytest
import torch

from pared.errors import InputError
from pared.training.data import Bucketed, Order, order_of
from tests.training.toys import Points

LENGTHS = torch.randint(10, 1000, (500,), generator=torch.Generator().manual_seed(0)).tolist()


def test_an_epoch_has_every_sample_once():
    order = Bucketed(LENGTHS, 10, seed=3)
    first, second = (
        torch.cat([order.indices(step) for step in range(start, start + 50)]) for start in (0, 50)
    )
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(500))
    assert not torch.equal(first, second)


def test_what_fills_no_batch_waits_for_another_epoch():
    order = Bucketed(LENGTHS[:48], 10, seed=0)
    epochs = [{int(i) for step in range(4) for i in order.indices(4 * e + step)} for e in range(9)]
    assert all(len(epoch) == 40 for epoch in epochs)
    assert len(set().union(*epochs)) == 48


def test_little_is_padded():
    def padded(order):
        lengths = torch.tensor(LENGTHS)
        batches = [lengths[order.indices(step)] for step in range(50)]
        return 1 - sum(b.sum() for b in batches) / sum(b.amax() * len(b) for b in batches)

    assert padded(Bucketed(LENGTHS, 10, seed=0)) < 0.08 < 0.4 < padded(Order(500, 10, seed=0))


def test_short_batches_do_not_come_first():
    order = Bucketed(LENGTHS, 10, seed=0)
    means = [torch.tensor(LENGTHS)[order.indices(step)].float().mean() for step in range(50)]
    assert means != sorted(means)


def test_any_step_can_be_asked_for_at_any_time():
    steps = [7, 123, 8, 50, 7]
    one, other = Bucketed(LENGTHS, 10, seed=1), Bucketed(LENGTHS, 10, seed=1)
    forward = {step: other.indices(step) for step in sorted(set(steps))}
    assert all(torch.equal(one.indices(step), forward[step]) for step in steps)
    assert not torch.equal(one.indices(7), Bucketed(LENGTHS, 10, seed=2).indices(7))


def test_data_without_lengths_are_shuffled():
    assert isinstance(order_of(Points(), 8, 0), Order)


def test_more_in_a_batch_than_there_is():
    with pytest.raises(InputError, match="batch_size 11 is more than the 10 samples there are"):
        Bucketed(LENGTHS[:10], 11, seed=0)
