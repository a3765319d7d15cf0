"""What must hold of attention-map reuse without trained weights: its paper's mathematics.

Run by `pared check attention-map-reuse`.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import presets
from pared.caching.attention_map_reuse import INFO, KINDS, AttentionMapReuse
from pared.caching.kept_maps import softmax_map
from pared.caching.runs import amplification
from pared.caching.schedules import (
    Bits,
    alternate,
    exhaustive,
    greedy,
    hurry,
    swap_search,
    swaps,
    with_reuse,
)
from pared.errors import InputError
from pared.keeping import held_bytes
from pared.method import apply
from pared.runtime import Clock


def check_map() -> None:
    """The map times the values is softmax attention within 1e-12, with masks of both kinds."""
    noise = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, tokens, 8, generator=noise, dtype=torch.float64) for tokens in (5, 7, 7)
    )
    seen = torch.rand(2, 1, 1, 7, generator=noise) > 0.3
    bias = torch.randn(2, 3, 5, 7, generator=noise, dtype=torch.float64)
    for mask in (None, seen, bias):
        weights = softmax_map(query, key, 8**-0.5, mask)
        wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        torch.testing.assert_close(weights @ value, wanted, rtol=0, atol=1e-12)


def check_no_reuse() -> None:
    """k = 0 is the model bit for bit; a step that keeps its maps is it within 1e-4."""
    for family, model in _toys():
        wanted = _run(model, 3)
        for reuse in ((), (9,)):
            with apply(model, AttentionMapReuse(reuse=reuse)):
                assert torch.equal(_run(model, 3), wanted), f"{family}: k = 0 changed the output"
        with apply(model, AttentionMapReuse(reuse=(3,))):
            torch.testing.assert_close(_run(model, 3), wanted, rtol=1e-4, atol=1e-4)


def check_exactness() -> None:
    """On unchanged inputs a reuse step gives the same bits as the step that computed the map."""
    for family, model in _toys():
        for keep_output in (True, False):
            with apply(model, AttentionMapReuse(reuse=(1, 2), keep_output=keep_output)) as handle:
                first, *others = _repeated(model, 3)
            stats = handle.stats[INFO.slug]
            assert stats["reused"] == 2 * stats["sites"] == 2 * stats["computed"], stats
            for output in others:
                assert torch.equal(output, first), f"{family}: reuse changed an unchanged input"


def check_work() -> None:
    """At reuse steps no query or key is projected, and every value and output once."""
    for family, model in _toys():
        sites = anatomy.of(model).sites(*KINDS["both"])
        for keep_output in (True, False):
            calls: dict[str, list[str]] = {"q": [], "k": [], "v": [], "out": []}
            hooks = [
                model.get_submodule(path).register_forward_hook(
                    lambda *_, into=calls[role], of=path: into.append(of)
                )
                for site in sites
                for role in calls
                for path in anatomy.of(model).linear_layers(site, role)
                if ".proj_out" not in path  # FLUX's one-stream blocks: beyond the attention
            ]
            with apply(model, AttentionMapReuse(reuse=(1,), keep_output=keep_output)):
                _run(model, 1)
                for entries in calls.values():
                    entries.clear()
                _continued(model)
            for hook in hooks:
                hook.remove()
            assert not calls["q"] and not calls["k"], f"{family}: queries or keys were projected"
            assert len(set(calls["v"])) == len(calls["v"]), f"{family}: a value came twice"
            spared = [s for s in sites if keep_output and s.kind == "cross_attention"]
            wanted = [path for s in sites if s not in spared for path in _values(model, s)]
            assert sorted(calls["v"]) == sorted(wanted), f"{family}: {calls['v']}"
            assert not [path for path in calls["out"] for s in spared if path.startswith(s.path)]


def _values(model: nn.Module, site: Any) -> tuple[str, ...]:
    return anatomy.of(model).linear_layers(site, "v")


def check_memory() -> None:
    """Maps are kept ahead of a reuse only, for each sample, and dropped behind the last one."""
    model = presets.build("toy:dit", device="cpu")
    tokens = 8 * 8
    with apply(model, AttentionMapReuse(reuse=(2, 3, 6))) as handle:
        clock, held = _clock(model), list[int]()
        hook = model.register_forward_hook(lambda *_: held.append(held_bytes(clock.kept)))
        _run(model, 8)
        hook.remove()
    maps = 2 * 2 * 2 * tokens**2 * 4  # layers, samples, heads; float32
    assert held == [0, maps, maps, 0, 0, maps, 0, 0], held
    assert handle.stats[INFO.slug]["bytes"] == maps, handle.stats


def check_schedules() -> None:
    """HURRY reuses in the last k steps and needs k < N; a swap search never falls."""
    assert hurry(6, 2) == (0, 0, 0, 0, 1, 1) and hurry(3, 0) == (0, 0, 0)
    assert alternate(7, 2) == (0, 0, 0, 0, 1, 0, 1)
    for wrong in (lambda: hurry(4, 4), lambda: hurry(4, -1), lambda: alternate(5, 3)):
        try:
            wrong()
        except InputError:
            continue
        raise AssertionError("a schedule without a computing step was made")
    assert len(set(swaps(hurry(20, 5)))) == 70
    assert all(not bits[0] and sum(bits) == 5 for bits in swaps(hurry(20, 5)))
    assert len(list(swaps(hurry(20, 5), adjacent=True))) == 1
    noise = torch.Generator().manual_seed(0)
    worth = torch.randn(12, 12, generator=noise)

    def score(bits: Bits) -> float:
        chosen = torch.tensor(bits, dtype=torch.float32)
        return float(chosen @ worth @ chosen)

    found = [score(bits) for bits in swap_search(hurry(12, 4), score)]
    assert all(a < b for a, b in pairwise(found)) and len(found) > 1
    ranked = exhaustive(12, 4, score)
    assert len(ranked) == math.comb(11, 4) and found[-1] <= score(ranked[0])
    nested = list(greedy(12, 4, score))
    assert [sum(bits) for bits in nested] == [0, 1, 2, 3, 4]
    assert all(a <= b for less, more in pairwise(nested) for a, b in zip(less, more, strict=True))


def check_amplification() -> None:
    """On z' = a z amp_i is exp(a (T - t_i)), and growth alone makes late reuse the best."""
    steps, end = 12, 1.5
    h, none = end / steps, (0,) * steps

    def integrated(a: float, bits: Bits, nudge: tuple[int, Tensor] | None = None) -> Tensor:
        """z' = a z + t with the drift t of the last computed step, exactly within a step."""
        z, drift = torch.ones(3, dtype=torch.float64), 0.0
        for step, bit in enumerate(bits):
            if nudge is not None and nudge[0] == step:
                z = z + nudge[1]
            drift = drift if bit else step * h
            z = math.exp(a * h) * z + drift * math.expm1(a * h) / a
        return z

    for a in (0.8, -0.8):
        wanted = integrated(a, none)

        def final(step: int, delta: Tensor, a: float = a) -> Tensor:
            return integrated(a, none, (step, delta))

        def nearness(bits: Bits, a: float = a, wanted: Tensor = wanted) -> float:
            return -float((integrated(a, bits) - wanted).abs().max())

        found = amplification(final, wanted, torch.full_like(wanted, 1e-3), steps)
        exact = [math.exp(a * (end - i * h)) for i in range(1, steps)]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(exact), rtol=1e-6, atol=0)
        best = exhaustive(steps, 1, nearness)[0]
        assert best == with_reuse(steps, [steps - 1 if a > 0 else 1]), (a, best)


