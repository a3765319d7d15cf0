"""What the speed scripts share: one block against tokens, and one call of a whole preset."""

from collections.abc import Sequence

import record
import torch

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.bench import scaling
from pared.bench.floor import floor
from pared.bench.timing import interleave

# From this size on a call of softmax attention takes minutes, and is timed once.
LONG = 4096


def blocks(
    slug: str,
    preset: str,
    arms: dict[str, list],
    sizes: Sequence[int],
    rounds: int,
    claim: str | None = None,
    device: str = "cpu",
) -> None:
    """Time one block for every arm and size; write table, exponents, curves and one claim.

    Args:
        slug: of the method whose results these are; an arm of that name must be there.
        preset: e.g. "pixart-sigma".
        arms: conversions by name, the stock model first.
        sizes: sides of square pictures, in pixels.
        rounds: at sizes below LONG.
        claim: key of the claim that the largest size decides.
        device: where the block lies; on an accelerator tables and curves are called after it.
    """
    points = []
    for pixels in sizes:
        long = pixels >= LONG and device == "cpu"
        points += scaling.measure(
            preset, arms, [pixels], 1 if long else rounds, warmup=0 if long else 1, device=device
        )
        print(_row(points[-1]), points[-1].timings.verdict.notes, flush=True)
    # An accelerator is idle most of the time on small pictures, and tells nothing of its growth.
    telling = points if device == "cpu" else points[-2:]
    tokens = [point.tokens for point in telling]
    exponents = {
        arm: round(scaling.exponent(tokens, [p.timings[arm].median for p in telling]), 3)
        for arm in arms
    }
    print("exponents", exponents, flush=True)
    series = {
        f"{arm} (tokens^{exponents[arm]:.2f})": [
            (point.tokens, float(f"{point.timings[arm].median:.4g}")) for point in points
        ]
        for arm in arms
    }
    claims = []
    if claim is not None:
        note = f"one block of {preset}, random weights, bfloat16; one round (smaller: {rounds})"
        ratio = points[-1].timings[slug].ratio
        claims.append(record.claim(slug, claim, ratio, None, (0,), note))
    where = "" if device == "cpu" else f", {record.describe_machine(device)}"
    tables = {
        f"one block of {preset}{where}": [_row(point) for point in points],
        f"fitted exponents of time in tokens{where}": [exponents],
    }
    curves = record.curves("image tokens", "seconds", series)
    record.write(slug, claims, tables, {f"time of one block of {preset}{where}": curves})


def _row(point: scaling.Point) -> dict[str, float]:
    row = {"pixels": point.pixels, "tokens": point.tokens}
    row |= {f"{arm} (s)": float(f"{timing.median:.4g}") for arm, timing in point.timings.items()}
    for arm, timing in list(point.timings.items())[1:]:
        row[f"{arm} speed-up"] = round(timing.ratio, 2)
    row["drift of softmax"] = round(point.timings.verdict.drift, 3)
    return row


def whole_model(
    slug: str,
    preset: str,
    method: list,
    pixels: int,
    rounds: int,
    claim: str | None = None,
    device: str = "cpu",
    compiled: bool = False,
) -> None:
    """One denoiser call of a full preset, converted against stock: claim and table row.

    Args:
        slug: of the method.
        preset: its full configuration gets random weights.
        method: the conversions.
        pixels: side of the square picture.
        rounds: how often each is timed.
        claim: key of the claim that this decides.
        device: where the model lies; on an accelerator the table is called after it.
        compiled: run the blocks of both through torch.compile.
    """
    calls, counts = {}, {}
    for arm, methods in (("softmax", []), (slug, method)):
        model = presets.build(preset, device=device, dtype=torch.bfloat16)
        pared.convert(model, *methods)
        family = anatomy.of(model)
        for block in family.blocks if compiled else ():
            block.module.compile()
        with torch.no_grad():
            family.denoise(model, *family.example(height=32, width=32))  # warm-up
        example = family.example(height=pixels // 8, width=pixels // 8)
        calls[arm] = torch.no_grad()(lambda f=family, m=model, e=example: f.denoise(m, *e))
        counts[arm] = macs(preset, methods, pixels)
    warmup = 0 if device == "cpu" else 2
    timings = interleave(calls, rounds=rounds, warmup=warmup, base="softmax")
    rate = floor(device)
    row = {"pixels": pixels}
    for arm, timing in timings.items():
        row[f"{arm} (s)"] = float(f"{timing.median:.3g}")
        row[f"{arm} over GEMM floor"] = round(
            timing.median / rate.seconds(2 * counts[arm], 0, torch.bfloat16), 2
        )
    ours = timings[slug]
    row["speed-up"] = round(ours.ratio, 2)
    row["drift of softmax"] = round(timings.verdict.drift, 3)
    print(row, timings.verdict.notes, flush=True)
    claims = []
    if claim is not None:
        spread = (ours.ratio_high - ours.ratio_low) / 2 if rounds > 1 else None
        note = f"one call of {preset}, random weights, bfloat16; {rounds} interleaved rounds"
        claims.append(record.claim(slug, claim, ours.ratio, spread, (0,), note))
    where = "" if device == "cpu" else f", {record.describe_machine(device)}"
    how = ", compiled" if compiled else ""
    record.write(slug, claims, {f"{preset} at {pixels} pixels{how}{where}": [row]})


def on_accelerator(
    slug: str, preset: str, arms: dict[str, list], sizes: Sequence[int], device: str
) -> None:
    """Blocks at `sizes` and the whole model from 1024 pixels on, on an accelerator: minutes."""
    blocks(slug, preset, arms, sizes, 10, device=device)
    for pixels in (1024, 2048, 4096):
        for compiled in (False, True):
            whole_model(slug, preset, arms[slug], pixels, 5, device=device, compiled=compiled)


def macs(preset: str, methods: list, pixels: int) -> int:
    """Multiply-adds of one call of a full preset."""
    from torch.utils.flop_counter import FlopCounterMode

    model = presets.build(preset, device="meta")
    pared.convert(model, *methods)
    family = anatomy.of(model)
    with FlopCounterMode(display=False) as counter:
        family.denoise(model, *family.example(height=pixels // 8, width=pixels // 8))
    return counter.get_total_flops() // 2
