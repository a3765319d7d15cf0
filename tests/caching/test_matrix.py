"""Every run-time method on every stock pipeline of the families it serves, in all ways of calling.

What must hold is the same for all; the method's own numbers stand in its own tests. By default each
method runs on one pipeline of every family and on its share of the others. The rest is slow, and so
are the settings in its record's grid.
"""

from functools import cache
from types import MethodType

import pytest
import torch

import pared
from pared import anatomy, info
from pared.anatomy import presets
from pared.errors import InputError
from pared.method import denoiser
from tests.caching.pipelines import SPECS, STEPS, WAYS, Way

METHODS = {s: record for s, record in info.registry().items() if record.kind == "runtime"}


def cases():
    """Specs of methods, each with a way; slow unless the way is its family's first, or it's its
    turn."""
    seen = set()
    for number, way in enumerate(WAYS):
        serving = [slug for slug, record in METHODS.items() if way.family in record.families]
        for place, slug in enumerate(serving):
            quick = (slug, way.family) not in seen or place == number % len(serving)
            seen.add((slug, way.family))
            usual = SPECS.get(slug, slug)
            for spec in dict.fromkeys([usual, *grid(slug, way.family)]):
                marks = [] if quick and spec == usual else [pytest.mark.slow]
                yield pytest.param(spec, way, id=f"{spec}-{way.name}", marks=marks)


def grid(slug: str, family: str) -> list[str]:
    """A method's grid where its defaults reuse something, without what doesn't fit the family."""
    specs = [] if slug in SPECS else [f"{slug}:{spec}" for spec in METHODS[slug].grid if spec]
    return [spec for spec in specs if fits(spec, family)]


@cache
def fits(spec: str, family: str) -> bool:
    try:
        return bool(pared.parse(spec).claims(anatomy.of(presets.build(f"toy:{family}"))))
    except InputError:  # attentions to a prompt in a model that has none, say
        return False


@cache
def pipeline_and_plain(way: Way):
    """The pipeline, which all methods share, and what it paints by itself."""
    pipe = way.build()
    return pipe, way.paint(pipe)


def spared(stats: dict) -> int:
    """Everything that a method counts as not computed."""
    patches = stats.get("patches", 0) - stats.get("active_patches", 0)
    return patches + sum(stats.get(key, 0) for key in ("reused", "forecast", "sparse_steps"))


@pytest.mark.filterwarnings("ignore:ras is validated for Euler")
@pytest.mark.parametrize("spec, way", cases())
def test_a_method_on_a_pipeline(spec, way):
    pipe, plain = pipeline_and_plain(way)
    method = pared.parse(spec)
    slug = method.info.slug
    # Another size, then another number of steps, then the first again.
    runs = [{}, {"size": 1}, {"steps": STEPS - 2}, {}]
    fresh = []
    for run in runs[:3]:
        with pared.apply(pipe, method) as handle:
            fresh.append(way.paint(pipe, **run))
        assert spared(handle.stats[slug]) > 0, f"nothing was reused in {run}: {handle.stats}"
        assert fresh[-1].isfinite().all()
    assert not torch.equal(fresh[0], plain), "the pictures are those of the pipeline itself"
    with pared.apply(pipe, method) as handle:
        for run, wanted in zip(runs, [*fresh, fresh[0]], strict=True):
            assert torch.equal(way.paint(pipe, **run), wanted), f"{run} depends on what ran before"
    stats = handle.stats[slug]
    assert stats["runs"] == len(runs), "one call of the pipeline is one run"
    assert torch.equal(way.paint(pipe), plain), "something stays behind"
    for name, module in denoiser(pipe).named_modules():
        own = MethodType(type(module).forward, module)
        assert vars(module).get("forward", own) == own, f"{name} is still gone around"


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_a_pipeline_without_methods(way):
    """Nothing applied changes nothing, and the ways are what their table says."""
    pipe, plain = pipeline_and_plain(way)
    calls = []
    hook = denoiser(pipe).register_forward_pre_hook(lambda module, args: calls.append(1))
    with pared.apply(pipe):
        assert torch.equal(way.paint(pipe), plain)
    hook.remove()
    rounds = getattr(pipe, "num_timesteps", len(pipe.scheduler.timesteps))
    assert len(calls) == way.passes * rounds
    assert rounds >= STEPS - 1
    assert not torch.equal(way.paint(pipe, seed=1), plain)


def test_every_family_and_method_is_in_the_matrix():
    served = {family for record in METHODS.values() for family in record.families}
    assert served <= {way.family for way in WAYS}
