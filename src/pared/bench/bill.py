"""The bill of a product: what every part of a model costs, in MACs, parameters and bytes.

    cost of an image = steps x passes x (what one pass of the denoiser computes)
                       + text encoders + decoding of the latents

Everything is counted on the meta device, from configurations: nothing is computed, loaded, moved
or changed. A MAC is one multiplication with its addition, two FLOPs; matrix products and
convolutions are counted, nothing else, as is the custom.
"""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from pared import anatomy, method
from pared.bench import bill_tables, costs
from pared.bench.bill_tables import DENOISER, counted
from pared.bench.costs import Cost
from pared.bench.targets import USUAL_FRAME_SCALE, USUAL_VAE_SCALE, Target, read
from pared.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from pared.anatomy import Family

Format = Literal["text", "json", "csv", "md"]


@dataclass(frozen=True)
class Line:
    """One line of a bill.

    Attributes:
        part: "denoiser", "vae", or the name of a text encoder.
        kind: of the denoiser's work, one of `pared.bench.costs.KINDS`; "encode" or "decode".
        macs: multiply-adds of one pass of the part (for the whole batch).
        passes: of the part per picture: steps x passes for the denoiser; prompt and negative prompt
            for text encoders; 1 for the autoencoder.
        parameters: how many. An autoencoder counts whole, though only its decoder runs.
        weight_bytes: bytes of parameters and buffers.
        activation_bytes: bytes of all tensors that enter or leave the layers in one pass, each
            once: about what training keeps. Attention maps aren't among them.
        largest_bytes: the largest of these tensors.
    """

    part: str
    kind: str
    macs: int
    passes: int
    parameters: int
    weight_bytes: int
    activation_bytes: int
    largest_bytes: int

    @property
    def total(self) -> int:
        """Multiply-adds of all passes."""
        return self.macs * self.passes


@dataclass(frozen=True)
class Bill:
    """What a picture costs, line by line.

    Attributes:
        name: of what was billed.
        height: of the picture in pixels.
        width: likewise.
        steps: of the denoiser.
        passes: of the denoiser per step.
        batch: pictures made at once.
        text_tokens: of the prompt as the denoiser sees it; 0 without text.
        dtype: of the denoiser's weights, as torch names it.
        lines: the costs.
        notes: what was assumed or left out.
        models: denoisers kept, one for each task unless one serves several.
        frames: of a video, which counts as one picture; 1 where pictures are made.
    """

    name: str
    height: int
    width: int
    steps: int
    passes: int
    batch: int
    text_tokens: int
    dtype: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    models: int = 1
    frames: int = 1

    @property
    def total(self) -> int:
        """Multiply-adds of everything, for the whole batch."""
        return sum(line.total for line in self.lines)

    @property
    def per_image(self) -> float:
        """Multiply-adds of one picture."""
        return self.total / self.batch

    @property
    def per_pass(self) -> int:
        """Multiply-adds of one pass of the denoiser, for the whole batch."""
        return sum(line.macs for line in self.lines if line.part == DENOISER)

    @property
    def parameters(self) -> int:
        """Parameters of all parts."""
        return sum(line.parameters for line in self.lines)

    @property
    def kept_parameters(self) -> int:
        """Parameters of all denoisers kept, and of what they share."""
        return sum(self._copies(line) * line.parameters for line in self.lines)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the same."""
        return sum(self._copies(line) * line.weight_bytes for line in self.lines)

    def _copies(self, line: Line) -> int:
        return self.models if line.part == DENOISER else 1

    @property
    def headline(self) -> str:
        """What was billed, e.g. "pixart-sigma, 2048x2048, 20 steps x 2 passes"."""
        video = f" x {counted(self.frames, 'frame')}" if self.frames > 1 else ""
        said = [
            self.name,
            f"{self.height}x{self.width}{video}",
            f"{counted(self.steps, 'step')} x {counted(self.passes, 'pass')}",
        ]
        said += [f"batch {self.batch}"] if self.batch > 1 else []
        said += [counted(self.text_tokens, "text token")] if self.text_tokens else []
        return ", ".join([*said, self.dtype])

    def kind(self, kind: str) -> Cost:
        """The cost of one kind of work in one pass of the denoiser; zero where it has none."""
        for line in self.lines:
            if line.part == DENOISER and line.kind == kind:
                return Cost(**{name: getattr(line, name) for name in Cost.__dataclass_fields__})
        return Cost()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and text, ready for JSON."""
        return asdict(self) | {
            "lines": [
                asdict(line) | {"total": line.total, "share": line.total / self.total}
                for line in self.lines
            ],
            "notes": list(self.notes),
            "total_macs": self.total,
            "total_flops": 2 * self.total,
            "macs_per_image": self.per_image,
            "flops_per_image": 2 * self.per_image,
            "macs_per_pass": self.per_pass,
            "parameters": self.parameters,
            "weight_bytes": sum(line.weight_bytes for line in self.lines),
            "kept_parameters": self.kept_parameters,
            "kept_bytes": self.kept_bytes,
        }

    def table(self, format: Format = "text") -> str:
        """The bill to read ("text", "md") or to compute with ("json", "csv")."""
        if format == "text":
            return bill_tables.bill_text(self)
        if format == "md":
            return bill_tables.bill_markdown(self)
        if format == "json":
            return json.dumps(self.to_dict(), indent=1)
        if format == "csv":
            return self._csv()
        raise InputError(f"there is no format {format!r}; the formats are text, json, csv and md.")

    def __str__(self) -> str:
        return self.table()

    def _csv(self) -> str:
        file = io.StringIO()
        lines = self.to_dict()["lines"]
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return file.getvalue()


