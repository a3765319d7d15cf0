"""From scores of frames to words: the best label of each frame, or a beam of prefixes.

Both take scores piece by piece and give out what can't change any more, so that a recording may be
of any length. The beam is that of Graves and Jaitly (2014, ICML) and Hannun et al. (2014, arXiv
1408.2873) without a language model: it sums over all paths of a prefix. When a label was said isn't
defined by a sum; it's told by the most probable way in which its prefix came about.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from pared.speech.recognition.model import WORD_BEGINS

# Labels less likely than this in a frame begin no prefix.
LEAST = math.log(1e-4)
# Every so many frames a beam gives out what is settled; by so many labels prefixes may differ then.
SETTLES, UNSETTLED = 64, 32
# Seconds without a label that no word goes on over. What has learnt from single sentences knows
# spaces within them and none between.
PAUSE = 0.4


class Said(NamedTuple):
    """One label, and the frames in which it was said, the last one excluded."""

    label: int
    start: int
    end: int


class Decoder(Protocol):
    """What both ways of decoding are."""

    def __call__(self, scores: Tensor) -> list[Said]:
        """What is settled after these frames.

        Args:
            scores: logarithmic probabilities, (frames, classes).
        """
        ...

    def flush(self) -> list[Said]:
        """The rest, once nothing more comes."""
        ...


class Greedy:
    """The best label of each frame; repetitions taken together, then blanks left out.

    Args:
        blank: the class of the blank.
    """

    def __init__(self, blank: int = 0) -> None:
        self.blank = blank
        self.frame = 0
        self.last = Said(blank, 0, 0)

    def __call__(self, scores: Tensor) -> list[Said]:
        """See `Decoder`."""
        done = []
        for label in scores.argmax(dim=-1).tolist():
            if label != self.last.label:
                done += self._ended()
                self.last = Said(label, self.frame, self.frame)
            self.frame += 1
        return done

    def flush(self) -> list[Said]:
        """See `Decoder`."""
        done = self._ended()
        self.last = Said(self.blank, self.frame, self.frame)
        return done

    def _ended(self) -> list[Said]:
        return [] if self.last.label == self.blank else [self.last._replace(end=self.frame)]


class _Ending(NamedTuple):
    """All paths of one prefix that end alike: with the blank, or with the prefix's last label.

    Attributes:
        total: logarithm of their summed probability.
        best: of the most probable one's.
        said: the prefix, as that one says it.
    """

    total: float = -math.inf
    best: float = -math.inf
    said: tuple[Said, ...] = ()

    def __or__(self, other: "_Ending") -> "_Ending":
        """Both together."""
        best = max(self, other, key=lambda ending: ending.best)
        return _Ending(_added(self.total, other.total), best.best, best.said)

    def then(self, score: float, said: tuple[Said, ...]) -> "_Ending":
        """With one more frame."""
        return _Ending(self.total + score, self.best + score, said)


class _Paths(NamedTuple):
    """All paths of one prefix."""

    blank: _Ending = _Ending()
    label: _Ending = _Ending()

    @property
    def all(self) -> _Ending:
        return self.blank | self.label

    def __or__(self, other: "_Paths") -> "_Paths":
        return _Paths(self.blank | other.blank, self.label | other.label)

    def without(self, count: int) -> "_Paths":
        """The same, the first labels forgotten."""
        return _Paths(*(ending._replace(said=ending.said[count:]) for ending in self))


START: dict[tuple[int, ...], _Paths] = {(): _Paths(blank=_Ending(0.0, 0.0))}


class Beam:
    """The most probable prefixes, each summed over its paths.

    Args:
        blank: the class of the blank.
        width: how many prefixes are kept.
    """

    def __init__(self, blank: int = 0, width: int = 8) -> None:
        self.blank, self.width = blank, width
        self.frame = 0
        self.beam = START

    def __call__(self, scores: Tensor) -> list[Said]:
        """See `Decoder`."""
        done = []
        for frame in scores.tolist():
            self._step(frame)
            if self.frame % SETTLES == 0:
                done += self._settled()
        return done

    def flush(self) -> list[Said]:
        """See `Decoder`."""
        best = next(iter(self.beam.values())).all.said
        self.beam = START
        return list(best)

    def _step(self, frame: list[float]) -> None:
        candidates = [(label, score) for label, score in enumerate(frame) if score > LEAST]
        # The best label is always one, whatever the scores.
        candidates = candidates or [max(enumerate(frame), key=lambda pair: pair[1])]
        grown: dict[tuple[int, ...], _Paths] = {}
        for prefix, paths in self.beam.items():
            for label, score in candidates:
                for longer, found in self._continued(prefix, paths, label, score):
                    if found.all.total > -math.inf:
                        grown[longer] = grown.get(longer, _Paths()) | found
        best = sorted(grown.items(), key=lambda pair: pair[1].all.total, reverse=True)
        self.beam = dict(best[: self.width])
        self.frame += 1

    def _continued(
        self, prefix: tuple[int, ...], paths: _Paths, label: int, score: float
    ) -> list[tuple[tuple[int, ...], _Paths]]:
        """What becomes of a prefix when the frame says a label."""
        all_ = paths.all
        if label == self.blank:
            return [(prefix, _Paths(blank=all_.then(score, all_.said)))]
        new = Said(label, self.frame, self.frame + 1)
        longer = (*prefix, label)
        if not prefix or label != prefix[-1]:
            return [(longer, _Paths(label=all_.then(score, (*all_.said, new))))]
        # The same label goes on, or comes again after a blank.
        going_on = tuple(one._replace(end=self.frame + 1) for one in paths.label.said[-1:])
        held = paths.label.then(score, (*paths.label.said[:-1], *going_on))
        again = paths.blank.then(score, (*paths.blank.said, new))
        return [(prefix, _Paths(label=held)), (longer, _Paths(label=again))]

    def _settled(self) -> list[Said]:
        """What all prefixes begin with, once those that differ from the best too early are gone."""
        best = next(iter(self.beam))
        sure = best[: max(0, len(best) - UNSETTLED)]
        self.beam = {k: paths for k, paths in self.beam.items() if k[: len(sure)] == sure}
        # The last common label stays: another one like it would need a blank before.
        count = max(0, _common(list(self.beam)) - 1)
        said = next(iter(self.beam.values())).all.said[:count]
        self.beam = {prefix[count:]: paths.without(count) for prefix, paths in self.beam.items()}
        return list(said)


def _added(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _common(prefixes: list[tuple[int, ...]]) -> int:
    """How many labels all prefixes begin with."""
    first, last = min(prefixes), max(prefixes)  # whatever these two share, all share
    pairs = zip(first, last, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))


# Words ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """A word and when it was said, in seconds."""

    text: str
    start: float
    end: float


class Words:
    """Puts labels together to words.

    Args:
        tokenizer: tells what labels stand for; words are delimited, or begin with a mark.
        seconds: from one frame to the next.
    """

    def __init__(self, tokenizer: Any, seconds: float) -> None:
        self.tokenizer, self.seconds = tokenizer, seconds
        self.delimiter = getattr(tokenizer, "word_delimiter_token", None)
        special = set(tokenizer.all_special_tokens) - {self.delimiter}
        self.unsaid = {tokenizer.convert_tokens_to_ids(token) for token in special}
        self.pieces: list[tuple[str, Said]] = []

    def __call__(self, said: Iterable[Said]) -> list[Word]:
        """The words that are complete after these labels."""
        done = []
        for one in said:
            if one.label in self.unsaid:
                continue
            text = self.tokenizer.convert_ids_to_tokens(one.label)
            if text == self.delimiter or text.startswith(WORD_BEGINS) or self._paused(one):
                done += self.flush()
            if piece := "" if text == self.delimiter else text.removeprefix(WORD_BEGINS):
                self.pieces.append((piece, one))
        return done

    def _paused(self, one: Said) -> bool:
        """Whether words are delimited, and a pause before this label does it too."""
        if not self.delimiter or not self.pieces:
            return False
        return (one.start - self.pieces[-1][1].end) * self.seconds > PAUSE

    def flush(self) -> list[Word]:
        """The word that was still to be completed, if any."""
        pieces, self.pieces = self.pieces, []
        if not pieces:
            return []
        text = "".join(piece for piece, _ in pieces)
        if getattr(self.tokenizer, "do_lower_case", False):
            text = text.lower()
        return [Word(text, pieces[0][1].start * self.seconds, pieces[-1][1].end * self.seconds)]
