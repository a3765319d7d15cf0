"""The U-Nets of Stable Diffusion 1, 2 and XL: `UNet2DConditionModel`.

A block, here, is one transformer block; several of them form a `Transformer2DModel`, which turns a
feature map into tokens, so every site has the grid of its own resolution level.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pared.anatomy.base import Block, Parts, Site, SiteKind, block_of
from pared.anatomy.denoiser import Denoiser, Grid
from pared.errors import InputError
from pared.nn.diffusion import guidance_features

# Pixels per latent pixel of the autoencoders that these models were trained with.
VAE_SCALE = 8

# The levels whose skip connections are known: one for each resnet, and one behind a downsampler.
LEVELS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")

# What FreeU puts on the blocks on the way up.
FREEU = ("s1", "s2", "b1", "b2")

# The arguments by which a ControlNet and a T2I-Adapter are heard.
DOWN, MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"
ADAPTED = "down_intrablock_additional_residuals"


@dataclass(frozen=True)
class Skip:
    """One skip connection: what hands it over on the way down, what takes it in on the way up.

    Attributes:
        down: dotted paths of the layers that make its tensor from that of the skip above.
        up: dotted paths of the layers that it enters; the first gets it joined on channels, behind
            what comes from below.
    """

    down: tuple[str, ...]
    up: tuple[str, ...]


@dataclass(frozen=True)
class Idle:
    """A layer or a whole block that a cut leaves out.

    Attributes:
        path: dotted path.
        module: the module itself.
        handed: tensors that it hands over to the way up, beside its output: a block's on the way
            down.
        in_tuple: whether its output comes in a tuple, as a `Transformer2DModel`'s.
    """

    path: str
    module: nn.Module
    handed: int = 0
    in_tuple: bool = False

    def result(self, x: Tensor) -> Any:
        """What the module returns, with `x` for each of its tensors."""
        if self.handed:
            return x, (x,) * self.handed
        return (x,) if self.in_tuple else x


@dataclass(frozen=True)
class Cut:
    """A U-Net cut below a skip: conv_in to that skip, and from there up to conv_out.

    Attributes:
        idle: all that lies below; blocks that do so as a whole are not taken apart.
        entry: the layer that takes in what comes from below.
        channels: of what comes from below: the first in the entry's input.
        skips: how many skips are left.
        adapted: how many of a T2I-Adapter's residuals, one for each block, go to what is left.
    """

    idle: tuple[Idle, ...]
    entry: nn.Module
    channels: int
    skips: int
    adapted: int

    def residuals(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a call, with residuals for no other layers than those left.

        Args:
            arguments: as pipelines give them: a ControlNet's residuals are one for each skip and
                one for the middle.
        """
        kept = dict(arguments)
        if arguments.get(MIDDLE) is not None and (down := arguments.get(DOWN)) is not None:
            # As many as before, since the model pairs them off with all skips.
            kept[DOWN] = (*down[: self.skips], *[0] * (len(down) - self.skips))
            kept[MIDDLE] = 0
        if (adapted := arguments.get(ADAPTED)) is not None:
            kept[ADAPTED] = adapted[: self.adapted]
        return kept


class Factors:
    """Numbers in a U-Net, beside adapters of peft, that pipelines may change between two steps.

    FreeU's, and the scales of those IP-Adapters that are in the model when this is made.
    """

    def __init__(self, family: "UNet") -> None:
        self._places = [(vars(block), name) for block in family.model.up_blocks for name in FREEU]
        for site in family.sites("cross_attention"):
            held = vars(cast(Any, site.module).processor)
            self._places += [(held, "scale")] if "scale" in held else []

    def read(self) -> list[str]:
        """All of them as they are now, written out."""
        return [str(place.get(name)) for place, name in self._places]


