"""Heals EDiT, its baselines and its ablation from the house teacher, all alike, and compares.

    python benchmarks/edit_quality.py                       # three seeds, an hour; resumes
    python benchmarks/edit_quality.py --steps 100 --seeds 1 # a first look

Writes the claims and the comparison table into results/edit.json. Every (method, seed) that is done
leaves a file under runs/quality, so the script may be stopped and started at will.
"""

import quality
import record

ARMS = {
    "EDiT (CF,SC,SC)": "edit",
    "EDiT without CF (none,SC,SC)": "edit:query=none",
    "SANA style": "sana",
    "LinFusion": "linfusion",
    "KV compression": "kv-compression",
}
CLAIMS = {
    "distance-sana-over-edit": "SANA style",
    "distance-linfusion-over-edit": "LinFusion",
    "distance-kv-over-edit": "KV compression",
    "distance-nocf-over-edit": "EDiT without CF (none,SC,SC)",
}


def claims_of(done: dict[str, list[quality.Figures]], note: str) -> list:
    """How much farther from the teacher each rival ends than EDiT, paired by seed."""
    ours = done["EDiT (CF,SC,SC)"]
    return [quality.claim_of("edit", key, done[arm], ours, note) for key, arm in CLAIMS.items()]


def main() -> None:
    options = quality.parser(__doc__).parse_args()
    bench = quality.Bench("house:pixart", options)
    done = bench.all_of(ARMS)
    note = (
        f"relative output error on held-out pictures after {options.steps} healing steps of "
        f"{options.batch_size} from the house teacher, every method alike; mean of ratios by seed"
    )
    table = f"healed alike from house:pixart, {options.steps} steps of {options.batch_size}"
    tables = {table: quality.table_of(done)}
    print(record.write("edit", claims_of(done, note), tables))


if __name__ == "__main__":
    main()
