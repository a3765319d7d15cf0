"""HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in Diffusion
Transformer Acceleration.

arXiv 2410.01723, ICML 2025.

A table says for every step of a run, and for every attention and feed-forward, whether it is
computed or its last output is taken again, before the gate, which stays fresh. The table is
learned, along whole trajectories that reuse itself has made and bent (`pared route`, or `learn` in
`pared.caching.harmonica_training`). A fixed interval (FORA) and random tables run on the same
executor.

Implemented from the paper, and from what the published code says where the paper leaves it open; no
code taken. Chosen here: cross-attentions, and in MM-DiTs the feed-forwards of the text, have
entries of their own; a one-stream block of FLUX, which adds attention and feed-forward up in one
projection, has one. Only what the next step takes again is kept at all. Where guidance calls for
prompt and negative prompt in turn, both go by one table and each has its own memory. Steps are
rounds of the pipeline's loop, two for what a scheduler of second order (Heun) calls a step, and
each has a row. Without a router the table is `interval:2`. Lumina-Next isn't served: its two
attentions hand on heads that are added up ahead of one projection, and to reuse what comes out of
that would leave both running. Nor are U-Nets, whose convolutions would be computed all the same;
the paper is about transformers. Not verified: pictures at the paper's scale, and a router under
another sampler with the same timesteps, which is let through.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from pared import anatomy
from pared.anatomy import Family
from pared.anatomy.base import Branch
from pared.anatomy.sites import runs_twice
from pared.caching.harmonica_tables import Routing, Row, Rule, rule_of
from pared.info import Headline, Info
from pared.method import Claim, Handle, RuntimeMethod, denoiser
from pared.runtime import Clock, detour

INFO = Info(
    slug="harmonica",
    title="HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in Diffusion "
    "Transformer Acceleration",
    arxiv="2410.01723",
    venue="ICML 2025",
    kind="runtime",
    families=("pixart", "dit", "sd3", "flux", "wan"),
    training=True,
    trained_by="route",
    exact=False,
    maturity="faithful",
    summary="a learned table says which layer of which step takes its last output again",
    cls="HarmoniCa",
    headlines=(
        Headline(
            key="theoretical-speed-up",
            text="multiply-adds of a run of 20 steps of PixArt, whole over with the learned table",
            paper=2.07,
            direction="higher",
            bound=1.5,
        ),
        Headline(
            key="measured-speed-up",
            text="time of a run of 20 steps of PixArt, whole over with the learned table",
            paper=1.69,
            direction="higher",
            bound=1.2,
        ),
        Headline(
            key="frechet-over-base",
            text="Frechet distance to real pictures at that table, over that of the whole model "
            "(paper: FID of PixArt-alpha is better with the table)",
            paper=1.0,
            direction="lower",
            bound=1.05,
        ),
    ),
    grid=("table=interval:2", "table=interval:3"),
)


class HarmoniCa(RuntimeMethod):
    """The executor of a caching table, section 3 of the paper."""

    info = INFO

    router: str | None = Field(
        default=None, description="file of a learned table, as `pared route` writes it"
    )
    table: str | None = Field(
        default=None,
        description="in place of a router: all, interval:N or random:CUR:SEED, with CUR the share "
        "of entries that are reused; interval:2 where neither is given",
    )

    @field_validator("table")
    @classmethod
    def _known(cls, table: str | None) -> str | None:
        if table is not None:
            rule_of(table)
        return table

    @model_validator(mode="after")
    def _one_table(self) -> "HarmoniCa":
        if self.router is not None and self.table is not None:
            raise ValueError("give a router or a table, not both")
        return self

    def claims(self, family: Family) -> list[Claim]:
        paths = [path for b in family.branches for path in (b.path, *b.feeds)]
        return [Claim(path, "reuses") for path in paths]

    def attach(self, pipeline: Any) -> Handle:
        family = anatomy.of(denoiser(pipeline))
        rule: Rule = rule_of(self.table or "interval:2")
        if self.router is not None:
            rule = Routing.load(self.router)
            rule.require(family)
        with ExitStack() as undo:
            executor = Executor(rule, Clock(pipeline, undo), family.branches)
            for index, branch in enumerate(family.branches):
                detour(branch.module, Reuse(executor.clock, index, branch.path), undo)
                for feed in branch.feeds:
                    module = family.model.get_submodule(feed)
                    detour(module, Feed(executor.clock, index), undo)
            return Handle(undo.pop_all(), (self,), executor.clock.stats)


# In the model -------------------------------------------------------------------------------------

# What a branch does at a call: "keep" is to compute, and to remember the output.
Action = Literal["compute", "keep", "reuse"]


class Executor:
    """Decides for all branches, once for each call of the denoiser."""

    def __init__(self, rule: Rule, clock: Clock, branches: tuple[Branch, ...]) -> None:
        self.rule, self.clock = rule, clock
        self.paths = [branch.path for branch in branches]
        clock.stats |= {"computed": 0, "reused": 0}
        clock.on_call = self.decide

    def decide(self) -> tuple[Action, ...]:
        """What each branch does at the running call; the clock keeps it as the plan."""
        clock, kept = self.clock, self.clock.kept
        now = self.rule.row(clock.step, clock, len(self.paths))
        if clock.step + 1 == clock.steps:
            then: Row = (True,) * len(self.paths)
        else:
            then = self.rule.row(clock.step + 1, clock, len(self.paths))
        plan: list[Action] = []
        for path, computed, computed_then in zip(self.paths, now, then, strict=True):
            if not computed and path in kept:
                plan.append("reuse")
            else:
                kept.pop(path, None)
                plan.append("compute" if computed_then else "keep")
        return tuple(plan)


class Reuse:
    """Goes around a branch: its own output or, by the plan, the one that is kept.

    torch.compile takes the branch's own forward and leaves the choice to Python: a table has too
    many plans for a graph of each.
    """

    def __init__(self, clock: Clock, index: int, path: str) -> None:
        self.clock, self.index, self.path = clock, index, path

    @torch.compiler.disable(recursive=False)
    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        action, kept, done = self.clock.plan[self.index], self.clock.kept, self.clock.done
        if action == "reuse":
            done[self.path] = "reused"
            return kept[self.path]
        output = own(*args, **kwargs)
        done[self.path] = "computed"
        if action == "keep":
            if self.path in kept:
                raise runs_twice(INFO.slug, self.path)
            kept[self.path] = each(torch.detach, output)
        return output


class Feed:
    """Goes around a module whose output only its branch uses: a reused branch needs none."""

    def __init__(self, clock: Clock, index: int) -> None:
        self.clock, self.index = clock, index

    @torch.compiler.disable(recursive=False)
    def __call__(
        self, own: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self.clock.plan[self.index] == "reuse":
            return hidden_states
        return own(hidden_states, *args, **kwargs)


def each(function: Callable[..., Tensor], *outputs: Any) -> Any:
    """A function of outputs of a branch, applied to each stream where these are tuples.

    Text that the last block has no use for may be None, and stays so.
    """
    if isinstance(outputs[0], tuple):
        streams = zip(*outputs, strict=True)
        return tuple(None if parts[0] is None else function(*parts) for parts in streams)
    return function(*outputs)
