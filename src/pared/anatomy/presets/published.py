"""Published models: the numbers of their configuration files.

Steps and guidance are the defaults of the stock diffusers pipelines.
"""

from pared.anatomy.presets.records import Component, Preset

# Text encoders and autoencoders that several models share -----------------------------------------

_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
_UMT5_XXL = _T5_XXL | {"vocab_size": 256_384}
_GEMMA_2B = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 256_000,
}
_CLIP = "transformers.CLIPTextModel"
_CLIP_PROJECTED = "transformers.CLIPTextModelWithProjection"


def _t5_xxl(tokens: int) -> Component:
    return Component("transformers.T5EncoderModel", _T5_XXL, 4_762_310_656, tokens)


def _vae(parameters: int, channels: int, scaling: float, sample_size: int, **more) -> Component:
    config = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        "sample_size": sample_size,
        "scaling_factor": scaling,
        **more,
    }
    return Component("diffusers.AutoencoderKL", config, parameters)


_NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
_SD_VAE = _vae(83_653_863, 4, 0.18215, 512)
_SDXL_VAE = _vae(83_653_863, 4, 0.13025, 1024)
_SD3_VAE = _vae(83_819_683, 16, 1.5305, 1024, shift_factor=0.0609, **_NO_QUANT)
_WAN_VAE = Component("diffusers.AutoencoderKLWan", {}, 126_892_531)
_FLUX_VAE = _vae(83_819_683, 16, 0.3611, 1024, shift_factor=0.1159, **_NO_QUANT)


def _wan(name: str, heads: int, layers: int, width: int, parameters: int) -> Preset:
    """Wan 2.1, text to video, in one of its two sizes.

    Args:
        name: of the size, as it's published.
        heads: of an attention, each 128 channels wide.
        layers: number of blocks.
        width: of the feed-forwards.
        parameters: of the denoiser.
    """
    return Preset(
        name=f"wan2.1-t2v-{name.lower()}",
        summary=f"Wan 2.1 {name}: a video DiT with cross-attention to UMT5, 81 frames of 480 p",
        hub=f"Wan-AI/Wan2.1-T2V-{name}-Diffusers",
        denoiser=Component(
            "diffusers.WanTransformer3DModel",
            {
                "patch_size": (1, 2, 2),
                "num_attention_heads": heads,
                "attention_head_dim": 128,
                "in_channels": 16,
                "out_channels": 16,
                "text_dim": 4096,
                "freq_dim": 256,
                "ffn_dim": width,
                "num_layers": layers,
                "cross_attn_norm": True,
                "qk_norm": "rms_norm_across_heads",
                "rope_max_seq_len": 1024,
            },
            parameters,
        ),
        vae=_WAN_VAE,
        text_encoders=(Component("transformers.UMT5EncoderModel", _UMT5_XXL, 5_680_910_336, 512),),
        text_tokens=512,
        steps=50,
        guidance=5.0,
        passes=2,
        height=480,
        width=832,
        vae_scale=8,
        latent_channels=16,
        frames=81,
    )


# The presets
# ---------------------------------------------------------------------------------------

