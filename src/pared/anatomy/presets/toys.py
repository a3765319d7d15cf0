"""Toys: the published models' classes at a size that a test or a first try runs in milliseconds.

Random weights only. Pictures are 128 px, latents 16 x 16, prompts 16 tokens per encoder; videos
have 5 frames, 2 in their latents.
"""

from typing import Any

from pared.anatomy.presets.records import Component, Preset

TOKENS = 16

_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
    "vocab_size": 1000,
    "max_position_embeddings": TOKENS,
    "bos_token_id": 998,
    "eos_token_id": 999,
}
_T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 1000,
    "feed_forward_proj": "gated-gelu",
}
_GEMMA = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 1000,
}
CLIP = Component("transformers.CLIPTextModel", _CLIP, 49_664, TOKENS)
CLIP_PROJECTED = Component("transformers.CLIPTextModelWithProjection", _CLIP, 50_688, TOKENS)
T5 = Component("transformers.T5EncoderModel", _T5, 121_792, TOKENS)
# Unlike T5's, its layers don't share their table of relative positions.
UMT5 = Component("transformers.UMT5EncoderModel", _T5, 121_920, TOKENS)
GEMMA = Component("transformers.GemmaModel", _GEMMA, 109_376, TOKENS)


def _vae(channels: int, parameters: int) -> Component:
    config = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": channels,
        "sample_size": 128,
        "scaling_factor": 1.0,
    }
    return Component("diffusers.AutoencoderKL", config, parameters)


VAE_4 = _vae(4, 67_231)
VAE_16 = _vae(16, 73_675)
VAE_VIDEO = Component(
    "diffusers.AutoencoderKLWan",
    {"base_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1},
    53_883,
)


def _toy(
    name: str, summary: str, denoiser: Component, encoders: tuple[Component, ...], **changed
) -> Preset:
    """A toy preset: what all toys have in common, and what this one changes."""
    settings: dict[str, Any] = {
        "vae": VAE_4,
        "text_tokens": TOKENS if encoders else 0,
        "guidance": 4.0,
        "passes": 2,
        "latent_channels": 4,
    } | changed
    return Preset(
        name=f"toy:{name}",
        summary=summary,
        hub="",
        denoiser=denoiser,
        text_encoders=encoders,
        steps=4,
        height=128,
        width=128,
        vae_scale=8,
        **settings,
    )


TOYS = (
    _toy(
        "pixart",
        "PixArt with 2 blocks of width 32",
        Component(
            "diffusers.PixArtTransformer2DModel",
            {
                "sample_size": 16,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "cross_attention_dim": 32,
                "caption_channels": 64,
                "in_channels": 4,
                "out_channels": 8,
                "patch_size": 2,
                "use_additional_conditions": False,
            },
            54_400,
        ),
        (T5,),
    ),
    _toy(
        "dit",
        "DiT with 2 blocks of width 32 and 10 classes",
        Component(
            "diffusers.DiTTransformer2DModel",
            {
                "sample_size": 16,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 8,
                "patch_size": 2,
                "num_embeds_ada_norm": 10,
            },
            60_800,
        ),
        (),
    ),
    _toy(
        "sd3",
        "MM-DiT with 3 blocks of width 32: dual attention, plain, no text output",
        Component(
            "diffusers.SD3Transformer2DModel",
            {
                "sample_size": 16,
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 3,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "joint_attention_dim": 64,
                "caption_projection_dim": 32,
                "pooled_projection_dim": 64,
                "pos_embed_max_size": 24,
                "dual_attention_layers": (0,),
                "qk_norm": "rms_norm",
            },
            128_256,
        ),
        (CLIP_PROJECTED, CLIP_PROJECTED, T5),
        text_tokens=2 * TOKENS,
        vae=VAE_16,
        latent_channels=16,
    ),
    _toy(
        "flux",
        "FLUX with 2 two-stream and 2 one-stream blocks of width 32",
        Component(
            "diffusers.FluxTransformer2DModel",
            {
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 2,
                "num_single_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "joint_attention_dim": 64,
                "pooled_projection_dim": 32,
                "guidance_embeds": True,
                "axes_dims_rope": (4, 6, 6),
            },
            136_320,
        ),
        (CLIP, T5),
        vae=VAE_16,
        latent_channels=16,
        guidance=3.5,
        passes=1,
    ),
    _toy(
        "unet",
        "Stable Diffusion 1 U-Net with 2 levels of width 32 and 64",
        Component(
            "diffusers.UNet2DConditionModel",
            {
                "sample_size": 16,
                "cross_attention_dim": 32,
                "block_out_channels": (32, 64),
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "layers_per_block": 1,
                "norm_num_groups": 8,
                # Heads, in spite of the name.
                "attention_head_dim": 2,
            },
            792_964,
        ),
        (CLIP,),
    ),
    _toy(
        "sdxl",
        "Stable Diffusion XL U-Net with 2 levels of width 32 and 64",
        Component(
            "diffusers.UNet2DConditionModel",
            {
                "sample_size": 16,
                "cross_attention_dim": 64,
                "block_out_channels": (32, 64),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "transformer_layers_per_block": (1, 2),
                "attention_head_dim": (2, 4),
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                # The pooled prompt (32) and six sizes.
                "projection_class_embeddings_input_dim": 32 + 6 * 8,
            },
            1_360_740,
        ),
        (CLIP, CLIP_PROJECTED),
    ),
    _toy(
        "wan",
        "Wan, text to video, with 2 blocks of width 32",
        Component(
            "diffusers.WanTransformer3DModel",
            {
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "in_channels": 16,
                "out_channels": 16,
                "text_dim": 64,
                "freq_dim": 32,
                "ffn_dim": 64,
            },
            41_888,
        ),
        (UMT5,),
        vae=VAE_VIDEO,
        latent_channels=16,
        frames=5,
    ),
    _toy(
        "lumina",
        "Lumina-Next with 2 blocks of width 32, 2 query heads to 1 of keys",
        Component(
            "diffusers.LuminaNextDiT2DModel",
            {
                "sample_size": 16,
                "patch_size": 2,
                "in_channels": 4,
                "hidden_size": 32,
                "num_layers": 2,
                "num_attention_heads": 2,
                "num_kv_heads": 1,
                "multiple_of": 32,
                "learn_sigma": True,
                "qk_norm": True,
                "cross_attention_dim": 64,
            },
            54_116,
        ),
        (GEMMA,),
    ),
)
