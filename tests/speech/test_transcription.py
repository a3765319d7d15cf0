"""Long recordings: windows that put together are the whole, and hold no more than a window."""

import pytest
import torch

from pared.speech.recognition import transcribe
from pared.speech.recognition.transcription import CONTEXT, STEP, windowed
from tests.speech import recognisers
from tests.speech.recognisers import noise

WINDOW = {"step": 1.0, "context": 0.5}


def deaf_to_the_rest():
    """A recogniser whose frames hear a quarter of a second: no attention, and no loudness."""
    recogniser = recognisers.conformer(num_hidden_layers=0)
    recogniser.extractor.do_normalize = False
    return recogniser


@pytest.mark.parametrize("samples", [900, 16000, 31999, 32000, 32001, 40000, 100_000])
@pytest.mark.parametrize("piece", [700, 16000, 10**6])
def test_windows_put_together_are_the_whole(samples, piece):
    recogniser, sound = deaf_to_the_rest(), noise(samples)
    found = torch.cat(list(windowed(recogniser, sound.split(piece), **WINDOW)))
    whole = recogniser.scores(sound)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)  # rounding of other lengths


@pytest.mark.parametrize("kind", recognisers.ALL)
def test_every_frame_comes_once_for_every_kind_of_model(kind):
    recogniser, sound = recognisers.ALL[kind](), noise(123_456)
    found = torch.cat(list(windowed(recogniser, sound.split(5000), **WINDOW)))
    # Features of a window begin and end a frame sooner or later than those of the whole.
    assert abs(len(found) - len(recogniser.scores(sound))) <= 1
    hop = {"conformer": 320, "wav2vec2": 320, "bert": 320, "parakeet": 1280}
    assert recogniser.hop == hop[kind]
    torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(len(found)))


def test_an_adapter_makes_fewer_frames_and_no_window_is_lost():
    """Behind some encoders three convolutions leave one frame of eight."""
    recogniser, sound = recognisers.wav2vec2(add_adapter=True, output_hidden_size=32), noise(99_840)
    assert recogniser.hop == 8 * 320
    found = list(windowed(recogniser, sound.split(5000), **WINDOW))
    assert len(found) > 3 and all(map(len, found))
    assert sum(map(len, found)) == len(recogniser.scores(sound)) == 39


def test_an_hour_takes_no_more_memory_than_a_minute(monkeypatch):
    recogniser = deaf_to_the_rest()
    heard = []

    def scores(self, sound):
        heard.append(len(sound))
        return torch.zeros(len(sound) // 320, len(recognisers.CHARACTERS)).log_softmax(dim=-1)

    monkeypatch.setattr(type(recogniser), "scores", scores)
    pieces = (torch.zeros(16000) for _ in range(3600))  # each gone once it was heard
    assert sum(len(one) for one in windowed(recogniser, pieces)) == 3600 * 50
    assert max(heard) == round((STEP + 2 * CONTEXT) * 16000)


def test_words_come_before_the_recording_ends(monkeypatch):
    recogniser = recognisers.conformer()
    given = []

    def scores(self, sound):
        frames = torch.zeros(len(sound) // 320, len(recognisers.CHARACTERS))
        frames[::10, 2] = frames[5::10, 1] = 50.0  # "a", then a space, over and over
        frames[:, 0] += 20.0
        return frames.log_softmax(dim=-1)

    def pieces():
        for number in range(60):
            given.append(number)
            yield torch.zeros(16000)

    monkeypatch.setattr(type(recogniser), "scores", scores)
    words = transcribe(recogniser, pieces())
    first = next(words)
    assert (first.text, first.start, first.end) == ("a", 0.0, pytest.approx(0.02))
    assert len(given) < 30
    assert 1 + len(list(words)) == 60 * 5


@pytest.mark.parametrize("beam", [1, 4])
def test_a_random_model_writes_something_down(beam):
    recogniser = recognisers.conformer()
    words = list(transcribe(recogniser, noise(48000).split(4096), beam))
    assert words and all(0 <= word.start < word.end <= 3 for word in words)
    assert [word.start for word in words] == sorted(word.start for word in words)


def test_nothing_at_all_says_nothing():
    assert list(transcribe(recognisers.conformer(), [])) == []