def bill(
    target: Any,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    passes: int | None = None,
    batch: int = 1,
    text_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    tasks: int = 1,
    frames: int | None = None,
) -> Bill:
    """What a picture or a video costs.

    Args:
        target: name of a preset (`pared.anatomy.presets.names()`) or of a house model, folder of a
            pipeline or of a model, a diffusers pipeline, or a denoiser. Configurations only are
            read; what is given stays as it is.
        height: of the picture in pixels; by default what the model is made for.
        width: likewise.
        steps: of the denoiser; by default the pipeline's (1 for a denoiser alone).
        passes: of the denoiser per step; by default the pipeline's, 2 with classifier-free guidance
            (1 for a denoiser alone).
        batch: pictures made at once.
        text_tokens: of the prompt as the denoiser sees it; by default the pipeline's.
        dtype: of all weights and activations; by default the model's own, float32 for presets and
            folders.
        tasks: that the product does; each takes a denoiser of its own, unless one was taught many.
        frames: of a video; by default the pipeline's.

    Raises:
        InputError: not a model that pared reads, or a size that it can't make; the message names
            the nearest.
    """
    found = read(target)
    order = Order(found, height, width, steps, passes, batch, text_tokens, dtype, tasks, frames)
    return order.bill(found.denoiser(dtype))


