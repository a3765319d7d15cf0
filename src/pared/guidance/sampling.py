"""Sampling that starts from a conditional endpoint, with diffusers' schedulers.

A scheduler knows one endpoint, white noise: it subtracts what it takes for noise, and the
stochastic ones add fresh noise. With z = a x + s y and y ~ N(mu, Sigma) the coordinates

    w = (z - s mu) / Sigma^(1/2) = a x / Sigma^(1/2) + s eps

have white noise for an endpoint. The steps of a scheduler are linear, element by element, so that a
step in w is the right step in z, noise and all: fresh white noise in w is a fresh y in z, and where
only a part of the noise is drawn anew, only that part of mu comes along. (White noise simply
exchanged for y there would add up means as if they were variances.) With mu = 0 and Sigma = 1 the
step is the scheduler's own, bit for bit.

Schedulers that aren't linear so, or whose noise levels can't be read, are refused by name.
"""

from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor

from pared.errors import InputError
from pared.objectives.endpoint import Gaussian

# Spacings of noise levels that spread out to the largest, which a schedule of zero terminal signal
# puts close to infinity.
SPREAD = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


class Shares(NamedTuple):
    """What y contributes around one step.

    Attributes:
        before: its share in the sample that the step gets.
        after: in the sample that it gives.
        v: in a v prediction.
    """

    before: Tensor
    after: Tensor
    v: Tensor


def scheduler_with(scheduler: Any, endpoint: Gaussian) -> Any:
    """A copy of a scheduler that samples from a conditional endpoint.

    It takes the place of the pipeline's own, in a loop or in the stock pipeline; samples start at
    y, times `init_noise_sigma` where the scheduler has one. For v prediction its schedule ends
    without signal and its steps begin there, evenly in time, as in training.

    Args:
        scheduler: of a pipeline; it stays as it is.
        endpoint: of the pictures and prompts that are sampled, shaped as the samples are.

    Raises:
        InputError: the scheduler can't do it, or the endpoint has no noise.
    """
    _check(scheduler, endpoint)
    own = prepared(scheduler)
    plain_step = own.step

    @wraps(plain_step)
    def step(
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        return_dict: bool = True,
        **call: Any,
    ) -> Any:
        _check_shape(sample, endpoint)
        mean, std = endpoint.mean.to(sample.device), endpoint.std.to(sample.device)
        shares = _shares(own, timestep)
        if call.get("eta", 0) == 1 and shares.v == 0:
            # Where nothing of x is left, DDIM would take the root of a rounding error.
            call["eta"] = 1 - 1e-6
        predicted = shares.v if _prediction(own.config) == "v_prediction" else 1
        found = plain_step(
            (model_output.float() - predicted * mean) / std,
            timestep,
            (sample.float() - shares.before * mean) / std,
            **call,
        )
        found.prev_sample = (found.prev_sample * std + shares.after * mean).to(sample.dtype)
        if "pred_original_sample" in found:
            found.pred_original_sample = (found.pred_original_sample * std).to(sample.dtype)
        return found if return_dict else found.to_tuple()

    own.step = step
    if hasattr(own, "scale_model_input"):
        plain_scale = own.scale_model_input

        @wraps(plain_scale)
        def scale_model_input(sample: Tensor, *args: Any, **call: Any) -> Tensor:
            _check_shape(sample, endpoint)
            return plain_scale(sample, *args, **call)

        own.scale_model_input = scale_model_input
    return own


def prepared(scheduler: Any) -> Any:
    """A copy of a scheduler, its schedule ending without signal where the model predicts v."""
    return type(scheduler).from_config(scheduler.config, **_changes(scheduler.config))


def refuse_guidance(*scales: float) -> None:
    """Refuse scales of guidance for a model with a conditional endpoint.

    Raises:
        InputError: a scale isn't 1.
    """
    if wrong := [scale for scale in scales if scale != 1]:
        raise InputError(
            f"a guidance scale of {wrong[0]:g} doesn't work with explicit-conditioning, which has "
            "its condition in the endpoint and no unconditional pass; use 1."
        )


# What is known of diffusers' schedulers
# --------------------------------------------------------------------------------------------------


