"""Choosing sites: those of some layers, and those that compute one plain softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from pared.errors import InputError

if TYPE_CHECKING:
    from pared.anatomy.base import Family, Site, SiteKind

# Stock processors that mix all tokens by one softmax, whatever kernel computes it.
SOFTMAX_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "JointAttnProcessor2_0",
    "XFormersJointAttnProcessor",
    "FluxAttnProcessor",
    "LuminaAttnProcessor2_0",
    "WanAttnProcessor",
)


def chosen(
    family: Family, slug: str, kinds: tuple[SiteKind, ...], layers: tuple[int, ...] | None
) -> list[Site]:
    """The sites of some kinds in the blocks of the given indices, in all blocks for None.

    Raises:
        InputError: a chosen layer doesn't exist or has no such site; the message names the method.
    """
    found = family.sites(*kinds)
    if layers is None:
        return found
    missing = sorted(set(layers) - {s.block for s in found})
    if missing:
        has = ", ".join(str(block) for block in sorted({s.block for s in found})) or "none"
        what = " or ".join(kind.replace("_", " ") for kind in kinds)
        what += " of the image" if family.kind == "denoiser" else ""
        raise InputError(
            f"{slug}: layers={missing} have no {what} in "
            f"{type(family.model).__name__}; those that have one are {has}."
        )
    return [s for s in found if s.block in layers]


def require_softmax(site: Site, slug: str) -> None:
    """Refuse an attention whose processor isn't a stock one of plain softmax.

    Raises:
        InputError: something else was put there; the message names the method.
    """
    name = type(cast(Any, site.module).processor).__name__
    if name not in SOFTMAX_PROCESSORS:
        raise InputError(
            f"{slug} can't be attached to {site.path}, whose {name} isn't the model's own softmax "
            "attention; take off first what put it there."
        )


def runs_twice(slug: str, path: str) -> InputError:
    """The error for a module that is called in parts, where a method keeps one output of it."""
    return InputError(
        f"{slug}: {path} runs several times in one call, and its parts can't be told apart; call "
        "the model's disable_forward_chunking() first."
    )
