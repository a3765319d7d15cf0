"""Measures DeepCache's speed claim on the full Stable Diffusion 1.5 configuration, random weights.

    python benchmarks/deepcache_speed.py            # five rounds on two cores: ten minutes
    python benchmarks/deepcache_speed.py --rounds 1 # three minutes

Timed in turn are a step of the plain U-Net, a full step that keeps what DeepCache needs, and a step
between, each of one guided picture of 512 pixels. The 50 steps of a run are composed of these;
encoder, scheduler and decoder, which DeepCache leaves alone, aren't in them. Writes the claim and
the table into results/deepcache.json.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median, stdev
from typing import Any

import record
import torch

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.bench.timing import Timings, interleave
from pared.method import Handle

STEPS, SPEC = 50, "deepcache:interval=5,branch=1"


class Steps:
    """One call of a denoiser: as it is, at a full step, and at the step behind it."""

    def __init__(self, preset: str, pixels: int, dtype: str) -> None:
        self.method: Any = pared.parse(SPEC)
        self.model = presets.build(preset, device="cpu", dtype=getattr(torch, dtype))
        self.family = anatomy.of(self.model)
        side = pixels // presets.get(preset).vae_scale
        self.inputs = self.family.example(batch=2, height=side, width=side)
        self.handle: Handle | None = None

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Timesteps fall, so that the second call is the second step of a run."""
        latents, timestep, condition = self.inputs
        time = torch.full_like(timestep, 900 - 20 * number)
        self.family.denoise(self.model, latents, time, condition)

    @contextmanager
    def attaching(self) -> Iterator[None]:
        """Around the full step."""
        self.handle = pared.apply(self.model, self.method)
        yield

    @contextmanager
    def removing(self) -> Iterator[None]:
        """Around the step behind it."""
        yield
        assert self.handle is not None
        if not self.handle.stats["deepcache"].get("reused"):
            raise SystemExit("the second step was no step between; nothing was measured.")
        self.handle.remove()

    def timed(self, rounds: int) -> Timings:
        """All three, in turn."""
        calls = {
            "plain": lambda: self.step(0),
            "full": lambda: self.step(0),
            "between": lambda: self.step(1),
        }
        around = {"full": self.attaching, "between": self.removing}
        return interleave(calls, rounds, warmup=1, base="plain", around=around)


def composed(method: Any, timings: Timings) -> list[float]:
    """The speed-up of a run, from the times of each round."""
    full = sum(method.full(step, STEPS) for step in range(STEPS))
    rounds = zip(*(timings[name].samples for name in ("plain", "full", "between")), strict=False)
    return [STEPS * plain / (full * kept + (STEPS - full) * between)
            for plain, kept, between in rounds]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--preset", default="sd1.5", help="others are shown and not written")
    parser.add_argument("--pixels", type=int, default=512)
    options = parser.parse_args()
    steps = Steps(options.preset, options.pixels, options.dtype)
    timings = steps.timed(options.rounds)
    found = composed(steps.method, timings)
    medians = {name: timing.median for name, timing in timings.items()}
    row = {
        "pixels": options.pixels,
        "plain step (s)": float(f"{medians['plain']:.4g}"),
        "full step (s)": float(f"{medians['full']:.4g}"),
        "step between (s)": float(f"{medians['between']:.4g}"),
        f"speed-up of {STEPS} steps": round(median(found), 2),
        "drift of plain": round(timings.verdict.drift, 3),
    }
    print(row, timings.verdict.notes, flush=True)
    if options.preset != "sd1.5" or options.pixels != 512:
        return
    note = (
        f"the U-Net alone on a guided picture of 512 pixels, random weights, {options.dtype}; "
        f"50 steps composed of the times of one, {options.rounds} interleaved rounds"
    )
    spread = stdev(found) if len(found) > 1 else None
    claims = [record.claim("deepcache", "speed-up-sd15", median(found), spread, (0,), note)]
    record.write("deepcache", claims, {f"one step of SD 1.5, {options.dtype}": [row]})


if __name__ == "__main__":
    main()
