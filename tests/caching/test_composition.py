"""What composes: caches on converted models, and caches with each other.

For each pair: off is the other alone and taken off is the model itself, bit for bit; the order of
attaching is all one; and what is counted as computed is what ran.
"""

import copy
from collections import Counter
from contextlib import ExitStack, contextmanager

import pytest
import torch

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention.edit import EDiT
from pared.attention.linfusion import LinFusion
from pared.attention.mm_edit import MMEDiT
from pared.caching.attention_map_reuse import AttentionMapReuse
from pared.caching.deepcache import DeepCache
from pared.caching.delta_dit import DeltaDiT
from pared.caching.harmonica import HarmoniCa
from pared.caching.ras import RAS
from pared.caching.taylorseer import TaylorSeer
from pared.method import attached_to, denoiser
from pared.runtime import Clock, detour
from tests.caching.pipelines import WAYS

DELTA, SEER = DeltaDiT(cached=1), TaylorSeer(interval=3, warmup=1)
CROSS = AttentionMapReuse(sites="cross")
# Settings that let nothing be reused.
OFF = {
    "delta-dit": {"interval": 1},
    "taylorseer": {"interval": 1},
    "harmonica": {"table": "all"},
    "deepcache": {"interval": 1},
    "attention-map-reuse": {"reuse": ()},
    "ras": {"ratio": 1},
}


def built(name, *conversions):
    """A stock pipeline, its denoiser converted, and how it's called."""
    way = next(way for way in WAYS if way.name == name)
    pipe = way.build()
    torch.manual_seed(0)
    pared.convert(pipe, *conversions)
    return pipe, way.paint


def with_off(method):
    return type(method)(**(method.model_dump() | OFF[method.info.slug]))


def composed(pipe, paint, *methods, **run):
    """What a pipeline paints with methods together, and what they count in that run.

    A second run is the same, and so is one where they were attached in another order, in what it
    counts, too; taken off, nothing of them is left.
    """
    plain = paint(pipe, **run)
    with pared.apply(pipe, *methods) as handle:
        found = paint(pipe, **run)
        stats = copy.deepcopy(handle.stats)
        assert torch.equal(paint(pipe, **run), found)
    with pared.apply(pipe, *reversed(methods)) as handle:
        assert torch.equal(paint(pipe, **run), found)
        assert handle.stats == stats
    assert torch.equal(paint(pipe, **run), plain)
    model = denoiser(pipe)
    assert not attached_to(model) and not hasattr(model, "pared_leader")
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(isinstance(clock, Clock) for clock in listening(model))
    assert found.isfinite().all()
    return found, stats


def listening(model):
    """Those whose hooks hear of the model's calls, in their order."""
    return [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]


def spared(counts):
    return counts.get("reused", 0) + counts.get("forecast", 0)


class Ran:
    """Goes around a module's own forward, inside of all methods, and counts its calls."""

    def __init__(self, counts, path):
        self.counts, self.path = counts, path

    def __call__(self, own, *args, **kwargs):
        self.counts[self.path] += 1
        return own(*args, **kwargs)


@contextmanager
def ran(pipe, paths):
    """How often modules run from now on, by path; for after the methods were attached."""
    counts = dict.fromkeys(paths, 0)
    with ExitStack() as undo:
        for path in paths:
            detour(denoiser(pipe).get_submodule(path), Ran(counts, path), undo, within=True)
        yield counts


def computed(stats):
    return {site: parts.get("computed", 0) for site, parts in stats["by_site"].items()}


def queries(pipe, paint, **run):
    """The calls of the denoiser at which each attention computed its queries, in one run."""
    model, calls, seen = denoiser(pipe), [], {}
    hooks = [model.register_forward_pre_hook(lambda *_: calls.append(1))]
    for site in anatomy.of(model).sites("self_attention", "joint_attention", "cross_attention"):
        steps = seen.setdefault(site.path, [])
        note = lambda *_, steps=steps: steps.append(len(calls) - 1)  # noqa: E731
        hooks.append(site.module.to_q.register_forward_hook(note))
    paint(pipe, **run)
    for hook in hooks:
        hook.remove()
    return seen


def projected(pipe, paint, **run):
    """How many tokens each attention made queries of, at each call that came to it in one run."""
    model, calls, seen = denoiser(pipe), [], {}
    hooks = [model.register_forward_pre_hook(lambda *_: calls.append(Counter()))]
    for site in anatomy.of(model).sites("self_attention", "joint_attention"):
        note = lambda *io, path=site.path: calls[-1].update({path: io[-1].shape[1]})  # noqa: E731
        hooks.append(site.module.to_q.register_forward_hook(note))
        seen[site.path] = []
    paint(pipe, **run)
    for hook in hooks:
        hook.remove()
    return {path: [call[path] for call in calls if path in call] for path in seen}


