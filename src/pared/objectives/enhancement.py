"""Training of personalised speech enhancement: one voice is kept, and silence where it is silent.

    L = -SI-SDR(x^, x) + |X^|^0.3 and X^0.3 errors + over-suppression

SI-SDR (Le Roux et al. 2019, arXiv 1811.02508) leaves the level free; the errors of compressed
spectra hold it. It is bounded smoothly at 30 dB, which is chosen here. Where the target is silent
SI-SDR has no meaning: there the energy of what is left counts. What is missing of the target costs
once more than what is left of the others, since people mind lost words most. No paper of streaming
enhancement that could be had gives its loss: terms and weights are chosen here, that of
over-suppression from memory of the literature of personalised enhancement.

What an enrolment tells is learnt late from that alone: until voices are told apart it is of no use,
and until it is of use nothing makes the encoder tell them apart. So a further term, chosen here and
off by default, asks of it that an enrolment be nearer to its own target than to the others of a
batch (InfoNCE, van den Oord et al. 2018, arXiv 1807.03748).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

# Spectra of the loss: as long and as far apart as the enhancer's own, which needn't be so.
WINDOW, HOP = 512, 256
# The power of the compressed spectra.
COMPRESSION = 0.3
# SI-SDR in dB that can't be bettered. Without it a recording of the target alone is worth more, the
# nearer its mask is to a constant, without end, and that is all that is learnt.
CEILING = 30.0
# What keeps logarithms and roots finite.
TINY = 1e-8
# A target whose mean power is below this (-80 dB) is silent.
SILENT = 1e-8
# What cosines between voices are divided by before the softmax.
TEMPERATURE = 0.1
# Share of the mixture's energy below which what is left in silence isn't told from nothing.
LEFT = 1e-3


class Enhancement(nn.Module):
    """Signal, spectral, silence and over-suppression terms; and whether voices are told apart.

    Batch: `noisy` and `target` (batch, samples), `enrolment` (batch, longest) and, where
    enrolments differ in length, `enrolment_samples` (batch,), and with `voice` the number of the
    `speaker` (batch,), as of `pared.worlds.speech.data.EnhancementData`. Model: called with noisy,
    enrolment and samples; gives (batch, samples). With `voice` it is given the targets as `clean`,
    too, and gives the voices of both (2, batch, width) as well, or None where it encodes none.

    Args:
        sdr: weight of the SI-SDR, in dB, and of what stands in for it in silence.
        magnitude: of the compressed magnitudes' squared error.
        spectrum: of the compressed complex spectra's.
        suppression: of the squared part of the magnitudes' error that is missing.
        voice: of how badly enrolments find their own target among the batch's.
    """

    def __init__(
        self,
        sdr: float = 1.0,
        magnitude: float = 1.0,
        spectrum: float = 0.1,
        suppression: float = 1.0,
        voice: float = 0.0,
    ) -> None:
        super().__init__()
        self.sdr, self.magnitude = sdr, magnitude
        self.spectrum, self.suppression, self.voice = spectrum, suppression, voice

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        noisy, target = batch["noisy"], batch["target"]
        told = batch["enrolment"], batch.get("enrolment_samples")
        if not self.voice:
            return self.terms(model(noisy, *told).float(), target.float(), noisy.float())
        enhanced, voices = model(noisy, *told, clean=target)
        found = self.terms(enhanced.float(), target.float(), noisy.float())
        if voices is not None:
            heard = ~silent(target)
            found["voice"] = self.voice * confusion(voices[:, heard], batch["speaker"][heard])
        return found

    def terms(self, enhanced: Tensor, target: Tensor, noisy: Tensor) -> dict[str, Tensor]:
        """The weighted terms of a batch, each (batch, samples)."""
        absent = silent(target)
        signal = torch.where(absent, 0.0, -bounded(si_sdr(enhanced, target))).mean()
        silence = torch.where(absent, residue(enhanced, noisy), 0.0).mean()
        ours, wanted = spectra(enhanced), spectra(target)
        missing = magnitudes(wanted) - magnitudes(ours)
        error = (compressed(ours) - compressed(wanted)).square().sum(dim=-1)
        return {
            "signal": self.sdr * signal,
            "silence": self.sdr * silence,
            "magnitude": self.magnitude * missing.square().mean(),
            "spectrum": self.spectrum * error.mean(),
            "suppression": self.suppression * missing.clamp(min=0).square().mean(),
        }


def silent(target: Tensor) -> Tensor:
    """Which targets (batch, samples) say nothing, (batch,)."""
    return target.square().mean(dim=-1) < SILENT


def confusion(voices: Tensor, speakers: Tensor) -> Tensor:
    """InfoNCE both ways between two recordings each of some speakers; 0 where all are told apart.

    Args:
        voices: (2, count, width).
        speakers: their numbers, (count,); the same speaker isn't held against a voice.
    """
    if len(speakers) < 2:
        return voices.sum() * 0
    one, other = normalize(voices.float(), dim=-1)
    same = (speakers[:, None] == speakers).fill_diagonal_(False)
    cosines = (one @ other.T / TEMPERATURE).masked_fill(same, -torch.inf)
    own = torch.arange(len(speakers), device=speakers.device)
    return (cross_entropy(cosines, own) + cross_entropy(cosines.T, own)) / 2


def si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, (batch,), of signals (batch, samples).

    10 log10(|a x|^2 / |x^ - a x|^2) with a = <x^, x> / |x|^2.
    """
    scale = (estimate * target).sum(dim=-1, keepdim=True)
    scale = scale / (target.square().sum(dim=-1, keepdim=True) + TINY)
    kept = scale * target
    return decibel(kept.square().sum(dim=-1), (estimate - kept).square().sum(dim=-1))


def bounded(ratio: Tensor) -> Tensor:
    """A ratio in dB that flattens out below `CEILING`: as if that much noise were unavoidable."""
    return -10 * (10 ** (-ratio / 10) + 10 ** (-CEILING / 10)).log10()


def residue(estimate: Tensor, noisy: Tensor) -> Tensor:
    """10 log10(|x^|^2 + 1e-3 |y|^2), (batch,): what is left where nothing should be."""
    energy = estimate.square().sum(dim=-1) + LEFT * noisy.square().sum(dim=-1)
    return 10 * (energy + TINY).log10()


def decibel(power: Tensor, reference: Tensor) -> Tensor:
    """10 log10 of a ratio of powers."""
    return 10 * ((power + TINY) / (reference + TINY)).log10()


def spectra(signals: Tensor) -> Tensor:
    """Of signals (batch, samples): real and imaginary parts, (batch, F, frames, 2)."""
    window = torch.hann_window(WINDOW, device=signals.device).sqrt()
    found = torch.stft(signals, WINDOW, HOP, window=window, return_complex=True)
    return torch.view_as_real(found)


def magnitudes(spectra: Tensor) -> Tensor:
    """|X|^0.3."""
    return (spectra.square().sum(dim=-1) + TINY) ** (COMPRESSION / 2)


def compressed(spectra: Tensor) -> Tensor:
    """X^0.3: magnitudes compressed, each with its own phase."""
    power = spectra.square().sum(dim=-1, keepdim=True) + TINY
    return spectra * power ** ((COMPRESSION - 1) / 2)
