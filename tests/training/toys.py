"""A small real problem for the loop: fit a two-layer net to noisy samples.

Also a script, for tests that kill it.
"""

import atexit
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pared.training import TrainingSettings, train


class Points:
    """256 points of a fixed random function; input noise is drawn anew in every step."""

    def __init__(self, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(256, 6, generator=generator)
        self.y = torch.tanh(self.x @ torch.randn(6, 2, generator=generator))
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = self.x[indices]
        x = x + self.noise * torch.randn(x.shape, generator=generator)
        return {"x": x, "y": self.y[indices]}

    def identity(self) -> str:
        return f"points, noise {self.noise}"


class Fit(nn.Module):
    """Squared error, as two named terms."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator):
        error = F.mse_loss(model(batch["x"]), batch["y"])
        return {"near": 0.75 * error, "far": 0.25 * error}


def net() -> nn.Module:
    """A net with dropout, so that the global random state matters too."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2))


def settings(**changes) -> TrainingSettings:
    base = {"steps": 40, "batch_size": 24, "learning_rate": 1e-2, "warmup": 3, "ema": 0.9}
    return TrainingSettings(**(base | {"checkpoint_every": 7, "log_every": 5} | changes))


def note_group(folder: Path) -> None:
    """Write down whether this process still belongs to a group, and the threads that it has."""
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    rank = os.environ.get("RANK", "0")
    (folder / f"end-{rank}.txt").write_text(f"{dist.is_initialized()} {' '.join(threads)}")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    atexit.register(note_group, folder)  # runs after all that is registered later
    model = net()
    stop = int(sys.argv[2]) if len(sys.argv) > 2 else 0

    def die(step: int, terms: dict[str, float]) -> None:
        if step == stop:
            import signal

            os.kill(os.getpid(), getattr(signal, sys.argv[3]))

    noise = 0.0 if "exact" in sys.argv else 0.1
    if "exact" in sys.argv:
        # Ranks draw different noise and dropout; without them DDP must equal one process.
        model[2].p = 0.0
    run = train(model, Fit(), Points(noise), settings(), folder, on_step=die)
    if run.finished:
        from safetensors.torch import save_file

        save_file(model.state_dict(), folder / f"final-{run.steps}.safetensors")
