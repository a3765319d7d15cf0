"""Measures what reuse saves of the time of full-size models, against what it saves in arithmetic.

    python benchmarks/cache_speed.py                   # on two cores: eighteen minutes
    python benchmarks/cache_speed.py --preset sd1.5    # a piece, for several sessions

Random weights in bfloat16, each method at its paper's setting (where a paper searches or learns its
schedule, a fixed one that reuses as much). A method has two kinds of steps: full ones, which keep
what the others use, and steps that skip. Timed in turn are a step of the plain model, the last full
step of a run ahead of one that skips, and that one; the run is composed of these by the kinds of
its steps, and a short real run is held against the same sum. Encoders, scheduler and decoder, which
no method touches, aren't in it. Writes tables and figures into results/cache-speed.json, and the
claims about speed and cost of deepcache, taylorseer and delta-dit into their own files.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from statistics import median, stdev
from typing import Any

import record
import torch

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.bench import metering
from pared.bench.costs import CORE
from pared.bench.timing import Timings, interleave

# What grows in a method's stats at a step that skips.
SKIPPED = ("reused", "forecast", "active_patches", "sparse_steps")
# Steps of the short real run.
SHORT = 8


@dataclass(frozen=True)
class Way:
    """A method at its paper's setting.

    Attributes:
        spec: of the method.
        steps: of the paper's run.
    """

    spec: str
    steps: int


@dataclass(frozen=True)
class Scene:
    """What is timed of a preset.

    Attributes:
        pixels: side of the picture.
        batch: samples of a step; 2 are a guided one.
        ways: methods; the first is also held against a short real run.
    """

    pixels: int
    batch: int
    ways: tuple[Way, ...]


REUSE = "attention-map-reuse"
SCENES = {
    "pixart-sigma": Scene(512, 2, (
        Way("taylorseer", 20),
        Way("delta-dit:boundary=12", 20),
        Way("harmonica:table=interval:2", 20),
        Way(REUSE, 20),
    )),
    "sd3.5-medium": Scene(512, 1, (
        Way("taylorseer", 28),
        Way("ras:resets=[12,20],high_ratio=0.3", 28),
        Way("delta-dit:boundary=17", 28),
        Way(REUSE, 28),
    )),
    "dit-xl-2": Scene(256, 2, (
        Way("taylorseer:warmup=2,order=4", 50),
        Way("delta-dit:boundary=30", 50),
        Way("harmonica:table=interval:2", 20),
        Way(REUSE, 20),
    )),
    "sd1.5": Scene(512, 2, (
        Way("deepcache:interval=5,branch=1", 50),
        Way("taylorseer", 50),
        Way(REUSE, 20),
    )),
    "flux.1-dev": Scene(512, 1, (
        Way("taylorseer:order=2", 50),
        Way("delta-dit:boundary=17", 28),
    )),
}  # fmt: skip
# FLUX needs 24 GiB for its weights alone.
USUAL = [name for name in SCENES if name != "flux.1-dev"]
DEEPCACHE = ("sd1.5", "deepcache:interval=5,branch=1")


# Kinds of steps -----------------------------------------------------------------------------------


@cache
def skips(spec: str, family: str, steps: int) -> tuple[bool, ...]:
    """Which steps of a run skip, found out on the family's toy."""
    model = presets.build(f"toy:{family}", device="cpu")
    inputs, found = anatomy.of(model).example(), []
    with pared.apply(model, pared.parse(spec)) as handle:
        (stats,) = handle.stats.values()
        for number in range(steps):
            before = skipped(stats)
            step(model, inputs, number, steps)
            found.append(skipped(stats) > before)
    if not any(found):
        raise SystemExit(f"{spec} skips nothing in {steps} steps.")
    return tuple(found)


def skipped(stats: dict[str, Any]) -> int:
    """How much was skipped so far."""
    return sum(stats.get(key, 0) for key in SKIPPED)


