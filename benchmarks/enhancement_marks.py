"""What enhancers are judged by: the held-out sets, published measures, and a recogniser.

Measures whose packages aren't installed are left out, with a word about it, and so are words where
the recogniser isn't shipped. What was judged by other means has another digest.
"""

import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from enhancement_sets import clips, pairs
from recognised import errors_of
from torch import Tensor

from pared.bench import sound
from pared.recipe import Recipe
from pared.speech.recognition import Recogniser, load
from pared.worlds import house

Figures = dict[str, Any]
# (recording, enrolment) -> what is kept of it.
Enhancer = Callable[[Tensor, Tensor], Tensor]

# Distributions that a measure needs.
MEASURES = {
    "PESQ": ("pesq",),
    "ESTOI": ("pystoi",),
    "DNSMOS": ("speechmos", "librosa", "requests", "onnxruntime"),
}
# Mixtures that DNSMOS is asked about: it takes a second or two for each.
ASKED = 60


class Judge:
    """Judges every enhancer alike.

    Args:
        plan: whose held-out voices are heard.
        clip_count: mixtures as the recipe mixes.
        pair_count: mixtures of two talkers.
        recogniser: that counts words; None for none.
        wanted: of `MEASURES`; by default all.
    """

    def __init__(
        self,
        plan: Recipe,
        clip_count: int,
        pair_count: int,
        recogniser: str | None,
        wanted: Iterable[str] | None = None,
    ) -> None:
        self.measures = measures(MEASURES if wanted is None else wanted)
        self.recogniser = recogniser_of(recogniser)
        self.clips, self.pairs = clips(plan, clip_count), pairs(plan, pair_count)

    @cached_property
    def digest(self) -> str:
        """Tells by what was judged: measures, recogniser, and every sound that is heard."""
        told = hashlib.sha256(repr((self.measures, ASKED)).encode())
        heard = [
            *((one.mixture, one.target, one.enrolment) for one in self.clips),
            *(pair[:-1] for pair in self.pairs),
            () if self.recogniser is None else self.recogniser.model.state_dict().values(),
        ]
        for tensor in (each for several in heard for each in several):
            told.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
        told.update(repr([pair.said for pair in self.pairs]).encode())
        return told.hexdigest()[:8]

    def marks(self, enhance: Enhancer) -> Figures:
        """How good what is kept is, on all held-out sets."""
        enhanced = [enhance(one.mixture, one.enrolment) for one in self.clips]
        return self.of_clips(enhanced) | self.of_pairs(enhance)

    def of_clips(self, enhanced: list[Tensor]) -> Figures:
        """Marks on mixtures of all kinds, each kind of mark where it makes sense."""
        both = list(zip(self.clips, enhanced, strict=True))
        present = [(one, ours) for one, ours in both if one.present]
        mixed = [(one, ours) for one, ours in present if min(one.sir, one.snr) < math.inf]
        absent = [(one, ours) for one, ours in both if not one.present]
        ours = torch.stack([ours for _, ours in mixed])
        target = torch.stack([one.target for one, _ in mixed])
        noisy = torch.stack([one.mixture for one, _ in mixed])
        found: Figures = {"SI-SDRi, dB": float(sound.improvement(ours, target, noisy).mean())}
        if "PESQ" in self.measures:
            quality = sound.pesq(ours, target)
            found["PESQ"] = float(quality.nanmean())
            found["without PESQ"] = int(quality.isnan().sum())
        if "ESTOI" in self.measures:
            found["ESTOI"] = float(sound.estoi(ours, target).nanmean())
        if "DNSMOS" in self.measures:
            asked = ours[:ASKED]
            for opinion, each in sound.dnsmos(asked).items():
                found[f"DNSMOS of {len(asked)}, {opinion}"] = float(each.mean())
        wanted = torch.stack([one.target for one, _ in present])
        given = torch.stack([ours for _, ours in present])
        found["frames suppressed"] = float(sound.oversuppression(given, wanted).nanmean())
        if absent:
            left = [sound.remainder(o[None], one.mixture[None]) for one, o in absent]
            found["left without target, dB"] = float(torch.cat(left).mean())
        return found

    def of_pairs(self, enhance: Enhancer) -> Figures:
        """Marks on two talkers, with either enrolment; and what a recogniser hears."""
        gains, flipped, heard = [], [], []
        for pair in self.pairs:
            first, second = (enhance(pair.mixture, e)[None] for e in (pair.mine, pair.theirs))
            target, other = pair.target[None], pair.other[None]
            gains.append(sound.improvement(first, target, pair.mixture[None]))
            flipped.append(sound.flips(first, second, target, other))
            heard.append(first[0])
        found = {
            "SI-SDRi of pairs, dB": float(torch.cat(gains).mean()),
            "flips": float(torch.cat(flipped).float().mean()),
        }
        if self.recogniser is not None:
            said = [pair.said for pair in self.pairs]
            found["WER of pairs"] = errors_of(self.recogniser, said, heard).rate
        return found

    def bounds(self) -> dict[str, Figures]:
        """Marks for comparison: of nothing done at all, and of the targets themselves."""
        targets = {id(one.mixture): one.target for one in (*self.clips, *self.pairs)}
        best = self.marks(lambda noisy, _: targets[id(noisy)])
        return {
            "unprocessed": self.marks(lambda noisy, _: noisy),
            # The others compare with the target, and say nothing of itself.
            "the target itself": {k: v for k, v in best.items() if k.startswith(("DNSMOS", "WER"))},
        }


def measures(wanted: Iterable[str]) -> dict[str, list[str]]:
    """Those of `MEASURES` that can be taken here, each with what takes it; says which can't."""
    found = {}
    for measure in wanted:
        try:
            found[measure] = [
                f"{each} {importlib.metadata.version(each)}" for each in MEASURES[measure]
            ]
        except importlib.metadata.PackageNotFoundError as error:
            print(f"{error.name} isn't installed; {measure} isn't measured")
    return found


def recogniser_of(name: str | None) -> Recogniser | None:
    """The one that counts words, the same for all; None where none is wanted, or shipped."""
    if name is None:
        return None
    if name.startswith("house:") and name.removeprefix("house:") not in house.names():
        print(f"{name} isn't shipped; words aren't counted")
        return None
    return load(house.folder_of(name))
