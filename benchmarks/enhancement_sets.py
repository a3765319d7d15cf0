"""What enhancers are judged on: voices and words that none has learnt from, mixed from fixed seeds.

*Clips* are mixtures as the training has them: one other talker, noise, now and then a room, now and
then the target alone, now and then all but the target. *Pairs* are two talkers equally loud and
nothing else, of whom either can be enrolled, and of whom the first says one whole sentence.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pared.recipe import Recipe
from pared.speech.streaming_pse.model import StreamingPSEModel
from pared.speech.streaming_pse.training import data_of
from pared.training import generator_for
from pared.worlds.draws import Draw
from pared.worlds.speech.mixtures import Mixture, headroom, rms, scaled

SECONDS = 4.0
# Root mean square of a talker, -25 dB of full scale.
LEVEL = 10 ** (-25 / 20)


class Pair(NamedTuple):
    """Two talkers: what each says, (samples,), other recordings of them, and the first one's words.

    Attributes:
        mixture: the sum of both.
        target: the first.
        other: the second.
        mine: an enrolment of the first.
        theirs: an enrolment of the second.
        said: what the first says.
    """

    mixture: Tensor
    target: Tensor
    other: Tensor
    mine: Tensor
    theirs: Tensor
    said: str


def clips(plan: Recipe, count: int) -> list[Mixture]:
    """Mixtures of held-out voices as the recipe mixes, at their own pitch, four seconds each."""
    mixing = replace(plan.data.mixing, pitch=(1.0, 1.0))
    table = plan.data.model_copy(update={"seconds": SECONDS, "mixing": mixing})
    data = data_of(table, "heldout")
    order = torch.randperm(len(data), generator=generator_for(7)).tolist()
    return [data.mixer.mixture(order[n % len(data)], generator_for(7, n)) for n in range(count)]


def pairs(plan: Recipe, count: int) -> list[Pair]:
    """Two held-out talkers equally loud."""
    mixer = data_of(plan.data, "heldout").mixer
    talkers, found = mixer.talkers, []
    for number in range(count):
        generator = generator_for(8, number)
        draw = Draw(generator)
        utterance = draw.below(len(talkers.speech))
        first = talkers.speaker_of(utterance)
        second = (first + 1 + draw.below(len(talkers) - 1)) % len(talkers)
        theirs = talkers.utterances[second]
        _, kept = talkers.divided(utterance, generator)
        said, theirs_kept = talkers.divided(theirs[draw.below(len(theirs))], generator)
        target = talkers.speech.waveform(utterance)
        target = LEVEL / rms(target) * target
        other = scaled(talkers.strung(said, len(target), generator), target, 0.0)
        gain = headroom(target + other)
        enrolments = [mixer.enrolment(each, generator) for each in (kept, theirs_kept)]
        words = str(talkers.speech.transcripts[utterance])
        found.append(Pair(gain * (target + other), gain * target, gain * other, *enrolments, words))
    return found


@torch.no_grad()
def kept(model: StreamingPSEModel, noisy: Tensor, told: Tensor) -> Tensor:
    """A recording (samples,) enhanced, given what the model encodes: an enrolment or embedding."""
    return model.enhance(noisy[None], model.encode(told[None]))[0]
