"""How good enhanced speech is: ratios, published measures, and what is special to one wanted voice.

SI-SDR asks for the waveform, PESQ (ITU-T P.862.2, wideband) for how it sounds, ESTOI (Jensen and
Taal 2016) for how well it's understood; DNSMOS guesses what listeners would say and needs no
reference. None of them tells a model that is silent from one that keeps the wrong voice: that is
what `oversuppression`, `remainder` and `flips` are for.

Signals are (batch, samples) at 16 kHz, aligned: what a stream gives out late has to be moved back.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from pared.errors import InputError
from pared.objectives.enhancement import SILENT, decibel, magnitudes, si_sdr, spectra
from pared.worlds.optional import need
from pared.worlds.speech.audio import RATE

EXTRA = "measure-speech"
# PESQ can't tell anything of less.
SHORTEST = RATE // 4
# Frames of the target further below its loudest one are pauses (-40 dB, as a ratio of powers).
PAUSE = 1e-4
# Share of a frame's compressed energy that may be missing before the frame counts as suppressed.
MISSING = 0.1


def improvement(estimate: Tensor, target: Tensor, noisy: Tensor) -> Tensor:
    """SI-SDR of the estimate minus that of the noisy signal, in dB, (batch,).

    Without sense where the target is silent, or is all there is.
    """
    estimate, target, noisy = _signals(estimate, target, noisy)
    return si_sdr(estimate, target) - si_sdr(noisy, target)


def pesq(estimate: Tensor, target: Tensor) -> Tensor:
    """PESQ wideband, 1.0 to 4.64, (batch,); NaN where it finds no speech in one of the two.

    Raises:
        InputError: `pesq` isn't installed, or the signals are shorter than a quarter of a second.
    """
    module: Any = need("pesq", extra=EXTRA)
    estimate, target = _signals(estimate, target)
    if estimate.shape[1] < SHORTEST:
        raise InputError(
            f"the signals last {estimate.shape[1] / RATE:.3f} s; PESQ needs at least "
            f"{SHORTEST / RATE:g} s."
        )
    codes = module.PesqError.RETURN_VALUES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # silence is divided by its peak
        found = [
            module.pesq(RATE, wanted.numpy(), ours.numpy(), "wb", on_error=codes)
            for ours, wanted in zip(estimate, target, strict=True)
        ]
    return torch.tensor([mark if mark > 0 else math.nan for mark in found])


def estoi(estimate: Tensor, target: Tensor) -> Tensor:
    """Extended short-time objective intelligibility, up to 1, (batch,).

    NaN where the target has less than 0.4 s of sound.

    Raises:
        InputError: `pystoi` isn't installed.
    """
    module: Any = need("pystoi", extra=EXTRA)
    estimate, target = _signals(estimate, target)
    found = []
    for ours, wanted in zip(estimate, target, strict=True):
        # Where little is left without the pauses it warns, and gives a number that means nothing.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mark = module.stoi(wanted.numpy(), ours.numpy(), RATE, extended=True)
        silent = float(wanted.square().mean()) < SILENT
        found.append(math.nan if caught or silent else float(mark))
    return torch.tensor(found)


def dnsmos(estimate: Tensor) -> dict[str, Tensor]:
    """Personalised DNSMOS P.835: opinions of "speech", "background" and "overall", 1 to 5.

    Synthetic voices get low marks even when they are clean; compare, and don't read the marks as
    they stand.

    Returns:
        Each (batch,).

    Raises:
        InputError: `speechmos`, or what it needs and doesn't bring, isn't installed.
    """
    try:
        from speechmos import dnsmos as judge
    except ImportError as error:
        raise InputError(
            f"DNSMOS needs the package {error.name!r}, which isn't installed; pip install "
            f"'pared[{EXTRA}]' brings all of it."
        ) from None
    (estimate,) = _signals(estimate)
    told = [
        judge.run(ours.clamp(-1, 1).numpy(), RATE, model_type="dnsmos_personalized")
        for ours in estimate
    ]
    names = {"speech": "sig_mos", "background": "bak_mos", "overall": "ovrl_mos"}
    return {ours: torch.tensor([float(one[its]) for one in told]) for ours, its in names.items()}


def oversuppression(estimate: Tensor, target: Tensor) -> Tensor:
    """Share of the frames in which the target speaks and too much of it is missing, (batch,).

    A frame is suppressed where sum_f max(|X|^0.3 - |X^|^0.3, 0)^2 > 0.1 sum_f |X|^0.6, after
    Eskimez et al. 2022 (arXiv 2110.09625; power and threshold from memory). NaN for silent targets.
    """
    estimate, target = _signals(estimate, target)
    ours, wanted = spectra(estimate), spectra(target)
    missing = (magnitudes(wanted) - magnitudes(ours)).clamp(min=0).square().sum(dim=1)
    whole = magnitudes(wanted).square().sum(dim=1)
    loudness = wanted.square().sum(dim=(1, 3))
    speaks = (loudness > PAUSE * loudness.amax(dim=1, keepdim=True)) & (loudness > 0)
    return ((missing > MISSING * whole) & speaks).sum(dim=1) / speaks.sum(dim=1)


def remainder(estimate: Tensor, noisy: Tensor) -> Tensor:
    """What is left of a recording in which the target doesn't speak, in dB of its energy, (batch,).

    The lower, the better; 0 where nothing was taken away.
    """
    estimate, noisy = _signals(estimate, noisy)
    return decibel(estimate.square().sum(dim=-1), noisy.square().sum(dim=-1))


def flips(kept: Tensor, swapped: Tensor, target: Tensor, other: Tensor) -> Tensor:
    """Whether it is the enrolment that decides which of two talkers is kept, (batch,) of bool.

    Args:
        kept: the mixture enhanced with the target's enrolment.
        swapped: the same mixture enhanced with the other talker's.
        target: what the target says.
        other: what the other talker says.
    """
    kept, swapped, target, other = _signals(kept, swapped, target, other)
    right = si_sdr(kept, target) > si_sdr(kept, other)
    return right & (si_sdr(swapped, other) > si_sdr(swapped, target))


def _signals(*signals: Tensor) -> list[Tensor]:
    """Signals that belong together, in float32 on the CPU.

    Raises:
        InputError: they differ in shape, or have another one, or a sample that is no number.
    """
    shapes = {tuple(signal.shape) for signal in signals}
    if len(shapes) > 1 or signals[0].ndim != 2 or 0 in signals[0].shape:
        raise InputError(
            f"the signals have the shapes {', '.join(str(tuple(s.shape)) for s in signals)}; give "
            "all of them as (batch, samples), alike, and nothing empty."
        )
    for signal in signals:
        if not signal.is_floating_point() or not signal.isfinite().all():
            raise InputError(
                f"a signal is {signal.dtype} with {int((~signal.isfinite()).sum())} samples that "
                "are NaN or infinite; give floating-point numbers in [-1, 1]."
            )
    return [signal.detach().float().cpu() for signal in signals]
