"""What an enhancer does, to be seen and heard: spectrograms and short recordings for the pages."""

import argparse

import record
import torch
from enhancement_sets import Pair, kept, pairs
from PIL import Image, ImageDraw
from torch import Tensor

from pared.objectives.enhancement import spectra
from pared.speech.streaming_pse.model import load
from pared.worlds.house import folder_of
from pared.worlds.optional import need
from pared.worlds.speech.audio import RATE, to_int16

# Of the enrolment that is written; in dB below the loudest what is black; colours, few, since they
# decide the size of the file.
SECONDS, DEEPEST, COLOURS = 3.0, 60.0, 24
RAMP = torch.tensor([[12, 14, 30], [56, 49, 130], [180, 60, 110], [250, 160, 70], [255, 250, 225]])
LABEL, STRETCH = 18, 3


def write(options: argparse.Namespace) -> None:
    """One mixture of two held-out talkers, with either enrolment, into `docs/`."""
    folder = record.ROOT / "docs"
    model = load(folder_of(options.model or "house:streaming-pse"))
    pair = pairs(options.plan, options.example + 1)[-1]
    first, second = (kept(model, pair.mixture, told) for told in (pair.mine, pair.theirs))
    sounds = {
        "enrolment": pair.mine[: round(SECONDS * RATE)],
        "mixture": pair.mixture,
        "enhanced": first,
        "swapped": second,
    }
    soundfile = need("soundfile", extra="speech")
    for name, sound in sounds.items():
        path = folder / f"speech-{name}.mp3"  # a quarter of FLAC's bytes, and all browsers play it
        soundfile.write(path, to_int16(sound).numpy(), RATE)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
    path = folder / "speech-spectrograms.png"
    picture(panels(pair, first, second)).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB; said was {pair.said!r}")


def panels(pair: Pair, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """What is seen, from above."""
    return {
        "two talkers at once": pair.mixture,
        "enhanced, told of the first": first,
        "what the first said": pair.target,
        "enhanced, told of the second": second,
        "what the second said": pair.other,
    }


def picture(sounds: dict[str, Tensor]) -> Image.Image:
    """Spectrograms one above the other, up to 8 kHz, all on the scale of the loudest."""
    decibels = [levels(sound) for sound in sounds.values()]
    loudest = max(float(each.amax()) for each in decibels)
    height, width = decibels[0].shape
    whole = Image.new("P", (STRETCH * width, len(sounds) * (LABEL + height)))
    shades = torch.linspace(0, len(RAMP) - 1, COLOURS)
    below = shades.floor().long().clamp(max=len(RAMP) - 2)
    colours = torch.lerp(
        RAMP[below].float(), RAMP[below + 1].float(), (shades - below)[:, None]
    ).round()
    whole.putpalette(colours.byte().flatten().tolist())
    draw = ImageDraw.Draw(whole)
    for number, (name, level) in enumerate(zip(sounds, decibels, strict=True)):
        above = (1 + (level - loudest) / DEEPEST).clamp(0, 1)
        shade = ((COLOURS - 1) * above).round().byte().flip(0)
        panel = Image.fromarray(shade.numpy()).resize((STRETCH * width, height), Image.NEAREST)
        top = number * (LABEL + height)
        draw.text((4, top + 3), name, fill=COLOURS - 1)
        whole.paste(panel, (0, top + LABEL))
    return whole


def levels(sound: Tensor) -> Tensor:
    """Power in dB, (frequencies, frames), neighbours among the frequencies taken together."""
    power = spectra(sound[None])[0, 1:].square().sum(dim=-1)
    return 10 * (power.unflatten(0, (-1, 2)).mean(dim=1) + 1e-10).log10()
