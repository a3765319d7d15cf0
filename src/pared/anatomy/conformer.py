"""Conformers over waveforms (Gulati et al., arXiv 2005.08100): `Wav2Vec2ConformerModel`.

    x += 1/2 FFN1(LN x);  x += MHSA(LN x);  x += Conv(x);  x = LN(x + 1/2 FFN2(LN x))

`position_embeddings_type` of the configuration says what the attentions get of positions: relative
ones as in Transformer-XL, "rotary", or none. What the class calls rotary rotates the input of the
projections for queries and keys, not queries and keys. Its wide convolution of positions is never
called.
"""

from typing import Any, ClassVar, cast

from torch import nn

from pared.anatomy.base import Parts
from pared.anatomy.speech import AudioEncoder


class Conformer(AudioEncoder):
    name = "conformer"
    classes = (
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerForCTC",
        "Wav2Vec2ConformerForPreTraining",
    )
    parts: ClassVar[Parts] = {
        "ffn1": ("feed_forward", "audio"),
        "self_attn": ("self_attention", "audio"),
        "conv_module": ("convolution", "audio"),
        "ffn2": ("feed_forward", "audio"),
    }
    convolution = "depthwise_conv"
    positions_by = "attention"

    @property
    def positions(self) -> str:
        return self.inside("embed_positions") if self.config.position_embeddings_type else ""

    def drop_positions(self) -> None:
        if self.positions:
            cast(Any, self.model.get_submodule(self.encoder)).embed_positions = None

    def add_positions(self, module: nn.Module) -> None:
        path = self.inside("dropout")  # through which all frames enter
        self.replace(path, nn.Sequential(module, self.model.get_submodule(path)))

    @property
    def rotates_inputs(self) -> bool:
        return self.config.position_embeddings_type == "rotary"
