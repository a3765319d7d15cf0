"""Training: the loop, its settings, its data contract. Knows no method."""

from pared.training.data import Dataset, generator_for
from pared.training.ema import EMA
from pared.training.loop import Run, train
from pared.training.settings import TrainingSettings

__all__ = ["EMA", "Dataset", "Run", "TrainingSettings", "generator_for", "train"]
