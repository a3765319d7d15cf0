"""What a denoiser learns to predict: noise, velocity v, or the flow of a straight path.

With clean latents x0 and noise eps ~ N(0, I):

- noise (Ho et al. 2020, arXiv 2006.11239) and v (Salimans and Ho 2022, arXiv 2202.00512) on a
  variance-preserving path: x_t = alpha_t x0 + sigma_t eps; targets eps, and v = alpha_t eps -
  sigma_t x0.
- flow (rectified flow, Liu et al. 2022, arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206):
  x_s = (1 - s) x0 + s eps; target eps - x0; the model is told s x 1000.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.objectives.noise import randn_like

Prediction = Literal["noise", "v", "flow"]
TimeSampling = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Noised:
    """A batch on its way: what goes into the denoiser and what should come out.

    Attributes:
        latents: x_t, (batch, channels, height, width).
        timestep: what the denoiser is told, (batch,).
        target: the wanted prediction, shaped like `latents`.
    """

    latents: Tensor
    timestep: Tensor
    target: Tensor


def flow_path(x0: Tensor, noise: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Point and target of the straight path at `s` in [0, 1], shape (batch,)."""
    s = s.view(-1, *[1] * (x0.ndim - 1))
    return (1 - s) * x0 + s * noise, noise - x0


def variance_preserving_path(
    x0: Tensor, noise: Tensor, alpha_bar: Tensor, prediction: Prediction
) -> tuple[Tensor, Tensor]:
    """Point and target of the path with cumulative signal `alpha_bar` in [0, 1], shape (batch,)."""
    alpha = alpha_bar.sqrt().view(-1, *[1] * (x0.ndim - 1))
    sigma = (1 - alpha_bar).sqrt().view(-1, *[1] * (x0.ndim - 1))
    target = noise if prediction == "noise" else alpha * noise - sigma * x0
    return alpha * x0 + sigma * noise, target


class Denoising(nn.Module):
    """The task loss of diffusion and flow models: mean-squared error of the prediction.

    Batch: `latents` (batch, channels, height, width), already scaled; every other entry is the
    condition that the model's family takes (`text`, `mask`, `pooled`, `label`; see
    `pared.anatomy`). With `latent_std` in the batch the latents are drawn from the autoencoder's
    posterior.

    Args:
        prediction: what the model outputs.
        time_sampling: "uniform", or "logit_normal" with location 0 and scale 1 (flow only; Esser et
            al. 2024).
        alpha_bars: squared signal at each timestep, a scheduler's `alphas_cumprod` (noise and v);
            by default Stable Diffusion's.

    Raises:
        InputError: there is no such prediction or sampling, or they don't go together.
    """

    def __init__(
        self,
        prediction: Prediction = "flow",
        time_sampling: TimeSampling = "uniform",
        alpha_bars: Tensor | None = None,
    ) -> None:
        super().__init__()
        if prediction not in (known := get_args(Prediction)):
            raise InputError(f"prediction {prediction!r} doesn't exist; give {' or '.join(known)}.")
        if time_sampling not in (known := get_args(TimeSampling)):
            raise InputError(
                f"time_sampling {time_sampling!r} doesn't exist; give {' or '.join(known)}."
            )
        if prediction != "flow" and time_sampling != "uniform":
            raise InputError(
                f"time_sampling {time_sampling!r} is for flows, and this denoiser predicts "
                f"{prediction!r}; leave it out."
            )
        self.prediction, self.time_sampling = prediction, time_sampling
        if alpha_bars is None:
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            alpha_bars = (1 - betas).cumprod(0)
        self.register_buffer("alpha_bars", alpha_bars.float(), persistent=False)

    def bind(self, student: nn.Module, teacher: nn.Module, data: Any = None) -> "Denoising":
        """Healing's way in. The data alone teach; of the teacher nothing is asked."""
        return self

    def noised(self, batch: dict[str, Tensor], generator: torch.Generator) -> Noised:
        """Draw times and noise for a batch; all randomness comes from `generator` (on the CPU)."""
        x0 = clean_latents(batch, generator)
        return self.between(x0, randn_like(x0, generator), generator)

    def between(
        self,
        x0: Tensor,
        noise: Tensor,
        generator: torch.Generator,
        alpha_bars: Tensor | None = None,
    ) -> Noised:
        """Points at drawn times on the paths from `x0` to `noise`.

        Args:
            x0: clean latents.
            noise: where the paths end.
            generator: of the times.
            alpha_bars: another schedule than the task's own (noise and v).
        """
        if self.prediction == "flow":
            if self.time_sampling == "uniform":
                s = torch.rand(len(x0), generator=generator)
            else:
                s = torch.randn(len(x0), generator=generator).sigmoid()
            s = s.to(x0)
            latents, target = flow_path(x0, noise, s)
            return Noised(latents, 1000 * s, target)
        bars = self.alpha_bars if alpha_bars is None else alpha_bars
        t = torch.randint(len(bars), (len(x0),), generator=generator).to(x0.device)
        alpha_bar = bars.to(x0.device)[t]
        latents, target = variance_preserving_path(x0, noise, alpha_bar, self.prediction)
        return Noised(latents, t, target)

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        noised = self.noised(batch, generator)
        prediction = anatomy.of(model).denoise(
            model, noised.latents, noised.timestep, condition_of(batch)
        )
        return {"task": F.mse_loss(prediction.float(), noised.target)}


def clean_latents(batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """The latents x0 of a batch, drawn from the autoencoder's posterior where that is given."""
    x0 = batch["latents"].float()
    if "latent_std" in batch:
        x0 = x0 + batch["latent_std"] * randn_like(x0, generator)
    return x0


def condition_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a batch that condition the denoiser."""
    return {k: v for k, v in batch.items() if k not in ("latents", "latent_std")}
