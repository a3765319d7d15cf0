"""What must hold of Re-ttention without trained weights: its paper's mathematics.

Run by `pared check re-ttention`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pared import anatomy
from pared.anatomy import presets
from pared.attention.joint import Heads
from pared.attention.re_ttention import INFO, Rettention, kept_keys, ramped, reshaped, statistics
from pared.method import apply
from pared.nn.banded_attention import (
    banded_attention,
    banded_attention_reference,
    dense_attention,
    merged,
)
from pared.nn.layout import merge_heads

EXACT = {"rtol": 0, "atol": 1e-12}  # of float64


def _heads(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    shape = 2, 3, tokens, 8
    return Heads(*(2 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)))


def _scores(x: Heads) -> Tensor:
    return x.query @ x.key.mT * x.query.shape[-1] ** -0.5


def _band(tokens: int, half: int) -> Tensor:
    token = torch.arange(tokens)
    return (token[:, None] - token).abs() <= half


def check_reference() -> None:
    """The band by blocks equals the masked map within 1e-12, and so does the dense form."""
    for tokens, half in ((1, 0), (5, 1), (16, 3), (37, 7), (64, 16), (65, 40), (50, 49), (20, 99)):
        x = _heads(tokens)
        wanted = banded_attention_reference(x.query, x.key, x.value, half)
        for part, right in zip(
            banded_attention(x.query, x.key, x.value, half), wanted, strict=True
        ):
            torch.testing.assert_close(part, right, **EXACT)
        full = dense_attention(x.query, x.key, x.value)
        wanted = banded_attention_reference(x.query, x.key, x.value, tokens)
        torch.testing.assert_close(full.output, wanted.output, **EXACT)
        torch.testing.assert_close(full.lse, wanted.lse, **EXACT)


def check_merging() -> None:
    """Two attentions to parts of the keys merge into one to all, also where a part is empty."""
    x = _heads(30)
    wanted = dense_attention(x.query, x.key, x.value)
    for cut in (0, 11):
        parts = [
            dense_attention(x.query, x.key[:, :, part], x.value[:, :, part])
            for part in (slice(cut, None), slice(0, cut))
        ]
        for part, right in zip(merged(*parts), wanted, strict=True):
            torch.testing.assert_close(part, right, **EXACT)


def check_full_mask() -> None:
    """With all keys rho = 1 and R = 0, and without a ramp a run is that of the model to 1e-6."""
    x = _heads(30)
    half = Rettention(keep=1).half_width(30)
    full = dense_attention(x.query, x.key, x.value)
    rho, residual = statistics(full, banded_attention(x.query, x.key, x.value, half))
    torch.testing.assert_close(rho, torch.ones_like(rho), **EXACT)
    torch.testing.assert_close(residual, torch.zeros_like(residual), **EXACT)
    for family in INFO.families:
        model = presets.build(f"toy:{family}", device="cpu")
        wanted = _run(model, 4)
        with apply(model, Rettention(keep=1, warmup=1, interval=3, ramp=0)) as handle:
            found = _run(model, 4)
        assert handle.stats["re-ttention"]["sparse_steps"] == 2, "nothing was sparse"
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def check_cache_step() -> None:
    """O~ + R = O at a cache step; on the same inputs the sparse step behind it gives O again."""
    x = _heads(37)
    full = dense_attention(x.query, x.key, x.value)
    for half in (0, 1, 5, 40):
        sparse = banded_attention(x.query, x.key, x.value, half)
        again = reshaped(sparse.output, statistics(full, sparse))
        torch.testing.assert_close(again, full.output, **EXACT)
    for family in INFO.families:
        _check_cache_step_of(family)


@torch.no_grad()
def _check_cache_step_of(name: str) -> None:
    """The same for every attention of a toy, on the inputs that it gets in the model."""
    model = presets.build(f"toy:{name}", device="cpu")
    family = anatomy.of(model)
    with apply(model, Rettention(keep=0.1)):
        calls = {}
        for site in family.sites("self_attention", "joint_attention"):

            def hook(module, args, kwargs, output, path=site.path):
                calls[path] = module, args, kwargs, output

            site.module.register_forward_hook(hook, with_kwargs=True)
        _run(model, 1)
        for path, (attn, args, kwargs, wanted) in list(calls.items()):
            plan = attn.processor.plan
            for mode in ("cache", "sparse"):
                plan.clock.plan = mode
                _assert_streams(attn(*args, **kwargs), wanted)
            assert (plan.clock.kept[path].rho < 1).any(), f"{path} has lost no key"


def _assert_streams(found: Tensor | tuple, wanted: Tensor | tuple) -> None:
    """Compare image tokens, and the prompt's where the block has a use for them."""
    pairs = [(found, wanted)] if isinstance(found, Tensor) else zip(found, wanted, strict=True)
    for stream, right in pairs:
        if stream is not None:
            torch.testing.assert_close(stream, right, rtol=1e-4, atol=1e-5)


