"""What a method may ask about a model: blocks, sites, token grid, how its denoiser is called.

A family is one file of this folder with one subclass of `Family`. It's the only kind of code in
pared that knows the class and attribute names of other libraries. What diffusers documents for
attention processors (`to_q`, `to_k`, `to_v`, `to_out`, `heads`, and `add_q_proj` and its like for
a second stream) is not repeated here: a processor gets its attention module and may use those
names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from pared.errors import InputError

SiteKind = Literal[
    "self_attention",  # image tokens attend to image tokens only
    "joint_attention",  # image and text tokens share one softmax
    "cross_attention",  # image tokens attend to the condition
    "feed_forward",
    "modulation",  # what turns the timestep (and labels) into shifts, scales and gates
    "norm",
]

# Prompts that text encoders get at once.
ENCODED_AT_ONCE = 256

# Whose tokens pass through a site.
Stream = Literal["image", "text", "both"]

# What a linear layer of an attention or a feed-forward is for.
Role = Literal["q", "k", "v", "out", "fc1", "fc2"]

# The layers of each role by diffusers' names; in an attention the text stream's own come second.
ROLES: dict[Role, tuple[str, ...]] = {
    "q": ("to_q", "add_q_proj"),
    "k": ("to_k", "add_k_proj"),
    "v": ("to_v", "add_v_proj"),
    "out": ("to_out.0", "to_add_out"),
    "fc1": ("net.0.proj",),
    "fc2": ("net.2",),
}


@dataclass(frozen=True)
class Site:
    """One place in a model where a method can work.

    Attributes:
        kind: what happens there.
        path: dotted name of the module inside the model; unique, used in messages and claims.
        block: index of the block that holds it, counted through the whole model.
        module: the module itself, as it is now.
        stream: whose tokens pass through it: the image's, the text's, or both.
    """

    kind: SiteKind
    path: str
    block: int
    module: nn.Module
    stream: Stream = "image"

    @property
    def width(self) -> int:
        """Channels of an attention's queries (heads x channels per head)."""
        return cast(Any, self.module).to_q.out_features

    @property
    def heads(self) -> int:
        """Attention heads."""
        return cast(int, self.module.heads)


@dataclass(frozen=True)
class Block:
    """One residual block: its index, dotted path and sites."""

    index: int
    path: str
    module: nn.Module
    sites: tuple[Site, ...]


