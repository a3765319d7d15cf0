"""Measures CLEAR's speed on FLUX.1-dev at full width (random weights, bfloat16).

    python benchmarks/clear_speed.py              # about ten minutes on two cores

One two-stream and two one-stream blocks stand for the model's 19 and 38. Writes the claims and
tables into results/clear.json.
"""

import argparse

import record
import torch

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention.clear import attended_pairs, attention_flops
from pared.bench.timing import interleave

PRESET, WIDTH, TEXT_TOKENS = "flux.1-dev", 3072, 512
RADII = (8, 16, 32)


def call(pixels: int, r: int | None):
    """A call of the shortened model, with CLEAR of radius r or as it is."""
    with torch.device("cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = presets.get(PRESET).denoiser.make(num_layers=1, num_single_layers=2).eval()
        torch.set_default_dtype(torch.float32)
    if r is not None:
        pared.convert(model, pared.Clear(r=r))
    family = anatomy.of(model)
    example = family.example(height=pixels // 8, width=pixels // 8)
    return torch.no_grad()(lambda: family.denoise(model, *example))


def saved(pixels: int, r: int) -> float:
    """Share of attention FLOPs saved at a picture size."""
    side = pixels // 16
    full = attention_flops((side**2 + TEXT_TOKENS) ** 2, WIDTH)
    return 1 - attention_flops(attended_pairs(r, side, side, TEXT_TOKENS), WIDTH) / full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    options = parser.parse_args()
    claims = [record.claim("clear", "flops-saved-8192", saved(8192, 8), None, (0,), "counted")]
    rows = []
    for pixels in options.sizes:
        calls = {"softmax": call(pixels, None)} | {f"r={r}": call(pixels, r) for r in RADII}
        timings = interleave(calls, rounds=options.rounds, warmup=0, base="softmax")
        row: dict[str, float] = {"pixels": pixels}
        row |= {f"{arm} (s)": float(f"{t.median:.3g}") for arm, t in timings.items()}
        row |= {f"r={r} speed-up": round(timings[f"r={r}"].ratio, 2) for r in RADII}
        row["drift of softmax"] = round(timings.verdict.drift, 3)
        rows.append(row)
        print(row, timings.verdict.notes, flush=True)
        if pixels == 2048:
            note = f"1 + 2 of the 19 + 38 blocks, random weights, bfloat16, {options.rounds} rounds"
            ratio = timings["r=8"].ratio
            claims.append(record.claim("clear", "speedup-2048", ratio, None, (0,), note))
    record.write("clear", claims, {f"1 + 2 blocks of {PRESET}": rows})


if __name__ == "__main__":
    main()
