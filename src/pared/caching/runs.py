"""Runs of one pipeline on fixed prompts and noise: how far reuse takes them from the full run.

What a search of schedules scores by, and the two curves that say what a step's error does to the
end: `sensitivity` and `amplification` (arXiv 2401.01008).
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from pared.caching.schedules import Bits, Score, with_reuse
from pared.errors import InputError
from pared.method import RuntimeMethod, apply

# Nearer than this is equal: without a cap one identical pair would make a mean infinite.
PSNR_CAP = 100.0


def sensitivity(score: Score, steps: int) -> tuple[float, ...]:
    """The score of reuse at one step alone, for steps 1 to N - 1: the curve of single steps."""
    return tuple(score(with_reuse(steps, [step])) for step in range(1, steps))


def amplification(
    final: Callable[[int, Tensor], Tensor], wanted: Tensor, delta: Tensor, steps: int
) -> tuple[float, ...]:
    """amp_i = ||Psi_i(z_i + delta) - Psi_i(z_i)|| / ||delta||, for steps 1 to N - 1.

    Psi_i is the rest of the sampler from step i on. Where amp falls with i, an error harms the less
    the later it is made; the paper places reuse late for that reason.

    Args:
        final: the end of the run in which `delta` was added to the state ahead of a step.
        wanted: the end without.
        delta: shaped as the states, and small.
        steps: N.
    """
    ends = (final(step, delta) for step in range(1, steps))
    return tuple(float((end - wanted).norm() / delta.norm()) for end in ends)


def psnr(found: Tensor, wanted: Tensor, value_range: float) -> float:
    """10 log10(R^2 / MSE) in dB, capped at 100, the mean over samples; both (batch, ...)."""
    error = (found.double() - wanted.double()).square().flatten(1).mean(dim=1)
    return float((10 * torch.log10(value_range**2 / error)).clamp(max=PSNR_CAP).mean())


# Runs of a pipeline -------------------------------------------------------------------------------


class Scheduled(Protocol):
    """A run-time method that works under a schedule."""

    def under(self, bits: Bits) -> RuntimeMethod:
        """The same with this schedule."""


class Runs:
    """Runs of a pipeline on fixed prompts and noise, scored by PSNR to its own full run.

    The pipeline stays as it is; its components are shared.

    Args:
        pipeline: text-to-image, text-to-video or class-to-image.
        method: what reuses, such as `AttentionMapReuse`; its own schedule doesn't matter.
        steps: of the pipeline's call.
        seeds: every prompt is painted from the noise of each.
        latents: compare final latents, in units of their range, and not pictures.
        batch_size: pictures painted at once.
        call: of the pipeline; `prompt` or `class_labels`, a list, among them.

    Attributes:
        steps: calls of the denoiser in a run: what a schedule has bits for. Schedulers of second
            order make more than the pipeline's steps.
        wanted: results of the full run, (samples, ...).

    Raises:
        InputError: the method can't be attached, or there is nothing to paint.
    """

    def __init__(
        self,
        pipeline: Any,
        method: Scheduled,
        steps: int,
        seeds: Sequence[int] = (0,),
        latents: bool = False,
        batch_size: int = 4,
        **call: Any,
    ) -> None:
        self.pipeline, self.method, self.latents = copy.copy(pipeline), method, latents
        self.pipeline.set_progress_bar_config(disable=True)
        given = [name for name in ("prompt", "class_labels") if call.get(name)]
        if not given:
            raise InputError("there is nothing to paint; give prompt or class_labels, a list.")
        self.name, self.call, self.batch_size = given[0], call, batch_size
        self.samples = [(what, seed) for what in call.pop(self.name) for seed in seeds]
        apply(self.pipeline, method.under((0,) * steps)).remove()
        self.wanted = self._painted(steps)
        self.steps = len(self.pipeline.scheduler.timesteps)
        self._asked = steps
        self.value_range = float(self.wanted.max() - self.wanted.min()) if latents else 1.0

    def __call__(self, bits: Bits) -> float:
        """PSNR in dB of runs under a schedule."""
        with apply(self.pipeline, self.method.under(bits)):
            return self._compared(self._painted(self._asked))

    def fewer(self, steps: int) -> float:
        """PSNR in dB of the pipeline itself with another number of steps: the rival."""
        return self._compared(self._painted(steps))

    def amplification(self, size: float = 0.01, seed: int = 0) -> tuple[float, ...]:
        """`amplification` of the pipeline's sampler, by noise of standard deviation `size`.

        Raises:
            InputError: the runs end in pictures.
        """
        if not self.latents:
            raise InputError("amplification is that of latents; make the runs with latents=True.")
        noise = torch.Generator().manual_seed(seed)
        delta = size * torch.randn(self.wanted.shape, generator=noise)
        return amplification(self._nudged, self.wanted, delta, self.steps)

    def _nudged(self, step: int, delta: Tensor) -> Tensor:
        return self._painted(self._asked, step, delta)

    def _compared(self, found: Tensor) -> float:
        return psnr(found, self.wanted, self.value_range)

    def _painted(self, steps: int, step: int = 0, delta: Tensor | None = None) -> Tensor:
        """Final latents or pictures, (samples, ...), with `delta` added ahead of a step."""
        parts = []
        for start in range(0, len(self.samples), self.batch_size):
            some = slice(start, start + self.batch_size)
            nudge = (
                nullcontext()
                if delta is None
                else nudged(self.pipeline.scheduler, step, delta[some])
            )
            with nudge:
                output = self.pipeline(
                    **{self.name: [what for what, _ in self.samples[some]]},
                    generator=[
                        torch.Generator().manual_seed(seed) for _, seed in self.samples[some]
                    ],
                    num_inference_steps=steps,
                    output_type="latent" if self.latents else "np",
                    **self.call,
                )
            painted = output.frames if hasattr(output, "frames") else output.images
            parts.append(torch.as_tensor(painted).float().cpu())
        return torch.cat(parts)


@contextmanager
def nudged(scheduler: Any, step: int, delta: Tensor) -> Iterator[None]:
    """Within the context `delta` is added to the latents that go into a step, from 1 on."""
    own, done = scheduler.step, 0

    @functools.wraps(own)  # pipelines look at the arguments it takes
    def stepped(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        latents, *others = own(*args, **kwargs)
        return (latents + delta.to(latents) if done == step else latents, *others)

    scheduler.step = stepped
    try:
        yield
    finally:
        del scheduler.step
