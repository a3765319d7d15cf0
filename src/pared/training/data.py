"""Which samples a step sees: a pure function of seed and step, so that a run resumes anywhere."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pared.errors import InputError


class Dataset(Protocol):
    """What the loop asks of data: a length, and whole batches by index.

    Data whose samples differ in length may tell their `lengths`, one number each; then batches hold
    samples of similar length.
    """

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


class Bucketed:
    """Shuffled epochs whose batches hold samples of similar length, so that little is padded.

    The samples of an epoch are shuffled, sorted by length within pools of some batches, and cut
    into batches, which come in random order. What doesn't fill a last batch waits for another
    epoch, which shuffles anew.

    Args:
        lengths: of the samples, in any unit.
        batch_size: samples in a batch.
        seed: of the order.

    Raises:
        InputError: there are fewer samples than a batch has.
    """

    POOL = 16  # batches

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        if len(lengths) < batch_size:
            raise InputError(
                f"batch_size {batch_size} is more than the {len(lengths)} samples there are; "
                "choose a smaller one."
            )
        self.lengths, self.batch_size, self.seed = torch.tensor(lengths), batch_size, seed
        self.batches = len(lengths) // batch_size  # in an epoch
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Indices of step `step` (from 0), shape (batch_size,)."""
        epoch, number = divmod(step, self.batches)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._of_epoch(epoch)
        return self._order[number]

    def _of_epoch(self, epoch: int) -> Tensor:
        generator = generator_for(self.seed, epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        pools = shuffled[: self.batches * self.batch_size].split(self.POOL * self.batch_size)
        ordered = torch.cat([pool[self.lengths[pool].argsort(stable=True)] for pool in pools])
        order = torch.randperm(self.batches, generator=generator)
        return ordered.view(self.batches, self.batch_size)[order]


def order_of(data: Dataset, batch_size: int, seed: int) -> Order | Bucketed:
    """In what order samples are seen: by similar length where data tell their `lengths`."""
    lengths = getattr(data, "lengths", None)
    if lengths is None:
        return Order(len(data), batch_size, seed)
    return Bucketed(lengths, batch_size, seed)
