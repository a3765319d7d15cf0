"""A model that computes some patches of a picture and reuses what it knows of the others.

The machinery of `ras`: what is kept of all patches from call to call, and the attention of a few to
all.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.anatomy import Family, Site
from pared.anatomy.heads import Heads
from pared.caching.regions import active_count, active_set, patch_metric
from pared.errors import InputError
from pared.nn.rotary import Rotary
from pared.runtime import Clock, Leaves

if TYPE_CHECKING:
    from pared.caching.ras import RAS

# "full" keeps nothing; "fill" computes all and keeps what regional steps need.
Mode = Literal["full", "fill", "regional"]

# What other methods have of such a call: where keys of all patches are kept all must be computed,
# and where some patches pass there are too few tokens for anything that was kept.
LEAVES: dict[Mode, Leaves] = {"full": "all", "fill": "fresh", "regional": "nothing"}


class Plan(NamedTuple):
    """What happens at a call.

    Attributes:
        mode: whether all patches are computed, and kept.
        more: patches that a regional call skips beyond its share.
    """

    mode: Mode
    more: int = 0


class Regions:
    """What is kept of all patches, and which are active at the running call.

    The clock keeps "latents" of the last call, "skips" (D), "active" numbers of patches, "output"
    (the last prediction of every patch), and for each attention, under its path, keys and values.

    Args:
        settings: of the method.
        family: of the model.
        clock: of the run.
        sites: number of the attentions that reuse.
    """

    def __init__(self, settings: "RAS", family: Family, clock: Clock, sites: int) -> None:
        self.settings, self.family, self.clock = settings, family, clock
        clock.stats |= {"sites": sites, "patches": 0, "active_patches": 0}
        clock.on_call = self.decide

    @property
    def plan(self) -> Plan:
        """Of the running call."""
        return cast(Plan, self.clock.plan)

    @property
    def active(self) -> Tensor | None:
        """Numbers of the active patches, (batch, active); None where all are."""
        return self.clock.kept["active"] if self.plan.mode == "regional" else None

    def decide(self) -> Plan:
        plan = self._planned()
        self.clock.leaves = LEAVES[plan.mode]
        return plan

    def _planned(self) -> Plan:
        clock, settings = self.clock, self.settings
        if not settings.dense(clock.step, clock.steps) and clock.kept:
            return Plan("regional", settings.more(clock.step, clock.steps))
        return Plan("full" if settings.dense(clock.step + 1, clock.steps) else "fill")

    def embed(self, own: Callable[..., Any], latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around the embedding of patches: of a regional call, the active ones go on."""
        embedded, mode = own(latents, *args, **kwargs), self.plan.mode
        if mode == "full":
            return embedded
        kept = self.clock.kept
        before = kept.get("latents")
        kept["latents"] = latents.detach().clone()  # callers may step in place
        if mode == "fill":
            patches = self.family.patches(latents)
            kept.setdefault("skips", torch.zeros(patches.shape[:2], device=latents.device))
            return embedded
        kept["active"] = active = self._chosen(latents.detach().float() - before.float())
        kept["skips"] = (kept["skips"] + 1).scatter(1, active, kept["skips"].gather(1, active))
        return self.family.some_tokens(embedded, active)

    def _chosen(self, update: Tensor) -> Tensor:
        """The patches that this call computes, from what the last step added to the latents."""
        settings, kept, stats = self.settings, self.clock.kept, self.clock.stats
        metric = patch_metric(self.family.patches(update), settings.metric)
        patches = metric.shape[1]
        count = active_count(patches, settings.ratio, self.plan.more, settings.quantum)
        stats["patches"] += patches
        stats["active_patches"] += count
        return active_set(
            metric,
            kept["skips"],
            count,
            settings.high_ratio,
            settings.k,
            settings.upstream_compat,
        )

    def attended(self, path: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all patches, those of the computed ones as they are now.

        Args:
            path: of the attention.
            key: of the computed patches, (batch, heads, patches, channels).
            value: likewise.
        """
        kept, active = self.clock.kept, self.active
        if active is None:
            kept[path] = key.detach(), value.detach()
            return key, value
        known = cast(tuple[Tensor, Tensor], kept[path])
        for whole, part in zip(known, (key, value), strict=True):
            place = active[:, None, :, None].expand_as(part)
            whole.scatter_(2, place, part.detach().to(whole.dtype))
        kept[path] = known
        return known

    def finish(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Around the last layer: patches that weren't computed are given what they had."""
        output, kept = own(*args, **kwargs), self.clock.kept
        if self.plan.mode == "full":
            return output
        if self.plan.mode == "regional":
            place = kept["active"][..., None].expand_as(output)
            output = kept["output"].scatter(1, place, output.to(kept["output"].dtype))
        kept["output"] = output.detach().clone()  # callers may write into what they get
        return output


class RegionalAttention:
    """Goes around a self- or joint attention: queries of the active patches, keys of all."""

    def __init__(self, regions: Regions, site: Site) -> None:
        self.regions, self.path, self.attn = regions, site.path, site.module
        self.joint = site.kind == "joint_attention"
        self.layout, self.grid = regions.family.layout, regions.family.grid(site)

    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mode = self.regions.plan.mode
        self.regions.clock.done[self.path] = "reused" if mode == "regional" else "computed"
        if mode == "full":
            self.grid.require()  # later calls read it, and it's better to refuse the first
            return own(*args, **kwargs)
        return self.mixed(*args, **kwargs)

    def mixed(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **given: Any,
    ) -> Any:
        """What the attention's own forward returns, with the arguments that it takes."""
        if attention_mask is not None and not self.layout.ignores_mask:
            raise InputError(
                "ras attends to all patches and takes no attention mask; call the model without."
            )
        of_image, of_text = self._rotations(self.layout.rotary(given))
        if not self.joint:
            return self._tokens(self._attend(hidden_states, of_image, given))
        if encoder_hidden_states is not None:
            text = self.layout.heads(self.attn, encoder_hidden_states, of_text, added=True)
            image, prompt = self._attend(hidden_states, of_image, given, text).split(
                [hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=2
            )
            return self._tokens(image), self._tokens(prompt, added=True)
        return self._one_stream(hidden_states, of_image, of_text, given)

    def _one_stream(
        self,
        x: Tensor,
        of_image: Rotary | None,
        of_text: Rotary | None,
        given: dict[str, Any],
    ) -> Tensor:
        """Of image and text in one sequence, projected by the same layers."""
        active = self.regions.active
        count = self.grid.tokens if active is None else active.shape[1]
        image, prompt = (x[:, part] for part in self.grid.streams(x.shape[1], count))
        text = self.layout.heads(self.attn, prompt, of_text)
        parts = self._attend(image, of_image, given, text).split([count, prompt.shape[1]], dim=2)
        tokens = [self._tokens(part) for part in parts]
        return torch.cat(tokens[:: 1 if self.grid.image_first else -1], dim=1)

    def _attend(
        self,
        image: Tensor,
        rotary: Rotary | None,
        given: dict[str, Any],
        text: Heads | None = None,
    ) -> Tensor:
        """Mixed heads of the patches `image` and of the text behind them."""
        query, key, value = self.layout.heads(self.attn, image, rotary)
        key, value = self.regions.attended(self.path, key, value)
        scale = self.layout.scale(self.attn, key.shape[2], given)
        if text is not None:
            both = zip((query, key, value), text, strict=True)
            query, key, value = (torch.cat(streams, dim=2) for streams in both)
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)

    def _tokens(self, mixed: Tensor, added: bool = False) -> Tensor:
        return self.layout.tokens(self.attn, mixed, added)

    def _rotations(self, rotary: Rotary | None) -> tuple[Rotary | None, Rotary | None]:
        """Rotations of the computed patches, and of the text."""
        if rotary is None or rotary.cos.ndim == 3:  # the embedding has left those of the others out
            return rotary, None
        image, text = self.grid.streams(len(rotary.cos))
        of_image, active = rotary.at(image), self.regions.active
        return of_image if active is None else of_image.at(active), rotary.at(text)
