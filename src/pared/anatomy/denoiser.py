"""The denoisers of diffusion models: how they are called, and what a method may ask of them.

A call has latents, a timestep, and a condition: named tensors, the same for all models that read
the same. `Grid` tells height and width in tokens of the call that is running, `Input` what a
conversion reads of the condition deep inside a model.
"""

import threading
from abc import abstractmethod
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.anatomy.base import Family, Site
from pared.anatomy.heads import HeadLayout
from pared.errors import InputError

# Prompts that text encoders get at once.
ENCODED_AT_ONCE = 256

# Where diffusers' pipelines take the shift of a dynamic schedule to be: image tokens and shift.
SHORT, LONG = (256, 0.5), (4096, 1.15)


class OfCall:
    """An attribute of a `Grid`: what the last call in this thread set it to.

    Threads that never called the model see what any of them set last: a backward pass with
    checkpointing runs layers again in a thread of its own.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, grid: "Grid | None", owner: type) -> Any:
        if grid is None:
            return self
        value = getattr(grid._own, self.name, grid._last.get(self.name))
        if isinstance(value, InputError):  # that it couldn't be read is told to whoever asks
            raise value
        return value

    def __set__(self, grid: "Grid", value: Any) -> None:
        setattr(grid._own, self.name, value)
        grid._last[self.name] = value


class Grid:
    """Height and width, in tokens, of the call that is running.

    It is itself the forward pre-hook that keeps it up to date; copies of a model copy it along.
    Threads that call one model at the same time see their own. Denoisers install it through
    `Denoiser.grid`.

    Args:
        patch: side of a token, in pixels of the module's input.

    Attributes:
        image_first: whether image tokens come before text tokens in the sequence that a joint
            attention mixes.
    """

    image_first: ClassVar[bool] = True
    height = OfCall()
    width = OfCall()

    def __init__(self, patch: int = 1) -> None:
        self.patch = patch
        self._own, self._last = threading.local(), {"height": 0, "width": 0}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _own=threading.local(), _last=dict(state["_last"]))

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

    def require(self) -> None:
        """Refuse a call whose tokens form no grid; for who needs one, and hasn't read it yet.

        Raises:
            InputError: they form none.
        """
        _ = self.tokens

    def streams(self, length: int, image: int | None = None) -> tuple[slice, slice]:
        """Which tokens of a joint sequence are image and which are text.

        The image tokens are those of the grid; all others are text.

        Args:
            length: tokens of the whole sequence.
            image: how many image tokens are in it, where some were left out.

        Returns:
            Slices of the image tokens and of the text tokens.
        """
        image = self.tokens if image is None else image
        text = length - image
        if self.image_first:
            return slice(0, image), slice(image, length)
        return slice(text, length), slice(0, text)


class Input:
    """An entry of the condition that a conversion reads deep inside a model.

    A task or a guidance weight, say, which the stock class has no argument for. Got by
    `Denoiser.input`; copies of a model copy it along.

    It is itself the forward pre-hook that tells the calls of `Denoiser.denoise` from others.
    """

    def __init__(self) -> None:
        self._by_hand: Tensor | None = None
        self._given: Tensor | None = None
        self._coming = False

    @property
    def value(self) -> Tensor | None:
        """(batch, ...) of the running call of `Denoiser.denoise`.

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
        if not self._coming:  # nobody gave it: the call isn't one of `Denoiser.denoise`
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


class Denoiser(Family):
    """Access to the denoiser of a diffusion model.

    Attributes:
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
        rising: whether the model's own timestep rises during a run.
        embedder: dotted path of the module that makes image tokens of the latents, its first
            argument, absolute positions added; "" where blocks see maps and no tokens.
        output_layer: dotted path of the last layer that works on each image token by itself.
        layout: how the attentions make heads of tokens.
    """

    kind = "denoiser"
    sizes: ClassVar[tuple[dict[str, int], dict[str, int]]] = (
        {"height": 8, "width": 8, "text_tokens": 8},
        {"height": 8, "width": 12, "text_tokens": 8},
    )
    brief: ClassVar[dict[str, int]] = {"text_tokens": 8}
    conditions: tuple[str, ...]
    input_layer: ClassVar[str]
    feed_forward_norms: ClassVar[dict[str, str]]
    shifts: ClassVar[tuple[str, ...]] = ("bias",)
    timestep_embedder: ClassVar[str] = ""
    guidance_projection: ClassVar[str] = ""
    rising: ClassVar[bool] = False
    embedder: ClassVar[str] = ""
    output_layer: ClassVar[str] = ""
    layout: ClassVar[HeadLayout] = HeadLayout()

    @property
    def channels(self) -> int:
        """Channels of the latents that the input layer reads."""
        return cast(int, self.config.in_channels)

    @property
    def patch(self) -> int:
        """Side of an image token in latent pixels; 1 where blocks see maps and no tokens."""
        return getattr(self.config, "patch_size", None) or 1

    @property
    def sample_size(self) -> int:
        """Side of the latents that the model is made for."""
        return cast(int, self.config.sample_size)

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

    def patches(self, latents: Tensor) -> Tensor:
        """What each token holds of latents as the model is given them.

        Returns:
            (batch, tokens, channels, pixels), tokens in the order of the model's.
        """
        side = self.config.patch_size
        tokens = F.pixel_unshuffle(latents, side).flatten(2).transpose(1, 2)
        return tokens.unflatten(2, (-1, side**2))

    def some_tokens(self, embedded: Any, ids: Tensor) -> Any:
        """What the `embedder` returned, for the tokens `ids` (batch, some) alone."""
        return torch.take_along_dim(embedded, ids[..., None], dim=1)

    # Calling the denoiser -------------------------------------------------------------------------

    def told(self, timestep: Tensor) -> Tensor:
        """What the stock pipeline tells the model at timesteps of its scheduler, from 0 to 1000."""
        return timestep

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        """Set a scheduler as the stock pipeline sets it.

        Args:
            scheduler: of diffusers; it is changed in place.
            steps: that users ask for; schedulers of second order make more of them.
            size: height and width of the latents.
        """
        scheduler.set_timesteps(steps, **self._schedule(scheduler, size))

    def _schedule(self, scheduler: Any, size: tuple[int, int]) -> dict[str, Any]:
        """What `set_timesteps` of a scheduler is told beside the steps."""
        device = self.model.device
        # Weights that are offloaded one by one are nowhere between the calls.
        told: dict[str, Any] = {"device": None if device.type == "meta" else device}
        if scheduler.config.get("use_dynamic_shifting"):
            height, width = size
            told["mu"] = _shift(scheduler.config, (height // self.patch) * (width // self.patch))
        return told

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

    def run(self, model: nn.Module, *example: Any) -> Tensor:
        return self.denoise(model, *example)

    def norm_before(self, site: Site) -> str:
        """Dotted path of the norm in front of a feed-forward."""
        block, _, name = site.path.rpartition(".")
        return f"{block}.{self.feed_forward_norms[name]}"

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
        """Random latents in the size that the model is made for, unless another is given."""
        height, width = height or self.sample_size, width or self.sample_size
        return self._random(batch, self.channels, height, width, generator=generator)

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


def _shift(config: Any, tokens: int) -> float:
    """mu of a dynamic schedule, on the line between a short and a long sequence."""
    short, low = config.get("base_image_seq_len", SHORT[0]), config.get("base_shift", SHORT[1])
    long, high = config.get("max_image_seq_len", LONG[0]), config.get("max_shift", LONG[1])
    return low + (tokens - short) * (high - low) / (long - short)
