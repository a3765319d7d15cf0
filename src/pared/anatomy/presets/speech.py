"""Speech recognisers: the numbers of the published configurations, and toys of the same classes."""

from typing import Any

from pared.anatomy.presets.records import Component, SpeechPreset

_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "vocab_size": 32,
}
_CONFORMER = _LARGE | {"hidden_act": "swish"}
# Training that drops layers, features or activations at random is left to those who want it.
_STILL = {
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
}
# One frame for 80 samples.
_TOY = _STILL | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 4, 4),
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}


def _whisper(
    size: str, layers: int, width: int, heads: int, parameters: int, **more: Any
) -> SpeechPreset:
    """A Whisper whose decoder is as large as its encoder."""
    config = {"d_model": width} | more
    for part in ("encoder", "decoder"):
        config |= {
            f"{part}_layers": layers,
            f"{part}_attention_heads": heads,
            f"{part}_ffn_dim": 4 * width,
        }
    return SpeechPreset(
        name=f"whisper-{size}",
        summary=f"Whisper {size}: {layers} layers of width {width}, and a decoder likewise",
        hub=f"openai/whisper-{size}",
        recogniser=Component(
            "transformers.WhisperForConditionalGeneration",
            config,
            parameters,
            depth="encoder_layers",
        ),
    )


def _audio(
    name: str, summary: str, cls: str, config: dict[str, Any], parameters: int, hub: str = ""
) -> SpeechPreset:
    """A recogniser that reads the waveform."""
    component = Component(f"transformers.{cls}", config, parameters, depth="num_hidden_layers")
    return SpeechPreset(name=name, summary=summary, hub=hub, recogniser=component)


PUBLISHED_SPEECH = (
    _audio(
        "wav2vec2-base",
        "wav2vec 2.0 base with a CTC head: 12 layers of width 768",
        "Wav2Vec2ForCTC",
        {"vocab_size": 32},
        94_396_320,
        "facebook/wav2vec2-base-960h",
    ),
    _audio(
        "wav2vec2-large",
        "wav2vec 2.0 large with a CTC head: 24 layers of width 1024",
        "Wav2Vec2ForCTC",
        _LARGE | {"do_stable_layer_norm": True},
        315_471_520,
        "facebook/wav2vec2-large-960h-lv60-self",
    ),
    _audio(
        "conformer-large",
        "wav2vec 2.0 Conformer with relative positions and a CTC head: 24 layers of width 1024",
        "Wav2Vec2ConformerForCTC",
        _CONFORMER,
        618_591_904,
        "facebook/wav2vec2-conformer-rel-pos-large-960h-ft",
    ),
    _audio(
        "conformer-rope-large",
        "the same with what the class calls rotary positions",
        "Wav2Vec2ConformerForCTC",
        _CONFORMER | {"position_embeddings_type": "rotary"},
        593_376_928,
        "facebook/wav2vec2-conformer-rope-large-960h-ft",
    ),
    _whisper("base", 6, 512, 8, 72_593_920),
    _whisper("large-v3", 32, 1280, 20, 1_543_490_560, num_mel_bins=128, vocab_size=51_866),
)

TOY_SPEECH = (
    _audio(
        "toy:wav2vec2",
        "wav2vec 2.0 with a CTC head and 2 layers of width 32",
        "Wav2Vec2ForCTC",
        _TOY,
        22_664,
    ),
    _audio(
        "toy:conformer",
        "wav2vec 2.0 Conformer with relative positions, a CTC head and 2 layers of width 32",
        "Wav2Vec2ConformerForCTC",
        _TOY | {"conv_depthwise_kernel_size": 5, "conformer_conv_dropout": 0.0},
        40_200,
    ),
    SpeechPreset(
        name="toy:whisper",
        summary="Whisper with 2 layers of width 32 in the encoder and 1 in the decoder",
        hub="",
        recogniser=Component(
            "transformers.WhisperForConditionalGeneration",
            {
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 64,
                "decoder_layers": 1,
                "decoder_attention_heads": 2,
                "decoder_ffn_dim": 64,
                "num_mel_bins": 16,
                "max_source_positions": 30,
                "max_target_positions": 16,
                "vocab_size": 64,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 1,
                "begin_suppress_tokens": None,
            },
            38_112,
            depth="encoder_layers",
        ),
    ),
)