def check_weights() -> None:
    """rho softmax_S equals the full softmax on the kept keys, and its rows sum to rho."""
    x, half = _heads(37), 4
    x = Heads(x.query, x.key, torch.eye(37, dtype=torch.float64).expand(2, 3, -1, -1))
    full = dense_attention(x.query, x.key, x.value)
    sparse = banded_attention(x.query, x.key, x.value, half)
    rho, _ = statistics(full, sparse)
    wanted = _scores(x).softmax(dim=-1) * _band(37, half)
    torch.testing.assert_close(rho * sparse.output, wanted, **EXACT)
    torch.testing.assert_close((rho * sparse.output).sum(-1, keepdim=True), rho, **EXACT)


def check_residual() -> None:
    """R behind the projection is what the masked keys add, without the bias."""
    torch.manual_seed(0)
    x, half, project = _heads(37), 4, torch.nn.Linear(24, 24).double()
    full = dense_attention(x.query, x.key, x.value)
    sparse = banded_attention(x.query, x.key, x.value, half)
    rho, residual = statistics(full, sparse)
    others = _scores(x).softmax(dim=-1) * ~_band(37, half) @ x.value
    wanted = merge_heads(others) @ project.weight.T
    torch.testing.assert_close(merge_heads(residual) @ project.weight.T, wanted, **EXACT)
    behind = project(merge_heads(full.output)) - project(merge_heads(rho * sparse.output))
    torch.testing.assert_close(behind, wanted, **EXACT)


def check_log_sum_exps() -> None:
    """rho from two log-sum-exps equals the direct ratio, lies in (0, 1], whatever the scores.

    A constant added to the scores of a row changes neither rho nor output, and scores of 1e4 from
    float16 inputs overflow nothing.
    """
    x, half = _heads(37), 4
    rho, residual = _statistics(x, half)
    weights = _scores(x).exp()
    wanted = (weights * _band(37, half)).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(rho, wanted, **EXACT)
    assert ((rho > 0) & (rho <= 1)).all(), "rho left (0, 1]"
    # One more channel, q = c and k = 1, adds c to a row; the roots undo its change of the scale.
    constant = 1e4 * torch.randn(2, 3, 37, 1, dtype=torch.float64) * 9**0.5
    query = torch.cat([x.query * (9 / 8) ** 0.5, constant], dim=-1)
    lifted = Heads(query, torch.cat([x.key, torch.ones_like(constant)], dim=-1), x.value)
    for part, right in zip(_statistics(lifted, half), (rho, residual), strict=True):
        torch.testing.assert_close(part, right, rtol=0, atol=1e-10)
    # Half precision tells scores of this size apart by several at least: rho is near 0 or 1.
    steep = Heads(*(y.half() for y in (100 + x.query / 10, 280 + x.key / 4, x.value)))
    precise = Heads(*(y.double() for y in (steep.query, steep.key, steep.value)))
    rho, residual = _statistics(steep, half)
    assert _scores(precise).max() > 5e4, "the scores are too small to show anything"
    assert rho.isfinite().all() and residual.isfinite().all() and (rho >= 0).all()
    # Scores of 8e4 are exact to a few hundredths in float32, and so is rho.
    torch.testing.assert_close(rho.double(), _statistics(precise, half).rho, rtol=0, atol=0.05)


def _statistics(x: Heads, half: int):
    full = dense_attention(x.query, x.key, x.value)
    return statistics(full, banded_attention(x.query, x.key, x.value, half))


