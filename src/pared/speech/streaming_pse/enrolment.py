"""Enrolling a user, and keeping what comes of it in a file.

The file is safetensors with the keys and values of every cross-attention (or the vector of a static
baseline) and, as metadata, a digest of the model that made it: of no use to another one.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pared.errors import InputError
from pared.speech.streaming_pse.layers import Enrolment
from pared.speech.streaming_pse.method import SAMPLE_RATE
from pared.speech.streaming_pse.model import PAUSE, StreamingPSEModel
from pared.speech.streaming_pse.stream import check_samples

# Seconds of recording, and of speech in it, below which there is too little to tell a voice by.
SHORTEST, LEAST_SPEECH = 1.0, 0.5
# Seconds of recording that are listened to, so that memory doesn't grow with the rest; pauses are
# what is far softer than the loudest moment in them.
LONGEST = 300.0
# Samples below this are silence: one step of 16 bits.
SILENCE = 2**-15
FORMAT = "pared-enrolment"


@torch.no_grad()
def enrol(model: StreamingPSEModel, recording: Tensor) -> Enrolment:
    """What the model needs to know one user by. Pauses are left out; no noisy-side layer runs.

    Args:
        model: the enhancer; not one with `conditioning="static_vector"`, whose embedding comes from
            elsewhere and goes through `StreamingPSEModel.encode`.
        recording: of the user alone, float (samples,), at 16 kHz; 3 to 10 s are best, and what
            comes after `LONGEST` isn't listened to.

    Returns:
        As `StreamingPSEModel.encode`, for a batch of one.

    Raises:
        InputError: silent, NaN, shorter than a second, or with less than half a second of speech.
    """
    settings = model.settings
    check_model(model)
    check_samples(recording)
    _check_length(len(recording) / SAMPLE_RATE, SHORTEST, "s")
    recording, where = recording[: round(LONGEST * SAMPLE_RATE)], ""
    if len(recording) == round(LONGEST * SAMPLE_RATE):
        where = f" in its first {LONGEST:g} s"
    recording = _centred(recording, settings.window)
    if recording.abs().amax() < SILENCE:
        raise InputError(f"the enrolment is silent{where}; record at least one second of speech.")
    if settings.conditioning == "none":
        return {}
    encoded, valid = model.encoded(recording[None].to(model.device))
    _check_length(
        int(valid.sum()) * settings.hop / SAMPLE_RATE, LEAST_SPEECH, f"s of speech{where}"
    )
    return {name: each.contiguous() for name, each in model.cached(encoded[:, valid[0]]).items()}


def _centred(recording: Tensor, frame: int) -> Tensor:
    """The recording, without an offset so large that its pauses would pass for speech.

    Not without its mean: many voices have one, which their pauses don't have.

    Args:
        recording: (samples,), at least a frame long.
        frame: in samples.
    """
    frames = recording.unfold(0, frame, frame)
    power, means = frames.var(dim=1, correction=0), frames.mean(dim=1)
    loudest = power.amax()
    pauses = means[power <= (PAUSE * loudest).clamp(min=SILENCE**2)]
    # Half of `PAUSE`, since an offset is one frequency less its mirror, of which sounds have both.
    if len(pauses) and (offset := pauses.median()).square() > PAUSE / 2 * loudest:
        return recording - offset
    return recording


def check_model(model: StreamingPSEModel) -> None:
    """Refuse a model that learns of nobody by a recording; `enrol` does it too.

    Raises:
        InputError: it takes embeddings from elsewhere.
    """
    if model.settings.conditioning == "static_vector":
        raise InputError(
            "this model (conditioning=static_vector) takes a speaker's embedding from another "
            "encoder, not a recording; give it to StreamingPSEModel.encode."
        )


def _check_length(seconds: float, least: float, unit: str) -> None:
    if seconds < least:
        raise InputError(
            f"the enrolment has {seconds:.2f} {unit}; it needs at least {least:g}, and 3 to 10 "
            "seconds are best."
        )


def save(path: str | Path, model: StreamingPSEModel, enrolment: Enrolment) -> None:
    """Keep an enrolment in a file (.safetensors), whose folder is made where there is none.

    Raises:
        InputError: it can't be written.
    """
    metadata = {
        "format": FORMAT,
        "model": model.digest(),
        "conditioning": model.settings.conditioning,
    }
    tensors = {name: each.detach().cpu().contiguous() for name, each in enrolment.items()}
    path = Path(path)
    # A name of its own: another command may write the same file.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # where it wasn't written
            partial.unlink()
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise InputError(f"{path} can't be written ({reason}); choose another place.") from None


def load(path: str | Path, model: StreamingPSEModel) -> Enrolment:
    """An enrolment from its file.

    Raises:
        InputError: there is none, it's damaged, or another model made it.
    """
    try:
        if not Path(path).is_file():
            raise InputError(f"there is no enrolment {str(path)!r}; make one with `pared enrol`.")
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            metadata = file.metadata() or {}
            # Copies: safetensors' own lie in the file, which may be written anew meanwhile.
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"{path} is no enrolment ({reason}); make one with `pared enrol`."
        ) from None
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is no enrolment, though a safetensors file; see `pared enrol`.")
    if metadata["model"] != (digest := model.digest()):
        raise InputError(
            f"{path} was made by another model ({metadata['model'][:8]}, this one is "
            f"{digest[:8]}); run `pared enrol` again with this one."
        )
    return found
