"""What all adapters share: few weights that train, the rest frozen, and the way back.

An adapter wraps linear layers and names what trains. The base's weights stay as they were, or are
among those that train; so a file with the trained ones (`pared.tuning.adapters`) and the base make
the tuned model again, and `merge` makes an ordinary model of the base's architecture.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from typing import Any, cast

from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import Family
from pared.anatomy.base import Role
from pared.anatomy.intact import watching
from pared.errors import InputError
from pared.method import Claim, Conversion, Handle, denoiser, stack_of

# The roles of a feed-forward's layers.
FEED_FORWARD: frozenset[Role] = frozenset({"fc1", "fc2"})


class Adapter(Conversion):
    """A conversion that wraps linear layers and trains little.

    Converting freezes all that doesn't train. `healing` is the task's own loss: there is nothing to
    mend, and what is learnt is in the data.
    """

    @property
    @abstractmethod
    def roles(self) -> Collection[Role]:
        """What the layers that it wraps are for."""

    @abstractmethod
    def layers(self, family: Family) -> Iterable[str]:
        """Dotted paths of the linear layers that it wraps."""

    @abstractmethod
    def folded(self, layer: nn.Module) -> nn.Linear:
        """The linear layer that computes what a wrapped one does; the wrapped one stays as is."""

    def claims(self, family: Family) -> list[Claim]:
        """The layers that it wraps.

        Of an attention only those are claimed, since whoever replaces how it mixes tokens goes on
        calling its projections. Who replaces a feed-forward reads the weights of its layers and
        would miss what wraps them; so of a feed-forward all is claimed.
        """
        whole = []
        if not FEED_FORWARD.isdisjoint(self.roles):
            whole = [site.path for site in family.sites("feed_forward")]
        inside = tuple(f"{path}." for path in whole)
        alone = [path for path in self.layers(family) if not path.startswith(inside)]
        return [Claim(path, "replaces") for path in (*alone, *whole)]

    def healing(self, task: Any) -> Any:
        """The task's own loss."""
        return task

    def merge(self, target: Any) -> Handle:
        """Fold the adapter into the base's own layers, so that it costs nothing any more.

        Afterwards the model has the base's architecture and names, and no longer carries the
        method.

        Args:
            target: a denoiser that carries this method, or a pipeline that holds one.

        Returns:
            A handle whose `remove` puts the wrapped layers back. It keeps them in memory: drop it
            where merging is for good.

        Raises:
            InputError: the model doesn't carry the method, or other adapters are where it is.
        """
        model = anatomy.unwrap(denoiser(target))
        family, before = anatomy.of(model), stack_of(model)
        if self not in before:
            carried = ", ".join(method.spec() for method in before) or "nothing"
            raise InputError(
                f"{self.spec()} can't be merged into a model that doesn't carry it; this one "
                f"carries {carried}."
            )
        looks = [look for look in watching(model) if look.method == self]
        for look in looks:
            look(model, ())
        wrapped = {path: model.get_submodule(path) for path in self.layers(family)}
        folded = {path: self.folded(layer) for path, layer in wrapped.items()}
        undo = ExitStack()
        for path, layer in wrapped.items():
            family.replace(path, folded[path])
            undo.callback(family.replace, path, layer)
        for look in looks:
            look.on = False
            undo.callback(setattr, look, "on", True)
        cast(Any, model).pared_stack = [method for method in before if method != self]
        undo.callback(setattr, model, "pared_stack", before)
        return Handle(undo, (self,))

    def metadata(self, family: Family) -> dict[str, str]:
        """Entries for the metadata of an adapter file, for other libraries to read."""
        return {}

    def freeze_others(self, model: nn.Module) -> None:
        """Let exactly what the method trains want gradients."""
        names = set(self.trainable(anatomy.of(model)))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)

    def plain(self, model: nn.Module, path: str) -> nn.Linear:
        """The linear layer at a path.

        Raises:
            InputError: what is there isn't one, or computes more than one does.
        """
        layer = model.get_submodule(path)
        if type(layer) is not nn.Linear:
            raise InputError(
                f"{self.info.slug} wraps plain linear layers, and {path} is a "
                f"{type(layer).__name__}; merge, or leave out, what put it there."
            )
        return layer


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of given weights (out, in) and biases (out); parameters stay the same ones."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return layer


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
