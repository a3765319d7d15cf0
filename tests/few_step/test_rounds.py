"""The rounds as a recipe has them, and schedulers that go a student's way."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from pared.errors import InputError
from pared.few_step import progressive
from pared.few_step.rounds import Rounds, equal_steps
from pared.objectives.denoising import Denoising
from pared.objectives.paths import Path

NAMES = {"noise": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}


def stock(kind: str):
    """A pipeline's scheduler with all that leads away from equal steps."""
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        use_karras_sigmas=True, prediction_type=NAMES[kind],
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("kind", NAMES)
def test_the_scheduler_goes_the_way_of_the_sampler(kind, steps):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    noise, along = torch.randn(50, 2), Path.of(Denoising(kind))

    def predict(z: Tensor, timestep: Tensor) -> Tensor:
        return net(torch.cat([z, timestep.expand(len(z))[:, None] / 1000], dim=1))

    def estimate(z: Tensor, t: Tensor) -> Tensor:
        return along.clean(predict(z, along.timestep(t)), z, along.level(t))

    wanted = progressive.sample(estimate, noise, along, steps)
    scheduler = equal_steps(stock(kind))
    scheduler.set_timesteps(steps)
    z = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        z = scheduler.step(predict(z, t), t, z).prev_sample
    # A flow's steps begin at 0.999. Noise is divided by 0.068 at t = 1, rounding and all.
    tolerance = {"noise": 1e-4, "v": 1e-5, "flow": 2e-3}[kind]
    torch.testing.assert_close(z, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", NAMES)
def test_the_denoiser_is_told_what_it_was_told_in_training(kind):
    along, scheduler = Path.of(Denoising(kind)), equal_steps(stock(kind))
    for steps in (1, 2, 4, 8, 10, 100):
        scheduler.set_timesteps(steps)
        t = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
        torch.testing.assert_close(
            scheduler.timesteps.double(), along.timestep(t).double(), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("stepper", ["stochastic", "encoder"])
def test_students_without_a_stock_sampler_leave_the_scheduler(stepper):
    pipeline = SimpleNamespace(scheduler=stock("flow"))
    own = pipeline.scheduler
    Rounds(4, stepper=stepper).equip(pipeline)
    assert pipeline.scheduler is own
    Rounds(4).equip(pipeline)
    assert pipeline.scheduler is not own


def test_updates_of_all_rounds():
    assert Rounds(16, 2).updates(10) == 10 + 10 + 20 + 20
    assert Rounds(2, 2).updates(10) == 20
    assert Rounds(4, final_round_multiplier=1).updates(10) == 30


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 6, "last": 4}, "halving 6 steps doesn't lead to 4"),
        ({"steps": 4, "last": 8}, "halving 4 steps doesn't lead to 8"),
        ({"steps": 4, "final_round_multiplier": 0}, "final_round_multiplier 0 doesn't work"),
        ({"steps": 4, "final_round_multiplier": 1.5}, "final_round_multiplier 1.5 doesn't work"),
        ({"steps": 4, "w_min": 3.0, "w_max": 1.0}, "guidance weights from 3 to 1"),
    ],
)
def test_bad_settings_say_what_is_right(settings, told):
    with pytest.raises(InputError, match=told):
        Rounds(**settings)