def check_mask() -> None:
    """At 4096 tokens w = 128 and the band keeps 3.12% of the map; it is symmetric, no row empty."""
    half = Rettention().half_width(4096)
    kept = int(_band(4096, half).sum())
    assert half == 64 and kept == 129 * 4096 - 64 * 65, f"{kept} of 4096 x 4096 are kept"
    assert round(kept / 4096**2, 4) == 0.0312
    for tokens, share in ((1, 0.1), (2, 0.1), (40, 0.25), (40, 1.0)):
        half = Rettention(keep=share).half_width(tokens)
        x = _heads(tokens)
        unit = torch.eye(tokens, dtype=torch.float64).expand(2, 3, -1, -1)
        seen = banded_attention(x.query, x.key, unit, half).output[0, 0] > 0
        assert torch.equal(seen, _band(tokens, half)), f"{tokens} tokens see other keys"
        assert torch.equal(seen, seen.T) and seen.any(dim=1).all()
        assert seen.all() or share < 1, "keep=1 leaves keys out"


def check_prompt_stays_dense() -> None:
    """In joint attention the band's queries keep all keys of the prompt, in one softmax."""
    image, text = _heads(37), _heads(6, seed=1)
    keys = torch.cat([image.key, text.key], dim=-2)
    scores = image.query @ keys.mT * 8**-0.5
    kept = torch.cat([_band(37, 4), torch.ones(37, 6, dtype=torch.bool)], dim=-1)
    values = torch.cat([image.value, text.value], dim=-2)
    wanted = scores.masked_fill(~kept, -torch.inf).softmax(dim=-1) @ values
    torch.testing.assert_close(kept_keys(image, text, 4).output, wanted, **EXACT)


def check_steps() -> None:
    """T = 20: full at 0-5, 10 and 15; rho grows by lambda a step, and anew from each cache step."""
    modes = [Rettention().mode(step) for step in range(20)]
    assert modes == ["plain"] * 5 + ["cache", *["sparse"] * 4] * 3
    model = presets.build("toy:dit", device="cpu")
    site = anatomy.of(model).sites("self_attention")[0]
    for clamp in (False, True):
        with apply(model, Rettention(keep=0.25, clamp=clamp)) as handle:
            clock, trace = site.module.processor.plan.clock, list[Any]()
            hook = model.register_forward_hook(
                lambda *_, into=trace, of=clock: into.append(of.kept.get(site.path))
            )
            _run(model, 20)
            _run(model, 20)
            hook.remove()
        counts = handle.stats["re-ttention"]
        assert counts["full_steps"] == 16 and counts["sparse_steps"] == 24, counts
        for run in (trace[:19], trace[20:39]):
            assert run[:5] == [None] * 5, "the warm-up remembered something"
            for start in (5, 10, 15):
                first, third = run[start].rho, run[start + 3].rho
                grown = first + 3 * 0.04
                wanted = grown.clamp(max=1) if clamp else grown
                torch.testing.assert_close(third, wanted, rtol=0, atol=1e-6)
                assert (first < 1).any() and (first <= 1).all()
        for before, after in zip(trace[:19], trace[20:39], strict=True):
            assert before is None or torch.equal(before.rho, after.rho), "a run left a trace"
    kept = ramped(_statistics(_heads(9), 1), 2.0, True)
    assert (kept.rho == 1).all()


def check_cost() -> None:
    """At a fixed band the cost of a sparse step is linear in tokens."""
    costs = []
    for tokens in (4096, 8192, 16384):
        q, k, v = (torch.empty(1, 2, tokens, 8, device="meta") for _ in range(3))
        with FlopCounterMode(display=False) as counter:
            banded_attention(q, k, v, 64)
        costs.append(counter.get_total_flops())
    assert costs[2] == 2 * costs[1] == 4 * costs[0], costs
    # Two products with 3 x 64 keys a query, two FLOPs a multiply-add.
    assert costs[0] == 2 * 2 * 2 * 4096 * 192 * 8


@torch.no_grad()
def _run(model: torch.nn.Module, steps: int) -> Tensor:
    """Latents after a few steps from fixed noise, no two steps alike."""
    family = anatomy.of(model)
    latents, timestep, condition = family.example(
        batch=2, height=16, width=16, text_tokens=5, generator=torch.Generator().manual_seed(0)
    )
    for step in range(steps):
        time = torch.full_like(timestep, 990 * (1 - step / steps))
        latents = latents - 0.1 * family.denoise(model, latents, time, condition)
    return latents
