"""Word error rates: counts, rates of sets, intervals, and what can't be counted."""

import pytest
import torch

from pared.bench.statistics import ratio_interval
from pared.bench.words import WordErrors, word_errors
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


def test_the_errors_of_several_runs_have_the_mean_of_their_rates():
    runs = [word_errors(SAID, heard) for heard in (HEARD, SAID, HEARD[:2] + SAID[2:])]
    found = WordErrors.joined(runs)
    assert found.errors.tolist() == [4, 2, 0, 1] and found.words.tolist() == [9, 3, 6, 9]
    assert found.rate == pytest.approx(sum(run.rate for run in runs) / 3)
    with pytest.raises(InputError, match="are of different utterances"):
        WordErrors.joined([*runs, word_errors(["one"], ["one"])])


def test_what_a_voice_says_is_summed():
    found = word_errors(SAID, HEARD).by_voice(["b", "a", "b", "a"])
    assert found.substitutions.tolist() == [1, 0] and found.deletions.tolist() == [0, 2]
    assert found.insertions.tolist() == [1, 0] and found.words.tolist() == [5, 4]
    for voices, known in ((["a", "b", None, "b"], 3), (["a"], 1)):
        with pytest.raises(InputError, match=f"voices of {known} utterances are known, and .* 4;"):
            word_errors(SAID, HEARD).by_voice(voices)


def test_the_interval_resamples_voices():
    """Where some voices are heard worse, their number decides and not that of utterances."""
    voices, each = 40, 50
    hard = torch.rand(voices, generator=rng()).repeat_interleave(each)
    words = torch.randint(4, 12, (voices * each,), generator=rng(1)).double()
    wrong = torch.binomial(words, 0.3 * hard.double(), generator=rng(2))
    nothing = torch.zeros_like(words)
    found = WordErrors(wrong, nothing, nothing, words)
    voice_of = [f"voice {n // each}" for n in range(len(words))]
    summed = found.by_voice(voice_of)
    assert summed.rate == pytest.approx(found.rate)
    low, high = summed.interval(rng())
    # The linearised standard error of a ratio, of sums by voice.
    residuals = (wrong - found.rate * words).view(voices, each).sum(1)
    error = float(residuals.std()) * voices**0.5 / float(words.sum())
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    over_utterances = found.interval(rng())
    assert high - low > 2 * (over_utterances.high - over_utterances.low)
    # What all voices lose alike is sure in spite of them.
    lost = WordErrors(wrong + 1, nothing, nothing, words).by_voice(voice_of)
    between = lost.difference(summed, rng())
    assert between.decided and between.high - between.low < (high - low) / 5


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
