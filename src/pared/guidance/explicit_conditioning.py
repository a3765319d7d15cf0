"""EC: Guidance Free Image Editing via Explicit Conditioning.

arXiv 2503.17593, 2025.

Editing by instruction with classifier-free guidance takes up to three passes per step. Here the
diffusion doesn't end in white noise but in a Gaussian of the given picture and the instruction, so
that whatever the denoiser predicts is conditional already, and one pass per step is enough. The
picture's part is the autoencoder's own posterior; the instruction's comes from a small autoencoder
of pooled prompts, which this method adds to the denoiser.

Implemented from accounts of the paper; no code taken, none is released. The formula that fuses both
Gaussians couldn't be reached, nor the losses and sizes of the prompt's autoencoder, nor the
training. Chosen here: the Gaussian of the sum (with "rms" and "mean" beside it); the prompt's maps
from residual convolutions, fitted by reconstruction and a weak KL to the corpus of instructions
with its mean and spread taken out, and no contrastive term, for which that stands in; the prior
frozen while the denoiser trains; v prediction on a schedule of zero terminal SNR, noise prediction
on the schedule as it is. Pooled prompts are what the denoiser is given anyway: its pooled entry,
the masked mean of its tokens, or the last token of a causal encoder. Fitted for one size of
latents, the prompt's maps are interpolated for others. `concat_context` and `image_std` are not the
paper's. Not verified: quality at the paper's scale.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from pared import anatomy
from pared.anatomy import Family
from pared.info import Headline, Info
from pared.method import Claim, Conversion
from pared.nn.widened import widened
from pared.objectives.endpoint import SITE, ConditionalPrior, pooled

INFO = Info(
    slug="explicit-conditioning",
    title="Guidance Free Image Editing via Explicit Conditioning",
    arxiv="2503.17593",
    venue="arXiv 2025",
    kind="conversion",
    families=("unet", "pixart", "sd3", "flux"),
    training=True,
    trained_by="recipe",
    exact=False,
    maturity="partial",
    summary="diffusion from the given picture and instruction instead of noise; no guidance passes",
    cls="ExplicitConditioning",
    headlines=(
        Headline(
            key="text-direction-over-guidance",
            text="directional similarity of images and captions (DCS) of edits, one pass of EC "
            "over three-pass guidance (paper: .191 / .177)",
            paper=1.08,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="visual-direction-over-guidance",
            text="directional similarity to the wanted image (DVS) of edits, one pass of EC over "
            "three-pass guidance (paper: .576 / .448)",
            paper=1.29,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="text-direction-over-one-pass",
            text="directional similarity of images and captions (DCS) of edits, EC over the guided "
            "model's one pass without guidance (paper: .191 / .114)",
            paper=1.68,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="speedup",
            text="time of an edit, three-pass guidance over EC at the same number of steps",
            paper=3.0,
            direction="higher",
            bound=2.5,
        ),
    ),
)


class ExplicitConditioning(Conversion):
    """The denoiser of a diffusion that ends in y ~ N(mu(c), Sigma(c)); section 3 of the paper."""

    info = INFO
    passes: ClassVar[int | None] = 1

    fusion: Literal["sum", "rms", "mean"] = Field(
        default="sum", description="of the picture's and the prompt's Gaussian"
    )
    image_std: float | None = Field(
        default=None,
        gt=0,
        description="standard deviation of the picture's Gaussian, in scaled latents; None takes "
        "the autoencoder's own, which is tiny",
    )
    sigma_scale: float = Field(
        default=1.0, gt=0, description="factor of the fused standard deviation"
    )
    learn_prior: bool = Field(
        default=False, description="let the denoiser's loss train the prior too, with a KL term"
    )
    concat_context: bool = Field(
        default=False,
        description="also give the picture's latents to the denoiser, behind the noised ones",
    )
    tasks: tuple[Literal["edit", "upscale", "inpaint"], ...] = Field(
        default=("edit",), min_length=1, description="what the denoiser is taught"
    )

    @property
    def serves(self) -> int:
        return len(self.tasks)

    def claims(self, family: Family) -> list[Claim]:
        if "text" not in family.conditions:
            return []
        reads, predicts = family.config.in_channels, family.config.get("out_channels")
        if predicts is not None and reads > predicts:
            raise family.refuse(
                self.info.slug,
                f"it reads {reads} channels and predicts {predicts}, so it reads pictures already; "
                "give a text-to-image model.",
            )
        claims = [Claim("guidance", "replaces"), Claim(SITE, "replaces")]
        if self.concat_context:
            claims.append(Claim(family.input_layer, "replaces"))
        return claims

    def convert(self, model: nn.Module) -> None:
        family = anatomy.of(model)
        # An example is the anatomy's word for the shapes of latents and prompts.
        latents, _, condition = family.example(text_tokens=1, generator=torch.Generator())
        _, channels, height, width = latents.shape
        prior = ConditionalPrior(
            pooled(condition).shape[1],
            channels,
            (height, width),
            self.fusion,
            self.image_std,
            self.sigma_scale,
        )
        setattr(model, SITE, prior.to(latents.device, latents.dtype))
        if self.concat_context:
            layer = model.get_submodule(family.input_layer)
            family.replace(family.input_layer, widened(layer))

    def trainable(self, family: Family) -> tuple[str, ...]:
        """All weights of the denoiser, as the paper trains it; those of the prior if it learns."""
        if self.learn_prior:
            return ("*",)
        parts = [name for name, _ in family.model.named_children() if name != SITE]
        own = [name for name, _ in family.model.named_parameters(recurse=False)]
        return (*(f"{name}.*" for name in parts), *own)

    def healing(self, task: Any) -> Any:
        from pared.objectives.explicit import Explicit

        return Explicit(task, learn_prior=self.learn_prior)
