"""Measures EDiT's speed claims on the full PixArt-Sigma configuration (random weights, bfloat16).

    python benchmarks/edit_speed.py            # blocks to 4096 pixels, model to 2048: half an hour
    python benchmarks/edit_speed.py --quick    # blocks to 2048 only: minutes

Writes the claims and the scaling table with its fitted exponents into results/edit.json.
"""

import argparse

import record
import torch

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.bench import scaling
from pared.bench.floor import floor
from pared.bench.timing import interleave

PRESET = "pixart-sigma"
ARMS = {
    "softmax": [],
    "edit": [pared.EDiT()],
    "edit:r=8": [pared.EDiT(r=8)],
    "sana": [pared.Sana()],
    "linfusion": [pared.LinFusion()],
    "kv-compression": [pared.KVCompression()],
}


def blocks(sizes: list[int], rounds: int) -> list[scaling.Point]:
    """Times of one block; at the largest sizes a call takes minutes, so each is timed once."""
    points = []
    for pixels in sizes:
        long = pixels > 2048
        points += scaling.measure(
            PRESET, ARMS, [pixels], 1 if long else rounds, warmup=0 if long else 1
        )
        point = points[-1]
        print(_row(point), point.timings.verdict.notes, flush=True)
    return points


def _row(point: scaling.Point) -> dict[str, float]:
    row = {"pixels": point.pixels, "tokens": point.tokens}
    row |= {f"{arm} (s)": round(timing.median, 4) for arm, timing in point.timings.items()}
    for arm, timing in list(point.timings.items())[1:]:
        row[f"{arm} speed-up"] = round(timing.ratio, 2)
    row["drift of softmax"] = round(point.timings.verdict.drift, 3)
    return row


def record_blocks(points: list[scaling.Point], rounds: int) -> None:
    """Write the scaling table, its fitted exponents, the curves and the claim at 4096."""
    tokens = [point.tokens for point in points]
    exponents = {
        arm: round(scaling.exponent(tokens, [p.timings[arm].median for p in points]), 3)
        for arm in ARMS
    }
    print("exponents", exponents, flush=True)
    series = {
        f"{arm} (tokens^{exponents[arm]:.2f})": [
            (point.tokens, round(point.timings[arm].median, 4)) for point in points
        ]
        for arm in ARMS
    }
    claims = []
    if points[-1].pixels == 4096:
        note = f"one block, random weights, bfloat16; one round (smaller sizes: {rounds})"
        ratio = points[-1].timings["edit"].ratio
        claims.append(record.claim("edit", "speedup-4096", ratio, None, (0,), note))
    record.write(
        "edit",
        claims,
        {
            "one block": [_row(point) for point in points],
            "fitted exponents of time in tokens": [exponents],
        },
        {"time of one block": record.curves("image tokens", "seconds", series)},
    )


def whole_model(pixels: int, rounds: int) -> None:
    """One denoiser call of the full model, EDiT against the stock model: claim and table row."""
    calls, macs = {}, {}
    for arm in ("softmax", "edit"):
        model = presets.build(PRESET, device="cpu", dtype=torch.bfloat16)
        pared.convert(model, *ARMS[arm])
        family = anatomy.of(model)
        warm = family.example(height=32, width=32)
        with torch.no_grad():
            family.denoise(model, *warm)
        example = family.example(height=pixels // 8, width=pixels // 8)
        calls[arm] = torch.no_grad()(lambda f=family, m=model, e=example: f.denoise(m, *e))
        macs[arm] = _macs(arm, pixels)
    timings = interleave(calls, rounds=rounds, warmup=0, base="softmax")
    rate = floor()
    row = {"pixels": pixels}
    for arm, timing in timings.items():
        row[f"{arm} (s)"] = round(timing.median, 2)
        row[f"{arm} over GEMM floor"] = round(
            timing.median / rate.seconds(2 * macs[arm], 0, torch.bfloat16), 2
        )
    edit = timings["edit"]
    row["speed-up"] = round(edit.ratio, 2)
    row["drift of softmax"] = round(timings.verdict.drift, 3)
    print(row, timings.verdict.notes, flush=True)
    spread = (edit.ratio_high - edit.ratio_low) / 2 if rounds > 1 else None
    note = f"whole denoiser call, random weights, bfloat16; {rounds} interleaved rounds"
    claim = record.claim("edit", f"speedup-{pixels}", edit.ratio, spread, (0,), note)
    record.write("edit", [claim], {f"whole model at {pixels} pixels": [row]})


def _macs(arm: str, pixels: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    model = presets.build(PRESET, device="meta")
    pared.convert(model, *ARMS[arm])
    family = anatomy.of(model)
    with FlopCounterMode(display=False) as counter:
        family.denoise(model, *family.example(height=pixels // 8, width=pixels // 8))
    return counter.get_total_flops() // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="blocks up to 2048 only")
    parser.add_argument("--rounds", type=int, default=3, help="of blocks up to 2048 pixels")
    options = parser.parse_args()
    sizes = [512, 1024, 2048] + ([] if options.quick else [4096])
    record_blocks(blocks(sizes, options.rounds), options.rounds)
    if not options.quick:
        whole_model(1024, rounds=2)
        whole_model(2048, rounds=1)


if __name__ == "__main__":
    main()
