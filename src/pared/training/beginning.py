"""What a run began from, so that a resumed one is the same: weights, conversions and objective.

Settings and data aren't all that decides a training. Two students of equal shapes have equal names
of weights, and a folder with the checkpoint of one would otherwise be taken for the other's.

Weights that a conversion has just drawn aren't compared: a script that is run again draws others,
and the checkpoint brings the run's own back.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.errors import InputError
from pared.method import drawn_in, stack_of

# Machines round in their own ways, and a run may go on elsewhere; any training moves weights more.
TOLERANCE = 1e-5
# Stands for a number that may be any; no weight is so large.
ANY = torch.finfo(torch.float64).max
# A model that carries what the run has come to may go on as well.
AGAIN = {"weights": ("now", "averaged")}
# What `Beginning.words` and `Beginning.numbers` are of, in words.
CALLED = {
    "conversions": "other conversions",
    "objective": "another objective",
    "teacher": "another teacher",
    "weights": "other weights",
}


class Beginning(NamedTuple):
    """What decides a run besides its settings and data.

    Attributes:
        words: what can be told in simple terms, by what it is of.
        numbers: two of every tensor of weights, float64 (2 tensors,), by what they are of; `ANY`
            of weights that were just drawn.
    """

    words: dict[str, Any]
    numbers: dict[str, Tensor]


def beginning_of(model: nn.Module, objective: nn.Module) -> Beginning:
    """Read ahead of the first step, from a model that nothing wraps or shards yet.

    Args:
        model: with the weights that the training starts from.
        objective: as it will be called.
    """
    words = {"conversions": list(map(repr, stack_of(model))), "objective": _told(objective)}
    numbers = {
        "weights": _of_model(model),
        "objective": numbers_of(dict(objective.named_buffers())),
    }
    if (teacher := getattr(objective, "_teacher", None)) is not None:
        words["teacher"] = [list(map(repr, stack_of(each))) for each in teacher]
        numbers["teacher"] = torch.cat([_of_model(each) for each in teacher])
    return Beginning(words, numbers)


def check_beginning(
    folder: Path, words: dict[str, Any], numbers: dict[str, Tensor], mine: Beginning
) -> None:
    """Refuse to go on with a run that began otherwise.

    Args:
        folder: of the run.
        words: that its checkpoint keeps; none where an earlier version wrote it.
        numbers: likewise; "now" and "averaged" are of its present weights, which will do as well.
        mine: what this run begins from.

    Raises:
        InputError: it did.
    """
    for name, found in mine.words.items():
        if name in words and words[name] != found:
            raise _other(folder, name)
    for name, found in mine.numbers.items():
        known = [numbers[each] for each in (name, *AGAIN.get(name, ())) if each in numbers]
        if known and not any(_close(each, found) for each in known):
            raise _other(folder, name)


def numbers_of(state: Mapping[str, Any], drawn: Collection[str] = ()) -> Tensor:
    """Two numbers of every tensor, at a third and at two thirds of it, by the tensors' names.

    Args:
        state: tensors by name.
        drawn: names of those whose numbers may be any.
    """
    few = [torch.zeros(0, dtype=torch.float64)]
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor) and (count := value.numel()):
            numbers = value.detach().reshape(-1)[[count // 3, 2 * count // 3]].cpu().double()
            few.append(torch.full_like(numbers, ANY) if name in drawn else numbers)
    return torch.cat(few)


def _of_model(model: nn.Module) -> Tensor:
    return numbers_of(anatomy.unwrap(model).state_dict(), drawn_in(model))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    told = (a != ANY) & (b != ANY)
    return torch.allclose(a[told], b[told], rtol=TOLERANCE, atol=1e-8, equal_nan=True)


def _other(folder: Path, name: str) -> InputError:
    return InputError(
        f"{folder} holds a run with {CALLED[name]} than this one begins from: go on with its own, "
        "or choose another output folder."
    )


def _told(value: Any) -> Any:
    """What can be said of a part of an objective as JSON; its tensors are told by their shape."""
    if isinstance(value, nn.Module):
        own = {k: v for k, v in vars(value).items() if k[0] != "_" and k != "training"}
        return [type(value).__name__, _told(own | dict(value.named_children()))]
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, Mapping):
        return {str(name): _told(each) for name, each in value.items()}
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [_told(each) for each in value]
    return type(value).__name__
