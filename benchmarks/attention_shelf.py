"""Every replacement of attention on the same teachers, healed alike: one table for each family.

    python benchmarks/attention_shelf.py                 # all house teachers that are shipped
    python benchmarks/attention_shelf.py --family pixart --seeds 1

Writes results/attention.json. What is done is kept under runs/quality.
"""

import quality
import record
import torch
from torch.utils.flop_counter import FlopCounterMode

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
# At full size CLEAR's disks are the paper's; the house grids are four times smaller.
FULL_SIZE = {"clear:r=2": "clear:r=8", "clear:r=4": "clear:r=16"}


def cost(family: str, spec: str, pixels: int) -> dict[str, float]:
    """GMACs and measured speed-up of one block (of the whole U-Net) at full size."""
    preset, spec = PRESETS[family], FULL_SIZE.get(spec, spec)
    calls, found = {}, {}
    for arm, methods in (("stock", []), (spec, [pared.parse(spec)])):
        meta = presets.build(preset, device="meta")
        pared.convert(meta, *methods)
        reader = anatomy.of(meta)
        with FlopCounterMode(display=False) as counter:
            reader.denoise(meta, *reader.example(height=pixels // 8, width=pixels // 8))
        found[arm] = counter.get_total_flops() / 2e9
        layers = None if family == "unet" else 1
        model = presets.build(preset, device="cpu", dtype=torch.bfloat16, layers=layers)
        pared.convert(model, *methods)
        real = anatomy.of(model)
        example = real.example(height=pixels // 8, width=pixels // 8)
        calls[arm] = torch.no_grad()(lambda r=real, m=model, e=example: r.denoise(m, *e))
    timing = interleave(calls, rounds=2, warmup=1, base="stock")[spec]
    return {
        f"GMACs at {pixels}": round(found[spec], 1),
        f"speed-up at {pixels}": round(timing.ratio, 2),
    }


def main() -> None:
    parser = quality.parser(__doc__)
    parser.add_argument("--family", choices=ARMS, help="one of them; by default all")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 2048])
    options = parser.parse_args()
    families = [options.family] if options.family else [f for f in ARMS if f in house.names()]
    for family in families:
        bench = quality.Bench(f"house:{family}", options)
        rows = quality.table_of(bench.all_of(ARMS[family]))
        for row in rows[1:]:
            for pixels in options.sizes:
                row |= cost(family, ARMS[family][row["model"]], pixels)
        record.write("attention", (), {f"{family}, healed alike": rows})


if __name__ == "__main__":
    main()
