"""Measures EDiT's speed claims on the full PixArt-Sigma configuration (random weights, bfloat16).

    python benchmarks/edit_speed.py            # blocks to 4096 pixels, whole model to 2048: an hour
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
from pared.bench.timing import Timing, interleave

PRESET = "pixart-sigma"
ARMS = {
    "softmax": [],
    "edit": [pared.EDiT()],
    "edit:r=8": [pared.EDiT(r=8)],
    "sana": [pared.Sana()],
    "linfusion": [pared.LinFusion()],
    "kv-compression": [pared.KVCompression()],
}


def blocks(sizes: list[int], rounds: int) -> tuple[list[dict], dict[str, float], list]:
    """The scaling table (one row per size), fitted exponents by arm, and the raw points."""
    points = scaling.measure(
        PRESET, ARMS, sizes, rounds, progress=lambda p: print(p, "px", flush=True)
    )
    rows = []
    for point in points:
        row = {"pixels": point.pixels, "tokens": point.tokens}
        for arm, timing in point.timings.items():
            row[f"{arm} (s)"] = round(timing.median, 4)
        for arm, timing in list(point.timings.items())[1:]:
            row[f"{arm} speed-up"] = round(timing.ratio, 2)
        rows.append(row)
        print(row, point.timings.verdict.notes, flush=True)
    tokens = [point.tokens for point in points]
    exponents = {
        arm: round(scaling.exponent(tokens, [p.timings[arm].median for p in points]), 3)
        for arm in ARMS
    }
    return rows, exponents, points


def whole_model(pixels: int, rounds: int) -> tuple[Timing, dict]:
    """One denoiser call of the full model, EDiT against the stock model, and its table row."""
    calls, macs = {}, {}
    for arm in ("softmax", "edit"):
        model = presets.build(PRESET, device="cpu", dtype=torch.bfloat16)
        pared.convert(model, *ARMS[arm])
        family = anatomy.of(model)
        example = family.example(height=pixels // 8, width=pixels // 8)
        calls[arm] = torch.no_grad()(lambda f=family, m=model, e=example: f.denoise(m, *e))
        macs[arm] = _macs(arm, pixels)
    timings = interleave(calls, rounds=rounds, warmup=1, base="softmax")
    rate = floor()
    row = {"pixels": pixels}
    for arm, timing in timings.items():
        row[f"{arm} (s)"] = round(timing.median, 2)
        row[f"{arm} over GEMM floor"] = round(
            timing.median / rate.seconds(2 * macs[arm], 0, torch.bfloat16), 2
        )
    row["speed-up"] = round(timings["edit"].ratio, 2)
    print(row, timings.verdict.notes, flush=True)
    return timings["edit"], row


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
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = [512, 1024, 2048] + ([] if options.quick else [4096])
    rows, exponents, points = blocks(sizes, options.rounds)
    claims, whole = [], []
    if not options.quick:
        largest = points[-1].timings["edit"]
        spread = (largest.ratio_high - largest.ratio_low) / 2
        note = f"one block, random weights, bfloat16; median of {options.rounds} interleaved rounds"
        claims.append(record.claim("edit", "speedup-4096", largest.ratio, spread, (0,), note))
        for pixels in (1024, 2048):
            timing, row = whole_model(pixels, rounds=2)
            whole.append(row)
            spread = (timing.ratio_high - timing.ratio_low) / 2
            note = "whole denoiser call, random weights, bfloat16; 2 interleaved rounds"
            claims.append(
                record.claim("edit", f"speedup-{pixels}", timing.ratio, spread, (0,), note)
            )
    tables = {"one block": rows, "fitted exponents of time in tokens": [exponents]}
    series = {
        f"{arm} (tokens^{exponents[arm]:.2f})": [
            (point.tokens, round(point.timings[arm].median, 4)) for point in points
        ]
        for arm in ARMS
    }
    figures = {"time of one block": record.curves("image tokens", "seconds", series)}
    if whole:
        tables["whole model"] = whole
    print("exponents", exponents)
    print(record.write("edit", claims, tables, figures))


if __name__ == "__main__":
    main()
