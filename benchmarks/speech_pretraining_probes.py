"""What frozen encoders are asked for: the words of digits, who speaks, what a command wants.

The probes are those of the paper at our scale: two layers of an LSTM, of 64 units in either
direction, on the weighted layers, by Adam at 2e-4, batches of 4 for words (by CTC) and of 2 for
intents. Who speaks is asked of a linear probe, among the voices that it learns from; the paper has
an ECAPA-TDNN which verifies unknown ones.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pared.bench.words import word_errors
from pared.speech import probing
from pared.speech.probing import Examples, Probe
from pared.worlds import speech
from pared.worlds.speech.characters import Characters
from pared.worlds.speech.grammar import COMMANDS
from pared.worlds.speech.world import Speech

# Makes features of sounds, (frames, layers, width) each.
Reader = Callable[[list[Tensor]], list[Tensor]]
Heard = tuple[Speech, list[Tensor]]

UNITS = 64
CHARACTERS = Characters()


class Task(NamedTuple):
    """What a probe is asked for, and how it is trained.

    Attributes:
        about: what its figure says.
        kind: of the speech world.
        split: that it's judged on; training has none of its texts, and in "heldout" not the voices.
        units: of the LSTM, in each direction; None: a linear probe.
        rate: of Adam.
        batch: utterances of a step.
        epochs: over what it learns from.
    """

    about: str
    kind: str
    split: Literal["validation", "heldout"]
    units: int | None
    rate: float
    batch: int
    epochs: int


TASKS = {
    "words": Task("WER of digits, LSTM probe", "digits", "heldout", UNITS, 2e-4, 4, 20),
    "voices": Task("voices named, linear probe", "digits", "validation", None, 1e-2, 8, 20),
    "intents": Task("intents named, LSTM probe", "commands", "heldout", UNITS, 2e-4, 2, 8),
}


def probed(reader: Reader, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Word error rate, and shares of voices and intents that are named rightly.

    Args:
        reader: what is probed.
        options: of the bench.
        seed: of the probes.
    """
    train, validation, judged = options.utterances
    heard: dict[tuple[str, str], Heard] = {}
    for task in TASKS.values():
        for split, count in (("train", train + validation), (task.split, judged)):
            if (task.kind, split) not in heard:
                world = speech.load(task.kind, split, count)
                sounds = [world.waveform(n) for n in range(count)]
                heard[task.kind, split] = world, reader(sounds)
    return {
        name: answered(name, heard[task.kind, "train"], heard[task.kind, task.split], train, seed)
        for name, task in TASKS.items()
    }


def answered(name: str, known: Heard, judged: Heard, train: int, seed: int) -> float:
    """How well a probe does that learns from the first `train` of the known utterances.

    The others of them tell which epoch was best.
    """
    task, voices = TASKS[name], sorted({*known[0].speakers, *judged[0].speakers})
    parts = [
        Examples(features, targets_of(name, world, voices)) for world, features in (known, judged)
    ]
    learnt, chosen = (
        Examples(parts[0].features[part], parts[0].targets[part])
        for part in (slice(train), slice(train, None))
    )
    classes = {"words": len(CHARACTERS), "voices": len(voices), "intents": len(COMMANDS)}
    _, layers, width = learnt.features[0].shape
    torch.manual_seed(seed)
    probe = Probe(layers, width, classes[name], task.units)
    probing.fit(probe, learnt, chosen, task.epochs, task.batch, task.rate, seed=seed)
    if name == "words":
        said = judged[0].transcripts
        return word_errors(said, probing.transcripts(probe, parts[1], CHARACTERS)).rate
    return probing.accuracy(probe, parts[1])


def targets_of(name: str, world: Speech, voices: Sequence[str]) -> list[Tensor]:
    """What a probe learns to answer of every utterance: letters, or a class."""
    if name == "words":
        return [torch.tensor(CHARACTERS.encode(text)) for text in world.transcripts]
    if name == "voices":
        return [torch.tensor(voices.index(voice)) for voice in world.speakers]
    return [torch.tensor(COMMANDS.index(str(intent))) for intent in world.intents]
