"""Adapters whose layers are peft's: put in at the sites that the anatomy names."""

import copy
import importlib.util
import re
from abc import abstractmethod
from typing import Any, ClassVar, cast

from torch import nn

from pared import anatomy
from pared.anatomy import Family
from pared.anatomy.base import Role
from pared.errors import InputError
from pared.method import Claim
from pared.tuning.base import Adapter


class PeftAdapter(Adapter):
    """An adapter of peft's on linear layers of attentions and feed-forwards.

    Subclasses have a field `places`: the roles of the layers that get one.
    """

    places: tuple[Role, ...]

    # What peft calls the parameters that it adds to a layer.
    added: ClassVar[tuple[str, ...]]

    @abstractmethod
    def config(self, family: Family) -> Any:
        """Peft's settings for this model."""

    @property
    def roles(self) -> tuple[Role, ...]:
        return self.places

    def paths(self, family: Family, *roles: Role) -> list[str]:
        """Dotted paths of the layers of some roles, of every attention and feed-forward."""
        kinds = ("self_attention", "joint_attention", "cross_attention", "feed_forward")
        paths = (
            path
            for site in family.sites(*kinds)
            for role in roles
            for path in family.linear_layers(site, role)
        )
        return list(dict.fromkeys(paths))

    def layers(self, family: Family) -> list[str]:
        return self.paths(family, *self.places)

    def claims(self, family: Family) -> list[Claim]:
        if importlib.util.find_spec("peft") is None:
            raise InputError(
                f"{self.info.slug} needs the package 'peft', which isn't installed; pip install "
                "'pared[adapters]' brings it."
            )
        return super().claims(family)

    def convert(self, model: nn.Module) -> None:
        from peft import inject_adapter_in_model

        family = anatomy.of(model)
        for path in self.layers(family):
            self.plain(model, path)
        inject_adapter_in_model(self.config(family), model)
        # The layers know all they need. Left there, it would be taken for that of a second adapter.
        del cast(Any, model).peft_config
        self.freeze_others(model)

    def trainable(self, family: Family) -> tuple[str, ...]:
        """Names of what peft added."""
        return tuple(
            f"{path}.{name}"
            for path in self.layers(family)
            for name, _ in family.model.get_submodule(path).named_parameters()
            if name.startswith(self.added)
        )

    def folded(self, layer: nn.Module) -> nn.Linear:
        twin = cast(Any, copy.deepcopy(layer))
        twin.merge()
        return twin.get_base_layer()


def exactly(paths: list[str]) -> str:
    """The pattern of these modules; a list of names would match others by their ends."""
    return "|".join(re.escape(path) for path in paths)
