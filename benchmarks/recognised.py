"""What a recogniser gets wrong in whole recordings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pared.bench.words import WordErrors, word_errors
from pared.speech.recognition import Recogniser, transcribe
from pared.training import generator_for
from pared.worlds.speech.data import TranscriptData
from pared.worlds.speech.talkers import Utterances


def sounds_of(said: Utterances, snr: tuple[float, float] | None) -> list[Tensor]:
    """Utterances as recognisers are trained on them, (samples,) each; the same at every call."""
    data = TranscriptData(said, snr=snr)
    drawn = (data.batch(torch.tensor([n]), generator_for(7, n)) for n in range(len(data)))
    return [batch["waveform"][0] for batch in drawn]


def errors_of(recogniser: Recogniser, said: Sequence[str], sounds: Sequence[Tensor]) -> WordErrors:
    """The errors in what it writes down of sounds, given what is said in them."""
    heard = [" ".join(word.text for word in transcribe(recogniser, [sound])) for sound in sounds]
    return word_errors(said, heard)