class Grid:
    """Height and width, in tokens, of the call that is running.

    It is itself the forward pre-hook that keeps it up to date; copies of a model copy it along.
    Families install it through `Family.grid`.

    Args:
        patch: side of a token, in pixels of the module's input.

    Attributes:
        image_first: whether image tokens come before text tokens in the sequence that a joint
            attention mixes.
    """

    image_first: ClassVar[bool] = True

    def __init__(self, patch: int = 1) -> None:
        self.patch, self.height, self.width = patch, 0, 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.height, self.width = self.measure(args, kwargs)

    def measure(self, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        """Height and width in tokens, from the arguments of the call."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return hidden.shape[-2] // self.patch, hidden.shape[-1] // self.patch

    @property
    def tokens(self) -> int:
        """Image tokens of the call."""
        return self.height * self.width

    def streams(self, length: int) -> tuple[slice, slice]:
        """Which tokens of a joint sequence are image and which are text.

        The image tokens are those of the grid; all others are text.

        Args:
            length: tokens of the whole sequence.

        Returns:
            Slices of the image tokens and of the text tokens.
        """
        text = length - self.tokens
        if self.image_first:
            return slice(0, self.tokens), slice(self.tokens, length)
        return slice(text, length), slice(0, text)


class Input:
    """An entry of the condition that a conversion reads deep inside a model.

    A task or a guidance weight, say, which the stock class has no argument for. Got by
    `Family.input`; copies of a model copy it along.

    It is itself the forward pre-hook that tells the calls of `Family.denoise` from others.
    """

    def __init__(self) -> None:
        self._by_hand: Tensor | None = None
        self._given: Tensor | None = None
        self._coming = False

    @property
    def value(self) -> Tensor | None:
        """(batch, ...) of the running call of `Family.denoise`.

        What is put here by hand holds for calls that don't give the entry, those of stock pipelines
        among them.
        """
        return self._by_hand if self._given is None else self._given

    @value.setter
    def value(self, value: Tensor | None) -> None:
        self._by_hand, self._given = value, None

    def give(self, value: Tensor | None) -> None:
        """Set the entry of the call of the model that comes next; None leaves it to the hand."""
        self._given, self._coming = value, True

    def forget(self) -> None:
        """Leave the entry to the hand again."""
        self._given, self._coming = None, False

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if not self._coming:  # nobody gave it: the call isn't one of `Family.denoise`
            self._given = None
        self._coming = False

    def numbers(self, calls: Tensor) -> Tensor:
        """The entry as one number for each sample of a call, in float32; 0 where none is given.

        Args:
            calls: anything of the call, (batch, ...), on its device.

        Returns:
            (batch,); an entry of one number holds for all samples.

        Raises:
            InputError: the entry has another length.
        """
        if self.value is None:
            return torch.zeros(len(calls), device=calls.device)
        value = self.value.to(calls.device, torch.float32).reshape(-1)
        if len(value) not in (1, len(calls)):
            raise InputError(
                f"{len(value)} numbers were given for a batch of {len(calls)}; give one for each "
                "sample, or one for all."
            )
        return value.expand(len(calls))


class Family(ABC):
    """Access to one model of a family. Get one by `pared.anatomy.of(model)`.

    Attributes:
        name: short name of the family, e.g. "pixart".
        classes: names of the model classes it reads.
        conditions: entries of the condition that `denoise` takes from this model's batches.
        input_layer: dotted path of the layer that reads the latents.
        feed_forward_norms: name of the norm before each feed-forward of a block, by the name of the
            feed-forward.
        shifts: names of the parameters that are only ever added: biases, and tables of shifts.
        timestep_embedder: dotted path of the layer whose output, with other conditions added, sets
            the modulation: the timestep's embedding. Where each block has its own, `*` stands for
            the block; "" where there is none.
        guidance_projection: dotted path of the projection through which the stock class itself
            takes in features of a guidance weight, there or yet to be added; "" where it can't.
        compiles_whole: whether torch.compile can take a model that carries a grid in one graph;
            where not, it takes the blocks (`compile_repeated_blocks`).
        model: the model, without the wrappers of `torch.compile`, DDP or peft.
    """

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    conditions: tuple[str, ...]
    input_layer: ClassVar[str]
    feed_forward_norms: ClassVar[dict[str, str]]
    shifts: ClassVar[tuple[str, ...]] = ("bias",)
    timestep_embedder: ClassVar[str] = ""
    guidance_projection: ClassVar[str] = ""
    compiles_whole: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def config(self) -> Any:
        """The configuration that diffusers keeps with the model."""
        return self.model.config

    @property
    def channels(self) -> int:
        """Channels of the latents that the input layer reads."""
        return cast(int, self.config.in_channels)

    @property
    @abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """The residual blocks in the order of execution."""

    def sites(self, *kinds: SiteKind) -> list[Site]:
        """All sites of the given kinds (of every kind when none is given), in order."""
        return [s for b in self.blocks for s in b.sites if not kinds or s.kind in kinds]

    # The tokens of a call -------------------------------------------------------------------------

    def grid(self, site: Site) -> Grid:
        """The token grid that `site` sees; follows every call of the model from now on."""
        module, fresh = self._grid_source(site)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Grid):
                return hook
        module.register_forward_pre_hook(fresh, with_kwargs=True)
        return fresh

    def _grid_source(self, site: Site) -> tuple[nn.Module, Grid]:
        """The module whose call tells the grid of `site`, and a new grid that reads such calls."""
        return self.model, Grid(self.config.patch_size)

    # Calling the denoiser -------------------------------------------------------------------------

    def denoise(
        self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """The model's prediction, shaped like `latents`.

        Args:
            model: what to call; the family's own model or a wrapper of it.
            latents: (batch, channels, height, width).
            timestep: (batch,), from 0 to 1000 (the model's own scale is the family's business).
            condition: tensors with the batch dimension first, named as in `conditions`, and as
                conversions asked for by `input`; entries that nobody knows are left aside. With
                "source" (batch, more channels, height, width), latents of a given picture, these
                are put behind the noised ones for a model that reads more channels.

        Raises:
            InputError: an entry is missing, or the size isn't a whole number of patches.
        """
        for name, entry in self.inputs.items():
            entry.give(condition.get(name))
        read = torch.cat([latents, condition["source"]], 1) if "source" in condition else latents
        kept = False
        try:
            prediction = self._denoise(model, read, timestep, condition)
            # A backward pass with checkpointing calls layers again and must find the inputs there.
            kept = torch.is_grad_enabled()
        finally:
            for entry in () if kept else self.inputs.values():
                entry.forget()
        # Some published weights also predict a variance, in the second half of the channels.
        return prediction[:, : latents.shape[1]]

    @abstractmethod
    def _denoise(
        self, model: nn.Module, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """See `denoise`: the call itself, with all channels in and out."""

    def input(self, name: str) -> Input:
        """An entry of the condition that follows every call of `denoise` from now on.

        Args:
            name: of the entry.
        """
        if not hasattr(self.model, "pared_inputs"):
            cast(Any, self.model).pared_inputs = {}
        if name not in self.inputs:
            self.inputs[name] = Input()
            self.model.register_forward_pre_hook(self.inputs[name])
        return self.inputs[name]

    @property
    def inputs(self) -> dict[str, Input]:
        """The entries of the condition that were asked for by `input`."""
        return getattr(self.model, "pared_inputs", {})

    def norm_before(self, site: Site) -> str:
        """Dotted path of the norm in front of a feed-forward."""
        block, _, name = site.path.rpartition(".")
        return f"{block}.{self.feed_forward_norms[name]}"

    def linear_layers(self, site: Site, role: Role) -> tuple[str, ...]:
        """Dotted paths of a site's linear layers of one role: both streams' in a joint attention.

        Layers that the site hasn't got are left out, and so is a query of the text where the
        attention computes no output for it.
        """
        names = [name for name in ROLES[role] if part_of(site.module, name) is not None]
        if "add_q_proj" in names and part_of(site.module, "to_add_out") is None:
            names.remove("add_q_proj")
        return tuple(f"{site.path}.{name}" for name in names)

    @property
    def label_tables(self) -> tuple[str, ...]:
        """Dotted paths of the embeddings of classes: a row for each class, the null class last."""
        return ()

    def set_classes(self, count: int) -> None:
        """Put label tables for `count` other classes in; the null class keeps its row.

        Raises:
            InputError: the model isn't conditioned by classes.
        """
        raise InputError(
            f"a {self.name} model takes {', '.join(self.conditions)}, and no classes that could be "
            "counted anew."
        )

    @abstractmethod
    def example(
        self,
        batch: int = 1,
        height: int | None = None,
        width: int | None = None,
        text_tokens: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Random latents, timestep and condition for one call, on the model's device, in its type.

        Args:
            batch: samples.
            height: of the latents (not pixels); by default the model's own sample size.
            width: likewise.
            text_tokens: length of the prompt; by default what the stock pipeline uses.
            generator: source of the random numbers (CPU).
        """

    def encode(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The condition of each prompt, made by the pipeline's own encoders.

        Args:
            pipeline: a stock pipeline of this family, with its text encoders.
            prompts: what to encode; "" is the prompt of an unconditional pass.

        Returns:
            Entries as in `conditions`, (prompts, ...), all prompts of one length.

        Raises:
            InputError: the family isn't conditioned by text.
        """
        raise InputError(
            f"a {self.name} model takes {', '.join(self.conditions)}, and no prompts that could be "
            "encoded."
        )

    def _encoded(self, encode: Callable[[list[str]], tuple], prompts: list[str]) -> list[Tensor]:
        """What a pipeline's `encode_prompt` gives, some prompts at a time, put together."""
        with torch.no_grad():
            parts = [
                encode(prompts[start : start + ENCODED_AT_ONCE])
                for start in range(0, len(prompts), ENCODED_AT_ONCE)
            ]
        return [torch.cat(entry).float().cpu() for entry in zip(*parts, strict=True)]

    def _latents(
        self, batch: int, height: int | None, width: int | None, generator: torch.Generator | None
    ) -> Tensor:
        """Random latents in the size that the configuration knows, unless another is given."""
        height, width = height or self.config.sample_size, width or self.config.sample_size
        return self._random(batch, self.channels, height, width, generator=generator)

    def _random(self, *shape: int, generator: torch.Generator | None) -> Tensor:
        parameter = next(self.model.parameters())
        if parameter.device.type == "meta":
            return torch.empty(shape, dtype=parameter.dtype, device="meta")
        return torch.randn(shape, generator=generator).to(parameter)

    def _take(self, condition: dict[str, Tensor], name: str) -> Tensor:
        """An entry that the model can't do without."""
        if name in condition:
            return condition[name]
        given = ", ".join(condition) or "nothing"
        raise InputError(
            f"the condition has no {name!r}: a {self.name} model takes "
            f"{', '.join(self.conditions)}, and was given {given}."
        )

    def _require_whole_patches(self, latents: Tensor, patch: int) -> None:
        """Refuse a size that the model would silently crop."""
        height, width = latents.shape[-2:]
        if height % patch or width % patch:
            raise InputError(
                f"latents of {height} x {width} don't divide into the {self.name} model's patches "
                f"of {patch} x {patch}; give a height and width that are multiples of {patch}."
            )

    # The timestep ---------------------------------------------------------------------------------

    @property
    def timestep_embedders(self) -> list[str]:
        """Dotted paths of all that `timestep_embedder` stands for."""
        names = (name for name, _ in self.model.named_modules())
        return [name for name in names if fnmatch(name, self.timestep_embedder)]

    def add_guidance_projection(self, channels: int) -> None:
        """Put in the `guidance_projection`, all zero; one that is there already is left as it is.

        The model's configuration says so, and stock classes and pipelines go by that.

        Args:
            channels: number of the features that it takes.
        """
        raise NotImplementedError

    # Finding and replacing modules ----------------------------------------------------------------

    def replace(self, path: str, module: nn.Module) -> None:
        """Put `module` where `path` points."""
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)

    def _list(self, path: str) -> Iterator[tuple[str, nn.Module]]:
        """The entries of a `ModuleList`, with their dotted paths."""
        entries = cast(nn.ModuleList, self.model.get_submodule(path))
        for index, module in enumerate(entries):
            yield f"{path}.{index}", module

    def refuse(self, what: str, serves: str) -> InputError:
        """The error for a method that can't work on this model."""
        return InputError(f"{what} can't be used on {type(self.model).__name__}: {serves}")


def part_of(module: Any, path: str) -> Any:
    """The submodule at a dotted path, or None where there is none."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


# The submodules of a block: each one's kind, with its stream where that is not the image's alone.
Parts = dict[str, SiteKind | tuple[SiteKind, Stream]]


def block_of(index: int, path: str, module: nn.Module, parts: Parts) -> Block:
    """A `Block` whose sites are the submodules named in `parts`, where they exist.

    Args:
        index: of the block, counted through the whole model.
        path: dotted path of the block.
        module: the block.
        parts: kinds and streams of its submodules.
    """
    sites = []
    for name, what in parts.items():
        part = getattr(module, name, None)
        if part is not None:
            of_site = (what,) if isinstance(what, str) else what
            sites.append(Site(of_site[0], f"{path}.{name}", index, part, *of_site[1:]))
    return Block(index, path, module, tuple(sites))
