"""What runs from several seeds share: which there are, the recipe of each, and a claim of all."""

import statistics
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import record

from pared import results
from pared.recipe import Recipe


def planned(plan: Recipe, seed: int, **model: Any) -> Recipe:
    """The recipe from another seed, with other entries of its table of the model."""
    stages = tuple(
        stage.model_copy(update={"training": stage.training.model_copy(update={"seed": seed})})
        for stage in plan.stages
    )
    table = plan.model.model_copy(update={"seed": seed, **model})
    return plan.model_copy(update={"model": table, "stages": stages})


def claim(
    slug: str,
    key: str,
    values: Sequence[float],
    seeds: Sequence[int],
    note: str,
    machine: str | None = None,
) -> results.Measured:
    """A claim from its value by each seed: their mean, and their spread where there are several."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return record.claim(slug, key, statistics.mean(values), spread, seeds, note, machine)


def pairs(
    seeds: Sequence[int], arms: Iterable[str], decisive: Container[str]
) -> Iterator[tuple[int, str]]:
    """Every seed with every arm that claims hang on; the first seed with the others, too."""
    for seed, arm in product(seeds, list(arms)):
        if seed == seeds[0] or arm in decisive:
            yield seed, arm