class UNet(Denoiser):
    name = "unet"
    classes = ("UNet2DConditionModel",)
    conditions: tuple[str, ...] = ("text",)
    input_layer = "conv_in"
    feed_forward_norms: ClassVar[dict[str, str]] = {"ff": "norm3"}
    timestep_embedder = "time_embedding"
    guidance_projection = "time_embedding.cond_proj"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        added = self.config.addition_embed_type
        if added == "text_time":
            self.conditions = ("text", "pooled", "time_ids")
        elif added is not None:
            raise InputError(
                f"pared reads the U-Nets of Stable Diffusion 1, 2 and XL; this one is "
                f"conditioned by {added!r}."
            )
        if self.config.time_cond_proj_dim is not None:
            self.input("guidance_weight")

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(
            block_of(index, path, module, _parts(module))
            for index, (path, module) in enumerate(self._transformer_blocks())
        )

    def _transformer_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        middle = ("mid_block", self.model.mid_block)
        for stage, module in (*self._list("down_blocks"), middle, *self._list("up_blocks")):
            # Stages without attention have no such list, and a U-Net may have no middle.
            for number, part in enumerate(getattr(module, "attentions", ())):
                if hasattr(part, "transformer_blocks"):
                    yield from self._list(f"{stage}.attentions.{number}.transformer_blocks")

    @property
    def skips(self) -> tuple[Skip, ...]:
        """The skip connections, from shallow to deep.

        Raises:
            InputError: the U-Net has levels of another make than those of Stable Diffusion.
        """
        for name in (*self.config.down_block_types, *self.config.up_block_types):
            if name not in LEVELS:
                raise InputError(
                    f"pared knows the skip connections of U-Nets made of {', '.join(LEVELS)}; this "
                    f"one has a {name}."
                )
        down, up = [("conv_in",)], list[tuple[str, ...]]()
        for path, block in self._list("down_blocks"):
            down += _down_layers(path, block)
        for path, block in self._list("up_blocks"):
            up += _layers(path, block)
        return tuple(Skip(*ends) for ends in zip(down, reversed(up), strict=True))

    def cut(self, index: int) -> Cut:
        """The U-Net without what lies below a skip.

        Args:
            index: of the skip, from 0, the shallowest; so many layers are left on the way down,
                beside conv_in.
        """
        model, skips = self.model, self.skips
        below = {path for skip in skips[index + 1 :] for path in (*skip.down, *skip.up)}
        idle, adapted = list[Idle](), 0
        for path, block in self._list("down_blocks"):
            layers = _down_layers(path, block)
            idle += self._idle(path, block, layers, below, handed=len(layers))
            # Blocks with attention take an adapter's residual in before they go down.
            adapts = layers[len(block.resnets) - 1 if hasattr(block, "attentions") else -1]
            adapted += below.isdisjoint(adapts)
        if model.mid_block is not None:
            idle.append(Idle("mid_block", model.mid_block))
        for path, block in self._list("up_blocks"):
            idle += self._idle(path, block, _layers(path, block), below)
        # What comes from below has the width of the layer there, or of the middle.
        channels = self.config.block_out_channels[-1]
        if index + 1 < len(skips):
            channels = model.get_submodule(skips[index + 1].up[0]).out_channels
        entry = model.get_submodule(skips[index].up[0])
        return Cut(tuple(idle), entry, channels, index + 1, adapted)

    def _idle(
        self,
        path: str,
        block: nn.Module,
        layers: Iterable[tuple[str, ...]],
        below: set[str],
        handed: int = 0,
    ) -> list[Idle]:
        """What of a block is idle: its layers that are `below`, or all of it."""
        names = [name for layer in layers for name in layer]
        if below.issuperset(names):
            return [Idle(path, block, handed)]
        return [
            Idle(name, self.model.get_submodule(name), in_tuple=".attentions." in name)
            for name in names
            if name in below
        ]

    def _grid_source(self, site: Site) -> tuple[nn.Module, Grid]:
        path, _, _ = site.path.rpartition(".transformer_blocks.")
        return self.model.get_submodule(path), Grid()

    def _denoise(
        self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """See `denoise`. For SDXL, `time_ids` (batch, 6) are original height and width, top
        and left of the crop, target height and width, in pixels; if absent, the latents' own size.
        `guidance_weight` (batch,) is for models that have an input for it; 0 if absent.
        """
        added = None
        if "pooled" in self.conditions:
            time_ids = condition.get("time_ids")
            added = {
                "text_embeds": self._take(condition, "pooled"),
                "time_ids": size_ids(latents) if time_ids is None else time_ids,
            }
        features = None
        if (channels := self.config.time_cond_proj_dim) is not None:
            # As the stock pipelines do, whose guidance_scale is 1 + guidance_weight.
            weight = self.input("guidance_weight").numbers(latents)
            features = guidance_features(weight, channels).to(latents.dtype)
        return model(
            latents,
            timestep,
            timestep_cond=features,
            encoder_hidden_states=self._take(condition, "text"),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def add_guidance_projection(self, channels: int) -> None:
        embedding: Any = self.model.time_embedding
        if embedding.cond_proj is None:
            weight = embedding.linear_1.weight
            embedding.cond_proj = nn.Linear(channels, weight.shape[1], bias=False).to(weight)
            nn.init.zeros_(embedding.cond_proj.weight)
            cast(Any, self.model).register_to_config(time_cond_proj_dim=channels)

    def encode(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        def some(prompts: list[str]) -> tuple[Tensor, ...]:
            if "pooled" not in self.conditions:
                device = pipeline._execution_device
                return pipeline.encode_prompt(prompts, device, 1, False)[:1]
            text, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
            return text, pooled

        found = dict(zip(("text", "pooled"), self._encoded(some, prompts), strict=False))
        if "pooled" in found and pipeline.config.get("force_zeros_for_empty_prompt"):
            # SDXL's unconditional pass reads zeros, and no empty prompt that was encoded.
            empty = torch.tensor([not prompt for prompt in prompts])
            for entry in found.values():
                entry[empty] = 0
        return found

    def example(self, batch=1, height=None, width=None, text_tokens=None, generator=None):
        latents = self._latents(batch, height, width, generator)
        length = 77 if text_tokens is None else text_tokens
        text = self._random(batch, length, self.config.cross_attention_dim, generator=generator)
        condition = {"text": text}
        if "pooled" in self.conditions:
            ids = size_ids(latents)
            sizes = ids.shape[1] * self.config.addition_time_embed_dim
            pooled = self.config.projection_class_embeddings_input_dim - sizes
            condition["pooled"] = self._random(batch, pooled, generator=generator)
            condition["time_ids"] = ids
        return latents, torch.full((batch,), 500, device=latents.device), condition


def size_ids(latents: Tensor) -> Tensor:
    """SDXL's size condition (batch, 6) for images of just this size, uncropped."""
    height, width = (VAE_SCALE * side for side in latents.shape[-2:])
    # In float32, since half precision rounds sizes above 2048.
    ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
    return ids.to(latents.device).expand(len(latents), -1)


def _parts(block: Any) -> Parts:
    # In some upscalers the first attention of a block reads the text too.
    first: SiteKind = "cross_attention" if block.only_cross_attention else "self_attention"
    return {"attn1": first, "attn2": "cross_attention", "ff": "feed_forward"}


def _layers(path: str, block: Any) -> list[tuple[str, ...]]:
    """The layers of a block, each a resnet with the attention behind it, if any."""
    parts = [name for name in ("resnets", "attentions") if hasattr(block, name)]
    return [
        tuple(f"{path}.{part}.{number}" for part in parts) for number in range(len(block.resnets))
    ]


def _down_layers(path: str, block: Any) -> list[tuple[str, ...]]:
    """The layers of a block on the way down, the downsampler last, if it has one."""
    samplers = tuple(f"{path}.downsamplers.{n}" for n in range(len(block.downsamplers or ())))
    return _layers(path, block) + ([samplers] if samplers else [])
