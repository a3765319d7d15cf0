"""Caches of other libraries: on and off without a trace, and what is found out about them."""

import re
from contextlib import ExitStack
from functools import partial

import pytest

import pared
from pared import info
from pared.anatomy import presets
from pared.bench import grid, peers
from pared.bench.peers import (
    CacheDit,
    Finding,
    FirstBlockCache,
    MagCache,
    Peer,
    PyramidAttentionBroadcast,
    hooks_on,
    tried,
)
from pared.bench.subjects import PipelineSubject, Sample
from pared.errors import InputError
from pared.method import Handle
from tests.caching.pipelines import PEERS, WAYS

WAY = {way.name: way for way in WAYS}
DIFFUSERS = [name for name, peer in PEERS.items() if not isinstance(peer, CacheDit)]


def found(cache, name) -> Finding:
    way = WAY[name]
    pipe = way.build()
    return tried(cache, pipe, lambda: way.paint(pipe))


@pytest.mark.parametrize("peer", DIFFUSERS)
def test_peers_work_where_they_are_made_for(peer):
    assert found(PEERS[peer], "flux") == Finding("works")


@pytest.mark.parametrize(
    ("peer", "way", "said"),
    [
        # Pipelines that announce no context; models without `enable_cache` get the functions.
        ("FirstBlockCache", "sd3.5", "fails: ValueError: No cache context is set"),
        ("FirstBlockCache", "flux img2img", "fails: ValueError: No cache context is set"),
        ("FirstBlockCache", "sd", "fails: IndexError"),
        ("MagCache", "sd", "does nothing: the picture stays the same; 0 modules are hooked"),
        ("TaylorSeer", "dit", "does nothing: the picture stays the same; 0 modules are hooked"),
        ("TaylorSeer", "wan, unguided", "does nothing: .*; 0 modules are hooked"),
        ("PAB", "dit", "fails: AttributeError: .*current_timestep"),
    ],
)
def test_what_is_found_out_about_peers(peer, way, said):
    outcome = found(PEERS[peer], way)
    assert re.match(said, f"{outcome.outcome}: {outcome.detail}"), outcome


def test_our_own_methods_are_tried_alike():
    assert found(pared.parse("taylorseer:interval=2"), "sd3.5 img2img") == Finding("works")
    refused = found(pared.parse("deepcache"), "dit")
    assert refused.outcome == "refuses" and "it serves the families unet" in refused.detail


class Astray(Peer):
    """Scales the output of the first block; `how` says what it does wrong."""

    info = peers._info("astray", "", "Astray")
    how: str = ""

    def attach(self, pipeline) -> Handle:
        undo, block = ExitStack(), pipeline.transformer.transformer_blocks[0]
        calls = []

        def scale(module, args, output):
            calls.append(1)
            if self.how == "overflows":
                return output / 0
            return output * (1 + 0.1 * (len(calls) if self.how == "drifts" else 1))

        hook = block.register_forward_hook(scale)
        if self.how != "stays":
            undo.callback(hook.remove)
        return Handle(undo, (self,), {})


@pytest.mark.parametrize(
    ("how", "detail"),
    [
        ("stays", "taken off, the pictures stay changed"),
        ("drifts", "a second call of the pipeline gives another picture"),
        ("overflows", "the pictures aren't finite"),
    ],
)
def test_a_cache_that_goes_astray_is_found_out(how, detail):
    assert found(Astray(how=how), "dit") == Finding("goes astray", detail)
    assert found(Astray(), "dit") == Finding("works")


def test_hooks_come_off_one_by_one_where_there_is_no_other_way():
    model = presets.build("toy:pixart", device="cpu")
    with pared.apply(model, MagCache(mag_ratios=(1.0,) * 28)) as handle:
        assert handle.stats["diffusers-magcache"]["hooks"] == len(hooks_on(model)) == 2
    assert not hooks_on(model)


