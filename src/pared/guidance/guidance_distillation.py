"""Guidance distillation: On Distillation of Guided Diffusion Models.

arXiv 2210.03142, CVPR 2023.

Classifier-free guidance calls the denoiser twice per step. Here the denoiser gets the guidance
weight w as one more input and learns, from the teacher it was, to predict in one call what the
teacher's two come to, for every w. That is the paper's first stage; its second, which halves the
number of steps again and again and keeps the input, is `pared.few_step.progressive`.

Implemented from the paper; there is no official code. w is 0 where the teacher isn't guided;
diffusers' guidance_scale is 1 + w. A U-Net takes w in through the projection that diffusers gives
it (`time_cond_proj_dim`): it opens in plain diffusers, and its stock pipelines pass on their
guidance_scale and call it once per step. The other families get a small MLP whose result is added
to the embedding of the timestep. Their stock pipelines know nothing of w: call them without
guidance (guidance_scale=1), with w put into `pared.anatomy.of(model).input("guidance_weight")`, as
`one_pass` and `pared sample` do; where nothing is put in, the model is the one without guidance.
Left open by the paper, or chosen here: 256 features of w, those of diffusers; the new weights start
at zero, so that the student starts as the teacher without guidance; w from 0 to 14, the range of
its latent class-conditional models (for Stable Diffusion it has 2 to 14); the error is that of v,
or of the flow where the model predicts one (`weighting`). Not verified: quality at the paper's
scale. A negative prompt has no effect on the student.
"""

import inspect
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import Family
from pared.anatomy.denoiser import Input
from pared.info import Headline, Info
from pared.method import Claim, Conversion, stack_of
from pared.nn.diffusion import guidance_features
from pared.objectives.guided import WEIGHT, Guided
from pared.objectives.paths import Weighting

INFO = Info(
    slug="guidance-distillation",
    title="On Distillation of Guided Diffusion Models",
    arxiv="2210.03142",
    venue="CVPR 2023",
    kind="conversion",
    families=("unet", "pixart", "sd3", "dit"),
    training=True,
    trained_by="recipe",
    exact=False,
    maturity="faithful",
    summary="the guidance weight as an input: one call per step in the place of two",
    cls="GuidanceDistillation",
    headlines=(
        Headline(
            key="flops-per-step",
            text="FLOPs of one guided step, the student over its teacher",
            paper=0.5,
            direction="lower",
            bound=0.51,
        ),
        Headline(
            key="distance-fast-over-distilled-2",
            text="distance to the pictures of many guided steps, 2 steps of a fast solver on the "
            "teacher over 2 steps of the student (paper, text-to-image: FID about 98 / 37)",
            paper=2.6,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="distance-fast-over-distilled-4",
            text="distance to the pictures of many guided steps, 4 steps of a fast solver on the "
            "teacher over 4 steps of the student (paper, text-to-image: FID about 34 / 26)",
            paper=1.3,
            direction="higher",
            bound=1.0,
        ),
    ),
)

# Features of w; what diffusers' pipelines for distilled U-Nets expect.
CHANNELS = 256


class GuidanceDistillation(Conversion):
    """An input for the guidance weight, section 3.1 of the paper."""

    info = INFO
    passes: ClassVar[int | None] = 1

    w_min: float = Field(default=0.0, ge=0, description="smallest weight learnt (scale - 1)")
    w_max: float = Field(default=14.0, ge=0, description="largest weight learnt (scale - 1)")
    weighting: Weighting = Field(
        default="velocity",
        description="how an error counts along the path: as in v, or the paper's truncated SNR",
    )

    @model_validator(mode="after")
    def _range(self) -> "GuidanceDistillation":
        if self.w_min > self.w_max:
            raise ValueError(
                f"w_min={self.w_min} is above w_max={self.w_max}; give the smaller one as w_min"
            )
        return self

    def claims(self, family: Family) -> list[Claim]:
        if "guidance" in family.conditions:
            raise family.refuse(
                self.info.slug,
                "it takes its guidance in as an input and calls for one pass a step.",
            )
        if not (path := _path(family)):
            return []
        return [Claim("guidance", "replaces"), Claim(path, "replaces")]

    def convert(self, model: nn.Module) -> None:
        family = anatomy.of(model)
        if family.guidance_projection:
            family.add_guidance_projection(CHANNELS)
            return
        embedders: list[Any] = [model.get_submodule(path) for path in family.timestep_embedders]
        of_time = [m for m in embedders[0].modules() if isinstance(m, nn.Linear)][-1]
        embedding = WeightEmbedding(of_time.out_features, family.input(WEIGHT)).to(of_time.weight)
        embedders[0].guidance = embedding
        for embedder in embedders:
            embedder.register_forward_hook(embedding.added)

    def trainable(self, family: Family) -> tuple[str, ...]:
        """Everything: the student is a whole model that starts as its teacher."""
        return ("*",)

    def healing(self, task: Any) -> Guided:
        return Guided(self.w_min, self.w_max, self.weighting, task)


def _path(family: Family) -> str:
    """Where the new weights are; "" where the family has no place for them."""
    if family.guidance_projection or not (embedders := family.timestep_embedders):
        return family.guidance_projection
    return f"{embedders[0]}.guidance"


def one_pass(pipeline: Any, **call: Any) -> dict[str, Any]:
    """Arguments with which a stock pipeline calls a student once per step, at their scale.

    The pipelines of U-Nets pass the scale on themselves. Of the other families they would call
    twice: their student is given the weight by hand, to stay, and the pipeline no guidance.

    Args:
        pipeline: any; only where it holds such a student are its arguments changed.
        call: arguments of its call; without a guidance_scale the pipeline's own holds.
    """
    model = getattr(pipeline, "transformer", None)
    if model is None or not any(isinstance(m, GuidanceDistillation) for m in stack_of(model)):
        return call
    usual = inspect.signature(type(pipeline).__call__).parameters["guidance_scale"].default
    weight = torch.tensor(call.get("guidance_scale", usual) - 1.0)
    anatomy.of(model).input(WEIGHT).value = weight
    return call | {"guidance_scale": 1.0}


class WeightEmbedding(nn.Module):
    """An MLP (256 -> width -> width) of the features of w; zero at the start.

    Args:
        width: of the timestep's embedding.
        weight: carries w of the running call.
    """

    def __init__(self, width: int, weight: Input) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(CHANNELS, width)
        self.linear_2 = nn.Linear(width, width)
        for parameter in self.linear_2.parameters():
            nn.init.zeros_(parameter)
        self.w = weight

    def forward(self, embedded: Tensor) -> Tensor:
        """The embedding of w for each sample, shaped like that of the timestep (batch, width)."""
        features = guidance_features(self.w.numbers(embedded), CHANNELS)
        return self.linear_2(F.silu(self.linear_1(features.to(self.linear_1.weight.dtype))))

    def added(self, embedder: nn.Module, args: tuple, embedded: Tensor) -> Tensor:
        """The forward hook that adds it to the embedding of the timestep."""
        return embedded + self(embedded)
