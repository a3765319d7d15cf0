"""Word error rates: counts, rates of sets, intervals, and what can't be counted."""

import pytest
import torch

from pared.bench.statistics import ratio_interval
from pared.bench.words import word_errors
from pared.errors import InputError

jiwer = pytest.importorskip("jiwer")

SAID = ["one two three", "four", "five six", "seven eight nine"]
HEARD = ["one three three four", "", "Five, six!", "seven nine"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_errors_of_each_kind():
    found = word_errors(SAID, HEARD)
    assert found.substitutions.tolist() == [1, 0, 0, 0]
    assert found.deletions.tolist() == [0, 1, 0, 1]
    assert found.insertions.tolist() == [1, 0, 0, 0]
    assert found.words.tolist() == [3, 1, 2, 3]
    # Of the set, and not the mean over utterances.
    assert found.rate == pytest.approx(4 / 9)
    assert word_errors(SAID, HEARD, normalise=str).rate == jiwer.wer(SAID, HEARD)


def test_the_interval_resamples_utterances():
    many = torch.randint(0, 4, (400,), generator=rng()).double()
    words = torch.randint(4, 12, (400,), generator=rng(1)).double()
    low, high = ratio_interval(many, words, rng())
    rate = float(many.sum() / words.sum())
    assert low < rate < high
    # The linearised standard error of a ratio, 1.96 of them to either side.
    error = (many - rate * words).std() / (400**0.5 * words.mean())
    assert high - low == pytest.approx(2 * 1.96 * float(error), rel=0.1)
    found = word_errors(SAID, HEARD)
    assert found.interval(rng()).low < found.rate < found.interval(rng()).high


def test_two_recognisers_on_the_same_utterances():
    worse, better = word_errors(SAID * 20, HEARD * 20), word_errors(SAID * 20, SAID * 20)
    found = worse.difference(better, rng())
    assert found.mean == pytest.approx(4 / 9) and found.decided
    assert not worse.difference(worse, rng()).decided
    with pytest.raises(InputError, match="are of different utterances"):
        worse.difference(word_errors(["one"], ["one"]), rng())


@pytest.mark.parametrize(
    "said, heard, told",
    [
        (["a"], [], "1 references and 0 recognised texts"),
        ([], [], "0 references"),
        (["a", " ... "], ["a", "b"], "reference 1 has no words"),
    ],
)
def test_what_cannot_be_counted(said, heard, told):
    with pytest.raises(InputError, match=told):
        word_errors(said, heard)
