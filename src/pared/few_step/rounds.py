"""Progressive distillation as a stage of a recipe, and its students in stock pipelines.

A recipe's objective "progressive" is `Rounds`: all rounds of one stage, from a first number of
steps N to a last one. The pipeline that comes out has a scheduler that goes a student's own way, N
equal steps of DDIM from t = 1; a student of N steps is to be sampled with N.

In diffusers that is DPM-Solver++ of the first order. On a variance-preserving path, with
`timestep_spacing="trailing"`, its steps are `progressive.sample` to rounding; those of
`DDIMScheduler` itself miss each other where N doesn't divide the 1000 times. On a flow's path its
sigmas begin at 0.999 and not at 1, which moves every step by a thousandth; what the denoiser is
told is the same, whole numbers where N doesn't divide 1000 aside. (The sigmas of
`FlowMatchEulerDiscreteScheduler` end at 0.001 and aren't equal.) No stock scheduler goes the way of
the stochastic sampler or of the encoder: their pipelines keep the scheduler that they had, and are
sampled by `progressive.sample_stochastically` and `progressive.encode`.
"""

from pathlib import Path as Folder
from typing import Any

from torch import nn

from pared.errors import InputError
from pared.few_step.progressive import Progressive, halve, halvings, updates_of
from pared.training import Dataset, Run, TrainingSettings

# What a scheduler says of a variance-preserving path. (`steps_offset` does nothing here; stock
# pipelines ask for it.)
OF_PATH = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "steps_offset",
)

# Equal steps on a flow's path. Of T times the scheduler has sigmas i / N (1 - 1 / T) and tells the
# denoiser T times that, cut to whole numbers: with 1001 that is 1000 i / N, as in training, and a
# shift of nearly nothing keeps rounding from cutting it to one less.
OF_FLOW = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "num_train_timesteps": 1001,
    "flow_shift": 1 + 1e-6,
}


class Rounds(Progressive):
    """`Progressive` with where its rounds end.

    Args:
        steps: N of the first round.
        last: N of the last one.
        final_round_multiplier: how many times longer the last two rounds are.
        settings: further ones of `Progressive`.

    Raises:
        InputError: halving doesn't lead from the first N to the last, or as for `Progressive`.
    """

    def __init__(
        self, steps: int, last: int = 1, final_round_multiplier: int = 2, **settings: Any
    ) -> None:
        found = halvings(steps, last)
        if not (isinstance(final_round_multiplier, int) and final_round_multiplier >= 1):
            raise InputError(
                f"final_round_multiplier {final_round_multiplier!r} doesn't work; give a whole "
                "number from 1."
            )
        super().__init__(steps, **settings)
        self.rounds, self.final_round_multiplier = found, final_round_multiplier

    def updates(self, each: int) -> int:
        """Optimizer steps of all rounds, of which each but the last two has so many."""
        return sum(updates_of(len(self.rounds), each, self.final_round_multiplier))

    def equip(self, pipeline: Any) -> None:
        """Give a pipeline the scheduler that goes the student's way, where there is one."""
        if self.stepper == "deterministic":
            pipeline.scheduler = equal_steps(pipeline.scheduler)


def train(
    student: nn.Module,
    objective: Rounds,
    data: Dataset,
    settings: TrainingSettings,
    folder: str | Folder,
) -> Run:
    """All rounds, as `pared.training.train` does one run; see `progressive.halve`."""
    last, multiplier = objective.rounds[-1], objective.final_round_multiplier
    return halve(student, objective, data, settings, folder, last, multiplier)


def equal_steps(scheduler: Any) -> Any:
    """DDIM in equal steps from t = 1 to 0, for the path of another scheduler.

    Args:
        scheduler: of a pipeline; stays as it is.
    """
    from diffusers import DPMSolverMultistepScheduler

    # Schedulers of flows alone have no entry for it.
    kind = getattr(scheduler.config, "prediction_type", "flow_prediction")
    known = {name: scheduler.config[name] for name in OF_PATH if name in scheduler.config}
    path = OF_FLOW if kind == "flow_prediction" else known
    return DPMSolverMultistepScheduler(solver_order=1, timestep_spacing="trailing", **path)
