"""Painting many prompts, each from a noise of its own: what the quality scripts share."""

from typing import Any

import torch

from pared.tasks.sampling import sample
from pared.worlds.tasks import Examples

AT_ONCE = 32
# What only pipelines of the PixArt type take: no table of sizes fits 64 pixels, and captions are
# clean.
OF_PIXART = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 32}


def painted(pipeline: Any, prompts: list[str], steps: int, guidance: float) -> torch.Tensor:
    """One picture of 64 pixels for each prompt, (prompts, 3, 64, 64) in [0, 1], on the CPU.

    Args:
        pipeline: of a house model.
        prompts: the noise of each comes from its number.
        steps: of sampling.
        guidance: scale; 1 paints the model's own distribution, in half the time.
    """
    extra = OF_PIXART if "PixArt" in type(pipeline).__name__ else {}
    found = []
    for start in range(0, len(prompts), AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        with torch.autocast(pipeline.device.type, torch.bfloat16):
            images = pipeline(
                some,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(some))],
                height=64,
                width=64,
                output_type="pt",
                **extra,
            ).images
        found.append(images.float().cpu())
    return torch.cat(found)


def repainted(
    pipeline: Any, task: str, examples: Examples, steps: int, seed: int = 0, **guidance: float
) -> torch.Tensor:
    """What a pipeline makes of the examples of a task, (examples, 3, 64, 64), on the CPU.

    Args:
        pipeline: whose denoiser was taught the task.
        task: its name.
        examples: prompts and given pictures.
        steps: of sampling.
        seed: of the noise; every batch has its own.
        guidance: scales, as `pared.tasks.sampling.sample` takes them.
    """
    found = []
    for some in torch.arange(len(examples)).split(AT_ONCE):
        given = None
        if examples.before:
            given = examples.images[[examples.before[i] for i in some]]
        generator = torch.Generator().manual_seed(1000 * seed + int(some[0]))
        words = [examples.texts[i] for i in some]
        with torch.autocast(pipeline.device.type, torch.bfloat16):
            found.append(
                sample(pipeline, task, words, given, steps, generator=generator, **guidance).cpu()
            )
    return torch.cat(found)
