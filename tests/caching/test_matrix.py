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
from pared import anatomy
from pared.anatomy import presets
from pared.bench.contract_runtime import spared
from pared.errors import InputError
from pared.method import attached_to, denoiser
from tests.caching.pipelines import BARE, METHODS, OTHERS, REFUSED, SPECS, STEPS, WAYS, Way, serving


def cases():
    """Specs of methods, each with a way; slow unless the way is its family's first, or it's its
    turn."""
    seen = set()
    for number, way in enumerate((*WAYS, *BARE)):
        specs = serving(way)
        for place, usual in enumerate(specs):
            quick = (usual, way.family) not in seen or place == number % len(specs)
            seen.add((usual, way.family))
            points = [] if way.bare else grid(usual, way.family)
            for spec in dict.fromkeys([usual, *points]):
                marks = [] if quick and spec == usual else [pytest.mark.slow]
                yield pytest.param(spec, way, id=f"{spec}-{way.name}", marks=marks)


def grid(usual: str, family: str) -> list[str]:
    """A method's grid, on top of how it's usually run here, without what doesn't fit the family."""
    slug, _, settings = usual.partition(":")
    points = [",".join(filter(None, (settings, point))) for point in METHODS[slug].grid if point]
    return [spec for spec in (f"{slug}:{point}" for point in points) if fits(spec, family)]


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


@pytest.mark.filterwarnings("ignore:ras is validated for Euler")
@pytest.mark.parametrize("spec, way", cases())
def test_a_method_on_a_pipeline(spec, way):
    pipe, plain = pipeline_and_plain(way)
    method = pared.parse(spec)
    slug = method.info.slug
    # Another size, then another number of steps, then the first again.
    runs = [{}, *OTHERS.values(), {}]
    fresh = []
    for run in runs[:3]:
        with pared.apply(way.target(pipe), method) as handle:
            fresh.append(way.paint(pipe, **run))
        assert spared(handle.stats[slug]) > 0, f"nothing was reused in {run}: {handle.stats}"
        assert fresh[-1].isfinite().all()
    assert not torch.equal(fresh[0], plain), "the pictures are those of the pipeline itself"
    with pared.apply(way.target(pipe), method) as handle:
        for run, wanted in zip(runs, [*fresh, fresh[0]], strict=True):
            assert torch.equal(way.paint(pipe, **run), wanted), f"{run} depends on what ran before"
    stats = handle.stats[slug]
    assert stats["runs"] == len(runs), "one call of the pipeline is one run"
    assert torch.equal(way.paint(pipe), plain), "something stays behind"
    for name, module in denoiser(pipe).named_modules():
        own = MethodType(type(module).forward, module)
        assert vars(module).get("forward", own) == own, f"{name} is still gone around"


@pytest.mark.parametrize(("slug", "name"), REFUSED, ids=str)
def test_what_a_method_refuses(slug, name):
    """In one clear sentence, and the pipeline is left as it was."""
    way = next(way for way in (*WAYS, *BARE) if way.name == name)
    pipe, plain = pipeline_and_plain(way)
    with (
        pytest.raises(InputError, match=REFUSED[slug, name]) as refusal,
        pared.apply(way.target(pipe), pared.parse(SPECS.get(slug, slug))),
    ):
        # What is in the sequence nobody knows before a call.
        assert "kontext" in name, "it is attached all the same"
        way.paint(pipe)
    assert "\n" not in str(refusal.value)
    assert not attached_to(denoiser(pipe))
    assert torch.equal(way.paint(pipe), plain)


@pytest.mark.parametrize("name", ["sd3.5 controlnet", "flux controlnet"])
def test_a_controlnet_that_only_a_call_shows_is_refused(name):
    way = next(way for way in WAYS if way.name == name)
    pipe = way.build()
    with (
        pared.apply(denoiser(pipe), pared.parse(SPECS["ras"])),
        pytest.raises(InputError, match="ControlNet"),
    ):
        way.paint(pipe)


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
