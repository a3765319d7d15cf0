"""How far training moved each layer of a model from where it started.

Phi = ||theta_f - theta_p||, per layer: what made MTU (arXiv 2503.11905) turn feed-forwards into
experts, as they move furthest under fine-tuning.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import inf

from torch import nn

from pared import anatomy
from pared.errors import InputError


@dataclass(frozen=True)
class Movement:
    """How far one layer moved.

    Attributes:
        kind: of the site that the layer is, as in `pared.anatomy`; "other" outside of all sites.
        path: dotted path of the layer.
        norm: Phi, the Euclidean norm of the change of all its parameters.
        relative: the same over the norm of the parameters before.
    """

    kind: str
    path: str
    norm: float
    relative: float


def movement(before: nn.Module, after: nn.Module) -> list[Movement]:
    """How far each layer moved between two states of one model, in the model's order.

    A layer is a site of the anatomy with all that is in it; outside of sites, a module with
    parameters of its own.

    Args:
        before: the pretrained model.
        after: the fine-tuned one, of the same architecture.

    Raises:
        InputError: the two don't have the same parameters.
    """
    before, after = anatomy.unwrap(before), anatomy.unwrap(after)
    kinds = {site.path: site.kind for site in anatomy.of(before).sites()}
    moved = dict(after.named_parameters())
    squares: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, parameter in before.named_parameters():
        if name not in moved or moved[name].shape != parameter.shape:
            raise InputError(
                f"the second model has no {name} of shape {tuple(parameter.shape)}; compare a "
                "model with what it was fine-tuned from."
            )
        start, end = (x.detach().double().cpu() for x in (parameter, moved.pop(name)))
        layer = squares[_layer(name, kinds)]
        layer[0] += float((end - start).square().sum())
        layer[1] += float(start.square().sum())
    if moved:
        raise InputError(
            f"the second model also has {next(iter(moved))}; compare a model with what it was "
            "fine-tuned from."
        )
    return [
        Movement(kind, path, change**0.5, _ratio(change, size) ** 0.5)
        for (kind, path), (change, size) in squares.items()
    ]


def _layer(name: str, kinds: dict[str, anatomy.SiteKind]) -> tuple[str, str]:
    """Kind and path of the layer that a parameter belongs to."""
    owner = path = name.rpartition(".")[0]
    while path:
        if path in kinds:
            return kinds[path], path
        path = path.rpartition(".")[0]
    return "other", owner


def _ratio(change: float, size: float) -> float:
    if size:
        return change / size
    return inf if change else 0.0
