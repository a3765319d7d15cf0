"""Measures what RAS owes to the keys it keeps, on the house SD3.

    python benchmarks/ras_keys.py            # three seeds on two cores: a quarter of an hour

Half of the patches attend to the kept keys of all, and in the ablation among themselves alone. The
pictures and the kept figures are those of benchmarks/caching.py. Writes the claim into
results/ras.json.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

import caching
from caching import PICTURES, Bench, distance
from pared.caching import ras
from pared.caching.regional import Regions

STEPS, SPEC = caching.STEPS["sd3"], "ras"


class AmongActive(Regions):
    """Patches that see the active ones alone."""

    def attended(self, path: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found = super().attended(path, key, value)
        return found if self.active is None else (key, value)


@contextmanager
def without_kept_keys() -> Iterator[None]:
    """Within the context `ras` is attached without its kept keys."""
    ras.Regions = AmongActive
    try:
        yield
    finally:
        ras.Regions = Regions


def distances(bench: Bench, seed: int) -> tuple[float, float]:
    """Of RAS to the whole model's pictures, without and with kept keys; kept once done."""
    path = bench.folder / f"ras-without-kept-keys-{seed}.json"
    if not path.exists():
        wanted, _ = bench.alone(seed, STEPS)
        with without_kept_keys():
            blind, _ = bench.painted(SPEC, seed)
        ours, _ = bench.painted(SPEC, seed)
        path.write_text(json.dumps([distance(blind, wanted), distance(ours, wanted)]))
    without, with_them = json.loads(path.read_text())
    return without, with_them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of a seed")
    options = parser.parse_args()
    bench, found = Bench("sd3", STEPS, options.pictures), {}
    for seed in range(options.seeds):
        without, with_them = distances(bench, seed)
        found[seed] = without / with_them
        print(seed, {"without kept keys": without, "with them": with_them}, flush=True)
    note = (
        f"house:sd3, {STEPS} steps, {len(bench.prompts)} pictures a seed, RMS distance of pictures"
    )
    caching.write_claim("ras", "distance-without-kept-keys-over-ras", found, note)


if __name__ == "__main__":
    main()
