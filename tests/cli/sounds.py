"""Recordings for the speech commands: good ones, those of other forms, and faulty ones."""

import os
import wave
from pathlib import Path

import pytest
import torch

from pared.speech.streaming_pse.method_checks import noise
from pared.worlds.speech import audio

soundfile = pytest.importorskip("soundfile")

WHOLE = noise(3 * 16000)

# Whatever the rate, the number of channels and the type of sample, it's taken.
FORMS = [
    {"rate": 44100, "channels": 2, "subtype": "FLOAT", "format": "WAV"},
    {"rate": 16000, "channels": 1, "subtype": "DOUBLE", "format": "WAV"},
    {"rate": 8000, "channels": 1, "subtype": "PCM_U8", "format": "WAV"},
    {"rate": 8000, "channels": 2, "subtype": "PCM_16", "format": "WAV"},
    {"rate": 44100, "channels": 1, "subtype": "PCM_32", "format": "WAV"},
    {"rate": 16000, "channels": 2, "subtype": "PCM_24", "format": "FLAC"},
    {"rate": 48000, "channels": 1, "subtype": "VORBIS", "format": "OGG"},
]

# What is wrong with a recording, and what is said of it.
FAULTS = [
    ("missing", "'x.wav' doesn't exist or is no file"),
    ("empty", "'x.wav' is empty"),
    ("text", "'x.wav' is damaged, or no WAV, FLAC, OGG or MP3"),
    ("silent", "'x.wav' is silent from beginning to end"),
    ("cut", "'x.wav' is cut off: its last"),
    ("nan", "'x.wav' has a sample that is NaN or infinite, at 0.006 s"),
]


def stored(folder: Path, form: dict) -> Path:
    """Two seconds in one of `FORMS`."""
    path = folder / f"noisy.{form['format'].lower()}"
    samples = noise(2 * form["rate"], form["channels"]).numpy()
    soundfile.write(path, samples, form["rate"], subtype=form["subtype"], format=form["format"])
    return path


def faulty(path: Path, fault: str) -> None:
    """A recording with one of `FAULTS`, or one that is `short`."""
    if fault == "missing":
        return
    if fault in ("empty", "text"):
        path.write_bytes(b"not a sound" if fault == "text" else b"")
        return
    samples = noise(8000 if fault == "short" else 32000).numpy()
    samples *= fault != "silent"
    samples[100] = float("nan") if fault == "nan" else samples[100]
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    if fault == "cut":
        os.truncate(path, 50000)


def pcm(samples: torch.Tensor) -> bytes:
    """16-bit samples, as they are piped."""
    return audio.to_int16(samples).numpy().tobytes()


def heard(data: bytes) -> torch.Tensor:
    """Samples from 16-bit ones."""
    if not data:
        return torch.empty(0)
    return torch.frombuffer(bytearray(data), dtype=torch.int16).float() / 32768


def read(path: Path) -> torch.Tensor:
    """The samples of a WAV file as `pared enhance` writes it."""
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        return heard(file.readframes(file.getnframes()))


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal, once stored as 16 bits."""
    # Half a step of 16 bits, and a step where rounding decides otherwise.
    torch.testing.assert_close(got, wanted.clamp(-1, 1), rtol=0, atol=1.6 / 32768)
