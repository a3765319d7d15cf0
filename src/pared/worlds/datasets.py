"""Training data as the loop wants it: whole batches by index, random by the given generator."""

import hashlib
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.errors import InputError
from pared.training.data import Dataset


def tokenize(tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of `captions`, both (captions, longest) and int64."""
    encoded = tokenizer(captions, padding="longest", return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


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

    def identity(self) -> str:
        return f"{self.data.identity()}-{_fingerprint(self.weights)}"


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

    def identity(self) -> str:
        return _fingerprint(self.images)


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
        return _fingerprint(self.images, self.input_ids)


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
    """Cached latents and text embeddings for denoisers.

    Attributes:
        latents: posterior means, already scaled, (count, channels, height, width).
        latent_std: posterior standard deviations on the same scale, same shape.
        text: last hidden states of the text encoder, (count, tokens, width).
        mask: attention mask of the text, (count, tokens).
        empty_text: the embedding of the empty prompt, (tokens, width); replaces a sample's text
            with chance `drop`.
        empty_mask: its mask, (tokens,).
        drop: chance that a sample is trained without its prompt (for classifier-free guidance).
    """

    latents: Tensor
    latent_std: Tensor
    text: Tensor
    mask: Tensor
    empty_text: Tensor
    empty_mask: Tensor
    drop: float = 0.1

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        dropped = torch.rand(len(indices), generator=generator) < self.drop
        text, mask = self.text[indices].float(), self.mask[indices]
        text[dropped], mask[dropped] = self.empty_text.float(), self.empty_mask
        return {
            "latents": self.latents[indices].float(),
            "latent_std": self.latent_std[indices].float(),
            "text": text,
            "mask": mask,
        }

    def identity(self) -> str:
        return _fingerprint(self.latents, self.text)


@torch.no_grad()
def encode_latents(vae, images: Tensor, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of uint8 `images`, on the autoencoder's own scale."""
    means, stds = [], []
    shift = vae.config.shift_factor or 0.0
    for chunk in images.split(batch_size):
        posterior = vae.encode((chunk.float() / 127.5 - 1).to(vae.device, vae.dtype)).latent_dist
        means.append((posterior.mean.float() - shift) * vae.config.scaling_factor)
        stds.append(posterior.std.float() * vae.config.scaling_factor)
    return torch.cat(means).cpu(), torch.cat(stds).cpu()


@torch.no_grad()
def encode_text(
    text_encoder, tokenizer, captions: list[str], batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Last hidden states (captions, tokens, width) and masks, as long as the longest caption."""
    if not captions:
        raise InputError("no captions to encode; the data needs at least one.")
    ids, mask = tokenize(tokenizer, captions)
    states = [
        text_encoder(i.to(text_encoder.device), attention_mask=m.to(text_encoder.device))[0]
        .float()
        .cpu()
        for i, m in zip(ids.split(batch_size), mask.split(batch_size), strict=True)
    ]
    return torch.cat(states), mask


def latent_data(
    vae, text_encoder, tokenizer, images: Tensor, captions: list[str], drop: float = 0.1
) -> LatentData:
    """Encode images and captions once, so that training touches neither encoder again."""
    mean, std = encode_latents(vae, images)
    text, mask = encode_text(text_encoder, tokenizer, ["", *captions])
    return LatentData(mean, std, text[1:], mask[1:], text[0], mask[0], drop)
