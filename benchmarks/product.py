"""The bill of a product that paints, edits, upscales and removes: the naive one against pared's.

    python benchmarks/product.py            # counted, no weights; a minute

Naive is a fine-tuned denoiser for each task, three passes a step to edit, softmax attention. Writes
the tables into results/product.json.
"""

import argparse

import record

import pared
from pared.bench.bill import Bill, Order
from pared.bench.targets import read

TASKS, PASSES = 4, 3
# Preset, sizes in pixels, and what replaces its attention.
PRODUCTS = {
    "sd1.5": ((512, 1024, 2048), "edit"),
    "sd3.5-medium": ((1024, 2048), "mm-edit"),
    "pixart-sigma": ((1024, 2048), "edit"),
}


def bills(preset: str, pixels: int, mixer: str) -> dict[str, Bill]:
    """The naive product, and with one method more each time."""
    order = Order(read(preset), pixels, pixels, None, PASSES, 1, None, None, tasks=TASKS)
    stacks = {
        "naive": [],
        "one model for all tasks": ["multi-task-upcycling"],
        "and one pass": ["multi-task-upcycling", "explicit-conditioning"],
        "and linear attention": ["multi-task-upcycling", "explicit-conditioning", mixer],
    }
    found = {}
    for name, specs in stacks.items():
        denoiser = order.target.denoiser(None)
        pared.convert(denoiser, *map(pared.parse, specs))
        found[name] = order.bill(denoiser)
    return found


def row_of(name: str, bill: Bill, naive: Bill) -> dict[str, float | str]:
    """One row: the factors, and what they come to."""
    return {
        "product": name,
        "pixels": bill.height,
        "models kept": bill.models,
        "steps": bill.steps,
        "passes": bill.passes,
        "GMACs per pass": round(bill.per_pass / 1e9, 1),
        "TMACs per edit": round(bill.per_image / 1e12, 2),
        "parameters kept (M)": round(bill.kept_parameters / 1e6),
        "times fewer MACs": round(naive.per_image / bill.per_image, 2),
        "times fewer parameters": round(naive.kept_parameters / bill.kept_parameters, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    tables = {}
    for preset in parser.parse_args().presets:
        sizes, mixer = PRODUCTS[preset]
        rows = []
        for pixels in sizes:
            found = bills(preset, pixels, mixer)
            rows += [row_of(name, bill, found["naive"]) for name, bill in found.items()]
        tables[f"{preset}, {TASKS} tasks"] = rows
        for row in rows:
            print(preset, row, flush=True)
    record.write("product", (), tables)


if __name__ == "__main__":
    main()
