"""Speaking the world at set-up, and reading what has been spoken."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from pared.errors import InputError
from pared.worlds.speech import grammar, voices
from pared.worlds.speech.grammar import KINDS, SPLITS
from pared.worlds.speech.voices import VOICES, Request, Voice

if TYPE_CHECKING:
    from torch import Tensor

# How many utterances a kind has if nothing else is asked for.
SIZES = {
    "digits": {"train": 1200, "validation": 160, "heldout": 160},
    "commands": {"train": 1200, "validation": 160, "heldout": 160},
    "sentences": {"train": 5000, "validation": 200, "heldout": 400},
}


@dataclass(frozen=True, eq=False)
class Speech:
    """Utterances in memory; entry i of every list belongs together.

    Attributes:
        samples: all waveforms one after another, int16 at 16 kHz.
        lengths: samples of each utterance.
        transcripts: what is said, in lower case.
        speakers: labels of the voices.
        digest: of everything that decided the sounds.
    """

    samples: Tensor
    lengths: list[int]
    transcripts: list[str]
    speakers: list[str]
    digest: str

    @cached_property
    def starts(self) -> list[int]:
        """Where each utterance begins in `samples`."""
        return list(accumulate(self.lengths[:-1], initial=0))

    @cached_property
    def intents(self) -> list[str | None]:
        """What is wanted, see `grammar.intent_of`; None for what is no command."""
        return [grammar.intent_of(text) for text in self.transcripts]

    def __len__(self) -> int:
        return len(self.lengths)

    def waveform(self, index: int) -> Tensor:
        """One utterance, float32 (samples,) in [-1, 1] at 16 kHz."""
        start = self.starts[index]
        return self.samples[start : start + self.lengths[index]] / 32768

    def identity(self) -> str:
        """A short text that changes when the utterances change."""
        return self.digest


def load(
    kind: str = "sentences",
    split: str = "train",
    count: int | None = None,
    seed: int = 0,
    synthesizers: tuple[str, ...] = (voices.DEFAULT,),
    folder: str | Path | None = None,
) -> Speech:
    """Utterances of the speech world, spoken now where they haven't been before.

    The same arguments give the same utterances; a smaller `count` gives the first of them.

    Args:
        kind: "digits" (strings of two to five), "commands", or "sentences".
        split: "train"; "validation", the same voices with held-out texts; "heldout", held-out
            voices with other held-out texts.
        count: how many utterances, `SIZES` by default.
        seed: of texts, and of who says them how fast.
        synthesizers: of the voices, without repetition. Only what all machines have in common is
            comparable between them, so flite's voices are taken on demand.
        folder: where the spoken files are kept, the cache by default.

    Raises:
        InputError: there is no such kind, split or synthesizer; a synthesizer isn't installed; or
            the folder can't be written to.
    """
    wanted = requests(kind, split, count, seed, synthesizers)
    return _read(wanted, voices.speak_all(wanted, _cache() if folder is None else Path(folder)))


def joined(parts: Sequence[Speech]) -> Speech:
    """Several sets of utterances one after another as one."""
    import torch

    if len(parts) == 1:
        return parts[0]
    return Speech(
        samples=torch.cat([part.samples for part in parts]),
        lengths=[length for part in parts for length in part.lengths],
        transcripts=[text for part in parts for text in part.transcripts],
        speakers=[speaker for part in parts for speaker in part.speakers],
        digest=hashlib.sha256("-".join(part.digest for part in parts).encode()).hexdigest()[:16],
    )


def requests(
    kind: str,
    split: str,
    count: int | None = None,
    seed: int = 0,
    synthesizers: tuple[str, ...] = (voices.DEFAULT,),
) -> list[Request]:
    """What `load` has spoken: texts in turn over all voices, at random rates."""
    voices.check_known(synthesizers)
    if count is None and kind in KINDS and split in SPLITS:
        count = SIZES[kind][split]
    if count is not None and count < 1:
        raise InputError(f"{count} utterances can't be loaded; ask for at least one.")
    texts = grammar.texts(kind, split, count or 0, seed)
    group = "heldout" if split == "heldout" else "train"
    talkers = [voice for synthesizer in synthesizers for voice in VOICES[synthesizer][group]]
    rng = random.Random(f"{kind}-{split}-{seed}-voices")
    spoken: list[Request] = []
    turn: list[Voice] = []
    for text in texts:
        if not turn:
            turn = rng.sample(talkers, len(talkers))
        spoken.append(Request(text, turn.pop(), rng.randint(voices.SLOWEST, voices.FASTEST)))
    return spoken


def _read(wanted: list[Request], files: list[Path]) -> Speech:
    import torch

    from pared.worlds.speech import audio

    waveforms = [audio.read_pcm(file)[0] for file in files]
    names = "\n".join(file.name for file in files)
    return Speech(
        samples=torch.cat(waveforms),
        lengths=[len(waveform) for waveform in waveforms],
        transcripts=[request.text for request in wanted],
        speakers=[request.voice.label for request in wanted],
        digest=hashlib.sha256(names.encode()).hexdigest()[:16],
    )


def _cache() -> Path:
    from huggingface_hub import cached_assets_path

    try:
        return Path(cached_assets_path("pared", "speech"))
    except OSError as error:
        raise InputError(
            f"the cache for spoken files can't be made ({error.strerror}); set HF_HOME to a "
            "folder that can be written to."
        ) from error
