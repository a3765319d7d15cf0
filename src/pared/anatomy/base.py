"""What a method may ask about a model: its blocks, the sites in them, and how to call it.

A family is one file of this folder with one subclass of `Family`, of a denoiser or of a speech
encoder. It's the only kind of code in pared that knows the class and attribute names of other
libraries. What diffusers documents for attention processors (`to_q`, `to_k`, `to_v`, `to_out`,
`heads`, and `add_q_proj` and its like for a second stream) is not repeated here: a processor gets
its attention module and may use those names.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from pared.errors import InputError

SiteKind = Literal[
    "self_attention",  # image tokens attend to image tokens only, frames of audio to frames
    "joint_attention",  # image and text tokens share one softmax
    "cross_attention",  # image tokens attend to the condition
    "feed_forward",
    "modulation",  # what turns the timestep (and labels) into shifts, scales and gates
    "norm",
    "convolution",  # frames of audio hear their neighbours
]

# Whose tokens pass through a site.
Stream = Literal["image", "text", "both", "audio"]

# What a linear layer of an attention or a feed-forward is for.
Role = Literal["q", "k", "v", "out", "fc1", "fc2"]

# The layers of each role by the names of diffusers and transformers; in a joint attention the text
# stream's own come second.
ROLES: dict[Role, tuple[str, ...]] = {
    "q": ("to_q", "add_q_proj", "q_proj", "linear_q"),
    "k": ("to_k", "add_k_proj", "k_proj", "linear_k"),
    "v": ("to_v", "add_v_proj", "v_proj", "linear_v"),
    "out": ("to_out.0", "to_add_out", "out_proj", "linear_out"),
    "fc1": ("net.0.proj", "intermediate_dense"),
    "fc2": ("net.2", "output_dense"),
}


@dataclass(frozen=True)
class Site:
    """One place in a model where a method can work.

    Attributes:
        kind: what happens there.
        path: dotted name of the module inside the model; unique, used in messages and claims.
        block: index of the block that holds it, counted through the whole model.
        module: the module itself, as it is now.
        stream: whose tokens pass through it: the image's, the text's, both, or the frames of audio.
    """

    kind: SiteKind
    path: str
    block: int
    module: nn.Module
    stream: Stream = "image"

    @property
    def width(self) -> int:
        """Channels of an attention's queries (heads x channels per head)."""
        query = next(name for name in ROLES["q"] if part_of(self.module, name) is not None)
        return part_of(self.module, query).out_features

    @property
    def heads(self) -> int:
        """Attention heads."""
        module = cast(Any, self.module)
        return module.heads if hasattr(module, "heads") else module.num_heads


