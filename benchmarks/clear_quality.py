"""CLEAR healed by the pictures alone and by its teacher too, from the house MM-DiT.

    python benchmarks/clear_quality.py       # three seeds of each; resumes

Writes the claim into results/clear.json. What is done is kept under runs/quality.
"""

import quality
import record

# The house grid has 16 x 16 tokens where the paper has 64 x 64: a quarter of its radius of 8.
SPEC = "clear:r=2"


def main() -> None:
    options = quality.parser(__doc__).parse_args()
    bench = quality.Bench("house:sd3", options)
    done: dict[str, list[quality.Figures]] = {"both": [], "task": []}
    for seed in range(options.seeds):
        for how, runs in done.items():
            runs.append(bench.healed(SPEC, seed, by_task=how == "task"))
            print(how, seed, runs[-1], flush=True)
    note = (
        f"relative output error on held-out pictures, {SPEC} healed from house:sd3 for "
        f"{options.steps} steps of {options.batch_size} by the task alone, over the same with both "
        "distillation terms; mean of ratios by seed"
    )
    claim = quality.claim_of(
        "clear", "distance-task-over-distilled", done["task"], done["both"], note
    )
    record.write("clear", [claim])


if __name__ == "__main__":
    main()
