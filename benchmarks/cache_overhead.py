"""Measures what watching a model costs: every cache at settings by which it skips nothing.

    python benchmarks/cache_overhead.py      # five minutes on one core

On a toy FLUX in its stock pipeline, where all caches work, pared's own and those of other
libraries. What a call of the denoiser takes longer has a part for the call itself and one for each
module that is hooked; two depths of the toy tell them apart, in microseconds. Neither depends on
how wide a model is, so both together say what a step of a larger model takes longer, whose hooked
modules are counted: here the house PixArt and PixArt-Sigma at 512 pixels, as a share of their steps
on this machine. Caches that keep what they would reuse pay for that, too. Writes
results/cache-overhead.json.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import record
import torch
from torch import Tensor, nn

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.bench import peers
from pared.bench.timing import Timings, interleave
from pared.checkpoint import load
from pared.method import denoiser
from pared.runtime import Clock, Detour, detour
from pared.worlds.house import folder_of

sys.path.insert(0, str(record.ROOT))
from tests.caching.pipelines import STEPS, WAYS, Way

# Of blocks of either kind.
DEPTHS = (2, 10)

# Settings by which everything is computed.
OURS = (
    "taylorseer:interval=1",
    "delta-dit:interval=1,cached=1",
    "harmonica:table=all",
    "attention-map-reuse:reuse=[]",
    "ras:ratio=1",
    "re-ttention:warmup=1000",
)
NEVER = 1e-12
THEIRS = {
    "First Block Cache of diffusers": peers.FirstBlockCache(threshold=NEVER),
    "TaylorSeer of diffusers": peers.DiffusersTaylorSeer(cache_interval=1),
    "MagCache of diffusers": peers.MagCache(
        num_inference_steps=STEPS, mag_ratios=(0.5,) * STEPS, threshold=NEVER
    ),
    "PAB of diffusers": peers.PyramidAttentionBroadcast(spatial_attention_block_skip_range=1),
    "DBCache of cache-dit": peers.CacheDit(
        Fn_compute_blocks=1, max_warmup_steps=0, residual_diff_threshold=0.0
    ),
}

Attach = Callable[[Any], Any]  # to a pipeline; gives a context


def through(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around a module: nothing."""
    return own(*args, **kwargs)


@contextmanager
def watched(pipeline: Any, detours: bool) -> Iterator[None]:
    """pared's mechanism alone: the clock, and a detour of nothing around every branch."""
    with ExitStack() as undo:
        Clock(pipeline, undo)
        for branch in anatomy.of(denoiser(pipeline)).branches if detours else ():
            detour(branch.module, through, undo)
        yield


def arms() -> dict[str, Attach]:
    """What is attached in each of the runs that are timed, by what attaches it."""
    found: dict[str, Attach] = {
        "pared: the clock alone": partial(watched, detours=False),
        "pared: the clock, and a detour around each branch": partial(watched, detours=True),
    }
    found |= {f"pared: {spec}": attaching(pared.parse(spec)) for spec in OURS}
    for name, peer in THEIRS.items():
        if peer.is_installed():
            found[name] = attaching(peer)
    return found


def attaching(cache: Any) -> Attach:
    return lambda pipeline: pared.apply(pipeline, cache)


def hooked(model: nn.Module, blocks: int) -> int:
    """Modules of a model that something goes around, or whose processor was exchanged.

    Args:
        model: with a cache attached.
        blocks: that it has; cache-dit puts others in the place of all.
    """
    hooks = {path for path, _ in peers.hooks_on(model)}
    for path, module in model.named_modules():
        processor = type(getattr(module, "processor", None)).__module__
        if isinstance(vars(module).get("forward"), Detour) or processor.startswith("pared."):
            hooks.add(path)
    return len(hooks) or (blocks if getattr(model, "_is_cached", False) else 0)


def counts(made: Callable[[], Any]) -> dict[str, int | None]:
    """How many modules each cache hooks of a pipeline; None where it can't be attached."""
    found = dict[str, int | None]()
    for name, attach in arms().items():
        pipeline = made()
        blocks = len(anatomy.of(denoiser(pipeline)).blocks)
        try:
            with attach(pipeline):
                found[name] = hooked(denoiser(pipeline), blocks)
        # Whatever another library says when a model isn't its own.
        except Exception:
            found[name] = None
    return found


