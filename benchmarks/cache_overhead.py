"""Measures what watching a model costs: every cache at settings by which it skips nothing.

    python benchmarks/cache_overhead.py      # five minutes on one core

On a toy FLUX in its stock pipeline, where all caches work, pared's own and those of other
libraries. The overhead of a call of the denoiser hardly depends on the size of the model, so it is
given in microseconds, by the call and by each hooked module, and as a share of a step of the house
PixArt and of one of PixArt-Sigma at 512 pixels on this machine. Caches that keep what they would
reuse pay for that, too. Writes results/cache-overhead.json.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from tests.caching.pipelines import STEPS, WAYS

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

Around = Callable[[], Any]


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


def arms(pipeline: Any) -> dict[str, Around]:
    """What is attached in each of the runs that are timed."""
    found: dict[str, Around] = {
        "pared: the clock alone": partial(watched, pipeline, False),
        "pared: the clock, and a detour around each branch": partial(watched, pipeline, True),
    }
    found |= {f"pared: {s}": partial(pared.apply, pipeline, pared.parse(s)) for s in OURS}
    for name, peer in THEIRS.items():
        if not isinstance(peer, peers.CacheDit) or peer.is_installed():
            found[name] = partial(pared.apply, pipeline, peer)
    return found


def hooked(model: nn.Module) -> int:
    """Modules of a model that something goes around, or whose processor was exchanged."""
    hooks = {path for path, _ in peers.hooks_on(model)}
    for path, module in model.named_modules():
        processor = type(getattr(module, "processor", None)).__module__
        if isinstance(vars(module).get("forward"), Detour) or processor.startswith("pared."):
            hooks.add(path)
    return len(hooks)


def require_idle(around: dict[str, Around], run: Callable[[], Tensor]) -> None:
    """Stop where a cache paints another picture: it skips something, and saves what it costs."""
    plain = run()
    for name, attach in around.items():
        with attach():
            if not torch.equal(run(), plain):
                raise SystemExit(f"{name} skips something; its overhead can't be told.")


def step_of(model: nn.Module, rounds: int, **size: int) -> float:
    """Seconds of one guided step of a denoiser."""
    family = anatomy.of(model)
    call = torch.no_grad()(partial(family.denoise, model, *family.example(batch=2, **size)))
    return interleave({"base": call}, rounds, warmup=1)["base"].median


def rows_of(
    pipeline: Any, around: dict[str, Around], times: Timings, steps: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for each cache: what it adds to a call, and to the steps of other models."""
    plain, rows = times["plain"].median, []
    for name, attach in around.items():
        with attach():
            count = hooked(denoiser(pipeline))
        # By the median of the rounds' own differences, since the machine's speed drifts.
        pairs = zip(times[name].samples, times["plain"].samples, strict=False)
        extra = float(torch.tensor([ours - base for ours, base in pairs]).median()) / STEPS
        row = {
            "cache": name,
            "hooked modules": count or "",
            "a call (microseconds)": round(1e6 * extra, 1),
            "a hooked module (microseconds)": round(1e6 * extra / count, 1) if count else "",
        }
        row |= {f"share of a step of {model}": f"{extra / s:.3%}" for model, s in steps.items()}
        rows.append(row)
        print(row, f"toy call {1e6 * plain / STEPS:.0f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--no-models", action="store_true", help="without the steps of real ones")
    options = parser.parse_args()
    way = next(way for way in WAYS if way.name == "flux")
    pipeline = way.build()
    around = arms(pipeline)
    run = partial(way.paint, pipeline)
    require_idle(around, run)
    calls = {"plain": run} | dict.fromkeys(around, run)
    times = interleave(calls, options.rounds, warmup=3, base="plain", around=around)
    steps = {}
    if not options.no_models:
        steps["house:pixart"] = step_of(denoiser(load(folder_of("house:pixart"))), 20)
        model = presets.build("pixart-sigma", device="cpu", dtype=torch.bfloat16)
        steps["PixArt-Sigma at 512"] = step_of(model, 3, height=64, width=64)
    print(steps, times.verdict.notes, flush=True)
    rows = rows_of(pipeline, around, times, steps)
    conditions = [
        {"what": "command", "value": record.command()},
        {"what": "machine", "value": record.describe_machine()},
        {"what": "commit", "value": record.commit()},
        {"what": "a call of the toy (microseconds)",
         "value": round(1e6 * times["plain"].median / STEPS)},
    ]  # fmt: skip
    conditions += [
        {"what": f"a step of {name} (s)", "value": float(f"{s:.3g}")} for name, s in steps.items()
    ]
    tables = {"what caches cost that skip nothing, FLUX": rows, "conditions": conditions}
    record.write("cache-overhead", (), tables)


if __name__ == "__main__":
    main()
