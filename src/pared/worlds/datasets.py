"""Training data as the loop wants it: whole batches by index, random by the given generator."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.method import denoiser
from pared.training.data import Dataset
from pared.worlds.readers import Item, Items

# What an autoencoder gets at once: 128 pictures of 64 x 64 pixels, or one of 1024 x 1024.
PIXELS_AT_ONCE = 128 * 64 * 64


def tokenize(tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of `captions`, both (captions, longest) and int64."""
    encoded = tokenizer(captions, padding="longest", return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


def fingerprint(*tensors: Tensor) -> str:
    """A short name for tensors: the same only if every number and shape is."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def origin(pipeline: Any, images: Tensor, texts: Sequence[str]) -> str:
    """A short name for what a pipeline's encoders make of pictures and texts.

    Latents depend on how a machine rounds, even on its number of threads; this doesn't, so that a
    run can go on with more of them, or elsewhere.

    Args:
        pipeline: with its encoders, of which one number per parameter is read.
        images: uint8, (count, 3, height, width).
        texts: any number.
    """
    model = denoiser(pipeline)
    parts = [p for p in pipeline.components.values() if isinstance(p, nn.Module) and p is not model]
    numbers = [p.detach().flatten()[:1].float().cpu() for part in parts for p in part.parameters()]
    words = torch.frombuffer(bytearray("\n".join(["", *texts]).encode() + b" "), dtype=torch.uint8)
    return fingerprint(images, words, torch.cat(numbers))


@dataclass
class Balanced:
    """Any data, drawn by weight with replacement instead of once an epoch.

    Attributes:
        data: see `pared.training.data.Dataset`.
        weights: how likely each sample is drawn, (count,), positive, of any sum.
    """

    data: Dataset
    weights: Tensor

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = torch.multinomial(self.weights, len(indices), replacement=True, generator=generator)
        return self.data.batch(drawn, generator)

    @property
    def empty(self) -> dict[str, Tensor]:
        """The condition for the empty prompt, see `LatentData`."""
        return cast(Any, self.data).empty

    @property
    def nbytes(self) -> int:
        """Memory that the data hold."""
        return getattr(self.data, "nbytes", 0)

    def to(self, device: torch.device) -> "Balanced":
        """The same, with the data on another device; the weights draw on the CPU."""
        moved = self.data.to(device) if hasattr(self.data, "to") else self.data
        return replace(self, data=moved)

    def identity(self) -> str:
        return f"{self.data.identity()}-{fingerprint(self.weights)}"


def balanced_weights(groups: list[str], balance: float) -> Tensor:
    """Weight count^-balance for each member of a group of `count`, (len(groups),).

    With 0 every sample is as likely as any other, with 1 every group is.
    """
    counts = Counter(groups)
    return torch.tensor([counts[group] ** -balance for group in groups])


@dataclass
class ImageData:
    """Images alone, for autoencoders: `pixel_values` (batch, 3, size, size) in [-1, 1].

    Attributes:
        images: uint8, (count, 3, size, size).
        flip: mirror half of the samples.
    """

    images: Tensor
    flip: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        pixels = self.images[indices].float() / 127.5 - 1
        if self.flip:
            mirrored = torch.rand(len(indices), generator=generator) < 0.5
            pixels[mirrored] = pixels[mirrored].flip(-1)
        return {"pixel_values": pixels}

    @property
    def nbytes(self) -> int:
        """Memory that the images hold."""
        return self.images.nbytes

    def to(self, device: torch.device) -> "ImageData":
        """The same on another device."""
        return replace(self, images=self.images.to(device))

    def identity(self) -> str:
        return fingerprint(self.images)


@dataclass
class ImageTextData:
    """Image-caption pairs for contrastive training.

    Images are randomly cropped, shifted, blurred and noised, so that an encoder judges what is
    shown and not the exact pixels: it will be asked about generated pictures.

    Attributes:
        images: uint8, (count, 3, size, size).
        input_ids: int64, (count, tokens).
        attention_mask: int64, (count, tokens).
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        pixels = self.images[indices].float() / 127.5 - 1
        return {
            "pixel_values": augment(pixels, generator),
            "input_ids": self.input_ids[indices],
            "attention_mask": self.attention_mask[indices],
        }

    def identity(self) -> str:
        return fingerprint(self.images, self.input_ids)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random zoom, shift, brightness, blur, noise; `pixels` (batch, 3, size, size) in [-1, 1]."""
    count = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    theta = torch.zeros(count, 2, 3)
    zoom = uniform(0.85, 1.15)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = uniform(-0.12, 0.12, 2)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    # Border colour outside: emoji stand on white.
    pixels = F.grid_sample(pixels - 1, grid, align_corners=False) + 1
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    weight = uniform(-0.6, 1.0, 1, 1, 1).clamp(min=0)  # a good third stays sharp
    pixels = pixels + weight * (blurred - pixels)
    pixels = pixels * uniform(0.9, 1.1, 1, 1, 1) + uniform(-0.05, 0.05, 1, 1, 1)
    noise = torch.randn(pixels.shape, generator=generator)
    return pixels + uniform(0, 0.08, 1, 1, 1) * noise


@dataclass
class LatentData:
    """Cached latents and conditions for denoisers.

    Attributes:
        latents: posterior means, already scaled, (count, channels, height, width).
        latent_std: posterior standard deviations on the same scale, same shape.
        condition: entries of the condition that the denoiser's family takes, (count, ...) each.
        empty: the same entries for the empty prompt, without the first dimension; replace a
            sample's condition with chance `drop`.
        drop: chance that a sample is trained without its prompt (for classifier-free guidance).
        origin: name of what the latents were made of; that of the latents themselves if empty.
    """

    latents: Tensor
    latent_std: Tensor
    condition: dict[str, Tensor]
    empty: dict[str, Tensor]
    drop: float = 0.1
    origin: str = ""

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        dropped = torch.rand(len(indices), generator=generator) < self.drop
        condition = {name: entry[indices] for name, entry in self.condition.items()}
        for name, entry in condition.items():
            entry[dropped] = self.empty[name]
        return {
            "latents": self.latents[indices],
            "latent_std": self.latent_std[indices],
        } | condition

    @property
    def nbytes(self) -> int:
        """Memory that latents and conditions hold."""
        return sum(x.nbytes for x in (self.latents, self.latent_std, *self.condition.values()))

    def to(self, device: torch.device) -> "LatentData":
        """The same on another device."""
        return LatentData(
            self.latents.to(device),
            self.latent_std.to(device),
            {name: entry.to(device) for name, entry in self.condition.items()},
            {name: entry.to(device) for name, entry in self.empty.items()},
            self.drop,
            self.origin,
        )

    def identity(self) -> str:
        return self.origin or fingerprint(self.latents, *self.condition.values())


@torch.no_grad()
def encode_latents(
    vae, images: Tensor, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of uint8 `images`, on the denoiser's scale.

    Args:
        vae: an `AutoencoderKL`.
        images: (count, 3, height, width).
        device: that it runs on, where it is offloaded from it; by default the one that it is on.

    Returns:
        Two float32 tensors on the CPU, both (count, channels, latent height, latent width).
    """
    means, stds = [], []
    shift = vae.config.shift_factor or 0.0
    height, width = images.shape[-2:]
    with upcast(vae):
        for chunk in images.split(max(1, PIXELS_AT_ONCE // (height * width))):
            pixels = (chunk.float() / 127.5 - 1).to(device or vae.device, vae.dtype)
            posterior = vae.encode(pixels).latent_dist
            means.append(((posterior.mean.float() - shift) * vae.config.scaling_factor).cpu())
            stds.append((posterior.std.float() * vae.config.scaling_factor).cpu())
    return torch.cat(means), torch.cat(stds)


@contextmanager
def upcast(vae: Any) -> Iterator[None]:
    """Within the context an autoencoder in float32 that overflows in float16, such as SDXL's."""
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    if overflows:
        vae.float()
    try:
        yield
    finally:
        if overflows:
            vae.half()


def latents_of(pipeline: Any, images: Tensor, captions: list[str], drop: float = 0.1) -> LatentData:
    """Encode images and captions once, so that training touches no encoder again.

    Args:
        pipeline: a stock pipeline with autoencoder, text encoders and denoiser.
        images: uint8, (count, 3, height, width).
        captions: of the images.
        drop: see `LatentData`.

    Raises:
        InputError: there are no captions, or the denoiser takes no text.
    """
    if not captions:
        raise InputError("no captions to encode; the data needs at least one.")
    condition = anatomy.of(denoiser(pipeline)).encode(pipeline, ["", *captions])
    mean, std = encode_latents(pipeline.vae, images)
    return LatentData(
        mean,
        std,
        {name: entry[1:] for name, entry in condition.items()},
        {name: entry[0] for name, entry in condition.items()},
        drop,
        origin(pipeline, images, captions),
    )


@dataclass
class PipelineData:
    """Captioned images that a pipeline encodes as they are drawn, for sets too large to be held.

    Attributes:
        pipeline: a stock pipeline with autoencoder, text encoders and denoiser.
        items: see `pared.worlds.readers.read`.
        size: side in pixels of the middle square that is taken from each image.
        drop: chance that a sample is trained without its prompt.
    """

    pipeline: Any
    items: Items
    size: int
    drop: float = 0.1

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = [self.items[int(index)] for index in indices]
        dropped = torch.rand(len(drawn), generator=generator) < self.drop
        prompts = [
            "" if without else item.caption for item, without in zip(drawn, dropped, strict=True)
        ]
        mean, std = encode_latents(self.pipeline.vae, fitted(drawn, self.size))
        condition = anatomy.of(denoiser(self.pipeline)).encode(self.pipeline, prompts)
        return {"latents": mean, "latent_std": std} | condition

    @property
    def empty(self) -> dict[str, Tensor]:
        """The condition for the empty prompt, see `LatentData`."""
        condition = anatomy.of(denoiser(self.pipeline)).encode(self.pipeline, [""])
        return {name: entry[0] for name, entry in condition.items()}

    def identity(self) -> str:
        return f"{self.items.source}-{len(self.items)}-{self.size}"


def fitted(items: Iterable[Item], size: int) -> Tensor:
    """The middle squares of images, uint8 (count, 3, size, size)."""
    import numpy as np
    from PIL import ImageOps

    pixels = np.stack([np.asarray(ImageOps.fit(item.image, (size, size))) for item in items])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