class Order:
    """One request for a bill, complete: counts any denoiser of the same family in its place."""

    def __init__(
        self,
        target: Target,
        height: int | None,
        width: int | None,
        steps: int | None,
        passes: int | None,
        batch: int,
        text_tokens: int | None,
        dtype: torch.dtype | None,
        tasks: int = 1,
        frames: int | None = None,
    ) -> None:
        self.tasks = _positive("tasks", tasks)
        self.target, self.dtype = target, dtype
        self.steps = _positive("steps", target.steps if steps is None else steps)
        self.passes = _positive("passes", target.passes if passes is None else passes)
        self.batch = _positive("batch", batch)
        self.notes = list(target.notes)
        family = anatomy.of(target.denoiser(dtype))
        if family.kind != "denoiser":
            raise InputError(
                f"{target.name} is a {family.kind}; a bill is for what diffusion models paint."
            )
        vae = target.vae(dtype) if target.vae else None
        encoders = {name: build(dtype) for name, build in target.encoders.items()}
        self._size(family, vae, height, width, frames)
        lengths = self._prompt(family, encoders, text_tokens)
        self._rest = [self._encoding(name, encoders[name], lengths[name]) for name in encoders]
        self._rest += [self._decoding(vae)] if vae is not None else []

    def bill(self, denoiser: nn.Module) -> Bill:
        """The bill with `denoiser` (on the meta device) at work."""
        spent = self.count(denoiser)
        stack = method.stack_of(denoiser)
        passes = next((m.passes for m in stack if m.passes), self.passes)
        serves = max((m.serves for m in stack), default=1)
        times = self.steps * passes
        own = [_line(DENOISER, kind, cost, times) for kind, cost in spent.items()]
        return Bill(
            name=self.target.name,
            height=self.height,
            width=self.width,
            steps=self.steps,
            passes=passes,
            batch=self.batch,
            text_tokens=self.text_tokens or 0,
            dtype=str(denoiser.dtype).removeprefix("torch."),
            lines=(*own, *(_asked(line, passes) for line in self._rest)),
            notes=tuple(self.notes),
            models=math.ceil(self.tasks / serves),
            frames=self.frames,
        )

    def count(self, denoiser: nn.Module) -> dict[str, Cost]:
        """The costs of one pass, by kind."""
        family = anatomy.of(denoiser)
        example = family.example(self.batch, text_tokens=self.text_tokens, **self.latent)
        try:
            return costs.count(
                denoiser, costs.BySite(family), lambda: family.denoise(denoiser, *example)
            )
        except ValueError as error:  # what models say about sizes that they weren't made for
            raise InputError(
                f"{self.target.name} can't run at {self.height}x{self.width} pixels: "
                f"{str(error).rstrip('.')}."
            ) from None

    def _size(
        self, family: Family, vae: Any, height: int | None, width: int | None, frames: int | None
    ) -> None:
        """Settle on height and width in pixels, on the frames of a video, and on the latents'."""
        scale = USUAL_VAE_SCALE if vae is None else _scale(vae)
        if vae is None:
            self.notes.append(f"a latent pixel is taken for {scale}x{scale} pixels")
        own, _, _ = family.example()
        usual = self.target.size or (own.shape[-2] * scale, own.shape[-1] * scale)
        self.height: int = usual[0] if height is None else height
        self.width: int = usual[1] if width is None else width
        # On a throw-away model: asking for a grid leaves a hook.
        patch = max((family.grid(site).patch for site in family.sites()), default=1)
        _whole(self.target.name, "height", self.height, scale * patch)
        _whole(self.target.name, "width", self.width, scale * patch)
        self.latent = {"height": self.height // scale, "width": self.width // scale}
        self.frames = 1
        if own.ndim == 5:
            self._frames(vae, own.shape[2], frames)
        elif frames is not None:
            raise InputError(f"{self.target.name} makes pictures; leave frames out.")

    def _frames(self, vae: Any, own: int, given: int | None) -> None:
        """Settle on the frames of a video, and on those of its latents, the first of which stands
        for one frame and every other for several."""
        scale = USUAL_FRAME_SCALE if vae is None else vae.config.scale_factor_temporal
        if vae is None:
            self.notes.append(f"a latent frame behind the first is taken for {scale} frames")
        usual = self.target.frames or (own - 1) * scale + 1
        self.frames = _positive("frames", usual if given is None else given)
        if (self.frames - 1) % scale:
            below = (self.frames - 1) // scale * scale + 1
            raise InputError(
                f"{self.target.name} makes videos of one frame and a multiple of {scale} more, and "
                f"frames={self.frames} is none; the nearest that works is {below} or "
                f"{below + scale}."
            )
        self.latent["frames"] = (self.frames - 1) // scale + 1

    def _prompt(
        self, family: Family, encoders: dict[str, Any], given: int | None
    ) -> dict[str, int]:
        """Settle on the prompt's length; returns that of every text encoder.

        An encoder with a table of positions is always given full prompts. Where the family's usual
        prompt is longer than what the others read, the denoiser gets both, one after the other.
        """
        self.text_tokens: int | None = None
        free = self.target.prompt
        limits = {name: _limit(encoder, free) for name, encoder in encoders.items()}
        longest = max((limit for limit in limits.values() if limit), default=0)
        _, _, condition = family.example()
        if "text" not in condition:
            if given is not None:
                raise InputError(f"{self.target.name} takes no text; leave text_tokens out.")
            return {name: limit or 0 for name, limit in limits.items()}
        usual = self.target.text_tokens or condition["text"].shape[1]
        before = longest if free is not None and usual > free else 0
        if given is not None:
            self.text_tokens = _positive("text_tokens", given)
        elif self.target.text_tokens:
            self.text_tokens = usual
        else:
            self.text_tokens = free + before if free is not None else longest or usual
        return {n: limit or max(1, self.text_tokens - before) for n, limit in limits.items()}

    def _encoding(self, name: str, encoder: Any, tokens: int) -> Line:
        ids = torch.zeros(self.batch, tokens, dtype=torch.long, device="meta")
        spent = costs.count(encoder, costs.Whole(), lambda: encoder(input_ids=ids))
        return _line(name, "encode", spent[costs.OTHER], 1)

    def _decoding(self, vae: Any) -> Line:
        kind = next(vae.parameters()).dtype
        size = [self.latent[side] for side in ("frames", "height", "width") if side in self.latent]
        latents = torch.empty(self.batch, _channels(vae), *size, dtype=kind, device="meta")
        spent = costs.count(vae, costs.Whole(), lambda: vae.decode(latents))
        return _line("vae", "decode", spent[costs.OTHER], 1)


def _line(part: str, kind: str, cost: Cost, passes: int) -> Line:
    return Line(part=part, kind=kind, passes=passes, **asdict(cost))


def _asked(line: Line, passes: int) -> Line:
    """A line with its passes: text encoders read the prompt, and for guidance a negative one."""
    return replace(line, passes=min(passes, 2)) if line.kind == "encode" else line


def _scale(vae: Any) -> int:
    """Pixels per latent pixel and side."""
    stages = getattr(vae.config, "block_out_channels", ())
    return getattr(vae, "spatial_compression_ratio", None) or 2 ** max(0, len(stages) - 1)


def _channels(vae: Any) -> int:
    """Channels of the latents; autoencoders of video have another name for them."""
    return vae.config.get("latent_channels") or vae.config.z_dim


def _limit(encoder: Any, free: int | None) -> int | None:
    """Tokens that a text encoder has a table of positions for; None if it takes any number."""
    limit = getattr(encoder.config, "max_position_embeddings", None)
    # Language models have a limit far beyond any prompt.
    return limit if limit is None or free is None or limit <= free else None


def _whole(name: str, side: str, pixels: int, token: int) -> None:
    if _positive(side, pixels) % token == 0:
        return
    below = max(1, pixels // token) * token
    near = f"{below} or {below + token}" if pixels > token else str(token)
    raise InputError(
        f"{name} makes pictures in tokens of {token}x{token} pixels, and {side}={pixels} is not a "
        f"multiple of {token}; the nearest that works is {near}."
    )


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name}={value!r} doesn't work; give a whole number of at least 1.")
    return value