@torch.no_grad()
def step(model: Any, inputs: tuple, number: int, steps: int) -> None:
    """One call of a denoiser, at a timestep that falls from step to step."""
    latents, timestep, condition = inputs
    now = torch.full_like(timestep, 999 * (1 - number / steps))
    anatomy.of(model).denoise(model, latents, now, condition)


# Timing -------------------------------------------------------------------------------------------


class Counted:
    """A call whose multiply-adds are counted when it's made for the first time."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.macs = call, 0

    def __call__(self) -> None:
        if self.macs:
            self.call()
            return
        with metering.flop_counter() as counter:
            self.call()
        self.macs = counter.get_total_flops() // 2


class Stage:
    """A preset with random weights, and the steps of it that are timed."""

    def __init__(self, name: str, scene: Scene, dtype: str) -> None:
        self.scene = scene
        self.model = presets.build(name, device="cpu", dtype=getattr(torch, dtype))
        self.family = anatomy.of(self.model)
        side = scene.pixels // presets.get(name).vae_scale
        self.inputs = self.family.example(batch=scene.batch, height=side, width=side)
        self.handle: pared.method.Handle | None = None

    def skips(self, way: Way) -> tuple[bool, ...]:
        """Which steps of a way's run skip."""
        return skips(way.spec, self.family.name, way.steps)

    def step(self, number: int, steps: int) -> None:
        """One step of a run, whatever is attached."""
        step(self.model, self.inputs, number, steps)

    def timed(self, rounds: int) -> tuple[Timings, dict[str, int]]:
        """Seconds and multiply-adds of a plain step, and of both kinds of each way, in turn."""
        calls = {"plain": Counted(partial(self.step, 0, 2))}
        around = {}
        for way in self.scene.ways:
            first = self.skips(way).index(True)
            full, skipping = f"{way.spec}: full", f"{way.spec}: skipping"
            calls[full] = Counted(partial(self.step, first - 1, way.steps))
            calls[skipping] = Counted(partial(self.step, first, way.steps))
            around[full] = partial(self.attaching, way, first - 1)
            around[skipping] = self.removing
        timings = interleave(calls, rounds, warmup=1, base="plain", around=around)
        return timings, {name: call.macs for name, call in calls.items()}

    @contextmanager
    def attaching(self, way: Way, number: int) -> Iterator[None]:
        """Around a full step: what comes before it in a run is done, and not timed."""
        self.handle = pared.apply(self.model, pared.parse(way.spec))
        for before in range(number):
            self.step(before, way.steps)
        yield

    @contextmanager
    def removing(self) -> Iterator[None]:
        """Around the step that skips, the next of the same run."""
        assert self.handle is not None
        (stats,) = self.handle.stats.values()
        before = skipped(stats)
        yield
        if skipped(stats) == before:
            raise SystemExit("a step that should skip computed everything; nothing was measured.")
        self.handle.remove()

    def short(self, way: Way) -> float:
        """Seconds of the first steps of a way's run, as they come."""
        with pared.apply(self.model, pared.parse(way.spec)):
            start = time.perf_counter()
            for number in range(SHORT):
                self.step(number, way.steps)
            return time.perf_counter() - start


