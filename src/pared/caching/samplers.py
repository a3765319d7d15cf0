"""What samplers do that matters to reuse between their steps."""

from typing import Any

# Parts of the names of diffusers' schedulers that always add noise, or do so by default.
NOISY = ("Ancestral", "SDE", "Sde", "DDPM", "LCM", "TCD", "SASolver", "Cosine", "Stochastic")


def adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler of diffusers adds fresh noise between the steps of a run.

    What only a call decides (eta of DDIM, s_churn of Euler) isn't seen.
    """
    config = scheduler.config
    return (
        any(part in type(scheduler).__name__ for part in NOISY)
        or str(config.get("algorithm_type", "")).startswith("sde")
        or bool(config.get("stochastic_sampling", False))
    )