def require_idle(name: str, attach: Callable[[], Any], run: Callable[[], Tensor]) -> None:
    """Stop where a cache paints another picture: it skips something, and saves what it costs."""
    plain = run()
    with attach():
        if not torch.equal(run(), plain):
            raise SystemExit(f"{name} skips something; its overhead can't be told.")


@dataclass(frozen=True)
class Measured:
    """What a depth of the toy gave.

    Attributes:
        extra: seconds that each cache adds to a call of the denoiser.
        hooked: modules that it hooks.
        plain: seconds of a call without.
        notes: what speaks against the figures.
    """

    extra: dict[str, float]
    hooked: dict[str, int | None]
    plain: float
    notes: tuple[str, ...]


def measured(way: Way, depth: int, rounds: int) -> Measured:
    """The overhead of all caches on a toy with so many blocks of either kind."""
    way = replace(way, config={"num_layers": depth, "num_single_layers": depth})
    # A pipeline for each, since cache-dit leaves its own forward on the model.
    calls: dict[str, Callable[[], Tensor]] = {"plain": way.made()[1]}
    around = {}
    for name, attach in arms().items():
        pipeline, calls[name] = way.made()
        around[name] = partial(attach, pipeline)
        require_idle(name, around[name], calls[name])
    times: Timings = interleave(calls, rounds, warmup=3, base="plain", around=around)
    extra = {}
    for name in around:
        # By the median of the rounds' own differences, since the machine's speed drifts.
        pairs = zip(times[name].samples, times["plain"].samples, strict=False)
        extra[name] = float(torch.tensor([ours - base for ours, base in pairs]).median()) / STEPS
    plain = times["plain"].median / STEPS
    return Measured(extra, counts(way.build), plain, times.verdict.notes)


@dataclass(frozen=True)
class Larger:
    """A model whose steps the overhead is a share of.

    Attributes:
        step: seconds of one guided step.
        hooked: modules that each cache hooks; None where it can't be attached.
    """

    step: float
    hooked: dict[str, int | None]


def larger(model: nn.Module, timed: int, **size: int) -> Larger:
    """Time a step of a PixArt, and count what caches hook of it in its stock pipeline."""
    family = anatomy.of(model)
    call = torch.no_grad()(partial(family.denoise, model, *family.example(batch=2, **size)))
    step = interleave({"base": call}, timed, warmup=1)["base"].median

    def stock() -> Any:
        pipeline = next(way for way in WAYS if way.name == "pixart-sigma").build()
        with torch.device("meta"):  # nothing is run
            pipeline.transformer = type(model).from_config(model.config)
        return pipeline

    return Larger(step, counts(stock))


def rows_of(
    shallow: Measured, deep: Measured, models: dict[str, Larger]
) -> Iterator[dict[str, Any]]:
    """A row for each cache: what it adds to a call, and to the steps of other models."""
    for name, extra in shallow.extra.items():
        few, many = shallow.hooked[name] or 0, deep.hooked[name] or 0
        # Some hook as many modules of a deeper model.
        each = (deep.extra[name] - extra) / (many - few) if many > few else extra / max(few, 1)
        row = {
            "cache": name,
            "hooked modules": few or "",
            "a call (microseconds)": round(1e6 * extra, 1),
            "a hooked module (microseconds)": round(1e6 * each, 1) if few else "",
        }
        for model, larger in models.items():
            count = larger.hooked[name]
            share = "doesn't work there"
            if count is not None and bool(count) == bool(few):
                share = f"{(extra + each * (count - few)) / larger.step:.3%}"
            row[f"share of a step of {model}"] = share
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    way = next(way for way in WAYS if way.name == "flux")
    shallow, deep = (measured(way, depth, options.rounds) for depth in DEPTHS)
    sigma = presets.build("pixart-sigma", device="cpu", dtype=torch.bfloat16)
    models = {
        "house:pixart": larger(denoiser(load(folder_of("house:pixart"))), 20),
        "PixArt-Sigma at 512": larger(sigma, 3, height=64, width=64),
    }
    rows = list(rows_of(shallow, deep, models))
    print(*rows, *shallow.notes, *deep.notes, sep="\n", flush=True)
    told = {"a call of the toy (microseconds)": round(1e6 * shallow.plain)} | {
        f"a step of {name} (s)": float(f"{model.step:.3g}") for name, model in models.items()
    }
    conditions = record.conditions(told)
    tables = {"what caches cost that skip nothing, FLUX": rows, "conditions": conditions}
    record.write("cache-overhead", (), tables)


if __name__ == "__main__":
    main()
