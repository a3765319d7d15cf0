"""Which samples a step sees: a pure function of seed and step, so that a run resumes anywhere."""

from typing import Protocol

import torch
from torch import Tensor


class Dataset(Protocol):
    """What the loop asks of data: a length, and whole batches by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The samples at `indices` (int64, shape (batch,)), the batch dimension first.

        Any randomness (crops, caption dropout) must come from `generator`.
        """
        ...

    def identity(self) -> str:
        """A short text that changes when the data changes; a resumed run must see the same."""
        ...


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator seeded by a tuple of small integers, e.g. (seed, step, rank)."""
    mixed = 0x9E3779B97F4A7C15
    for part in key:  # splitmix64: neighbouring keys give unrelated streams
        mixed = (mixed ^ part) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed % 2**63)


def beside(data: Dataset, device: torch.device) -> Dataset:
    """Cached data moved to an accelerator, where they take a tenth of its free memory at most.

    A small model's step is shorter than the transfer of its batch. Data without `to` and `nbytes`
    stay where they are, and so do all data on the CPU.
    """
    if device.type != "cuda" or not (hasattr(data, "to") and hasattr(data, "nbytes")):
        return data
    free, _ = torch.cuda.mem_get_info(device)
    return data.to(device) if data.nbytes < free / 10 else data


class Order:
    """Shuffled epochs without replacement, one permutation per epoch, drawn from (seed, epoch)."""

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Indices of step `step` (from 0), shape (batch_size,); a batch may span two epochs."""
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.length
        return torch.cat(
            [self._of_epoch(int(e))[positions[epochs == e] % self.length] for e in epochs.unique()]
        )

    def _of_epoch(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._permutation = torch.randperm(
                self.length, generator=generator_for(self.seed, epoch)
            )
            self._epoch = epoch
        return self._permutation
