"""Every replacement of attention on the same teachers, healed alike: one table for each family.

    python benchmarks/attention_shelf.py                 # all house teachers, best on a GPU
    python benchmarks/attention_shelf.py --family pixart --seeds 1
    python benchmarks/attention_shelf.py --speed         # time and memory at full size, no healing

Writes results/attention.json: healing writes the rows of a family, `--speed` adds columns to them.
What is done is kept under runs/quality.
"""

import time
from collections.abc import Callable

import quality
import record
import speed
import torch

import pared
from pared import anatomy, results
from pared.anatomy import presets
from pared.bench.timing import interleave, peak_memory
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
# Calls that take longer, in seconds, are told by their first.
LONG = 60
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


def spec_at_full_size(family: str, model: str) -> str | None:
    """What a row of the table stands for at full size; None for the teacher."""
    spec = ARMS[family].get(model)
    return FULL_SIZE.get(spec or "", spec)


def count(family: str, spec: str | None, pixels: int) -> float:
    """GMACs of one call of the full preset."""
    return round(speed.macs(PRESETS[family], [pared.parse(spec)] if spec else [], pixels) / 1e9, 1)


def speeds(family: str, pixels: int) -> dict[str, dict[str, float]]:
    """Speed-up over the stock model and peak memory at a size, by row."""
    arms = ["teacher", *ARMS[family]]
    calls = {arm: call(family, spec_at_full_size(family, arm), pixels) for arm in arms}
    memory, first = {}, {}
    for arm in arms:
        start = time.perf_counter()
        memory[arm] = peak_memory(calls[arm])
        first[arm] = time.perf_counter() - start
    if first["teacher"] < LONG:
        timings = interleave(calls, rounds=3, warmup=0, base="teacher")
        ratios = {arm: timings[arm].ratio for arm in arms}
        print(timings.verdict.notes, flush=True)
    else:
        ratios = {arm: first["teacher"] / first[arm] for arm in arms}
    return {
        arm: {
            f"speed-up at {pixels}": round(ratios[arm], 2),
            f"peak MiB at {pixels}": round(memory[arm] / 2**20),
        }
        for arm in arms
    }


def call(family: str, spec: str | None, pixels: int) -> Callable[[], object]:
    """A call of one block of the preset at full width, of the whole U-Net."""
    layers = None if family == "unet" else 1
    model = presets.build(PRESETS[family], device="cpu", dtype=torch.bfloat16, layers=layers)
    pared.convert(model, *([pared.parse(spec)] if spec else []))
    reader = anatomy.of(model)
    example = reader.example(height=pixels // 8, width=pixels // 8)
    return torch.no_grad()(lambda: reader.denoise(model, *example))


def add_speeds(family: str, sizes: list[int]) -> None:
    """Add what full size costs to the family's rows in the results."""
    file = results.read("attention", record.ROOT / "results")
    names = [n for n in (file.tables if file else {}) if n.startswith(f"{family},")]
    if not names:
        raise SystemExit(f"results/attention.json has no rows of {family} yet; heal them first.")
    tables = {name: [dict(row) for row in file.tables[name]] for name in names}
    for pixels in sizes:
        found = speeds(family, pixels)
        for rows in tables.values():
            for row in rows:
                row |= found.get(row["model"], {})
        print(family, pixels, found, flush=True)
        record.write("attention", (), tables)


def main() -> None:
    parser = quality.parser(__doc__)
    parser.add_argument("--family", choices=ARMS, help="one of them; by default all")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 2048])
    parser.add_argument("--speed", action="store_true", help="time full size, heal nothing")
    options = parser.parse_args()
    families = [options.family] if options.family else [f for f in ARMS if f in house.names()]
    for family in families:
        if options.speed:
            add_speeds(family, options.sizes)
            continue
        bench = quality.Bench(f"house:{family}", options)
        done = bench.all_of(ARMS[family])
        rows = quality.table_of(done)
        for row in rows:
            spec = spec_at_full_size(family, row["model"])
            row |= {f"GMACs at {pixels}": count(family, spec, pixels) for pixels in options.sizes}
        budget = f"{options.steps} steps of {options.batch_size}"
        record.write("attention", (), {f"{family}, {budget}": rows})
        decided(family, done, budget)


if __name__ == "__main__":
    main()
