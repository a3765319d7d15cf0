"""Data as the training loop draws it."""

import pytest
import torch

from pared.training.data import generator_for
from pared.worlds.datasets import Balanced, balanced_weights


class Numbers:
    """Samples that are their own index."""

    def __len__(self):
        return 4

    def batch(self, indices, generator):
        return {"index": indices}

    def identity(self):
        return "numbers"


def test_balanced_draws_every_group_alike():
    weights = balanced_weights(["man", "man", "man", "cake"], balance=1)
    data = Balanced(Numbers(), weights)
    drawn = data.batch(torch.arange(6000), generator_for(1, 2))["index"]
    assert (drawn == 3).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (drawn == 0).float().mean() == pytest.approx(1 / 6, abs=0.03)


def test_balance_of_half_lies_between():
    weights = balanced_weights(["a"] * 4 + ["b"], balance=0.5)
    assert weights.tolist() == [0.5] * 4 + [1.0]


def test_balanced_draws_by_the_generator_alone_and_shows_in_the_identity():
    weights = balanced_weights(["a", "a", "b", "b"], balance=1)
    data = Balanced(Numbers(), weights)
    first, second = (data.batch(torch.arange(50), generator_for(3)) for _ in range(2))
    assert torch.equal(first["index"], second["index"])
    other = Balanced(Numbers(), balanced_weights(["a", "b", "b", "b"], balance=1))
    assert data.identity() != other.identity() != "numbers"
