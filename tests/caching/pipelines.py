"""Stock pipelines at toy size, and the ways in which they call their denoisers.

No text encoders: prompts come as embeddings. `WAYS` lists what a run-time method meets: every
family of denoisers, plain and guided (on a joint batch or by calls in turn), from noise, from a
picture and under a mask, with a ControlNet, with schedules that repeat timesteps.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from pared.anatomy import presets
from pared.bench import peers

# Steps of a run from noise; a picture or a mask leaves 6 of them.
STEPS = 7
STRENGTH = 0.9


@dataclass(frozen=True, eq=False)
class Way:
    """One pipeline and one way of calling it.

    Attributes:
        name: "PIPELINE" or "PIPELINE, WAY".
        family: of its denoiser.
        cls: name of the pipeline's class.
        passes: calls of the denoiser per step.
        scheduler: makes its scheduler.
        call: arguments of its call that aren't those of all pipelines of the family.
        config: arguments of the denoiser that differ from its toy's.
        pictured: whether it starts from a picture; "mask" with a mask over it.
        sizes: of pictures in pixels; None where the denoiser makes one size only.
    """

    name: str
    family: str
    cls: str
    passes: int = 1
    scheduler: Callable[[], Any] = diffusers.FlowMatchEulerDiscreteScheduler
    call: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    pictured: bool | str = False
    sizes: tuple[tuple[int, int], ...] | None = ((64, 64), (64, 96))

    @property
    def toy(self) -> str:
        return "toy:sdxl" if "XL" in self.cls else f"toy:{self.family}"

    def build(self) -> Any:
        """The pipeline, its denoiser's weights the same every time."""
        cls = getattr(diffusers, self.cls)
        main = "unet" if self.family == "unet" else "transformer"
        parts: dict[str, Any] = {main: denoiser(self.toy, self.config)}
        if self.pictured or self.family == "dit":
            parts["vae"] = autoencoder(self.toy)
        if "ControlNet" in self.cls:
            parts["controlnet"] = controlnet(parts["unet"])
        needed = inspect.signature(cls).parameters.values()
        missing = {each.name: None for each in needed if each.default is inspect.Parameter.empty}
        if "requires_safety_checker" in inspect.signature(cls).parameters:
            missing["requires_safety_checker"] = False
        pipe = cls(**(missing | parts | {"scheduler": self.scheduler()}))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def paint(self, pipe: Any, steps: int = STEPS, size: int = 0, seed: int = 0) -> Tensor:
        """Latents of a picture or a video (pictures, of a pipeline that gives no latents).

        Args:
            pipe: from `build`.
            steps: of the call.
            size: which of the sizes; where there is but one, other numbers make two pictures.
            seed: of noise, prompt, picture and mask.
        """
        seeded = torch.Generator().manual_seed(seed)
        given = PROMPTS[self.toy.removeprefix("toy:")](seeded)
        if self.sizes is None:
            given["class_labels"] = [3] if size == 0 else [3, 5]
            given |= {"generator": seeded, "output_type": "pt"}
        else:
            height, width = self.sizes[size]
            given |= {"height": height, "width": width, "output_type": "latent"}
            given["generator"] = torch.Generator().manual_seed(seed)
            image = torch.rand(1, 3, height, width, generator=seeded)
            if self.pictured or "ControlNet" in self.cls:
                given["image"] = image
            if self.pictured:
                given["strength"] = STRENGTH
            if self.pictured == "mask":
                given["mask_image"] = (image[:, :1] > 0.5).float()
        accepted = inspect.signature(type(pipe).__call__).parameters
        given = {name: value for name, value in given.items() if name in accepted}
        output = pipe(**given, **self.call, num_inference_steps=steps)
        return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)


# Parts --------------------------------------------------------------------------------------------


@torch.no_grad()
def denoiser(toy: str, config: dict[str, Any]) -> Any:
    """A toy whose branches all do something, also where their gates start at zero."""
    torch.manual_seed(0)
    model = presets.get(toy).denoiser.make(**config).eval()
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn(weight.shape))
    return model


def autoencoder(toy: str) -> Any:
    torch.manual_seed(0)
    return presets.get(toy).vae.make(shift_factor=0.0).eval()


@torch.no_grad()
def controlnet(unet: Any) -> Any:
    """A ControlNet that is heard: fresh ones end in zeros."""
    torch.manual_seed(0)
    model = diffusers.ControlNetModel.from_unet(unet).eval()
    for weight in model.parameters():
        weight.add_(0.05 * torch.randn(weight.shape))
    return model


def _text(width: int, seeded: torch.Generator, pooled: int = 0) -> dict[str, Any]:
    text = torch.randn(1, 5, width, generator=seeded)
    given = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}
    if pooled:
        vector = torch.randn(1, pooled, generator=seeded)
        given["pooled_prompt_embeds"] = vector
        given["negative_pooled_prompt_embeds"] = torch.zeros_like(vector)
    return given


def _masked(seeded: torch.Generator) -> dict[str, Any]:
    masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
    # Pipelines that have a negative prompt of their own want to be told that there is none.
    return _text(64, seeded) | dict.fromkeys(masks, torch.ones(1, 5)) | {"negative_prompt": None}