def measured(name: str, scene: Scene, rounds: int, dtype: str) -> tuple[list[dict], list[float]]:
    """The rows of a preset, and the speed-ups of its first way, round by round."""
    stage = Stage(name, scene, dtype)
    timings, macs = stage.timed(rounds)
    rows, speed_ups = [], []
    for way in scene.ways:
        kinds = stage.skips(way)
        full, skipping = kinds.count(False), kinds.count(True)
        names = ("plain", f"{way.spec}: full", f"{way.spec}: skipping")
        each = zip(*(timings[n].samples for n in names), strict=False)
        shares = [(full * a + skipping * b) / (len(kinds) * plain) for plain, a, b in each]
        counted = full * macs[names[1]] + skipping * macs[names[2]]
        speed_ups.append([1 / share for share in shares])
        rows.append({
            "way": way.spec,
            "steps": way.steps,
            "full steps": full,
            "share of multiply-adds": round(counted / (len(kinds) * macs["plain"]), 3),
            "share of time": round(median(shares), 3),
            "speed-up": round(1 / median(shares), 2),
            **{f"{kind} step (s)": float(f"{timings[n].median:.3g}")
               for kind, n in zip(("plain", "full", "skipping"), names, strict=True)},
            "machine": record.describe_machine(),
        })  # fmt: skip
        if len(shares) > 1:
            rows[-1]["share of time sd"] = round(stdev(shares), 3)
    way, names = scene.ways[0], [f"{scene.ways[0].spec}: {k}" for k in ("full", "skipping")]
    expected = sum(timings[names[skip]].median for skip in stage.skips(way)[:SHORT])
    rows[0][f"{SHORT} real steps over their sum"] = round(stage.short(way) / expected, 3)
    print(name, rows, f"drift {timings.verdict.drift:.3f}", timings.verdict.notes, flush=True)
    return rows, speed_ups[0]


# Claims -------------------------------------------------------------------------------------------


def counted_claims() -> None:
    """What schedules and configurations decide by themselves."""
    kinds = skips("taylorseer", "flux", 50)
    found = len(kinds) / kinds.count(False)
    note = f"{kinds.count(False)} full steps in 50, counted on a toy"
    any_machine = "any; counted"
    claim = record.claim("taylorseer", "speedup-50", found, None, (0,), note, any_machine)
    record.write("taylorseer", [claim])

    kinds = skips("delta-dit:boundary=12", "pixart", 20)
    whole, passed = without_attention(28), without_attention(28 - 21)
    found = len(kinds) * whole / (kinds.count(False) * whole + kinds.count(True) * passed)
    note = f"PixArt-Sigma's blocks; {kinds.count(False)} full steps in 20; cross-attention counts"
    claim = record.claim("delta-dit", "cost-1024", found, None, (0,), note, any_machine)
    record.write("delta-dit", [claim])


def without_attention(layers: int) -> int:
    """Multiply-adds of a step of PixArt at 1024 pixels, but for the products of self-attention."""
    model = presets.build("pixart-sigma", layers=layers)
    inputs = anatomy.of(model).example(height=128, width=128)
    count = metering.count(lambda: step(model, inputs, 0, 20), model)
    return count.total - count.macs.get(CORE, 0)


def deepcache_claim(found: list[float], scene: Scene, dtype: str) -> None:
    """Its speed-up on Stable Diffusion 1.5."""
    note = (
        f"the U-Net alone on a guided picture of {scene.pixels} pixels, random weights, {dtype}; "
        f"50 steps composed of the times of one, {len(found)} interleaved rounds"
    )
    spread = stdev(found) if len(found) > 1 else None
    claim = record.claim("deepcache", "speed-up-sd15", median(found), spread, (0,), note)
    record.write("deepcache", [claim])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", choices=SCENES, default=USUAL)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    counted_claims()
    for name in options.preset:
        scene = SCENES[name]
        rows, first = measured(name, scene, options.rounds, options.dtype)
        passes = "guided" if scene.batch == 2 else "unguided"
        title = f"{name}, {scene.pixels} pixels, {passes}, {options.dtype}"
        points = {
            row["way"].partition(":")[0]: [
                ("", row["share of multiply-adds"], row["share of time"])
            ]
            for row in rows
        }
        figure = record.points("share of multiply-adds", "share of time", points)
        record.write("cache-speed", (), {title: rows}, {f"{title}: time by work": figure})
        if (name, scene.ways[0].spec) == DEEPCACHE:
            deepcache_claim(first, scene, options.dtype)


if __name__ == "__main__":
    main()
