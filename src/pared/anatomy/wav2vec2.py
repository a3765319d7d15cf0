"""wav2vec 2.0 (Baevski et al., arXiv 2006.11477) and HuBERT: Transformers over waveforms.

Positions come from one wide convolution before the first block. The smaller models normalise before
the blocks and behind each residual branch, the larger ones in front of each.
"""

from typing import ClassVar

from pared.anatomy.base import Parts
from pared.anatomy.speech import AudioEncoder, NoPositions


class Wav2Vec2(AudioEncoder):
    name = "wav2vec2"
    classes = (
        "Wav2Vec2Model",
        "Wav2Vec2ForCTC",
        "Wav2Vec2ForPreTraining",
        "HubertModel",
        "HubertForCTC",
    )
    parts: ClassVar[Parts] = {
        "attention": ("self_attention", "audio"),
        "feed_forward": ("feed_forward", "audio"),
    }
    positions_by = "convolution"
    whole = "the convolution that tells positions reaches far into the future"

    @property
    def positions(self) -> str:
        return self.inside("pos_conv_embed")

    def drop_positions(self) -> None:
        self.replace(self.positions, NoPositions())
