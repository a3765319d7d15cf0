"""The settings of a training run: everything that decides its weights, in one frozen object."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TrainingSettings(BaseModel):
    """How long, how fast and how precisely to train.

    Two runs with equal settings, objective, data and starting weights end with equal weights on one
    machine, whether or not they were interrupted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1, description="optimizer steps")
    batch_size: int = Field(
        default=64, ge=1, description="samples per optimizer step, over all processes"
    )
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="shape of the learning rate after the warm-up"
    )
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = Field(
        default=1.0, gt=0, description="largest gradient norm; None turns clipping off"
    )
    accumulation: int = Field(default=1, ge=1, description="micro-batches per optimizer step")
    precision: Literal["no", "bf16", "fp16"] = Field(default="no", description="autocast type")
    ema: float | None = Field(
        default=None, gt=0, lt=1, description="decay of the weight average; None: no average"
    )
    trainable: tuple[str, ...] = Field(
        default=("*",),
        description="glob patterns of parameter names that train; the rest is frozen",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="run layers again in the backward pass: less memory, about a third more time",
    )
    compile: bool = Field(default=False, description="run the model through torch.compile")
    seed: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=250, ge=1, description="steps between checkpoints")
    log_every: int = Field(default=10, ge=1, description="steps between log lines")
    trackers: tuple[str, ...] = Field(
        default=(), description="accelerate trackers, e.g. tensorboard, trackio, wandb"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingSettings":
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} doesn't divide into accumulation="
                f"{self.accumulation} micro-batches; choose a multiple"
            )
        if self.warmup >= self.steps:
            raise ValueError(f"warmup {self.warmup} must be shorter than steps {self.steps}")
        return self

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        from math import cos, pi

        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "linear":
            return self.learning_rate * (1 - progress)
        return self.learning_rate * 0.5 * (1 + cos(pi * progress))

    def scalars(self) -> dict[str, bool | int | float | str | None]:
        """All fields as trackers take them: numbers and text, what is several as one text."""
        fields = self.model_dump(mode="json").items()
        simple = bool | int | float | str | None
        return {name: each if isinstance(each, simple) else str(each) for name, each in fields}

    def identity(self) -> dict:
        """The fields that a resumed run must share with the run it resumes."""
        free = {"checkpoint_every", "log_every", "trackers"}
        if self.schedule == "constant":
            free.add("steps")  # a constant rate may simply go on for longer
        return self.model_dump(mode="json", exclude=free)
