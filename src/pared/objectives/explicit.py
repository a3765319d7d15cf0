"""Training with a conditional endpoint, and of the prompt's part of it.

Explicit Conditioning (arXiv 2503.17593): the usual regression with y in the place of noise. Noise
prediction learns y, v prediction alpha_t y - sigma_t x, flow prediction y - x.

Sampling starts at y itself, so that at the last time nothing of x may be left. For v the schedule
is rescaled to that (zero terminal SNR, Lin et al. 2024, arXiv 2305.08891); a flow ends there
anyway. For noise prediction it stays as it is: where nothing of x is left, knowing y tells nothing
of x, and a sampler would divide by zero.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.method import drawn_in, note_drawn
from pared.nn.prompt_vae import PromptVAE, kl_to_standard
from pared.objectives.denoising import Denoising, Noised, clean_latents, condition_of
from pared.objectives.endpoint import (
    SITE,
    ConditionalPrior,
    Gaussian,
    pooled,
    prior_of,
    reads_source,
)
from pared.objectives.noise import randn_like

# Weight of the prompt autoencoder's KL term, of sums over dimensions. With less (1e-3) half of the
# noise is gone from small latents, 4 x 16 x 16, before the prompts are told apart any better.
KL = 0.1


def zero_terminal_snr(alpha_bars: Tensor) -> Tensor:
    """A schedule shifted and scaled in sqrt(alpha_bar) so that it ends at zero (algorithm 1)."""
    root = alpha_bars.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))).square()


class Explicit(nn.Module):
    """The task loss of a denoiser that carries a conditional prior.

    Batch: that of `Denoising`, and `source` and `source_std`, mean and standard deviation of the
    given pictures' latents, shaped and scaled like `latents`. A denoiser that reads such latents
    behind the noised ones gets them there too. Samples whose source is all zeros have no picture,
    as in text-to-image, and end in white noise.

    Args:
        task: what the denoiser predicts.
        learn_prior: also let the loss train the prior, held by the weighted KL of the prompt's part
            from N(0, 1): without that the loss would fall by making y predictable, and pictures
            wouldn't get better.
    """

    def __init__(self, task: Denoising | None = None, learn_prior: bool = False) -> None:
        super().__init__()
        self.task, self.learn_prior = task or Denoising(), learn_prior

    def bind(self, student: nn.Module, teacher: nn.Module, data: Any = None) -> "Explicit":
        """Healing's way in: a prior that knows no prompts is fitted to those of the data.

        The data alone teach; of the teacher nothing is asked.

        Args:
            student: carries a conditional prior.
            teacher: left alone.
            data: its `condition` holds that of every prompt, as `pared.tasks.data.TaskData` does.

        Raises:
            InputError: the student carries no conditional prior, or one that will stay blind to
                prompts, since it was never fitted to any and the data hold none.
        """
        prior = _prior(student)
        if hasattr(data, "condition") and not prior.prompt.head.weight.any():
            fit_prompt_vae(prior, pooled(data.condition))
            # Rounding grows in the fit, and a run that goes on elsewhere brings its own prior.
            fitted = {f"{SITE}.prompt.{name}" for name in prior.prompt.state_dict()}
            note_drawn(student, drawn_in(student) | fitted)
        if not (self.learn_prior or prior.prompt.head.weight.any()):
            raise InputError(
                "the conditional prior knows no prompts yet; fit it to the pooled instructions "
                "with pared.objectives.explicit.fit_prompt_vae before healing."
            )
        return self

    def noised(
        self, batch: dict[str, Tensor], endpoint: Gaussian, generator: torch.Generator
    ) -> Noised:
        """z_t = alpha_t x + sigma_t y with its target, at times drawn for a batch."""
        x0 = clean_latents(batch, generator)
        y = endpoint.draw(generator)
        bars = self.task.alpha_bars
        if self.task.prediction == "v":
            bars = zero_terminal_snr(bars)
        return self.task.between(x0, y, generator, bars)

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        prior, condition = _prior(model), condition_of(batch)
        source, std = condition.get("source"), condition.get("source_std")
        if source is None:
            raise InputError(
                "explicit conditioning learns from given pictures; the batch has no 'source'."
            )
        if not reads_source(model):
            del condition["source"]
        with torch.set_grad_enabled(self.learn_prior and torch.is_grad_enabled()):
            endpoint = prior(source, std, condition)
        # What is painted from words alone goes on ending in noise.
        endpoint = endpoint.only_where(source.flatten(1).any(dim=1))
        noised = self.noised(batch, endpoint, generator)
        prediction = anatomy.of(model).denoise(model, noised.latents, noised.timestep, condition)
        terms = {"task": F.mse_loss(prediction.float(), noised.target)}
        if self.learn_prior:
            mean, var = prior.of_prompt(condition, (source.shape[-2], source.shape[-1]))
            # Per element, as the task's error is.
            terms["kl"] = KL * kl_to_standard(mean, var).mean() / mean[0].numel()
        return terms


def _prior(model: nn.Module) -> ConditionalPrior:
    if (prior := prior_of(model)) is None:
        raise InputError(
            "this model carries no conditional prior; convert it with explicit-conditioning first."
        )
    return prior


# The prompt's autoencoder
# --------------------------------------------------------------------------------------------------


def prompt_terms(
    vae: PromptVAE, pooled: Tensor, generator: torch.Generator, kl: float = KL
) -> dict[str, Tensor]:
    """Squared error, 1 - cosine and weighted KL of a batch of pooled prompts (batch, width).

    Error and KL are summed over dimensions, and all are means over the batch. Prompts are compared
    with the corpus's mean and spread taken out.
    """
    mean, var = vae.encode(pooled)
    found = vae.decode(mean + var.sqrt() * randn_like(mean, generator))
    wanted = vae.normalised(pooled)
    return {
        "square": (found - wanted).square().sum(dim=1).mean(),
        "cosine": (1 - F.cosine_similarity(found, wanted)).mean(),
        "kl": kl * kl_to_standard(mean, var).mean(),
    }


def fit_prompt_vae(
    prior: ConditionalPrior,
    pooled: Tensor,
    steps: int = 300,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Fit the prompt's part of a prior to a corpus, in place; seconds for small latents.

    Args:
        prior: of a converted model.
        pooled: vectors of the corpus's prompts, (prompts, width); see `endpoint.pooled`.
        steps: of AdamW, its rate falling to zero along a cosine.
        batch_size: prompts per step, drawn with replacement.
        learning_rate: at the start.
        seed: of everything random.

    Returns:
        The terms of `prompt_terms` on the last batch.

    Raises:
        InputError: fewer than two prompts, or vectors of another width.
    """
    vae, dtype = prior.prompt, prior.prompt.expand.weight.dtype
    if pooled.ndim != 2 or len(pooled) < 2 or pooled.shape[1] != len(vae.center):
        raise InputError(
            f"the pooled prompts have shape {tuple(pooled.shape)}; give (prompts, "
            f"{len(vae.center)}), two prompts at least."
        )
    trained = [(p, p.requires_grad) for p in vae.parameters()]
    vae.float().requires_grad_(True)
    pooled = pooled.detach().to(vae.expand.weight)
    vae.center.copy_(pooled.mean(dim=0))
    vae.spread.copy_(pooled.std(dim=0).clamp(min=1e-4))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    terms: dict[str, Tensor] = {}
    with torch.enable_grad():
        for _ in range(steps):
            drawn = torch.randint(len(pooled), (batch_size,), generator=generator)
            terms = prompt_terms(vae, pooled[drawn.to(pooled.device)], generator)
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    for parameter, wanted in trained:
        parameter.requires_grad_(wanted)
    vae.to(dtype)
    return {name: float(value.detach()) for name, value in terms.items()}
