"""Single random numbers from one generator, for data that are made up sample by sample."""

import torch


class Draw:
    """What is drawn follows from the generator's state alone."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        """A number between two bounds."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def factor(self, bounds: tuple[float, float]) -> float:
        """A number between two bounds; where they are the same nothing is drawn."""
        low, high = bounds
        return low if low == high else self.uniform(low, high)

    def chance(self, probability: float) -> bool:
        """True as often as the probability says."""
        return self.uniform(0, 1) < probability

    def below(self, count: int) -> int:
        """A whole number from 0 on, below `count`."""
        return int(torch.randint(count, (), generator=self.generator))

    def of(self, weights: tuple[float, ...]) -> int:
        """An index, as likely as its weight."""
        return int(
            torch.multinomial(torch.tensor(weights, dtype=torch.float), 1, generator=self.generator)
        )

    def one(self, things: tuple):
        """One of some things, all as likely."""
        return things[self.of((1.0,) * len(things))]