def test_peers_say_what_they_need():
    with pytest.raises(InputError, match="diffusers-pab asks a pipeline for its timestep"):
        pared.apply(presets.build("toy:flux"), PyramidAttentionBroadcast())
    with pytest.raises(InputError, match=r"diffusers-magcache can't be used .* as mag_ratios"):
        pared.apply(presets.build("toy:wan"), MagCache())
    with pared.apply(presets.build("toy:flux"), MagCache()) as handle:
        assert handle.stats["diffusers-magcache"]["hooks"] == 4


def test_two_caches_on_one_model_are_refused():
    model = presets.build("toy:flux", device="cpu")
    with pared.apply(model, FirstBlockCache()):
        with pytest.raises(InputError, match=r"magcache reuses denoiser, which diffusers-fbc"):
            pared.apply(model, MagCache())
        with pytest.raises(InputError, match="has a cache of diffusers enabled"):
            pared.apply(model, pared.parse("taylorseer"))


def test_peers_are_arms_of_the_bench():
    arms = {"base": [], "mag": [MagCache(num_inference_steps=4, mag_ratios=(1.0,) * 4)]}
    report = pared.bench(WAY["dit"].build(), arms, prompts=[3], steps=4, rounds=2, quality=False)
    assert "mag" in report.table()


def test_a_bench_tries_all_peers_and_says_what_became_of_them():
    pipe = WAY["dit"].build()
    arms, said = grid.peer_arms(PipelineSubject(pipe, [Sample(3, 0)], {"num_inference_steps": 7}))
    assert "diffusers-fbc:threshold=0.15" in {*arms} | {line.partition(" ")[0] for line in said}
    tried = len(arms) + len(said)
    assert tried == len(grid.peers_for(7)) and all(line.endswith(".") for line in said)
    assert any("diffusers-magcache:num_inference_steps=7 refuses: " in line for line in said)
    assert all(spec == peer.spec() for spec, (peer,) in arms.items())
    assert not hooks_on(pipe.transformer)


def test_peers_stand_beside_the_arms_of_a_bench(monkeypatch):
    few = [PEERS["PAB"], MagCache(num_inference_steps=4, mag_ratios=(1.0,) * 4, threshold=1.0)]
    monkeypatch.setattr(grid, "peers_for", lambda steps: few)
    bench = partial(pared.bench, WAY["dit"].build(), prompts=[3], rounds=1, quality=False)
    report = bench({"base": []}, steps=4, peers=True, models={"base": "dit"})
    mag = report.row(few[1].spec())
    assert mag.kind == "runtime" and "diffusers-pab" in report.notes[-1]
    assert mag.command == "pared bench dit --peers --seeds 1 --steps 4"
    assert report.row("base").command == "pared sample dit 3 --steps 4 -o picture.png"
    monkeypatch.setattr(grid, "peers_for", lambda steps: few[:1])
    with pytest.raises(InputError, match="none of 1 caches of other libraries works in a DiT"):
        bench({"base": []}, steps=4, peers=True)
    with pytest.raises(InputError, match="caches of other libraries work in pipelines"):
        pared.bench("toy:dit", {"base": []}, peers=True)


def test_peers_are_no_methods_of_pared():
    assert not any(record.module.startswith("pared.bench") for record in info.registry().values())


def test_cache_dit_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"isn't installed; pip install 'pared\[peers\]' brings"):
        pared.apply(WAY["flux"].build(), CacheDit())


@pytest.mark.skipif(not CacheDit.is_installed(), reason="cache-dit isn't installed")
@pytest.mark.parametrize("way", ["flux", "pixart-sigma", "wan, unguided"])
def test_cache_dit(way):
    assert found(PEERS["cache-dit"], way) == Finding("works")


@pytest.mark.skipif(not CacheDit.is_installed(), reason="cache-dit isn't installed")
def test_cache_dit_and_ours_on_one_model_are_refused():
    pipe = WAY["flux"].build()
    with pared.apply(pipe, PEERS["cache-dit"]), pytest.raises(InputError, match="of cache-dit"):
        pared.apply(pipe, pared.parse("taylorseer"))