@dataclass(frozen=True)
class Branch:
    """What one addition to the residual stream of a block comes from.

    Attributes:
        path: dotted path of the module whose output the block gates and adds (a tuple of outputs
            in a joint attention: image first, then text).
        module: the module itself.
        block: index of the block that holds it.
        feeds: dotted paths of other modules of the block that work for this branch alone: their
            outputs, shaped like their inputs but for the channels, are of use to it only.
    """

    path: str
    module: nn.Module
    block: int
    feeds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """One residual block.

    Attributes:
        index: counted through the whole model.
        path: dotted path.
        module: the block itself; its forward takes the image tokens as `hidden_states`, and the
            text tokens that it changes as `encoder_hidden_states`, in this order.
        sites: where methods work.
        returns: whose tokens the block returns, in order. A last block may return None for text.
    """

    index: int
    path: str
    module: nn.Module
    sites: tuple[Site, ...]
    returns: tuple[Stream, ...] = ("image",)

    def tokens(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The residual streams that a call of the block gets, in the order of `returns`."""
        names = ("hidden_states", "encoder_hidden_states")
        given = dict(zip(names, args, strict=False)) | kwargs
        return tuple(given[names[stream == "text"]] for stream in self.returns)

    def outputs(self, result: Any) -> tuple[Tensor | None, ...]:
        """The residual streams in what the block returns, in the order of `returns`."""
        return result if isinstance(result, tuple) else (result,)

    def result(self, streams: tuple[Tensor | None, ...]) -> Any:
        """What the block returns for these streams: the inverse of `outputs`."""
        return streams if len(self.returns) > 1 else streams[0]


class Lacking(InputError, AttributeError):
    """Something was asked of a model that only models of another kind have."""


class Family(ABC):
    """Access to one model of a family. Get one by `pared.anatomy.of(model)`.

    This much every model has; what only one kind of models has, such as the `denoise` of a
    denoiser, is asked of the family too, and refused in a sentence by those of another kind.

    Attributes:
        name: short name of the family, e.g. "pixart".
        kind: what its models are. Methods for models of one kind serve those of no other.
        classes: names of the model classes it reads.
        sizes: two sizes of small calls, as arguments of `example`.
        brief: what keeps a call at the model's own size brief, likewise.
        compiles_whole: whether torch.compile can take a model that carries a grid in one graph;
            where not, it takes the blocks (`compile_repeated_blocks`).
        model: the model, without the wrappers of `torch.compile`, DDP or peft.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    sizes: ClassVar[tuple[dict[str, int], dict[str, int]]]
    brief: ClassVar[dict[str, int]] = {}
    compiles_whole: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property of ours that failed: raise what it raised
            return object.__getattribute__(self, name)
        raise Lacking(f"a {self.name} model has no {name!r}: it is a {self.kind}.")

    @property
    def config(self) -> Any:
        """The configuration that its library keeps with the model."""
        return self.model.config

    @property
    @abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """The residual blocks in the order of execution."""

    def sites(self, *kinds: SiteKind) -> list[Site]:
        """All sites of the given kinds (of every kind when none is given), in order."""
        return [s for b in self.blocks for s in b.sites if not kinds or s.kind in kinds]

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All additions to the residual streams, in order, such as attentions."""
        return tuple(
            Branch(s.path, s.module, s.block)
            for s in self.sites(
                "self_attention",
                "joint_attention",
                "cross_attention",
                "feed_forward",
                "convolution",
            )
        )

    # Calling the model ----------------------------------------------------------------------------

    @abstractmethod
    def example(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Random inputs for one call of `run`, on the model's device, in its type.

        Each kind of models has sizes of its own; `batch` and `generator` are common to all.
        """

    @abstractmethod
    def run(self, model: nn.Module, *example: Any) -> Tensor:
        """The output of one call.

        Args:
            model: what to call; the family's own model or a wrapper of it.
            example: what `example` gave, or the like; all tensors in it with the batch first.
        """

    def _random(self, *shape: int, generator: torch.Generator | None) -> Tensor:
        # Not the first parameter's type: Wan's is a table that diffusers keeps in float32.
        model = cast(Any, self.model)
        if model.device.type == "meta":
            return torch.empty(shape, dtype=model.dtype, device="meta")
        return torch.randn(shape, generator=generator).to(model.device, model.dtype)

    # Finding and replacing modules ----------------------------------------------------------------

    def linear_layers(self, site: Site, role: Role) -> tuple[str, ...]:
        """Dotted paths of a site's linear layers of one role: both streams' in a joint attention.

        Layers that the site hasn't got are left out, and so is a query of the text where the
        attention computes no output for it.
        """
        names = [name for name in ROLES[role] if part_of(site.module, name) is not None]
        if "add_q_proj" in names and part_of(site.module, "to_add_out") is None:
            names.remove("add_q_proj")
        return tuple(f"{site.path}.{name}" for name in names)

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


def block_of(
    index: int,
    path: str,
    module: nn.Module,
    parts: Parts,
    returns: tuple[Stream, ...] = ("image",),
) -> Block:
    """A `Block` whose sites are the submodules named in `parts`, where they exist.

    Args:
        index: of the block, counted through the whole model.
        path: dotted path of the block.
        module: the block.
        parts: kinds and streams of its submodules.
        returns: whose tokens it returns, in order.
    """
    sites = []
    for name, what in parts.items():
        part = getattr(module, name, None)
        if part is not None:
            of_site = (what,) if isinstance(what, str) else what
            sites.append(Site(of_site[0], f"{path}.{name}", index, part, *of_site[1:]))
    return Block(index, path, module, tuple(sites), returns)
