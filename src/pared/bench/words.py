"""Word error rates: how many words of a transcript are wrong, and how sure that is.

The errors of a recognised text are the fewest substitutions, deletions and insertions that turn it
into the reference; the rate of a set is all its errors over all its words, so long utterances count
for more. Utterances vary much more than words do: intervals come from resampling utterances.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pared.bench.statistics import Difference, Interval, ratio_interval
from pared.errors import InputError
from pared.worlds.optional import need
from pared.worlds.speech.characters import normalised


@dataclass(frozen=True)
class WordErrors:
    """What a recogniser got wrong, utterance by utterance.

    Attributes:
        substitutions: words heard as others, (utterances,).
        deletions: words not heard, (utterances,).
        insertions: words heard and not said, (utterances,).
        words: words said, (utterances,).
    """

    substitutions: Tensor
    deletions: Tensor
    insertions: Tensor
    words: Tensor

    @property
    def errors(self) -> Tensor:
        """Of all three kinds, (utterances,)."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per word said; above 1 where more was heard than said."""
        return float(self.errors.sum() / self.words.sum())

    def interval(self, generator: torch.Generator, level: float = 0.95) -> Interval:
        """Percentile bootstrap interval of the rate, over utterances."""
        return ratio_interval(self.errors, self.words, generator, level)

    def difference(
        self, other: "WordErrors", generator: torch.Generator, level: float = 0.95
    ) -> Difference:
        """This rate minus another one on the same utterances, with its paired interval.

        Raises:
            InputError: the utterances aren't the same.
        """
        if not torch.equal(self.words, other.words):
            raise InputError(
                "the two error rates are of different utterances; compare recognisers on the same."
            )
        between = self.errors - other.errors
        low, high = ratio_interval(between, self.words, generator, level)
        return Difference(float(between.sum() / self.words.sum()), low, high)


def word_errors(
    references: Sequence[str],
    heard: Sequence[str],
    normalise: Callable[[str], str] = normalised,
) -> WordErrors:
    """Count errors.

    Args:
        references: what was said in each utterance.
        heard: what was recognised, in the same order.
        normalise: is done to both; by default case and marks that nobody speaks don't count.

    Raises:
        InputError: there isn't one text for each reference, or a reference has no words; or `jiwer`
            isn't installed.
    """
    jiwer = need("jiwer", extra="speech")
    if len(references) != len(heard) or not references:
        raise InputError(
            f"there are {len(references)} references and {len(heard)} recognised texts; each "
            "utterance needs both."
        )
    said = [normalise(text) for text in references]
    if "" in said:
        raise InputError(f"reference {said.index('')} has no words; leave the utterance out.")
    found = [jiwer.process_words(a, normalise(b)) for a, b in zip(said, heard, strict=True)]

    def counted(name: str) -> Tensor:
        return torch.tensor([getattr(one, name) for one in found], dtype=torch.float64)

    return WordErrors(
        counted("substitutions"),
        counted("deletions"),
        counted("insertions"),
        torch.tensor([len(text.split()) for text in said], dtype=torch.float64),
    )
