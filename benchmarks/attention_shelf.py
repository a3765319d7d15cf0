"""Every replacement of attention on the same teachers, healed alike: one table for each family.

    python benchmarks/attention_shelf.py                 # all house teachers, best on a GPU
    python benchmarks/attention_shelf.py --family pixart --seeds 1
    python benchmarks/attention_shelf.py --kept --speed  # what is done, with times at full size

Writes results/attention.json. What is done is kept under runs/quality.
"""

from collections.abc import Callable

import quality
import record
import speed
import torch

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.bench.timing import interleave
from pared.worlds import house

COMMON = {
    "SANA style": "sana",
    "CLEAR r=2": "clear:r=2",
    "CLEAR r=4": "clear:r=4",
}
IMAGE = {
    "EDiT": "edit",
    "LinFusion": "linfusion",
    "KV compression": "kv-compression",
    "SummaryMixing": "summary-mixing-image",
}
ARMS = {
    "pixart": COMMON | IMAGE,
    "unet": COMMON | IMAGE,
    "sd3": COMMON | {"MM-EDiT": "mm-edit", "MM-EDiT, exact weight": "mm-edit:weight=exact"},
}
PRESETS = {"pixart": "pixart-sigma", "unet": "sd1.5", "sd3": "sd3.5-medium"}
# What students of a family decide: slug and key of the claim, the rival, and the method.
CLAIMS = {
    "unet": [("clear", "distance-small-over-large", "CLEAR r=2", "CLEAR r=4")],
    "sd3": [("mm-edit", "distance-sana-over-mm-edit", "SANA style", "MM-EDiT")],
}
# At full size CLEAR's disks are the paper's; the house grids are four times smaller.
FULL_SIZE = {"clear:r=2": "clear:r=8", "clear:r=4": "clear:r=16"}


def decided(family: str, done: dict[str, list[quality.Figures]], budget: str) -> None:
    """Write the claims that students of a family decide, paired by seed."""
    for slug, key, rival, ours in CLAIMS.get(family, ()):
        note = (
            f"relative output error on held-out pictures, {rival} over {ours}, each healed from "
            f"house:{family} for {budget}; mean of ratios by seed"
        )
        record.write(slug, [quality.claim_of(slug, key, done[rival], done[ours], note)])


def cost(family: str, spec: str | None, pixels: int, timed: bool) -> dict[str, float]:
    """GMACs at full size, and the measured speed-up of one block (of the whole U-Net)."""
    spec = FULL_SIZE.get(spec or "", spec)
    methods = [pared.parse(spec)] if spec else []
    row = {f"GMACs at {pixels}": round(speed.macs(PRESETS[family], methods, pixels) / 1e9, 1)}
    if timed and spec:
        calls = {"stock": call(family, None, pixels), spec: call(family, spec, pixels)}
        timing = interleave(calls, rounds=2, warmup=1, base="stock")[spec]
        row[f"speed-up at {pixels}"] = round(timing.ratio, 2)
    return row


def call(family: str, spec: str | None, pixels: int) -> Callable[[], object]:
    """A call of one block of the preset at full width, of the whole U-Net."""
    layers = None if family == "unet" else 1
    model = presets.build(PRESETS[family], device="cpu", dtype=torch.bfloat16, layers=layers)
    pared.convert(model, *([pared.parse(spec)] if spec else []))
    reader = anatomy.of(model)
    example = reader.example(height=pixels // 8, width=pixels // 8)
    return torch.no_grad()(lambda: reader.denoise(model, *example))


def main() -> None:
    parser = quality.parser(__doc__)
    parser.add_argument("--family", choices=ARMS, help="one of them; by default all")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 2048])
    parser.add_argument("--speed", action="store_true", help="time blocks at full size too")
    options = parser.parse_args()
    families = [options.family] if options.family else [f for f in ARMS if f in house.names()]
    for family in families:
        bench = quality.Bench(f"house:{family}", options)
        done = bench.all_of(ARMS[family])
        rows = quality.table_of(done)
        for row in rows:
            for pixels in options.sizes:
                row |= cost(family, ARMS[family].get(row["model"]), pixels, options.speed)
        budget = f"{options.steps} steps of {options.batch_size}"
        record.write("attention", (), {f"{family}, {budget}": rows})
        decided(family, done, budget)


if __name__ == "__main__":
    main()
