"""Times one attention layer of every kind against tokens, 1k to 65k, and measures its memory.

    python benchmarks/mixers.py            # a quarter of an hour on two cores
    python benchmarks/mixers.py --only "CLEAR r=8"

Full width, random weights, bfloat16. Writes tables and curves into results/mixers.json. Each layer
is measured in a process of its own, so that no other one's memory lies about.
"""

import argparse
import json
import multiprocessing
import time

import record
import torch

import pared
from pared import anatomy, results
from pared.anatomy import presets
from pared.bench import scaling
from pared.bench.timing import peak_memory

LAYERS = {
    "pixart-sigma": {
        "softmax": None,
        "EDiT": "edit",
        "SANA style": "sana",
        "LinFusion": "linfusion",
        "SummaryMixing": "summary-mixing-image",
        "KV compression": "kv-compression",
        "CLEAR r=8": "clear:r=8",
    },
    "sd3.5-medium": {
        "softmax": None,
        "MM-EDiT": "mm-edit",
        "MM-EDiT, exact weight": "mm-edit:weight=exact",
        "SANA style": "sana",
        "CLEAR r=8": "clear:r=8",
    },
}
TEXT_TOKENS = 333  # of Stable Diffusion 3


class Layer:
    """The first image attention of a preset at full width, alone."""

    def __init__(self, preset: str, spec: str | None) -> None:
        model = presets.build(preset, device="cpu", dtype=torch.bfloat16, layers=1)
        pared.convert(model, *([pared.parse(spec)] if spec else []))
        self.family = anatomy.of(model)
        self.site = self.family.sites("self_attention", "joint_attention")[0]

    @torch.no_grad()
    def call(self, side: int) -> None:
        """Mix side x side tokens once."""
        grid = self.family.grid(self.site)
        grid.height = grid.width = side
        tokens = [torch.randn(1, side**2, self.site.width, dtype=torch.bfloat16)]
        if self.site.kind == "joint_attention":
            tokens += [torch.randn(1, TEXT_TOKENS, self.site.width, dtype=torch.bfloat16)]
        self.site.module(*tokens)


def measured(preset: str, spec: str | None, sides: list[int]) -> list[dict[str, float]]:
    """Tokens, seconds and bytes of one layer at every size, the smallest first."""
    layer, rows = Layer(preset, spec), []
    for side in sides:
        bytes_ = peak_memory(lambda side=side: layer.call(side))
        durations = []
        # Long calls are told by one.
        while not durations or (len(durations) < 5 and sum(durations) < 10):
            start = time.perf_counter()
            layer.call(side)
            durations.append(time.perf_counter() - start)
        seconds = sorted(durations)[len(durations) // 2]
        rows.append({"tokens": side**2, "seconds": seconds, "bytes": bytes_})
        print(preset, spec, json.dumps(rows[-1]), flush=True)
    return rows


def row_of(name: str, found: list[dict[str, float]]) -> dict[str, object]:
    """One row: exponents of the last two sizes, and what every size takes."""
    tokens = [point["tokens"] for point in found]
    row: dict[str, object] = {"layer": name}
    for key in ("seconds", "bytes"):
        exponent = scaling.exponent(tokens[-2:], [point[key] for point in found[-2:]])
        row[f"exponent of {key}, last two sizes"] = round(exponent, 3)
    row |= {f"s at {p['tokens']}": float(f"{p['seconds']:.3g}") for p in found}
    return row | {f"MiB at {p['tokens']}": round(p["bytes"] / 2**20) for p in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--only", nargs="+", metavar="LAYER", help="measure these anew")
    options = parser.parse_args()
    old = results.read("mixers", record.ROOT / "results")
    for preset, layers in LAYERS.items():
        title = f"one attention of {preset}"
        kept = old if old is not None and options.only else results.Results("mixers", ())
        rows = {row["layer"]: row for row in kept.tables.get(title, [])}
        times = dict(kept.figures.get(f"time of {title}", {"series": {}})["series"])
        memory = dict(kept.figures.get(f"memory of {title}", {"series": {}})["series"])
        for name, spec in layers.items():
            if options.only and name not in options.only:
                continue
            with multiprocessing.get_context("spawn").Pool(1) as alone:
                found = alone.apply(measured, (preset, spec, options.sides))
            rows[name] = row_of(name, found)
            times[name] = [(p["tokens"], float(f"{p['seconds']:.4g}")) for p in found]
            memory[name] = [(p["tokens"], round(p["bytes"] / 2**20, 1)) for p in found]
        tables = {
            title: [rows[name] for name in layers if name in rows],
            "conditions": record.conditions({}),
        }
        curves = {
            f"time of {title}": record.curves("image tokens", "seconds", times),
            f"memory of {title}": record.curves("image tokens", "MiB", memory),
        }
        record.write("mixers", (), tables, curves)


if __name__ == "__main__":
    main()
