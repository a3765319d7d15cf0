"""What a preset is made of."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Component:
    """One model of a pipeline.

    Attributes:
        cls: dotted path of its class, e.g. "diffusers.AutoencoderKL".
        config: arguments of the class (of its configuration class, for transformers).
        parameters: how many it has.
        tokens: of a prompt, for text encoders.
        depth: what the configuration calls the number of blocks.
    """

    cls: str
    config: dict[str, Any]
    parameters: int
    tokens: int = 0
    depth: str = "num_layers"

    def make(self, **changes: Any) -> nn.Module:
        """The model, freshly initialised on the current device in the current default type.

        Args:
            changes: arguments that differ from `config`.
        """
        module, _, name = self.cls.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        if module == "transformers":
            return cls(cls.config_class(**(self.config | changes)))
        return cls(**(self.config | changes))


@dataclass(frozen=True)
class Preset:
    """A text-to-image, class-to-image or text-to-video pipeline by its numbers.

    Attributes:
        name: what users write.
        summary: one line.
        hub: id of the published weights, "" for toys. Never fetched.
        denoiser: the model that runs at every step.
        vae: the autoencoder.
        text_encoders: in the order of the pipeline's `text_encoder`, `text_encoder_2`, ...
        text_tokens: length of a prompt as the denoiser sees it.
        steps: default number of steps.
        guidance: default guidance scale.
        passes: passes of the denoiser per step: 2 with classifier-free guidance, 1 where the
            guidance scale is an input of the denoiser.
        height: default height of a picture, in pixels.
        width: default width.
        vae_scale: pixels per latent pixel and side.
        latent_channels: channels of the latents.
        frames: default number of frames of a video; 1 where pictures are made.
    """

    kind: ClassVar[str] = "denoiser"

    name: str
    summary: str
    hub: str
    denoiser: Component
    vae: Component
    text_encoders: tuple[Component, ...]
    text_tokens: int
    steps: int
    guidance: float
    passes: int
    height: int
    width: int
    vae_scale: int
    latent_channels: int
    frames: int = 1

    @property
    def main(self) -> Component:
        """The model that methods work on."""
        return self.denoiser

    @property
    def components(self) -> dict[str, Component]:
        """All components by name: "denoiser", "vae", "text_encoder", "text_encoder_2", ..."""
        found = {"denoiser": self.denoiser, "vae": self.vae}
        for number, encoder in enumerate(self.text_encoders, start=1):
            found["text_encoder" if number == 1 else f"text_encoder_{number}"] = encoder
        return found


@dataclass(frozen=True)
class SpeechPreset:
    """A speech recogniser by its numbers.

    Attributes:
        name: what users write.
        summary: one line.
        hub: id of the published weights, "" for toys. Never fetched.
        recogniser: the model.
    """

    kind: ClassVar[str] = "speech encoder"

    name: str
    summary: str
    hub: str
    recogniser: Component

    @property
    def main(self) -> Component:
        """The model that methods work on."""
        return self.recogniser

    @property
    def components(self) -> dict[str, Component]:
        """All components by name: "recogniser"."""
        return {"recogniser": self.recogniser}
