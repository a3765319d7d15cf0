"""DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient
Fine-Tuning.

arXiv 2304.06648, ICCV 2023.

To adapt a model to another domain, only biases, the scales of norms, the label table and new
vectors gamma train. A gamma multiplies each output channel of a layer, y = gamma (W x + b), and
starts at one, so that nothing changes at first. Folded into the layers they cost nothing. Without
any gamma, `locations=[]`, it is BitFit: biases and the label table alone; then the scales of norms
stay frozen too.

Implemented from the paper; no code taken, none of the authors' is released. Where the gammas are
isn't confirmed; the reported 0.83M weights of DiT-XL/2 are matched exactly by seven vectors of the
model's width per block ("full"): one on each residual branch, and one on q, k, v, the attention's
output projection and the feed-forward's last layer. A branch's output is that of its last layer, so
in "full" two vectors act on one output; what they can express is that of one, their product, which
moves twice as fast. Chosen here: both streams of a joint attention and cross-attentions count as
attentions; in FLUX's one-stream blocks the shared output projection is the branch, and there is no
feed-forward to scale; the tables that PixArt's blocks add to a shared modulation train, since they
are the biases of a block's own modulation elsewhere. diffusers' DiT has a timestep embedding and a
label table in every block, where the published code has one for all: each of them trains, and the
paper's counts are those of a model whose blocks share them. Weights in half precision are too
coarse for such small changes: train in float32, with autocast (`precision`). Not here: positions at
half coordinates for a higher resolution. Not verified: quality at the paper's scale. On the small
PixArt that comes with pared, whose 60 steps on another domain are few, all weights end nearest to
it; by the loss on unseen pictures DiffFit comes next, before BitFit and LoRA, while the distance of
what they paint can't tell the three apart. At the rate for all weights it hardly learns. A training
step with gammas takes as long there as one of all weights, one of biases alone a quarter less.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import Family
from pared.anatomy.base import Role
from pared.info import Headline, Info
from pared.method import Claim
from pared.tuning.base import Adapter, linear

INFO = Info(
    slug="difffit",
    title="DiffFit: Unlocking Transferability of Large Diffusion Models via Simple "
    "Parameter-Efficient Fine-Tuning",
    arxiv="2304.06648",
    venue="ICCV 2023",
    kind="conversion",
    families=("dit", "pixart", "sd3", "unet", "flux"),
    training=True,
    exact=False,
    maturity="faithful",
    summary="trains biases, norms, labels and a scale per channel; folds away afterwards",
    cls="DiffFit",
    headlines=(
        Headline(
            key="share-of-parameters",
            text="share of DiT-XL/2's parameters that trains for Food-101, the label table "
            "included",
            paper=0.0012,
            direction="lower",
            bound=0.00125,
        ),
        Headline(
            key="distance-full-over-difffit",
            text="distance to the target data, fine-tuning of all weights over DiffFit "
            "(paper: FID 16.59 / 15.39, mean of eight sets)",
            paper=1.08,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="distance-bitfit-over-difffit",
            text="distance to the target data, BitFit over DiffFit "
            "(paper: FID 16.82 / 15.39, mean of eight sets)",
            paper=1.09,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="distance-lora-over-difffit",
            text="distance to the target data, LoRA of rank 16 over DiffFit "
            "(paper: FID 81.31 / 15.39, mean of eight sets)",
            paper=5.28,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="step-time-full-over-difffit",
            text="seconds of a training step, fine-tuning of all weights over DiffFit",
            paper=2.0,
            direction="higher",
            bound=1.2,
        ),
    ),
)

Location = Literal["attention_branch", "feed_forward_branch", "q", "k", "v", "out", "fc2"]

# The layer on whose output each location's vector is, and the name of the vector there.
PLACES: dict[Location, tuple[Role, str]] = {
    "attention_branch": ("out", "gamma_branch"),
    "feed_forward_branch": ("fc2", "gamma_branch"),
    "q": ("q", "gamma"),
    "k": ("k", "gamma"),
    "v": ("v", "gamma"),
    "out": ("out", "gamma"),
    "fc2": ("fc2", "gamma"),
}
PRESETS: dict[str, tuple[Location, ...]] = {
    "blocks": ("attention_branch", "feed_forward_branch"),
    "blocks+qkv": ("attention_branch", "feed_forward_branch", "q", "k", "v"),
    "full": tuple(PLACES),
}


class DiffFit(Adapter):
    """Biases, norms, labels and gammas, section 3 of the paper.

    Train with about ten times the learning rate of full fine-tuning (1e-3, healing's default here,
    where 1e-4 looks as if it didn't work) and without weight decay, which would pull gammas to zero
    instead of one.
    """

    info = INFO
    learning_rate: ClassVar[float] = 1e-3

    locations: Literal["blocks", "blocks+qkv", "full"] | tuple[Location, ...] = Field(
        default="full",
        description="where gammas are: blocks (2 per block), blocks+qkv (5), full (7), or a list "
        "of attention_branch, feed_forward_branch, q, k, v, out, fc2; the empty list is BitFit",
    )
    classes: int | None = Field(
        default=None,
        ge=1,
        description="classes of the new data; the label table is drawn anew but for the null class",
    )

    @field_validator("locations", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """One sentence for both forms; pydantic's own would tell of the first alone."""
        if not isinstance(value, list | tuple):
            if value not in list(PRESETS):
                raise ValueError(f"give one of {', '.join(PRESETS)}, or a list of locations")
        elif odd := [each for each in value if each not in tuple(PLACES)]:
            raise ValueError(f"there is no location {odd[0]!r}; there are {', '.join(PLACES)}")
        elif len(set(value)) < len(value):
            raise ValueError("a location is there twice; give each once")
        return value

    @property
    def _places(self) -> list[tuple[Role, str]]:
        chosen = PRESETS[self.locations] if isinstance(self.locations, str) else self.locations
        return [PLACES[location] for location in chosen]

    @property
    def roles(self) -> set[Role]:
        return {role for role, _ in self._places}

    def layers(self, family: Family) -> dict[str, list[str]]:
        """Dotted paths of the scaled layers, each with the names of its vectors."""
        found: dict[str, list[str]] = {}
        kinds = ("self_attention", "joint_attention", "cross_attention", "feed_forward")
        for site in family.sites(*kinds):
            for role, name in self._places:
                for path in family.linear_layers(site, role):
                    found.setdefault(path, []).append(name)
        return found

    def claims(self, family: Family) -> list[Claim]:
        """Besides the scaled layers it reads every site: the biases there train."""
        tables = family.label_tables if self.classes is not None else ()
        return (
            super().claims(family)
            + [Claim(path, "replaces") for path in tables]
            + [Claim(site.path, "reads") for site in family.sites()]
        )

    def convert(self, model: nn.Module) -> None:
        family = anatomy.of(model)
        scaled = [
            (path, ScaledLinear(self.plain(model, path), names))
            for path, names in self.layers(family).items()
        ]
        if self.classes is not None:
            family.set_classes(self.classes)
        for path, layer in scaled:
            family.replace(path, layer)
        self.freeze_others(model)

    def trainable(self, family: Family) -> tuple[str, ...]:
        """Names of all biases, scales of norms, label tables and gammas.

        By kind of parameter, not by the names of modules: the modulation layers that diffusers
        calls norms hold matrices, which stay frozen.
        """
        tables = {f"{path}.weight" for path in family.label_tables}
        return tuple(
            name
            for name, parameter in family.model.named_parameters()
            if name in tables or self._trains(family, name.rpartition(".")[2], parameter)
        )

    def _trains(self, family: Family, name: str, parameter: nn.Parameter) -> bool:
        if name in family.shifts:
            return True
        # The weight of a norm, of whatever class, is a vector; all other weights are matrices.
        is_scale = name == "weight" and parameter.ndim == 1
        return len(self.locations) > 0 and (is_scale or name in ("gamma", "gamma_branch"))

    def folded(self, layer: nn.Module) -> nn.Linear:
        assert isinstance(layer, ScaledLinear)
        return fold(layer)


class ScaledLinear(nn.Linear):
    """y = gamma (W x + b): a linear layer with its own parameters, and one vector or more.

    Args:
        base: the layer; its parameters are taken over, under their names.
        names: of the vectors, each (out,); their product scales the output.
    """

    def __init__(self, base: nn.Linear, names: list[str]) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.names = tuple(names)
        for name in names:
            ones = torch.ones(base.out_features, device=base.weight.device, dtype=base.weight.dtype)
            self.register_parameter(name, nn.Parameter(ones))

    @property
    def gammas(self) -> list[nn.Parameter]:
        """The vectors, each (out,)."""
        return [self.get_parameter(name) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y = super().forward(x)
        for gamma in self.gammas:
            # Under autocast y is in half precision, and the product is rounded to it only once.
            y = (y * gamma).to(y.dtype)
        return y


@torch.no_grad()
def fold(layer: ScaledLinear) -> nn.Linear:
    """W' = diag(gamma) W, b' = gamma b."""
    gamma = torch.ones_like(
        layer.gammas[0], dtype=torch.promote_types(layer.weight.dtype, torch.float32)
    )
    for vector in layer.gammas:
        gamma = gamma * vector
    weight = (gamma[:, None] * layer.weight).to(layer.weight.dtype)
    return linear(weight, None if layer.bias is None else (gamma * layer.bias).to(weight.dtype))