PUBLISHED = (
    Preset(
        name="pixart-sigma",
        summary="PixArt-Sigma XL/2: a DiT with cross-attention to T5, 1024 px",
        hub="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        denoiser=Component(
            "diffusers.PixArtTransformer2DModel",
            {
                "sample_size": 128,
                "num_layers": 28,
                "num_attention_heads": 16,
                "attention_head_dim": 72,
                "cross_attention_dim": 1152,
                "caption_channels": 4096,
                "in_channels": 4,
                "out_channels": 8,
                "patch_size": 2,
                # Positions are those of the 512 px model, stretched: 2 at 1024 px, 4 at 2048 px.
                "interpolation_scale": 2,
                "use_additional_conditions": False,
            },
            610_856_096,
        ),
        vae=_SDXL_VAE,
        text_encoders=(_t5_xxl(300),),
        text_tokens=300,
        steps=20,
        guidance=4.5,
        passes=2,
        height=1024,
        width=1024,
        vae_scale=8,
        latent_channels=4,
    ),
    Preset(
        name="sd3.5-medium",
        summary="Stable Diffusion 3.5 Medium: an MM-DiT with dual attention, 1024 px",
        hub="stabilityai/stable-diffusion-3.5-medium",
        denoiser=Component(
            "diffusers.SD3Transformer2DModel",
            {
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 24,
                "num_attention_heads": 24,
                "attention_head_dim": 64,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
            2_243_171_520,
        ),
        vae=_SD3_VAE,
        text_encoders=(
            Component(_CLIP_PROJECTED, _CLIP_L, 123_650_304, 77),
            Component(_CLIP_PROJECTED, _CLIP_BIG_G, 694_659_840, 77),
            _t5_xxl(256),
        ),
        # The two CLIP encoders are joined along the width, T5 follows along the sequence.
        text_tokens=333,
        steps=28,
        guidance=7.0,
        passes=2,
        height=1024,
        width=1024,
        vae_scale=8,
        latent_channels=16,
    ),
    Preset(
        name="flux.1-dev",
        summary="FLUX.1 [dev]: two- and one-stream blocks, distilled guidance, 1024 px",
        hub="black-forest-labs/FLUX.1-dev",
        denoiser=Component(
            "diffusers.FluxTransformer2DModel",
            {
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "num_attention_heads": 24,
                "attention_head_dim": 128,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
                "axes_dims_rope": (16, 56, 56),
            },
            11_901_408_320,
        ),
        vae=_FLUX_VAE,
        # CLIP gives the pooled vector only.
        text_encoders=(Component(_CLIP, _CLIP_L, 123_060_480, 77), _t5_xxl(512)),
        text_tokens=512,
        steps=28,
        guidance=3.5,
        passes=1,
        height=1024,
        width=1024,
        vae_scale=8,
        latent_channels=16,
    ),
    Preset(
        name="dit-xl-2",
        summary="DiT-XL/2: ImageNet classes, 256 px",
        hub="facebook/DiT-XL-2-256",
        denoiser=Component(
            "diffusers.DiTTransformer2DModel",
            {
                "sample_size": 32,
                "num_layers": 28,
                "num_attention_heads": 16,
                "attention_head_dim": 72,
                "in_channels": 4,
                "out_channels": 8,
                "patch_size": 2,
                "num_embeds_ada_norm": 1000,
            },
            749_826_464,
        ),
        vae=_SD_VAE,
        text_encoders=(),
        text_tokens=0,
        steps=50,
        guidance=4.0,
        passes=2,
        height=256,
        width=256,
        vae_scale=8,
        latent_channels=4,
    ),
    Preset(
        name="sd1.5",
        summary="Stable Diffusion 1.5: a U-Net with cross-attention to CLIP, 512 px",
        hub="stable-diffusion-v1-5/stable-diffusion-v1-5",
        denoiser=Component(
            "diffusers.UNet2DConditionModel",
            {
                "sample_size": 64,
                "cross_attention_dim": 768,
                "block_out_channels": (320, 640, 1280, 1280),
                # Heads, in spite of the name.
                "attention_head_dim": 8,
            },
            859_520_964,
        ),
        vae=_SD_VAE,
        text_encoders=(Component(_CLIP, _CLIP_L, 123_060_480, 77),),
        text_tokens=77,
        steps=50,
        guidance=7.5,
        passes=2,
        height=512,
        width=512,
        vae_scale=8,
        latent_channels=4,
    ),
    Preset(
        name="sdxl",
        summary="Stable Diffusion XL: a U-Net with deep attention at two levels, 1024 px",
        hub="stabilityai/stable-diffusion-xl-base-1.0",
        denoiser=Component(
            "diffusers.UNet2DConditionModel",
            {
                "sample_size": 128,
                "cross_attention_dim": 2048,
                "block_out_channels": (320, 640, 1280),
                "down_block_types": (
                    "DownBlock2D",
                    "CrossAttnDownBlock2D",
                    "CrossAttnDownBlock2D",
                ),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            2_567_463_684,
        ),
        vae=_SDXL_VAE,
        text_encoders=(
            Component(_CLIP, _CLIP_L, 123_060_480, 77),
            Component(_CLIP_PROJECTED, _CLIP_BIG_G, 694_659_840, 77),
        ),
        text_tokens=77,
        steps=50,
        guidance=5.0,
        passes=2,
        height=1024,
        width=1024,
        vae_scale=8,
        latent_channels=4,
    ),
    _wan("1.3B", heads=12, layers=30, width=8_960, parameters=1_418_996_800),
    _wan("14B", heads=40, layers=40, width=13_824, parameters=14_288_491_584),
    Preset(
        name="lumina-next",
        summary="Lumina-Next SFT: a DiT with fewer key heads and cross-attention to Gemma, 1024 px",
        hub="Alpha-VLLM/Lumina-Next-SFT-diffusers",
        denoiser=Component(
            "diffusers.LuminaNextDiT2DModel",
            {
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": 4,
                "hidden_size": 2304,
                "num_layers": 24,
                "num_attention_heads": 32,
                "num_kv_heads": 8,
                "multiple_of": 256,
                "norm_eps": 1e-5,
                "learn_sigma": True,
                "qk_norm": True,
                "cross_attention_dim": 2048,
            },
            1_754_898_976,
        ),
        vae=_SDXL_VAE,
        text_encoders=(Component("transformers.GemmaModel", _GEMMA_2B, 2_506_172_416, 256),),
        text_tokens=256,
        steps=30,
        guidance=4.0,
        passes=2,
        height=1024,
        width=1024,
        vae_scale=8,
        latent_channels=4,
    ),
)
