"""A whole text-to-image pipeline at toy size, with the house tokenizer; it paints 64 px noise."""

from pathlib import Path

import torch

from pared.anatomy import presets
from pared.worlds import house


def write(folder: Path) -> Path:
    """Save the pipeline as an ordinary diffusers folder."""
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(house.folder_of("house:clip"))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=300,
        bos_token_id=0,
        eos_token_id=1,
    )
    toy = presets.get("toy:pixart")
    config = toy.denoiser.config | {"sample_size": 8, "caption_channels": 32, "out_channels": 4}
    PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(text).eval(),
        vae=AutoencoderKL(**toy.vae.config).eval(),
        transformer=PixArtTransformer2DModel(**config).eval(),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0
        ),
    ).save_pretrained(folder)
    return folder