# On converted models ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "conversion", "caches"),
    [
        ("pixart-sigma", EDiT(), (DELTA, SEER, HarmoniCa(), CROSS)),
        ("sd3.5", MMEDiT(), (DELTA, SEER, HarmoniCa())),
        ("sd", LinFusion(), (DeepCache(branch=1, min_steps=1), SEER, CROSS)),
    ],
    ids=["edit", "mm-edit", "linfusion"],
)
def test_caches_on_a_converted_model(name, conversion, caches):
    pipe, paint = built(name, conversion)
    plain = paint(pipe)
    for cache in caches:
        found, stats = composed(pipe, paint, cache)
        assert not torch.equal(found, plain)
        counts = stats[cache.info.slug]
        assert spared(counts) > 0
        for site, parts in counts["by_site"].items():
            assert sum(parts.values()) == counts["calls"], (cache.info.slug, site)
        with pared.apply(pipe, with_off(cache)) as handle:
            assert torch.equal(paint(pipe), plain)
        assert spared(handle.stats[cache.info.slug]) == 0


# TaylorSeer over Delta-DiT ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixart-sigma", "sd3.5"])
def test_taylorseer_over_delta_dit(name):
    pipe, paint = built(name)
    found, stats = composed(pipe, paint, DELTA, SEER)
    for method, other in ((DELTA, SEER), (SEER, DELTA)):
        with pared.apply(pipe, method):
            alone = paint(pipe)
        with pared.apply(pipe, method, with_off(other)):
            assert torch.equal(paint(pipe), alone)
        assert not torch.equal(found, alone)
    family = anatomy.of(denoiser(pipe))
    sites = {branch.path: branch.block for branch in family.branches}
    passed = {
        number: stats["delta-dit"]["by_site"].get(path, {}).get("reused", 0)
        for number, path in ((block.index, block.path) for block in family.blocks)
    }
    assert sum(passed.values()) == stats["delta-dit"]["reused"] == 3
    for path, parts in stats["taylorseer"]["by_site"].items():
        assert sum(parts.values()) == 7 - passed[sites[path]], "counted where nobody called"
    with (
        pared.apply(pipe, DELTA, SEER),
        ran(pipe, [*stats["delta-dit"]["by_site"], *sites]) as times,
    ):
        seen = queries(pipe, paint)
    assert times == computed(stats["delta-dit"]) | computed(stats["taylorseer"])
    blocks = {site.path: site.block for site in family.sites()}
    for path, steps in seen.items():
        assert steps == run_by_both(blocks[path], len(family.blocks), 7), path


def run_by_both(block, blocks, steps):
    """Where an attention runs: its block isn't passed by, and it isn't forecast."""
    found = []
    for step in range(steps):
        passed = step % DELTA.interval and block in DELTA.run_at(step, blocks, steps)
        due = found and not SEER.full(step) and found[-1] > step - SEER.interval
        if not passed and not due:
            found.append(step)
    return found


# DeepCache with attention-map reuse on what remains -----------------------------------------------


def test_attention_maps_are_reused_in_what_deepcache_leaves():
    pipe, paint = built("sd")
    deep, maps = DeepCache(branch=2, min_steps=1), AttentionMapReuse()
    family = anatomy.of(denoiser(pipe))
    idle = tuple(f"{part.path}." for part in deep.cut(family).idle)
    found, stats = composed(pipe, paint, deep, maps)
    for method, other in ((deep, maps), (maps, deep)):
        with pared.apply(pipe, method):
            alone = paint(pipe)
        with pared.apply(pipe, method, with_off(other)):
            assert torch.equal(paint(pipe), alone)
        assert not torch.equal(found, alone)
    parts = [part.path for part in deep.cut(family).idle]
    with pared.apply(pipe, deep, maps), ran(pipe, parts) as times:
        seen = queries(pipe, paint)
    assert times == computed(stats["deepcache"])
    assert computed(stats["attention-map-reuse"]) == {path: len(at) for path, at in seen.items()}
    for path, counts in stats["attention-map-reuse"]["by_site"].items():
        assert sum(counts.values()) == (3 if path.startswith(idle) else 7)
    assert {path.startswith(idle) for path in seen} == {True, False}
    for path, steps in seen.items():
        # Maps are computed at even steps and reused at odd ones. Where DeepCache passes an
        # attention by at steps 1, 2, 4 and 5, there is none of step 2 to reuse at step 3.
        assert steps == ([0, 3, 6] if path.startswith(idle) else [0, 2, 4, 6]), path


