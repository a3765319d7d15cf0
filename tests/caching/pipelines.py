"""Stock pipelines at toy size, and the ways in which they call their denoisers.

No text encoders: prompts come as embeddings. `WAYS` lists what a run-time method meets: every
family of denoisers, plain and guided (on a joint batch or by calls in turn), from noise, from a
picture or a video, under a mask, beside a picture to be edited, with a ControlNet, with schedules
that repeat timesteps.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from pared import info, method
from pared.anatomy import presets
from pared.bench import peers

# Steps of a run from noise; a picture or a mask leaves 6 of them.
STEPS = 7
STRENGTH = 0.9

# Calls that differ from the first, as arguments of `Way.paint`, by what is special to them.
OTHERS = {"another size": {"size": 1}, "another number of steps": {"steps": STEPS - 2}}


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
        pictured: whether it is given a picture or a video; "mask" with a mask over it.
        sizes: of pictures in pixels; None where the denoiser makes one size only.
        bare: whether a cache is given the denoiser alone, and not the pipeline that calls it.
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
    bare: bool = False

    @property
    def toy(self) -> str:
        return "toy:sdxl" if "XL" in self.cls else f"toy:{self.family}"

    def build(self) -> Any:
        """The pipeline, its denoiser's weights the same every time."""
        cls = getattr(diffusers, self.cls)
        main = "unet" if self.family == "unet" else "transformer"
        parts: dict[str, Any] = {main: denoiser(self.toy, self.config)}
        if self.pictured or self.family == "dit" or "ControlNet" in self.cls:
            parts["vae"] = autoencoder(self.toy)
        if "ControlNet" in self.cls:
            parts["controlnet"] = controlnet(parts[main])
        needed = inspect.signature(cls).parameters.values()
        missing = {each.name: None for each in needed if each.default is inspect.Parameter.empty}
        if "requires_safety_checker" in inspect.signature(cls).parameters:
            missing["requires_safety_checker"] = False
        pipe = cls(**(missing | parts | {"scheduler": self.scheduler()}))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def target(self, pipe: Any) -> Any:
        """What a cache is attached to."""
        return method.denoiser(pipe) if self.bare else pipe

    def made(self) -> tuple[Any, Callable[..., Tensor]]:
        """What a cache is attached to, of a fresh pipeline, and what calls that."""
        pipe = self.build()
        return self.target(pipe), partial(self.paint, pipe)

    def paint(
        self,
        pipe: Any,
        steps: int = STEPS,
        size: int = 0,
        seed: int = 0,
        pictures: int = 1,
        **call: Any,
    ) -> Tensor:
        """Latents of pictures or videos (pictures, of a pipeline that gives no latents).

        Args:
            pipe: from `build`.
            steps: of the call.
            size: which of the sizes; where there is but one, other numbers make one picture more.
            seed: of noise, prompt, picture and mask.
            pictures: how many, of one prompt.
            call: more arguments of the pipeline's call.
        """
        seeded = torch.Generator().manual_seed(seed)
        given = {
            name: x.repeat(pictures, *[1] * (x.ndim - 1)) if isinstance(x, Tensor) else x
            for name, x in PROMPTS[self.toy.removeprefix("toy:")](seeded).items()
        }
        if self.sizes is None:
            given["class_labels"] = [3] * pictures + [5] * (size > 0)
            given |= {"generator": seeded, "output_type": "pt"}
        else:
            height, width = self.sizes[size]
            given |= {"height": height, "width": width, "output_type": "latent"}
            given["generator"] = torch.Generator().manual_seed(seed)
            given |= self._pictures(torch.rand(1, 3, height, width, generator=seeded))
        accepted = inspect.signature(type(pipe).__call__).parameters
        given = {name: value for name, value in given.items() if name in accepted}
        with torch.random.fork_rng(devices=[]):
            # That of SD3 with a ControlNet encodes the picture with noise of nobody's generator.
            torch.manual_seed(seed)
            output = pipe(**(given | self.call | call), num_inference_steps=steps)
        return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)

    def _pictures(self, image: Tensor) -> dict[str, Any]:
        """What the call is given of a picture, (1, 3, height, width), under all names there are."""
        if not self.pictured and "ControlNet" not in self.cls:
            return {}
        given = {"image": image, "control_image": image, "video": image.repeat(5, 1, 1, 1)[None]}
        # FLUX Kontext chooses a size of its own unless it's told not to.
        given |= {"_auto_resize": False, "max_area": image.shape[-2] * image.shape[-1]}
        if self.pictured == "mask":
            given["mask_image"] = (image[:, :1] > 0.5).float()
        return given | {"strength": STRENGTH}


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
    part = presets.get(toy).vae
    return part.make(**({} if "Wan" in part.cls else {"shift_factor": 0.0})).eval()


@torch.no_grad()
def controlnet(model: Any) -> Any:
    """A ControlNet that is heard: fresh ones end in zeros."""
    torch.manual_seed(0)
    name = type(model).__name__
    if name == "UNet2DConditionModel":
        net = diffusers.ControlNetModel.from_unet(model)
    else:
        cls = getattr(diffusers, f"{name.partition('Transformer')[0]}ControlNetModel")
        own = {"num_layers": 2, "num_extra_conditioning_channels": 0, "num_single_layers": 1}
        own |= {key: model.config[key] for key in ("attention_head_dim", "num_attention_heads")}
        accepted = inspect.signature(cls.from_transformer).parameters
        net = cls.from_transformer(model, **{k: v for k, v in own.items() if k in accepted})
    for weight in net.parameters():
        weight.add_(0.05 * torch.randn(weight.shape))
    return net.eval()


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