def _of_times(scheduler: Any, timestep: Any) -> Shares:
    """Schedulers that go from time to time: z = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) y."""
    if hasattr(scheduler, "previous_timestep"):  # DDPM
        previous, final = scheduler.previous_timestep(timestep), scheduler.one
    else:
        every = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        previous, final = timestep - every, scheduler.final_alpha_cumprod
    bars = scheduler.alphas_cumprod
    now, then = bars[timestep], bars[previous] if previous >= 0 else final
    return Shares((1 - now).sqrt(), (1 - then).sqrt(), now.sqrt())


def _of_solver(scheduler: Any, timestep: Any) -> Shares:
    """Solvers that know sigma / alpha: z = alpha x + sigma y."""
    now, then = _sigmas(scheduler, timestep)
    if scheduler.config.use_flow_sigmas:
        return Shares(now, then, 1 - now)
    alpha = (1 + now**2) ** -0.5
    return Shares(now * alpha, then * (1 + then**2) ** -0.5, alpha)


def _exploding(scheduler: Any, timestep: Any) -> Shares:
    """Schedulers whose samples are z / alpha = x + (sigma / alpha) y."""
    now, then = _sigmas(scheduler, timestep)
    return Shares(now, then, (1 + now**2) ** -0.5)


def _straight(scheduler: Any, timestep: Any) -> Shares:
    """Flows: z = (1 - s) x + s y."""
    now, then = _sigmas(scheduler, timestep)
    return Shares(now, then, 1 - now)


def _sigmas(scheduler: Any, timestep: Any) -> tuple[Tensor, Tensor]:
    """Noise levels, in the scheduler's own terms, before and after the step that comes."""
    index = scheduler.step_index
    if index is None:  # the first step
        index = scheduler.begin_index
    if index is None:
        index = scheduler.index_for_timestep(timestep)
    return scheduler.sigmas[index], scheduler.sigmas[index + 1]


SCHEDULERS = {
    "DDIMScheduler": _of_times,
    "DDPMScheduler": _of_times,
    "DPMSolverMultistepScheduler": _of_solver,
    "UniPCMultistepScheduler": _of_solver,
    "EulerDiscreteScheduler": _exploding,
    "EulerAncestralDiscreteScheduler": _exploding,
    "FlowMatchEulerDiscreteScheduler": _straight,
}


def _shares(scheduler: Any, timestep: Any) -> Shares:
    return SCHEDULERS[type(scheduler).__name__](scheduler, timestep)


def _prediction(config: Any) -> str:
    # Schedulers of flows alone have no entry for it.
    return str(config.get("prediction_type", "flow_prediction"))


def _changes(config: Any) -> dict[str, Any]:
    """Changes of a configuration for the first sample to be all endpoint, the last all data."""
    if _prediction(config) != "v_prediction":
        return {}
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    changes |= {name: False for name in SPREAD if config.get(name)}
    return changes | ({"set_alpha_to_one": True} if "set_alpha_to_one" in config else {})


def _check(scheduler: Any, endpoint: Gaussian) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    if name not in SCHEDULERS:
        raise InputError(
            f"{name} can't sample from a conditional endpoint; use {', '.join(SCHEDULERS)}."
        )
    if (prediction := _prediction(config)) not in ("epsilon", "v_prediction", "flow_prediction"):
        raise InputError(
            f"the scheduler takes a prediction of {prediction!r}; a conditional endpoint needs "
            "'epsilon', 'v_prediction' or 'flow_prediction'."
        )
    for clip in ("clip_sample", "thresholding"):
        if config.get(clip):
            raise InputError(
                f"{name} has {clip} on, which cuts latents off at bounds that aren't theirs; set "
                f"{clip}=False in its configuration."
            )
    if not (endpoint.std > 0).all():
        raise InputError(
            "the endpoint's standard deviation is zero somewhere; a scheduler needs it above zero."
        )


def _check_shape(sample: Tensor, endpoint: Gaussian) -> None:
    if sample.shape != endpoint.mean.shape:
        raise InputError(
            f"the scheduler is given samples of shape {tuple(sample.shape)} but its endpoint has "
            f"{tuple(endpoint.mean.shape)}; draw one endpoint for each picture, and leave guidance "
            "off (a scale of 1)."
        )
