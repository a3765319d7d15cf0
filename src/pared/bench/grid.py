"""Every way of running a model that its run-time methods offer: the points of a frontier."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, cast

from pared import anatomy, info, method
from pared.bench import peers
from pared.bench.peers import Peer
from pared.bench.subjects import PipelineSubject, Subject
from pared.errors import InputError
from pared.method import RuntimeMethod

# Methods joined in one way of running.
Stack = tuple[str, ...]

# The baseline of all caches: all is computed at every second or third step, and used again as it
# was in between. Outputs of modules; in families that aren't served there, of all blocks together.
PLAIN = (
    "taylorseer:interval=2,order=0",
    "taylorseer:interval=3,order=0",
    "delta-dit:speedup=2.0,rule=rear,reuse=feature_map",
    "delta-dit:interval=3,speedup=3.0,rule=rear,reuse=feature_map",
)


def settings(family: str, slugs: Sequence[str] = ()) -> list[str]:
    """The specs in the grids of all run-time methods that serve a family, and plain reuse.

    Args:
        family: name of a family.
        slugs: of these methods only, where given.

    Raises:
        InputError: one of the slugs is no run-time method that serves the family.
    """
    serving = {
        record.slug: record
        for record in info.registry().values()
        if record.kind == "runtime" and family in record.families and record.grid
    }
    for slug in slugs:
        if slug not in serving:
            raise InputError(
                f"{slug!r} is no run-time method for a {family} model; choose among "
                f"{', '.join(serving) or 'none'}."
            )
    chosen = [record for record in serving.values() if not slugs or record.slug in slugs]
    found = [f"{r.slug}:{point}" if point else r.slug for r in chosen for point in r.grid]
    return found + [
        spec for spec in plain_reuse(family) if spec.partition(":")[0] in slugs or not slugs
    ]


def plain_reuse(family: str) -> list[str]:
    """The specs of plain reuse in a family."""
    served = [spec for spec in PLAIN if family in info.get(spec.partition(":")[0]).families]
    return [s for s in served if s.partition(":")[0] == served[0].partition(":")[0]]


def attachable(target: Any, specs: Sequence[str], pairs: bool = False) -> list[Stack]:
    """The specs that can be attached to a pipeline, by themselves and in pairs.

    Args:
        target: the pipeline, or a bare denoiser.
        specs: of run-time methods.
        pairs: also two of them together, of different methods.
    """
    alone = [(spec,) for spec in specs if _attaches(target, (spec,))]
    if not pairs:
        return [*alone]
    two = [
        (a, b)
        for (a,), (b,) in combinations(alone, 2)
        if a.partition(":")[0] != b.partition(":")[0] and _attaches(target, (a, b))
    ]
    return [*alone, *two]


def methods_of(stack: Stack) -> tuple[RuntimeMethod, ...]:
    """The methods of a stack."""
    return tuple(cast(RuntimeMethod, method.parse(spec)) for spec in stack)


def _attaches(target: Any, stack: Stack) -> bool:
    try:
        method.apply(target, *methods_of(stack)).remove()
    except InputError:
        return False
    return True


# Caches of other libraries ------------------------------------------------------------------------


def peers_for(steps: int) -> list[Peer]:
    """Caches of other libraries at the defaults of these, and at settings that skip more.

    Args:
        steps: of the runs, which some of them must know.
    """
    few = {"Fn_compute_blocks": 1, "max_warmup_steps": 4}
    return [
        peers.FirstBlockCache(),
        peers.FirstBlockCache(threshold=0.15),
        peers.DiffusersTaylorSeer(),
        peers.DiffusersTaylorSeer(cache_interval=3),
        peers.DiffusersTaylorSeer(cache_interval=3, use_lite_mode=True),
        peers.MagCache(num_inference_steps=steps),
        peers.PyramidAttentionBroadcast(),
        peers.PyramidAttentionBroadcast(
            spatial_attention_block_skip_range=3, cross_attention_block_skip_range=3
        ),
        peers.CacheDit(),
        peers.CacheDit(**few),
        peers.CacheDit(**few, residual_diff_threshold=0.24),
        peers.CacheDit(**few, residual_diff_threshold=0.24, taylorseer_order=1),
    ]


def peer_arms(subject: Subject) -> tuple[dict[str, list[Peer]], list[str]]:
    """Caches of other libraries as arms of a bench, those that work, by their specs.

    Each is tried with one picture first: many fail on one pipeline or another, or do nothing.

    Args:
        subject: of the bench, a pipeline.

    Returns:
        The arms, and a sentence on each of the others.

    Raises:
        InputError: the subject is no pipeline.
    """
    if not isinstance(subject, PipelineSubject):
        raise InputError("caches of other libraries work in pipelines; give one, or leave them.")
    arms, said = {}, []
    for peer in peers_for(subject.steps or 1):
        found = peers.tried(peer, subject.target, subject.run)
        if found.outcome == "works":
            arms[peer.spec()] = [peer]
        else:
            said.append(f"{peer.spec()} {found.outcome}: {found.detail.rstrip('.')}.")
    return arms, said


def family_of(target: Any) -> str:
    """Name of the family of a pipeline's denoiser."""
    return anatomy.of(method.denoiser(target)).name
