"""What runs from several seeds share: which there are, the recipe of each, and a claim of all."""

import hashlib
import json
import statistics
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import record

from pared import results
from pared.recipe import Recipe

# Settings of a training that its weights don't depend on.
FREE = {"checkpoint_every", "log_every", "trackers"}


def planned(plan: Recipe, seed: int, **model: Any) -> Recipe:
    """The recipe from another seed, with other entries of its table of the model."""
    stages = tuple(
        stage.model_copy(update={"training": stage.training.model_copy(update={"seed": seed})})
        for stage in plan.stages
    )
    table = plan.model.model_copy(update={"seed": seed, **model})
    return plan.model_copy(update={"model": table, "stages": stages})


def told(plan: Recipe) -> dict[str, Any]:
    """Of a recipe, all that decides what is trained, and nothing else."""
    return plan.model_dump(
        mode="json",
        include={"model", "data", "objective", "stages"},
        exclude={"stages": {"__all__": {"training": FREE}}},
    )


def digest(told: Any) -> str:
    """A short text that changes with what is told."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


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