# RAS with its resets shared -----------------------------------------------------------------------

# Of nine steps: all, all, all (kept by RAS), some patches, some, all, all, all, all.
RESTING = RAS(start=3, end=5, resets=())
PIPELINES = ["pixart-sigma", "sd3.5", "flux, guided in turn", "lumina"]
BESIDE = {"pixart": (DELTA, SEER, HarmoniCa(), CROSS), "lumina": (DELTA,)}
USUAL = (DELTA, SEER, TaylorSeer(interval=3, warmup=1, sites="block"), HarmoniCa())
# The steps at which the caches reuse; the steps 2 to 5 are full, or begin afresh.
REUSING = {"delta-dit": 2, "taylorseer": 3, "harmonica": 2, "attention-map-reuse": 2}
warned = pytest.mark.filterwarnings("ignore:ras is validated for Euler")


@warned
@pytest.mark.parametrize("name", PIPELINES)
def test_ras_beside_a_cache(name):
    pipe, paint = built(name)
    passes = 2 if "in turn" in name else 1
    with pared.apply(pipe, RESTING):
        resting = paint(pipe, steps=9)
    for cache in BESIDE.get(anatomy.of(denoiser(pipe)).name, USUAL):
        slug = cache.info.slug
        found, stats = composed(pipe, paint, RESTING, cache, steps=9)
        with pared.apply(pipe, cache):
            alone = paint(pipe, steps=9)
        assert not torch.equal(found, resting) and not torch.equal(found, alone)
        with pared.apply(pipe, cache, with_off(RESTING)):
            assert torch.equal(paint(pipe, steps=9), alone)
        with pared.apply(pipe, RESTING, with_off(cache)):
            assert torch.equal(paint(pipe, steps=9), resting)
        counts = stats[slug]
        assert counts["calls"] == 9 * passes
        assert stats["ras"]["reused"] == stats["ras"]["sites"] * 2 * passes
        for site, parts in counts["by_site"].items():
            assert sum(parts.values()) == 9 * passes, (slug, site)
            if slug != "delta-dit":  # passes by a block at some of its steps
                assert spared(parts) == REUSING[slug] * passes, (slug, site)
        if slug == "delta-dit":
            assert spared(counts) == REUSING[slug] * passes  # one block
        with pared.apply(pipe, RESTING, cache):
            tokens = projected(pipe, paint, steps=9)
        for site, parts in stats["ras"]["by_site"].items():
            whole = tokens[site].count(max(tokens[site]))
            assert parts == {"computed": whole, "reused": len(tokens[site]) - whole}, (slug, site)


@warned
@pytest.mark.parametrize("name", PIPELINES)
def test_a_cache_keeps_nothing_of_a_part_of_the_patches(name):
    """Where all steps are RAS's, the other computes, keeps nothing, and changes nothing."""
    pipe, paint = built(name)
    ras, model = RAS(start=1, resets=(3,)), denoiser(pipe)
    with pared.apply(pipe, ras):
        wanted = paint(pipe)
    for cache in BESIDE.get(anatomy.of(model).name, USUAL):
        with pared.apply(pipe, cache, ras) as handle:
            leader, other = (c for c in listening(model) if isinstance(c, Clock))
            left = []
            hook = model.register_forward_hook(
                lambda *_, left=left, a=leader, b=other: left.append((a.leaves, len(b.kept)))
            )
            found = paint(pipe)
            hook.remove()
        assert {kept for leaves, kept in left if leaves == "nothing"} == {0}
        assert spared(handle.stats[cache.info.slug]) == 0
        # An attention map that might be kept is computed in the open, which rounds differently.
        rounding = 1e-3 if cache.info.slug == "attention-map-reuse" else 0
        torch.testing.assert_close(found, wanted, rtol=0, atol=rounding)


@torch.no_grad()
def test_a_copy_shares_resets_of_its_own():
    model = presets.build("toy:sd3", device="cpu")
    family = anatomy.of(model)
    size = {"height": 8, "width": 8, "text_tokens": 4}
    latents, timestep, condition = family.example(1, **size, generator=torch.Generator())

    def run(of):
        times = [torch.full_like(timestep, 900 - 50 * step) for step in range(9)]
        return torch.stack([family.denoise(of, latents * (1 + t), t, condition) for t in times])

    with pared.apply(model, SEER, RESTING):
        twin = copy.deepcopy(model)
        wanted = run(model)
    assert torch.equal(run(twin), wanted) and not torch.equal(run(model), wanted)
    assert twin.pared_leader is listening(twin)[0] and not hasattr(model, "pared_leader")
