"""Who speaks, and speaking: espeak-ng, and flite where it is installed, into a cache of WAV files.

A voice is an accent, a variant (the shape of a vocal tract) and a pitch; how fast it speaks is
drawn for each utterance. Held-out voices have variants that no training voice has.

A file's name tells everything that decided its sound: synthesizer and version, voice, rate, text.
So a file that is there never has to be spoken again, and processes may speak side by side.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pared.errors import InputError

DEFAULT = "espeak-ng"  # which all machines can have
SYNTHESIZERS = (DEFAULT, "flite")
SLOWEST, FASTEST = 140, 200  # words per minute
EDITION = 1  # of what happens to a synthesizer's output; part of the files' names

INSTALL = {
    "espeak-ng": "`apt install espeak-ng` (Debian, Ubuntu), `dnf install espeak-ng` (Fedora), "
    "`brew install espeak-ng` (macOS), or github.com/espeak-ng/espeak-ng/releases (Windows)",
    "flite": "`apt install flite` (Debian, Ubuntu) or `dnf install flite` (Fedora)",
}


@dataclass(frozen=True)
class Voice:
    """One talker.

    Attributes:
        synthesizer: one of `SYNTHESIZERS`.
        name: its own name for the voice; "en-us+f3" is accent and variant of espeak-ng.
        pitch: from 0 to 99, where the synthesizer takes one.
    """

    synthesizer: str
    name: str
    pitch: int | None = None

    @property
    def label(self) -> str:
        """What tells the voice from all others, fit for the name of a folder."""
        return self.name if self.pitch is None else f"{self.name}-p{self.pitch}"


@dataclass(frozen=True)
class Request:
    """What to say, who says it, and how fast.

    Attributes:
        text: lower case, without punctuation.
        voice: the talker.
        rate: words per minute.
    """

    text: str
    voice: Voice
    rate: int

    @property
    def file(self) -> Path:
        """Where the utterance lies within the cache."""
        voice = self.voice
        version = version_of(voice.synthesizer)
        told = repr((EDITION, version, voice.label, self.rate, self.text))
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
        return Path(f"{voice.synthesizer}-{version}", voice.label, f"{digest}.wav")


def _espeak(*groups: tuple[str, str, tuple[int, ...]]) -> tuple[Voice, ...]:
    return tuple(
        Voice("espeak-ng", f"{accent}+{variant}", pitch)
        for accent, variants, pitches in groups
        for variant in variants.split()
        for pitch in pitches
    )


# Accents are the names of espeak-ng's files: British English is "en". Of a language, as "en-gb",
# espeak-ng takes the same accent but leaves out the variant in silence, and all voices are one.
# Pitches lie on both sides of the variant's own, which is 50.
VOICES: dict[str, dict[str, tuple[Voice, ...]]] = {
    "espeak-ng": {
        "train": _espeak(
            ("en-us", "f1 f4 m1 m3 Alicia Alex anika Denis", (35, 65)),
            ("en", "f2 m2 m4 m7 Annie pedro belinda Marco", (35, 65)),
            ("en-gb-scotland", "f2 m6 steph david shelby Mario", (50,)),
            ("en-us-nyc", "f1 m3 Annie klatt2 Nguyen gustave", (50,)),
            ("en-gb-x-rp", "f4 m1 grandma Jacky robert sandro", (50,)),
            ("en-029", "Alicia m7 Michael victor ed edward", (50,)),
        ),
        "heldout": _espeak(
            ("en-us", "f3 m8 Andrea paul", (50,)),
            ("en", "f5 m5 linda Hugo", (50,)),
        ),
    },
    "flite": {
        "train": (Voice("flite", "awb"), Voice("flite", "kal16")),
        "heldout": (Voice("flite", "slt"), Voice("flite", "rms")),
    },
}


def speak_all(requests: Iterable[Request], folder: Path) -> list[Path]:
    """Files with the utterances, in order; what isn't there yet is spoken on all cores.

    Ctrl-C ends it at once, and what has been spoken stays.

    Args:
        requests: the utterances.
        folder: the cache.

    Raises:
        InputError: a synthesizer or a voice is missing, or the folder can't be written to.
    """
    from huggingface_hub.utils import tqdm

    files = {request: folder / request.file for request in requests}
    missing = [request for request, file in files.items() if not file.exists()]
    if not missing:
        return list(files.values())
    for voice in {request.voice for request in missing}:
        check_voice(voice)
    pool = ThreadPoolExecutor(_cores())
    pending = [pool.submit(_store, request, files[request]) for request in missing]
    done = 0
    try:
        with tqdm(
            total=len(missing), desc="speaking", unit="utterance", name="pared.speech"
        ) as bar:
            for future in as_completed(pending):
                future.result()
                done += 1
                bar.update()
    except KeyboardInterrupt:
        tqdm.write(f"Stopped with {done} of {len(missing)} spoken; they stay in {folder}.")
        raise
    except OSError as error:
        raise InputError(
            f"utterances can't be kept in {str(folder)!r} ({error.strerror}); "
            "set HF_HOME to a folder that can be written to."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return list(files.values())


def _store(request: Request, file: Path) -> None:
    """Speak into the cache; a file appears there only when it is whole."""
    from pared.worlds.speech import audio

    waveform = audio.trimmed(speak(request))
    file.parent.mkdir(parents=True, exist_ok=True)
    audio.write(file, waveform)


def speak(request: Request):
    """One utterance as the synthesizer gives it, float32 (samples,) at `audio.RATE`.

    Raises:
        InputError: the synthesizer is missing or fails.
    """
    from pared.worlds.speech import audio

    voice = request.voice
    with tempfile.TemporaryDirectory(prefix="pared-") as folder:
        text, sound = Path(folder, "said.txt"), Path(folder, "said.wav")
        text.write_text(request.text)
        if voice.synthesizer == "espeak-ng":
            options = ["-v", voice.name, "-s", str(request.rate), "-p", str(voice.pitch)]
            options += ["-f", str(text), "-w", str(sound)]
        else:
            # Flite's own pace is about 170 words per minute.
            options = ["-voice", voice.name, "--setf", f"duration_stretch={170 / request.rate:.3f}"]
            options += ["-f", str(text), "-o", str(sound)]
        run(voice.synthesizer, *options)
        if not sound.exists() or not sound.stat().st_size:
            raise InputError(
                f"{voice.synthesizer} said nothing for {request.text!r} with the voice "
                f"{voice.name!r}; install it anew."
            )
        samples, rate = audio.read_pcm(sound)
    return audio.resampled(samples / 32768, rate)


def check_known(synthesizers: Sequence[str]) -> None:
    """See that names are those of synthesizers, each once.

    Raises:
        InputError: one isn't.
    """
    for number, name in enumerate(synthesizers):
        if name not in SYNTHESIZERS:
            raise InputError(
                f"there is no synthesizer {name!r}; known are {', '.join(SYNTHESIZERS)}."
            )
        if name in synthesizers[:number]:
            raise InputError(f"the synthesizer {name!r} is given twice; once is enough.")


def check_voice(voice: Voice) -> None:
    """See that a voice is there: espeak-ng takes another one in silence.

    Raises:
        InputError: it isn't.
    """
    for part, known in zip(voice.name.split("+"), known_voices(voice.synthesizer), strict=False):
        if part not in known:
            raise InputError(
                f"{voice.synthesizer} {version_of(voice.synthesizer)} has no voice {part!r}; "
                "install a newer version."
            )


@cache
def known_voices(synthesizer: str) -> tuple[frozenset[str], ...]:
    """Names of voices; of espeak-ng the accents, then the variants."""
    if synthesizer == "flite":
        return (frozenset(run("flite", "-lv").partition(":")[2].split()),)
    # Columns are priority, language, age and sex, name, file. An accent's file is "gmw/en-US", and
    # found in small letters, too; a variant's is "!v/m3".
    rows = run(synthesizer, "--voices=en").replace("\\", "/").splitlines()[1:]
    accents = {row.split()[4].rpartition("/")[2].lower() for row in rows}
    listed = run(synthesizer, "--voices=variant").replace("\\", "/")
    variants = {part.removeprefix("!v/") for part in listed.split() if part.startswith("!v/")}
    return frozenset(accents), frozenset(variants)


@cache
def version_of(synthesizer: str) -> str:
    """The version of an installed synthesizer.

    Raises:
        InputError: it isn't installed.
    """
    # Printed as eSpeak NG text-to-speech: 1.51  Data at: ..., or version: flite-2.2-current Sep ...
    told = run(synthesizer, "--version")
    told = told.rpartition("version:" if synthesizer == "flite" else "speech:")[2].split()[0]
    return told.removeprefix("flite-")


def run(synthesizer: str, *options: str) -> str:
    """What a synthesizer prints.

    Raises:
        InputError: it isn't installed, or fails.
    """
    command = [synthesizer, *options]
    try:
        # In a group of its own: Ctrl-C must not leave half an utterance.
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    except FileNotFoundError as error:
        raise InputError(
            f"the speech world is spoken by {synthesizer}, which isn't installed; install it with "
            f"{INSTALL[synthesizer]}."
        ) from error
    # Flite ends with 1 after telling its version.
    if done.returncode and "--version" not in options:
        told = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"{synthesizer} failed with code {done.returncode} ({told}); try "
            f"`{' '.join(command[:3])}` in a terminal."
        )
    return done.stdout


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
