"""What conversions of an encoder's self-attentions share: which layers, and what goes with them."""

from abc import abstractmethod
from typing import Any

from pydantic import Field
from torch import nn

from pared import anatomy
from pared.anatomy import Family, Site
from pared.anatomy.sites import chosen
from pared.anatomy.speech import SpeechEncoder
from pared.errors import InputError
from pared.method import Claim, Conversion, stack_of
from pared.speech.hearing import Hearing, hearing_of, leave_out_padding


class EncoderConversion(Conversion):
    """Puts something else in the place of a speech encoder's self-attentions.

    The convolutions of the same blocks are kept from hearing padding, as the papers' are, and from
    hearing the future where frames hear in chunks. The positions that the model came with go once
    no layer has a use for them, whether one conversion took all layers or several took some each.
    """

    layers: tuple[int, ...] | None = Field(
        default=None, description="indices of the blocks to convert; None converts all"
    )
    streaming: bool = Field(
        default=False,
        description="in training, hear in chunks drawn anew for every batch, so that the encoder "
        "can work on a stream afterwards",
    )

    @abstractmethod
    def attention(self, family: SpeechEncoder, site: Site, hearing: Hearing) -> nn.Module:
        """What takes the place of the attention at `site`.

        Its forward gets `hidden_states` (batch, frames, width), and more that it may ignore, and
        returns a pair: mixed frames of the same shape, and None for a map.
        """

    @abstractmethod
    def drops_positions(self, family: SpeechEncoder) -> bool:
        """Whether a converted layer has no use for the positions that the model came with."""

    def sites(self, family: Family) -> list[Site]:
        """The attentions of the chosen layers.

        Raises:
            InputError: a chosen layer doesn't exist.
        """
        return chosen(family, self.info.slug, ("self_attention",), self.layers)

    def positions_go(self, family: Family) -> bool:
        """Whether the model's positions go: all layers are converted, and none has a use for them.

        Those of earlier conversions count too, each as its own conversion says.
        """
        earlier = [m for m in stack_of(family.model) if isinstance(m, EncoderConversion)]
        together = [*earlier, self]
        taken = {site.path for method in together for site in method.sites(family)}
        everywhere = len(taken) == len(family.sites("self_attention"))
        return everywhere and all(method.drops_positions(family) for method in together)

    def claims(self, family: Family) -> list[Claim]:
        paths = [site.path for site in (*self.sites(family), *self._convolutions(family))]
        if self.positions_go(family) and family.positions:
            paths.append(family.positions)
        return [Claim(path, "replaces") for path in paths]

    def convert(self, model: nn.Module) -> None:
        family: Any = anatomy.of(model)
        hearing = hearing_of(model)
        hearing.draws |= self.streaming
        for site in self.sites(family):
            weight = next(site.module.parameters())  # others may lie elsewhere than on meta
            new = self.attention(family, site, hearing).to(weight.device, weight.dtype)
            family.replace(site.path, new.train(site.module.training))
        leave_out_padding(model, self._convolutions(family))
        if self.positions_go(family):
            family.drop_positions()

    def _convolutions(self, family: Family) -> list[Site]:
        blocks = {site.block for site in self.sites(family)}
        return [site for site in family.sites("convolution") if site.block in blocks]

    def healing(self, task: Any) -> Any:
        raise InputError(
            f"{self.info.slug} is trained as a recogniser is, by pared.objectives.ctc.CTC or the "
            "model's own loss; pared.heal trains denoisers."
        )
