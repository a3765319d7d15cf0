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
from pared.anatomy.intact import Intact
from pared.errors import InputError
from pared.method import Claim
from pared.tuning.base import Adapter

# By which name peft knows ours among several adapters of a layer.
NAME = "default"


class PeftAdapter(Adapter):
    """An adapter of peft's on linear layers of attentions and feed-forwards.

    Merge it before you load others (`load_lora_weights`): peft then computes with these alone. A
    call of the model is refused while it does.

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

        family, upstream = anatomy.of(model), cast(Any, model)
        if others := list(getattr(model, "peft_config", {})):
            raise InputError(
                f"{self.info.slug} would switch off the adapter {others[0]!r} that the model "
                "carries already; fuse it first (fuse_lora, then unload_lora)."
            )
        for path in self.layers(family):
            self.plain(model, path)
        inject_adapter_in_model(self.config(family), model, NAME)
        # The layers know all they need. Left there, it would be taken for that of a second adapter.
        del upstream.peft_config
        Active(self, self.layers(family)).watch(model)
        self.freeze_others(model)

    def trainable(self, family: Family) -> tuple[str, ...]:
        """Names of what peft added."""
        return tuple(
            f"{path}.{name}"
            for path in self.layers(family)
            for name, _ in family.model.get_submodule(path).named_parameters()
            if name.startswith(self.added) and name.split(".")[1] == NAME
        )

    def folded(self, layer: nn.Module) -> nn.Linear:
        twin = cast(Any, copy.deepcopy(layer))
        if others := sorted(set(getattr(twin, twin.adapter_layer_names[0])) - {NAME}):
            raise InputError(
                f"{self.spec()} can't be merged where another adapter is on the same layers; take "
                f"it off first: model.delete_adapters({others[0]!r})."
            )
        twin.merge()
        return twin.get_base_layer()


class Active(Intact):
    """Refuses calls of a model in which ours was taken off, or peft computes with others alone."""

    def holds(self, module: Any) -> bool:
        if not hasattr(module, "active_adapters"):
            return False
        return NAME in (module.merged_adapters if module.merged else module.active_adapters)

    def fault(self, path: str, module: Any) -> str:
        slug = self.method.info.slug
        if not hasattr(module, "active_adapters"):
            return (
                f"{slug} was taken off {path} (unload_lora_weights takes all adapters, say); load "
                "the model again, and merge it before you load others."
            )
        return (
            f"{slug} does nothing in {path} any more, where the adapters {module.active_adapters} "
            "were switched on instead; take them off again (delete_adapters), and merge it before "
            "you load others."
        )


def exactly(paths: list[str]) -> str:
    """The pattern of these modules; a list of names would match others by their ends."""
    return "|".join(re.escape(path) for path in paths)
