"""Word error rates: how many words of a transcript are wrong, and how sure that is.

The errors of a recognised text are the fewest substitutions, deletions and insertions that turn it
into the reference; the rate of a set is all its errors over all its words, so long utterances count
for more. Utterances vary much more than words do: intervals come from resampling utterances, or
whole voices, since utterances of one voice go wrong together.
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
    """What a recogniser got wrong, utterance by utterance, or voice by voice (see `by_voice`).

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

    @classmethod
    def joined(cls, runs: Sequence["WordErrors"]) -> "WordErrors":
        """Errors of several runs on the same utterances together: its rate is the mean of theirs.

        Raises:
            InputError: the utterances aren't the same.
        """
        for run in runs:
            runs[0]._need_same(run)
        counts = zip(*(run._counts for run in runs), strict=True)
        return cls(*(torch.stack(each).sum(0) for each in counts))

    def by_voice(self, voices: Sequence[str | None]) -> "WordErrors":
        """The sums over all that each voice says, so that intervals come from resampling voices.

        That is how sure a rate is for voices that nobody has heard. What a voice says isn't
        resampled again, since its chance is in the sums already (Davison and Hinkley 1997, Section
        3.8). Below some 20 voices intervals are too narrow, by a fifth for 8.

        Args:
            voices: who says each utterance, (utterances,).

        Raises:
            InputError: there isn't one voice for each utterance, or it isn't known who speaks.
        """
        if len(voices) != len(self.words) or None in voices:
            known = sum(voice is not None for voice in voices)
            raise InputError(
                f"the voices of {known} utterances are known, and errors of {len(self.words)}; "
                "summing by voice needs to know who says each utterance."
            )
        numbers = {voice: number for number, voice in enumerate(dict.fromkeys(voices))}
        owner = torch.tensor([numbers[voice] for voice in voices])
        empty = self.words.new_zeros(len(numbers))
        return WordErrors(*(empty.index_add(0, owner, counts) for counts in self._counts))

    def interval(self, generator: torch.Generator, level: float = 0.95) -> Interval:
        """Percentile bootstrap interval of the rate, over utterances; over voices if `by_voice`."""
        return ratio_interval(self.errors, self.words, generator, level)

    def difference(
        self, other: "WordErrors", generator: torch.Generator, level: float = 0.95
    ) -> Difference:
        """This rate minus another one on the same utterances, with its paired interval.

        Raises:
            InputError: the utterances aren't the same.
        """
        self._need_same(other)
        between = self.errors - other.errors
        low, high = ratio_interval(between, self.words, generator, level)
        return Difference(float(between.sum() / self.words.sum()), low, high)

    @property
    def _counts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.substitutions, self.deletions, self.insertions, self.words

    def _need_same(self, other: "WordErrors") -> None:
        if not torch.equal(self.words, other.words):
            raise InputError(
                "the two error rates are of different utterances; compare recognisers on the same."
            )


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