def _euler() -> Any:
    return diffusers.EulerDiscreteScheduler()


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

# Beside its latents it reads those of a picture, and a mask of 4 channels.
FROM_PICTURE = {"in_channels": 36}
CLASSES = {"num_embeds_ada_norm": 1000}

# The first of each family stands for it where time is short.
WAYS = (
    Way("sd", "unet", f"{SD}Pipeline", 1, _ddim, GUIDED),
    Way("sd, unguided", "unet", f"{SD}Pipeline", 1, _ddim, PLAIN),
    Way("sd, repeated timestep", "unet", f"{SD}Pipeline", 1, _pndm, GUIDED),
    Way("sd, second order", "unet", f"{SD}Pipeline", 1, _heun, GUIDED),
    Way("sd img2img", "unet", f"{SD}Img2ImgPipeline", 1, _ddim, GUIDED, pictured=True),
    Way("sd inpaint", "unet", f"{SD}InpaintPipeline", 1, _ddim, GUIDED, pictured="mask"),
    Way("sd controlnet", "unet", f"{SD}ControlNetPipeline", 1, _ddim, GUIDED),
    Way("sdxl", "unet", f"{SD}XLPipeline", 1, _euler, GUIDED),
    Way("sdxl img2img", "unet", f"{SD}XLImg2ImgPipeline", 1, _euler, GUIDED, pictured=True),
    Way("sdxl inpaint", "unet", f"{SD}XLInpaintPipeline", 1, _euler, GUIDED, pictured="mask"),
    Way("sdxl controlnet", "unet", f"{SD}XLControlNetPipeline", 1, _euler, GUIDED),
    Way("pixart-sigma", "pixart", "PixArtSigmaPipeline", 1, _ddim, GUIDED | PIXART),
    Way("pixart-sigma, unguided", "pixart", "PixArtSigmaPipeline", 1, _ddim, PLAIN | PIXART),
    Way("dit", "dit", "DiTPipeline", 1, _ddim, GUIDED, CLASSES, sizes=None),
    Way("dit, unguided", "dit", "DiTPipeline", 1, _ddim, PLAIN, CLASSES, sizes=None),
    Way("sd3.5", "sd3", f"{SD}3Pipeline", call=GUIDED),
    Way("sd3.5, unguided", "sd3", f"{SD}3Pipeline", call=PLAIN),
    Way("sd3", "sd3", f"{SD}3Pipeline", call=GUIDED, config=SD30),
    Way("sd3.5 img2img", "sd3", f"{SD}3Img2ImgPipeline", call=GUIDED, pictured=True),
    Way("sd3.5 inpaint", "sd3", f"{SD}3InpaintPipeline", call=GUIDED, pictured="mask"),
    Way("sd3.5 controlnet", "sd3", f"{SD}3ControlNetPipeline", call=GUIDED),
    Way("flux", "flux", "FluxPipeline"),
    Way("flux, guided in turn", "flux", "FluxPipeline", 2, call=IN_TURN),
    Way("flux img2img", "flux", "FluxImg2ImgPipeline", pictured=True),
    Way("flux inpaint", "flux", "FluxInpaintPipeline", pictured="mask"),
    Way("flux controlnet", "flux", "FluxControlNetPipeline"),
    Way("flux kontext", "flux", "FluxKontextPipeline", pictured=True),
    Way("wan, guided in turn", "wan", "WanPipeline", 2, _unipc, GUIDED),
    Way("wan, unguided", "wan", "WanPipeline", 1, _unipc, PLAIN),
    Way(
        "wan image-to-video, guided in turn",
        "wan",
        "WanImageToVideoPipeline",
        2,
        _unipc,
        GUIDED,
        FROM_PICTURE,
        pictured=True,
    ),
    Way(
        "wan video-to-video, guided in turn",
        "wan",
        "WanVideoToVideoPipeline",
        2,
        _unipc,
        GUIDED,
        pictured=True,
    ),
    Way("lumina", "lumina", "LuminaPipeline", call=GUIDED),
)

FIRST = tuple({way.family: way for way in reversed(WAYS)}.values())[::-1]
BARE = tuple(replace(way, name=f"{way.name}, denoiser alone", bare=True) for way in FIRST)

# What a method refuses in one clear sentence, by slug and way: when it is attached, or (the others)
# at the first call, which alone shows what is in it.
REFUSED = {
    ("ras", "sd3.5 controlnet"): "whose ControlNet adds to all patches",
    ("ras", "flux controlnet"): "whose ControlNet adds to all patches",
    ("ras", "flux kontext"): "reference images are in the sequence",
    ("re-ttention", "flux kontext"): "reference images are in the sequence",
} | {
    ("delta-dit", way.name): "a denoiser alone doesn't say how many a run has"
    for way in BARE
    if way.family != "unet"
}

# Caches -------------------------------------------------------------------------------------------

# Specs of run-time methods whose defaults reuse nothing in so short a run.
SPECS = {
    "deepcache": "deepcache:min_steps=1",
    "re-ttention": "re-ttention:warmup=1,interval=3,keep=0.25",
    "ras": "ras:start=2,resets=[3]",
}

METHODS = {slug: each for slug, each in info.registry().items() if each.kind == "runtime"}


def serving(way: Way) -> list[str]:
    """Specs of the methods that work on a way."""
    fit = [s for s, record in METHODS.items() if way.family in record.families]
    return [SPECS.get(slug, slug) for slug in fit if (slug, way.name) not in REFUSED]


_SEER = {"cache_interval": 2, "disable_cache_before_step": 2}
_DBCACHE = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 2,
    "residual_diff_threshold": 10.0,
    "num_inference_steps": STEPS,
}

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
