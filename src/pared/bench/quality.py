"""How an arm's pictures compare with the base's on the same noise, as a set, and with prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pared.bench import fidelity
from pared.bench.alignment import retrieval
from pared.bench.distances import frechet, median_bandwidth, mmd
from pared.bench.distances.sets import euclidean, two_sets
from pared.bench.figures import Figure
from pared.bench.judge import Judge
from pared.bench.statistics import bootstrap_interval, paired_difference
from pared.errors import InputError

# Pictures nearer than this are equal for any eye (8-bit rounding alone is 59 dB); without a cap,
# one identical pair would make the mean infinite.
PSNR_CAP = 100.0


@dataclass(frozen=True)
class Quality:
    """What is known of one arm's pictures.

    Attributes:
        figures: by the keys of `pared.bench.figures.COLUMNS`.
        psnr: of every picture, (n,); None for the base.
        identical: whether every picture equals the base's, bit for bit.
    """

    figures: dict[str, Figure]
    psnr: torch.Tensor | None = None
    identical: bool = False


@dataclass
class Yardstick:
    """What pictures are held against. Made once, from the base's pictures.

    Attributes:
        base: the base's pictures (n, 3, height, width) in [0, 1].
        judge: encoder of pictures and texts, if any.
        reference: real pictures, likewise (m, 3, height, width), if any.
        captions: texts among which the judge looks for the prompt; each once.
        targets: row of each picture's prompt in `captions` (n,).
        notes: what could not be measured, and why.
    """

    base: torch.Tensor
    judge: Judge | None = None
    reference: torch.Tensor | None = None
    captions: Sequence[str] = ()
    targets: Sequence[int] = ()
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sets: dict[str, tuple[torch.Tensor, float]] = {}
        if self.judge is None:
            self._note("No judge is at hand: distances between sets and retrieval are left out.")
            return
        self.base_features = self.judge.of_images(self.base)
        self._add_set("base", self.base_features)
        if self.reference is not None:
            self._add_set("reference", self.judge.of_images(self.reference))
        if self.captions:
            self.caption_features = self.judge.of_texts(list(self.captions))

    def measure(self, images: torch.Tensor, is_base: bool = False) -> Quality:
        """Compares an arm's pictures (n, 3, height, width) in [0, 1], ordered as the base's."""
        figures: dict[str, Figure] = {}
        psnr = None
        if not is_base:
            psnr = fidelity.psnr(images, self.base).clamp(max=PSNR_CAP)
            figures |= self._pairs(images, psnr)
        if self.judge is not None:
            features = self.judge.of_images(images)
            if not is_base:
                cosines = fidelity.cosine(features, self.base_features)
                figures["judge_cosine"] = mean_of(cosines)
            figures |= self._distances(features, skip="base" if is_base else "")
            figures |= self._retrieval(features)
        return Quality(figures, psnr, not is_base and torch.equal(images, self.base))

    def _pairs(self, images: torch.Tensor, psnr: torch.Tensor) -> dict[str, Figure]:
        values = {
            "psnr": psnr,
            "relative_mse": fidelity.relative_mse(images, self.base),
            "sharpness": fidelity.sharpness(images, self.base),
        }
        if min(images.shape[-2:]) >= fidelity.WINDOW:
            values["ssim"] = fidelity.ssim(images, self.base)
        else:
            self._note(f"SSIM needs pictures of at least {fidelity.WINDOW} pixels; it is left out.")
        finite = {key: value[value.isfinite()] for key, value in values.items()}
        lost = {key: len(values[key]) - len(value) for key, value in finite.items()}
        if lost["sharpness"]:
            self._note("Some of the base's pictures are flat: they have no sharpness to compare.")
        return {key: mean_of(value) for key, value in finite.items() if len(value)}

    def _distances(self, features: torch.Tensor, skip: str) -> dict[str, Figure]:
        figures = {}
        for name, (other, bandwidth) in self._sets.items():
            if name == skip:
                continue
            if min(len(features), len(other)) >= 2:
                measure = paired_mmd if name == "base" else mmd
                figures[f"mmd_{name}"] = Figure(
                    1000 * measure(features, other, bandwidth=bandwidth)
                )
            if min(len(features), len(other)) > features.shape[1]:
                figures[f"frechet_{name}"] = Figure(frechet(features, other))
        return figures

    def _retrieval(self, features: torch.Tensor) -> dict[str, Figure]:
        if len(self.captions) < 2:
            return {}
        k = tuple(each for each in (1, 5) if each < len(self.captions))
        target = torch.tensor(list(self.targets))
        found = retrieval(features, self.caption_features, target, k)
        return {f"top{each}": Figure(share) for each, share in found.items()}

    def _add_set(self, name: str, features: torch.Tensor) -> None:
        """Takes in a set to measure distances to; one bandwidth for all arms, from this set."""
        n, d = min(len(features), len(self.base)), features.shape[1]
        if n < 2:
            self._note("Distances between sets need at least 2 pictures; they are left out.")
            return
        try:
            self._sets[name] = features, median_bandwidth(features)
        except InputError as error:
            self._note(f"Distances to the {name} are left out: {error}")
            return
        if n <= d:
            self._note(
                f"{n} pictures are too few for a Frechet distance of {d} dimensions: MMD stands "
                "alone."
            )
        elif n < 10 * d:
            self._note(
                f"Frechet distances of {n} pictures in {d} dimensions are biased upwards: compare "
                "them within this report only."
            )

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def paired_mmd(a: torch.Tensor, b: torch.Tensor, bandwidth: float) -> float:
    """The squared MMD of two sets whose rows belong together, here by their noise; unbiased.

    The mean over i != j of k(a_i, a_j) + k(b_i, b_j) - 2 k(a_i, b_j): a picture is never compared
    with its own partner, which it resembles for a reason that the two distributions know nothing
    of. The estimator for independent sets is far below 0 on such pairs.

    Args:
        a: features (n, dimensions).
        b: features of the partners (n, dimensions).
        bandwidth: sigma of the kernel exp(-||x - y||^2 / (2 sigma^2)).

    Returns:
        The squared discrepancy, 0 for equal sets.
    """
    a, b = two_sets(a, b, at_least=2)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.exp(-euclidean(x, y).square() / (2 * bandwidth**2))

    h = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    return (h.sum() - h.trace()).item() / (len(a) * (len(a) - 1))


def mean_of(values: torch.Tensor) -> Figure:
    """The mean of one figure per picture (n,), with its bootstrap interval where n > 1."""
    if len(values) < 2:
        return Figure(values.mean().item())
    interval = bootstrap_interval(values, torch.Generator().manual_seed(0))
    return Figure(values.mean().item(), interval.low, interval.high)


def closer(a: Quality, b: Quality) -> int | None:
    """Which of two arms paints closer to the base: 1 for a, -1 for b, 0 undecided, None unknown."""
    if a.psnr is None or b.psnr is None or len(a.psnr) < 2:
        return None
    difference = paired_difference(a.psnr, b.psnr, torch.Generator().manual_seed(0))
    if not difference.decided:
        return 0
    return 1 if difference.mean > 0 else -1


def as_images(given: Any) -> torch.Tensor:
    """Pictures (n, 3, height, width) in [0, 1] from what users have.

    Args:
        given: a tensor (n, 3, height, width), uint8 or in [0, 1]; an array (n, height, width, 3),
            likewise; a list of PIL pictures of one size; or an object with such an `images`, like
            the emoji world.

    Raises:
        InputError: it is none of these.
    """
    if hasattr(given, "images"):
        given = given.images
    if isinstance(given, (list, tuple)) and given and hasattr(given[0], "convert"):
        if len({picture.size for picture in given}) > 1:
            raise InputError("the reference pictures have several sizes; give them one size.")
        given = np.stack([np.asarray(picture.convert("RGB")) for picture in given])
    if isinstance(given, np.ndarray) and given.ndim == 4:
        given = torch.from_numpy(given).permute(0, 3, 1, 2)
    if not torch.is_tensor(given) or given.ndim != 4 or given.shape[1] != 3:
        raise InputError(
            "the reference pictures must be a tensor (n, 3, height, width), an array (n, height, "
            "width, 3) or a list of PIL pictures."
        )
    return given / 255 if given.dtype == torch.uint8 else given.float()
