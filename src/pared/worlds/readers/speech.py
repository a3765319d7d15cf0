"""Readers for users' own recordings: LibriSpeech, Common Voice, DNS challenge, `datasets`.

    >>> from pared.worlds.readers.speech import read_noise_corpus, read_speech
    >>> corpus = read_speech("LibriSpeech/train-clean-100")
    >>> corpus.waveform(0), corpus.transcripts[0], corpus.speakers[0]

Every layout gives the same thing as the speech world does, and trains the same way
(`pared.worlds.speech.data`). Recordings are read as they are drawn, in any format and at any rate.
Nothing is left out in silence: what can't be used is refused, or skipped with a warning, by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pared.errors import InputError
from pared.worlds.readers import speech_layouts as layouts
from pared.worlds.readers.items import report
from pared.worlds.readers.speech_layouts import Recording

if TYPE_CHECKING:
    from torch import Tensor


def read_speech(
    source: str | Path,
    split: str | None = None,
    on_bad: str = "refuse",
    thorough: bool = True,
    audio_column: str | None = None,
    transcript_column: str | None = None,
) -> Corpus:
    """Transcribed recordings from wherever they are.

    Args:
        source: one of
            - a folder laid out as LibriSpeech is, or a part of one: FLAC (or WAV) files beside a
              `*.trans.txt` that holds their words;
            - a folder laid out as Common Voice is: `clips` beside .tsv files;
            - a dataset: its name on the hub, a folder written by `save_to_disk`, a folder of
              parquet, or one .parquet file. Columns named `speaker_id`, `client_id` or `speaker`
              say who speaks.
        split: LibriSpeech's part ("test-clean"; all by default), Common Voice's .tsv ("train" by
            default), or a dataset's split ("train", or the only one, by default).
        on_bad: what to do with recordings that can't be read or have no transcript: "refuse" all,
            or "skip" those with one warning that names them.
        thorough: decode every recording once before this returns, so that silent or damaged ones
            come to light before any work starts; it takes minutes for a hundred hours. Otherwise
            only headers are looked at, and such a recording is refused when it is drawn.
        audio_column: of a dataset, if not found by itself.
        transcript_column: of a dataset, if not found by itself.

    Raises:
        InputError: the source isn't there, holds no transcribed recordings, or holds bad ones that
            are to be refused; or a needed package is missing.
    """
    _check(on_bad)
    folder = Path(source).expanduser()
    if folder.is_file() and folder.suffix != ".parquet":
        raise InputError(
            f"the file {str(source)!r} is no corpus; give a folder, a dataset or a .parquet file."
        )
    if folder.is_dir() and layouts.is_librispeech(folder):
        recordings = layouts.librispeech(folder, split)
    elif folder.is_dir() and layouts.is_common_voice(folder):
        recordings = layouts.common_voice(folder, split)
    else:
        recordings = layouts.table(str(source), split, audio_column, transcript_column)
    return Corpus(str(source), _examined(recordings, thorough), on_bad)


@dataclass(frozen=True)
class NoiseCorpus:
    """What the DNS challenge provides.

    Attributes:
        clean: clean speech; speakers are known from file names, or else from folders.
        noise: noises, where there is a folder of them.
        noisy: noisy speech, where it comes with its clean side: entry i is that of `clean`.
    """

    clean: Corpus
    noise: Corpus | None
    noisy: Corpus | None


def read_noise_corpus(
    source: str | Path, on_bad: str = "refuse", thorough: bool = True
) -> NoiseCorpus:
    """Speech and noise laid out as in the DNS challenge.

    Args:
        source: a folder with, at any depth, a folder `clean` (or `clean_fullband` ...) of speech
            and a folder `noise` (or `noise_fullband` ...), as training sets have them; or one with
            `clean` and `noisy`, whose files are told together by `fileid_N` or by their names, as
            test sets and synthesised training sets have them. Impulse responses are left out:
            rooms are simulated.
        on_bad: what to do with recordings that can't be read: "refuse" all, or "skip" those with
            one warning that names them.
        thorough: see `read_speech`.

    Raises:
        InputError: the source isn't there or laid out otherwise; holds bad recordings that are to
            be refused; or `soundfile` isn't installed.
    """
    _check(on_bad)
    folder = Path(source).expanduser()
    clean, noise, noisy = (_examined(side, thorough) for side in layouts.challenge(folder))
    if noisy:
        pairs = list(zip(clean, noisy, strict=True))
        clean = [_paired(one, other, "noisy") for one, other in pairs]
        noisy = [_paired(other, one, "clean") for one, other in pairs]
    name = str(source)
    return NoiseCorpus(
        Corpus(name, clean, on_bad),
        Corpus(name, noise, on_bad) if noise else None,
        Corpus(name, noisy, on_bad) if noisy else None,
    )


def read_noises(source: str | Path, on_bad: str = "refuse") -> Corpus:
    """Noises to mix with speech; no speech is read.

    Args:
        source: a folder of recordings, at any depth; of one laid out as in the DNS challenge only
            its folder `noise` (or `noise_fullband` ...).
        on_bad: see `read_noise_corpus`.

    Raises:
        InputError: the source isn't there or holds no noises; holds bad recordings that are to be
            refused; or `soundfile` isn't installed.
    """
    _check(on_bad)
    found = layouts.noises(Path(source).expanduser())
    return Corpus(str(source), _examined(found, thorough=True), on_bad)


class Corpus:
    """Recordings that have been examined; entry i of every list belongs together.

    Args:
        source: what the user asked to read, for messages.
        recordings: as examined.
        on_bad: "refuse" or "skip".

    Attributes:
        keys: the recordings' names within the source.
        transcripts: what is said; None where it isn't known.
        speakers: who says it; None where it isn't known.

    Raises:
        InputError: there is nothing usable, or something unusable that is to be refused.
    """

    def __init__(self, source: str, recordings: list[Recording], on_bad: str) -> None:
        if not recordings:
            raise InputError(f"{source!r} lists no recordings; give a corpus that holds some.")
        faults = [f"{one.key} ({one.fault})" for one in recordings if one.fault]
        if faults:
            report(
                source, faults, len(recordings), on_bad, "a sound that can be read, and its words"
            )
        self.source = source
        self._recordings = [one for one in recordings if not one.fault]
        self.keys = [one.key for one in self._recordings]
        self.transcripts = [one.transcript for one in self._recordings]
        self.speakers = [one.speaker for one in self._recordings]

    def __len__(self) -> int:
        return len(self._recordings)

    @property
    def lengths(self) -> list[int]:
        """Samples of each recording at 16 kHz."""
        from pared.worlds.speech.audio import RATE

        return [-(-one.frames * RATE // one.rate) for one in self._recordings]

    def waveform(self, index: int) -> Tensor:
        """One recording, float32 (samples,) in [-1, 1], mono, at 16 kHz.

        Raises:
            InputError: it turns out to be damaged or silent, or is no longer there.
        """
        from pared.worlds.speech import audio

        recording = self._recordings[index]
        try:
            return audio.decoded(recording.content())
        except audio.Unreadable as fault:
            raise InputError(
                f"{recording.key} in {self.source!r} {fault}; mend or remove it, or read with "
                "thorough=True and on_bad='skip'."
            ) from fault

    def identity(self) -> str:
        """A short text that changes when recordings, transcripts or speakers change."""
        told = [(one.key, one.transcript, one.speaker, one.frames) for one in self._recordings]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _check(on_bad: str) -> None:
    if on_bad not in ("refuse", "skip"):
        raise InputError(f"on_bad can't be {on_bad!r}; it is 'refuse' or 'skip'.")


def _examined(recordings: Iterable[Recording], thorough: bool) -> list[Recording]:
    """Recordings with their lengths, and with what is wrong with them."""
    from huggingface_hub.utils import tqdm

    listed = list(recordings)
    bar = tqdm(listed, desc="reading", unit="file", name="pared.speech", disable=not thorough)
    return [one if one.fault else _with_frames(one, thorough) for one in bar]


def _with_frames(recording: Recording, thorough: bool) -> Recording:
    from pared.worlds.speech import audio

    try:
        content = recording.content()
        with audio.opened(content) as file:
            frames, rate = audio.frames_of(file), file.samplerate
        if thorough:
            audio.decoded(content)
    except audio.Unreadable as fault:
        return replace(recording, fault=str(fault))
    return replace(recording, frames=frames, rate=rate)


def _paired(one: Recording, other: Recording, name: str) -> Recording:
    """A recording that can't be used if the other side of its pair can't."""
    if other.fault and not one.fault:
        return replace(one, fault=f"its {name} side {other.fault}")
    return one