PROMPTS: dict[str, Callable[[torch.Generator], dict[str, Any]]] = {
    "unet": lambda seeded: _text(32, seeded),
    "sdxl": lambda seeded: _text(64, seeded, 32),
    "pixart": _masked,
    "lumina": _masked,
    "dit": lambda seeded: {},
    "sd3": lambda seeded: _text(64, seeded, 64),
    "flux": lambda seeded: _text(64, seeded, 32),
    "wan": lambda seeded: _text(64, seeded) | {"num_frames": 5},
}


# Ways ---------------------------------------------------------------------------------------------


def _ddim() -> Any:
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)


def _pndm() -> Any:
    return diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True)


def _heun() -> Any:
    return diffusers.HeunDiscreteScheduler(steps_offset=1)


def _unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


SD = "StableDiffusion"
GUIDED, PLAIN = {"guidance_scale": 4.0}, {"guidance_scale": 1.0}
IN_TURN = {"true_cfg_scale": 3.0}
PIXART = {"use_resolution_binning": False}
# Without dual attention and norms of queries and keys, as in SD 3.0.
SD30 = {"dual_attention_layers": (), "qk_norm": None}

# The first of each family stands for it where time is short.
WAYS = (
    Way("sd", "unet", f"{SD}Pipeline", 1, _ddim, GUIDED),
    Way("sd, unguided", "unet", f"{SD}Pipeline", 1, _ddim, PLAIN),
    Way("sd, repeated timestep", "unet", f"{SD}Pipeline", 1, _pndm, GUIDED),
    Way("sd, second order", "unet", f"{SD}Pipeline", 1, _heun, GUIDED),
    Way("sd img2img", "unet", f"{SD}Img2ImgPipeline", 1, _ddim, GUIDED, pictured=True),
    Way("sd inpaint", "unet", f"{SD}InpaintPipeline", 1, _ddim, GUIDED, pictured="mask"),
    Way("sd controlnet", "unet", f"{SD}ControlNetPipeline", 1, _ddim, GUIDED),
    Way("sdxl", "unet", f"{SD}XLPipeline", 1, diffusers.EulerDiscreteScheduler, GUIDED),
    Way("pixart-sigma", "pixart", "PixArtSigmaPipeline", 1, _ddim, GUIDED | PIXART),
    Way("pixart-sigma, unguided", "pixart", "PixArtSigmaPipeline", 1, _ddim, PLAIN | PIXART),
    Way("dit", "dit", "DiTPipeline", 1, _ddim, GUIDED, {"num_embeds_ada_norm": 1000}, sizes=None),
    Way("sd3.5", "sd3", f"{SD}3Pipeline", call=GUIDED),
    Way("sd3.5, unguided", "sd3", f"{SD}3Pipeline", call=PLAIN),
    Way("sd3", "sd3", f"{SD}3Pipeline", call=GUIDED, config=SD30),
    Way("sd3.5 img2img", "sd3", f"{SD}3Img2ImgPipeline", call=GUIDED, pictured=True),
    Way("sd3.5 inpaint", "sd3", f"{SD}3InpaintPipeline", call=GUIDED, pictured="mask"),
    Way("flux", "flux", "FluxPipeline"),
    Way("flux, guided in turn", "flux", "FluxPipeline", 2, call=IN_TURN),
    Way("flux img2img", "flux", "FluxImg2ImgPipeline", pictured=True),
    Way("wan, guided in turn", "wan", "WanPipeline", 2, _unipc, GUIDED),
    Way("wan, unguided", "wan", "WanPipeline", 1, _unipc, PLAIN),
    Way("lumina", "lumina", "LuminaPipeline", call=GUIDED),
)

# Caches -------------------------------------------------------------------------------------------

# Specs of run-time methods whose defaults reuse nothing in so short a run.
SPECS = {
    "re-ttention": "re-ttention:warmup=1,interval=3,keep=0.25",
    "ras": "ras:start=2,resets=[3]",
}

_SEER = {"cache_interval": 2, "disable_cache_before_step": 2}
_DBCACHE = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 10.0}

# Those of other libraries, each so that it reuses something in a short run on random weights.
PEERS: dict[str, peers.Peer] = {
    "FirstBlockCache": peers.FirstBlockCache(threshold=10.0),
    "TaylorSeer": peers.DiffusersTaylorSeer(**_SEER),
    "TaylorSeer lite": peers.DiffusersTaylorSeer(**_SEER, use_lite_mode=True),
    "MagCache": peers.MagCache(num_inference_steps=STEPS, mag_ratios=(1.0,) * STEPS, threshold=1.0),
    "PAB": peers.PyramidAttentionBroadcast(
        spatial_attention_timestep_skip_range=(0, 1000),
        cross_attention_timestep_skip_range=(0, 1000),
        cross_attention_block_skip_range=2,
    ),
    "cache-dit": peers.CacheDit(**_DBCACHE),
    "cache-dit with TaylorSeer": peers.CacheDit(**_DBCACHE, taylorseer_order=1),
}
