"""Stock pipelines around toy parts, with weights at random: what a recipe's model may come from."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from pared.anatomy import presets
from pared.worlds.house import folder_of


def clip(width: int, projected: bool = False) -> Any:
    """A CLIP text encoder with the house tokenizer's vocabulary."""
    config = CLIPTextConfig(
        vocab_size=2222, hidden_size=width, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=300, projection_dim=width,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(channels: int) -> AutoencoderKL:
    """An autoencoder of 8 x 8 pixels a latent."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.0,
    )


def pipeline(family: str) -> Any:
    """The stock pipeline of a family, everything of it a toy."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(folder_of("house:clip"), model_max_length=12)
    model = presets.build(f"toy:{family}", device="cpu")
    if family == "pixart":
        scheduler = DPMSolverMultistepScheduler()
        return PixArtSigmaPipeline(tokenizer, clip(64), vae(4), model, scheduler)
    if family == "unet":
        return StableDiffusionPipeline(
            vae(4), clip(32), tokenizer, model, DPMSolverMultistepScheduler(steps_offset=1),
            None, None, requires_safety_checker=False,
        )  # fmt: skip
    if family == "sdxl":
        encoders = clip(32), clip(32, True), tokenizer, tokenizer
        scheduler = EulerDiscreteScheduler()
        return StableDiffusionXLPipeline(vae(4), *encoders, model, scheduler, add_watermarker=False)
    flow = FlowMatchEulerDiscreteScheduler()
    if family == "sd3":
        encoders = clip(32, True), tokenizer, clip(32, True), tokenizer
        return StableDiffusion3Pipeline(model, flow, vae(16), *encoders, None, None)
    t5 = T5EncoderModel(
        T5Config(vocab_size=2222, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    ).eval()
    return FluxPipeline(flow, vae(16), clip(32), tokenizer, t5, tokenizer, model)
