"""Recognisers at toy size: real CTC classes of transformers over waveforms and over log-mel."""

from typing import Any

import torch
import transformers

from pared.speech.recognition.model import Recogniser
from pared.speech.recognition.vocabulary import tokenizer_of
from pared.worlds.speech.characters import Characters

CHARACTERS = Characters(" abcdefghijklnot")
CLASSES = {"vocab_size": len(CHARACTERS), "pad_token_id": 0}

# One frame per 20 ms; layer norms, so that nothing but its own sound decides a frame.
FRONT = {
    "conv_dim": [16, 16],
    "conv_kernel": [256, 10],
    "conv_stride": [40, 8],
    "conv_bias": True,
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.1,
}


def conformer(**changes: Any) -> Recogniser:
    """Over waveforms, with relative positions."""
    config = transformers.Wav2Vec2ConformerConfig(
        **(SIZES | FRONT | CLASSES | {"conv_depthwise_kernel_size": 5} | changes)
    )
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return _recogniser(transformers.Wav2Vec2ConformerForCTC, config, extractor)


def wav2vec2(**changes: Any) -> Recogniser:
    """Over waveforms; its groups are normed over the whole sound, and it takes no mask."""
    front = FRONT | {"feat_extract_norm": "group"}
    config = transformers.Wav2Vec2Config(**(SIZES | front | CLASSES | changes))
    extractor = transformers.Wav2Vec2FeatureExtractor()
    return _recogniser(transformers.Wav2Vec2ForCTC, config, extractor)


def bert(**changes: Any) -> Recogniser:
    """Over log-mel features, two of 10 ms to a frame."""
    config = transformers.Wav2Vec2BertConfig(**(SIZES | CLASSES | changes))
    extractor = transformers.SeamlessM4TFeatureExtractor()
    return _recogniser(transformers.Wav2Vec2BertForCTC, config, extractor)


def parakeet(**changes: Any) -> Recogniser:
    """Over log-mel features, eight of 10 ms to a frame."""
    encoder = transformers.ParakeetEncoderConfig(
        **(SIZES | {"subsampling_conv_channels": 4, "layerdrop": 0.0} | changes)
    )
    config = transformers.ParakeetCTCConfig(encoder_config=encoder.to_dict(), **CLASSES)
    extractor = transformers.ParakeetFeatureExtractor()
    return _recogniser(transformers.ParakeetForCTC, config, extractor)


def _recogniser(cls: Any, config: Any, extractor: Any) -> Recogniser:
    torch.manual_seed(0)
    return Recogniser(cls(config).eval(), extractor, tokenizer_of(CHARACTERS))


ALL = {"conformer": conformer, "wav2vec2": wav2vec2, "bert": bert, "parakeet": parakeet}


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    """A sound to be heard something in."""
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))
