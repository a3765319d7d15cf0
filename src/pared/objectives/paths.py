"""The path between data and noise that a denoiser knows, from t = 0 (data) to t = 1 (noise).

`Denoising` draws points of it for training. Samplers and objectives that walk along it need more:
the level of noise at any t, what the denoiser is told there, and a clean estimate from what it
predicts.

A flow's path is continuous: alpha = 1 - t, sigma = t, and the denoiser is told 1000 t. A
variance-preserving one is a grid, the one its denoiser was trained on: t = j / 1000 is timestep
j - 1, and t = 0, of which the denoiser knows nothing, is clean. These are the times of diffusers'
schedulers with `timestep_spacing="trailing"`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.nn.diffusion import Level, scaled
from pared.objectives.denoising import Denoising, Prediction

# (z, t) -> clean estimate; z (batch, ...), t (batch,).
Estimate = Callable[[Tensor, Tensor], Tensor]

# How an error counts that was made at some t, by the clean estimate's squared error there:
# "velocity": SNR + 1, which is the plain squared error of v; on a flow's path that of the flow.
# "truncated_snr": max(SNR, 1).
Weighting = Literal["velocity", "truncated_snr"]


@dataclass(frozen=True, eq=False)
class Path:
    """What lies between data and noise. Get one by `Path.of(task)`.

    Times `t` are (batch,), in float64 on the CPU where differences of levels matter.

    Attributes:
        prediction: what the denoiser predicts.
        alpha_bars: squared signal at t = 0, 1/1000, ... 1, float64; None for a flow.
    """

    prediction: Prediction
    alpha_bars: Tensor | None = None

    @classmethod
    def of(cls, task: Denoising) -> "Path":
        """The path that a denoiser was trained on."""
        if task.prediction == "flow":
            return cls("flow")
        clean = torch.ones(1, dtype=torch.float64)
        known = cast(Tensor, task.alpha_bars).cpu().double()
        return cls(task.prediction, torch.cat([clean, known]))

    # Times ----------------------------------------------------------------------------------------

    def level(self, t: Tensor) -> Level:
        """alpha_t and sigma_t, each (batch,), as precise as `t` is."""
        if self.alpha_bars is None:
            return Level(1 - t, t)
        alpha_bar = self.alpha_bars.to(t)[self._index(t)]
        return Level(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def timestep(self, t: Tensor) -> Tensor:
        """What the denoiser is told at `t` above 0, (batch,)."""
        return (1000 * t).float() if self.alpha_bars is None else self._index(t) - 1

    def time(self, timestep: Tensor) -> Tensor:
        """The t at which the denoiser is told `timestep`, (batch,), in float32."""
        if self.alpha_bars is None:
            return timestep.float() / 1000
        return (timestep.float() + 1) / (len(self.alpha_bars) - 1)

    def _index(self, t: Tensor) -> Tensor:
        """The nearest place in the grid."""
        return (t * (len(self.alpha_bars) - 1)).round().long()

    def require(self, times: int) -> None:
        """Refuse more times between 0 and 1 than the denoiser was trained on.

        Raises:
            InputError: times of the grid would coincide.
        """
        if self.alpha_bars is not None and times > (known := len(self.alpha_bars) - 1):
            raise InputError(
                f"{times} different times don't fit into the {known} that a denoiser of noise or v "
                f"was trained on; use fewer steps."
            )

    # Predictions ----------------------------------------------------------------------------------

    def clean(self, prediction: Tensor, z: Tensor, level: Level) -> Tensor:
        """The clean estimate that a prediction at z amounts to; all (batch, ...)."""
        alpha, sigma = level
        if self.prediction == "noise":
            return scaled(1 / alpha, z) - scaled(sigma / alpha, prediction)
        if self.prediction == "v":
            return scaled(alpha, z) - scaled(sigma, prediction)
        return z - scaled(sigma, prediction)

    def predicted(self, x: Tensor, z: Tensor, level: Level) -> Tensor:
        """The prediction at z that a clean estimate amounts to, the inverse of `clean`."""
        alpha, sigma = level
        if self.prediction == "noise":
            return scaled(1 / sigma, z) - scaled(alpha / sigma, x)
        if self.prediction == "v":
            return scaled(alpha / sigma, z) - scaled(1 / sigma, x)
        return scaled(1 / sigma, z - x)

    def error(
        self, prediction: Tensor, target: Tensor, level: Level, weighting: Weighting
    ) -> Tensor:
        """Mean squared error of predictions, each sample with its weight; see `Weighting`."""
        weight = self._weight(level, weighting)
        return scaled(weight, (prediction - target).square()).mean()

    def _weight(self, level: Level, weighting: Weighting) -> Tensor:
        """The weighting of the clean estimate's error, for the error of the prediction, (batch,).

        The former error is the latter times sigma / alpha for noise, and times sigma for v and
        flow.
        """
        alpha, sigma = level
        if weighting == "velocity":
            return alpha**-2 if self.prediction == "noise" else torch.ones_like(alpha)
        truncated = torch.maximum(alpha, sigma) ** 2
        return truncated / alpha**2 if self.prediction == "noise" else truncated

    # Denoisers ------------------------------------------------------------------------------------

    def estimate(self, model: nn.Module, condition: dict[str, Tensor]) -> Estimate:
        """The clean estimate of a denoiser as a function of z and t alone.

        Args:
            model: that `pared.anatomy` reads, or a wrapper of one.
            condition: what it is given at every t, see `Family.denoise`.
        """
        family = anatomy.of(model)

        def estimate(z: Tensor, t: Tensor) -> Tensor:
            timestep = self.timestep(t).to(z.device)
            prediction = family.denoise(model, z, timestep, condition)
            return self.clean(prediction.float(), z.float(), self.level(t))

        return estimate