def check_separate_samples() -> None:
    """Each sample has its map; a batch in another order, or of other prompts, computes anew."""
    for family, model in _toys():
        method = AttentionMapReuse(reuse=(1, 2))
        found = []
        for swapped in (False, True):
            with apply(model, method):
                _run(model, 1)
                kept = _clock(model).kept
                if swapped:
                    kept |= {path: tensor.flip(0) for path, tensor in kept.items()}
                found.append(_continued(model))
        assert not torch.equal(*found), f"{family}: swapping maps changed nothing"
        wanted = _continued(model, order=[1, 0])
        with apply(model, method) as handle:
            _run(model, 1)
            reordered = _continued(model, order=[1, 0])
        stats = handle.stats[INFO.slug]
        assert "reused" not in stats, f"{family}: maps of another order were reused"
        torch.testing.assert_close(reordered, wanted, rtol=1e-4, atol=1e-4)


# Toys and how they're run -------------------------------------------------------------------------


def _toys() -> list[tuple[str, nn.Module]]:
    return [(name, presets.build(f"toy:{name}", device="cpu")) for name in INFO.families]


def _clock(model: nn.Module) -> Clock:
    site: Any = anatomy.of(model).sites(*KINDS["both"])[0]
    return site.module.processor.memory.clock


def _example(model: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    noise = torch.Generator().manual_seed(0)
    family = anatomy.of(model)
    brief = {"frames": 2} if "frames" in family.sizes[0] else {}
    latents, timestep, condition = family.example(
        batch=2, height=16, width=16, text_tokens=5, generator=noise, **brief
    )
    if "label" in condition:
        condition["label"] = torch.tensor([3, 7])
    return latents, timestep.double(), condition


@torch.no_grad()
def _run(model: nn.Module, steps: int) -> Tensor:
    """Latents after some steps from fixed noise, no two steps alike."""
    family = anatomy.of(model)
    latents, timestep, condition = _example(model)
    for step in range(steps):
        time = torch.full_like(timestep, 990 - 90 * step)
        latents = latents - 0.1 * family.denoise(model, latents, time, condition)
    return latents


@torch.no_grad()
def _continued(model: nn.Module, order: list[int] | None = None) -> Tensor:
    """The prediction of the step behind `_run(model, 1)`, with samples in another order."""
    latents, timestep, condition = _example(model)
    if order is not None:
        latents, condition = latents[order], {k: v[order] for k, v in condition.items()}
    time = torch.full_like(timestep, 500)
    return anatomy.of(model).denoise(model, latents, time, condition)


@torch.no_grad()
def _repeated(model: nn.Module, steps: int) -> list[Tensor]:
    """Predictions of steps whose inputs are equal: their times differ by less than rounding."""
    latents, timestep, condition = _example(model)
    times = [torch.full_like(timestep, 500 * (1 - 1e-12 * step)) for step in range(steps)]
    return [anatomy.of(model).denoise(model, latents, time, condition) for time in times]
