"""Tables of HarmoniCa (arXiv 2410.01723): which branch of which step is computed, and the learned
table's file.
"""

import json
import math
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pared.anatomy import Family
from pared.errors import InputError
from pared.runtime import Clock

# Of one step: which branches are computed.
Row = tuple[bool, ...]

# Under which the facts about a table stand in its file's metadata.
KEY = "harmonica"


def table_all(steps: int, sites: int) -> Tensor:
    """The table of no reuse: true, "is computed", everywhere, (steps, sites)."""
    return torch.ones(steps, sites, dtype=torch.bool)


def table_from_interval(n: int, steps: int, sites: int) -> Tensor:
    """FORA's table (arXiv 2407.01425): every n-th step computes all, the others nothing."""
    return (torch.arange(steps) % n == 0)[:, None].expand(steps, sites).clone()


def table_random(cur: float, seed: int, steps: int, sites: int) -> Tensor:
    """A table that reuses the share `cur` of its entries, drawn at random behind the first step.

    Returns:
        (steps, sites), true where an entry is computed.

    Raises:
        InputError: so many can't be reused, since the first step computes all.
    """
    require_possible(cur, steps)
    table = table_all(steps, sites)
    order = torch.randperm((steps - 1) * sites, generator=torch.Generator().manual_seed(seed))
    table[1:].view(-1)[order[: round(cur * steps * sites)]] = False
    return table


def require_possible(cur: float, steps: int) -> None:
    """Refuse a share of reuse that no run of so many steps can have.

    Raises:
        InputError: it can't.
    """
    if cur > 1 - 1 / steps:
        raise InputError(
            f"a run of {steps} steps can't reuse the share {cur:g} of all outputs, since the first "
            f"step computes all; ask for {1 - 1 / steps:.3g} at most."
        )


def cur_of(table: Tensor) -> float:
    """Cache usage ratio: the share of entries of a table (steps, sites) that are reused."""
    return 1 - float(table.double().mean())


class Rule(Protocol):
    """What tells the executor which branches to compute."""

    def row(self, step: int, clock: Clock, sites: int) -> Row:
        """The row of a step, also of one behind the last.

        Raises:
            InputError: the rule doesn't fit the run.
        """
        ...


@dataclass(frozen=True)
class Interval:
    """Everything at every n-th step, nothing in between."""

    n: int

    def row(self, step: int, clock: Clock, sites: int) -> Row:
        return (step % self.n == 0,) * sites


@dataclass(frozen=True)
class Random:
    """`table_random`, made for the number of steps of the run."""

    cur: float
    seed: int

    def row(self, step: int, clock: Clock, sites: int) -> Row:
        if clock.steps is None:
            raise InputError(
                "harmonica: a random table needs to know how many steps the run has, which a bare "
                "denoiser doesn't tell; apply it to a pipeline."
            )
        rows = _random_rows(self.cur, self.seed, clock.steps, sites)
        return rows[step] if step < clock.steps else (True,) * sites


@lru_cache(maxsize=8)
def _random_rows(cur: float, seed: int, steps: int, sites: int) -> tuple[Row, ...]:
    return tuple(map(tuple, table_random(cur, seed, steps, sites).tolist()))


def rule_of(table: str) -> Interval | Random:
    """The rule behind a `table` setting.

    Raises:
        ValueError: it's none.
    """
    kind, _, rest = table.partition(":")
    try:
        if table == "all":
            return Interval(1)
        if kind == "interval" and int(rest) >= 1:
            return Interval(int(rest))
        if kind == "random":
            cur, _, seed = rest.partition(":")
            if 0 <= float(cur) < 1:
                return Random(float(cur), int(seed or 0))
    except ValueError:
        pass
    raise ValueError(
        "write all, interval:N with N from 1, or random:CUR:SEED with CUR from 0 to below 1"
    )


# The learned table --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Routing:
    """A learned table, and what it is tied to.

    Attributes:
        scores: r, (T, sites) in float32, the noisiest step first.
        sites: dotted paths of the branches, in order.
        timesteps: of the run, as the denoiser is told them.
        tau: an entry is computed iff its score is above.
        model: what it was learned on, in words.
        sampler: class of the scheduler.
        guidance: scale that it was learned with.
        beta: price of an entry at the end of the training.
        name: how messages call it.
    """

    scores: Tensor
    sites: tuple[str, ...]
    timesteps: tuple[float, ...]
    tau: float
    model: str = ""
    sampler: str = ""
    guidance: float = 1.0
    beta: float = 0.0
    name: str = "the router"

    @property
    def table(self) -> Tensor:
        """The decisions, (T, sites): true where an entry is computed, in the first row always."""
        computed = self.scores > self.tau
        computed[0] = True
        return computed

    @property
    def cur(self) -> float:
        """Cache usage ratio."""
        return cur_of(self.table)

    def row(self, step: int, clock: Clock, sites: int) -> Row:
        if step == clock.step:
            self._check(clock)
        return self._rows[step] if step < len(self._rows) else (True,) * sites

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        return tuple(map(tuple, self.table.tolist()))

    def _check(self, clock: Clock) -> None:
        """Refuse a run that isn't the one that the table was learned for."""
        known, wanted, now = clock.steps, len(self.timesteps), clock.reading
        if (known is not None and known != wanted) or clock.step >= wanted:
            raise InputError(
                f"{self.name} was learned for runs of {wanted} steps, and this one has "
                f"{known or 'more'}; sample with {wanted} steps, or learn a table for yours."
            )
        told = self.timesteps[clock.step]
        # Pipelines in half precision tell the timestep in half precision.
        rounding = torch.finfo(now.rounding).eps if now.rounding.is_floating_point else 0
        if not math.isclose(now.time, told, rel_tol=max(rounding, 1e-5)):
            raise InputError(
                f"{self.name} was learned at other timesteps: step {clock.step} is at {now.time:g} "
                f"here and at {told:g} there; use {self.sampler} as it was then, or learn a table "
                "for this schedule."
            )

    def require(self, family: Family) -> None:
        """Refuse a model that has other branches.

        Raises:
            InputError: it has.
        """
        paths = tuple(branch.path for branch in family.branches)
        if paths != self.sites:
            raise InputError(
                f"{self.name} was learned for a model with {len(self.sites)} branches, the last at "
                f"{self.sites[-1]}, and this one has {len(paths)}, the last at {paths[-1]}; learn "
                "a table for this model."
            )

    def save(self, path: str | Path) -> Path:
        """Write the scores and all the rest to one safetensors file, beside and renamed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "sites": self.sites,
            "timesteps": self.timesteps,
            "tau": self.tau,
            "model": self.model,
            "sampler": self.sampler,
            "guidance": self.guidance,
            "beta": self.beta,
            "cur": self.cur,
        }
        beside = path.with_name(f"{path.name}.part")
        scores = self.scores.detach().float().cpu().contiguous()
        save_file({"scores": scores}, beside, metadata={KEY: json.dumps(facts)})
        os.replace(beside, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Routing":
        """The table in a file that `save` wrote.

        Raises:
            InputError: there is no such file, or it holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})[KEY])
                scores = file.get_tensor("scores")
        except FileNotFoundError:
            raise InputError(
                f"there is no router {str(path)!r}; learn one by `pared route`."
            ) from None
        except (OSError, SafetensorError, KeyError, ValueError):
            raise InputError(
                f"{path} is no router of harmonica; give a file that `pared route` wrote."
            ) from None
        del facts["cur"]  # follows from the scores
        facts |= {"sites": tuple(facts["sites"]), "timesteps": tuple(facts["timesteps"])}
        return cls(scores, **facts, name=f"the router {path}")
