"""Caches of other libraries beside pared's own: as arms of the bench, and tried on any pipeline.

Each is a run-time method that does nothing but switch the other library's cache on and off again,
by that library's public interface, with the library's own defaults:

    pared.bench(pipe, {"base": [], "FBC": [peers.FirstBlockCache()], "ours": [pared.TaylorSeer()]})

diffusers' caches are configurations for `enable_cache`; models whose class has no such method are
given the library's functions, whose hooks are then taken off one by one. cache-dit is used where it
is installed (pip install 'pared[peers]'). What they can't do they say, or they don't: `tried` finds
out, and `pared.bench.in_a_row` whether they last.
"""

import sys
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from diffusers import hooks
from pydantic import Field
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import Family
from pared.errors import InputError
from pared.info import Info
from pared.method import Claim, Handle, RuntimeMethod, apply, denoiser

# Whether a peer can do something with a family is what is to be found out.
FAMILIES = tuple({f.name: f for f in anatomy.families().values() if f.kind == "denoiser"})


def _info(slug: str, summary: str, cls: str) -> Info:
    return Info(
        slug=slug,
        title=summary,
        arxiv="",
        venue="",
        kind="runtime",
        families=FAMILIES,
        training=False,
        exact=False,
        maturity="faithful",
        summary=summary,
        cls=cls,
    )


class Peer(RuntimeMethod):
    """A cache of another library."""

    @staticmethod
    def is_installed() -> bool:
        """Whether that library can be imported; diffusers always can."""
        return True

    def claims(self, family: Family) -> list[Claim]:
        # Which modules it takes is the other library's business.
        return [Claim("denoiser", "reuses")]


# diffusers ----------------------------------------------------------------------------------------


class DiffusersCache(Peer):
    """A cache of diffusers.

    Attributes:
        function: what puts it on a model without `enable_cache`.
    """

    function: ClassVar[Callable[[nn.Module, Any], None]]

    @abstractmethod
    def config(self, pipeline: Any) -> Any:
        """The configuration that diffusers takes."""

    def attach(self, pipeline: Any) -> Handle:
        model: Any = anatomy.unwrap(denoiser(pipeline))
        config, before = self.config(pipeline), hooks_on(model)
        with ExitStack() as undo:
            undo.callback(_unhook, model, before)
            if hasattr(model, "enable_cache"):
                model.enable_cache(config)
                undo.callback(model.disable_cache)
            else:
                type(self).function(model, config)
            found = len(hooks_on(model) - before)
            return Handle(undo.pop_all(), (self,), {"hooks": found})


def hooks_on(model: nn.Module) -> set[tuple[str, str]]:
    """The hooks that diffusers put on the modules of a model: path of the module, and name."""
    return {
        (path, name)
        for path, module in model.named_modules()
        for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", ())
    }


def _unhook(model: nn.Module, left: set[tuple[str, str]]) -> None:
    """Take all hooks of diffusers off that aren't among those to be left."""
    for path, name in hooks_on(model) - left:
        registry: Any = model.get_submodule(path)._diffusers_hook
        registry.remove_hook(name, recurse=False)


class FirstBlockCache(DiffusersCache):
    """All blocks behind the first add what they added before, while the first changes little."""

    info = _info("diffusers-fbc", "First Block Cache of diffusers", "FirstBlockCache")
    function = hooks.apply_first_block_cache

    threshold: float = Field(default=0.05, gt=0, description="change of the first block, relative")

    def config(self, pipeline: Any) -> Any:
        return hooks.FirstBlockCacheConfig(self.threshold)


class DiffusersTaylorSeer(DiffusersCache):
    """Outputs of attentions by a Taylor series; in lite mode the last projection's alone."""

    info = _info("diffusers-taylorseer", "TaylorSeer of diffusers", "DiffusersTaylorSeer")
    function = hooks.apply_taylorseer_cache

    cache_interval: int = Field(default=5, ge=1, description="steps to the next full one")
    disable_cache_before_step: int = Field(default=3, ge=0, description="full steps at the start")
    max_order: int = Field(default=1, ge=0, description="of the series")
    use_lite_mode: bool = Field(default=False, description="skip all blocks")

    def config(self, pipeline: Any) -> Any:
        return hooks.TaylorSeerCacheConfig(**self.model_dump())


class MagCache(DiffusersCache):
    """Blocks are skipped while the magnitudes of their residuals promise little error."""

    info = _info("diffusers-magcache", "MagCache of diffusers", "MagCache")
    function = hooks.apply_mag_cache

    threshold: float = Field(default=0.06, gt=0, description="error that may add up")
    max_skip_steps: int = Field(default=3, ge=1, description="steps skipped in a row, at most")
    retention_ratio: float = Field(default=0.2, ge=0, le=1, description="of steps never skipped")
    num_inference_steps: int = Field(default=28, ge=1, description="of the pipeline's call")
    mag_ratios: tuple[float, ...] | None = Field(
        default=None, description="measured on the model; diffusers knows those of FLUX alone"
    )

    def config(self, pipeline: Any) -> Any:
        ratios: Any = self.mag_ratios
        if ratios is None:
            family = anatomy.of(denoiser(pipeline))
            if family.name != "flux":
                raise family.refuse(
                    self.info.slug, "it takes ratios measured on the model, as mag_ratios."
                )
            from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

            ratios = FLUX_MAG_RATIOS
        settings = self.model_dump(exclude={"mag_ratios"})
        return hooks.MagCacheConfig(mag_ratios=torch.as_tensor(ratios), **settings)


class PyramidAttentionBroadcast(DiffusersCache):
    """Outputs of attentions are used for some steps, within a range of timesteps."""

    info = _info(
        "diffusers-pab", "Pyramid Attention Broadcast of diffusers", "PyramidAttentionBroadcast"
    )
    function = hooks.apply_pyramid_attention_broadcast

    spatial_attention_block_skip_range: int | None = Field(default=2, ge=1)
    cross_attention_block_skip_range: int | None = Field(default=None, ge=1)
    spatial_attention_timestep_skip_range: tuple[int, int] = (100, 800)
    cross_attention_timestep_skip_range: tuple[int, int] = (100, 800)

    def config(self, pipeline: Any) -> Any:
        if pipeline is denoiser(pipeline):
            raise InputError(
                f"{self.info.slug} asks a pipeline for its timestep; give it the pipeline, not the "
                "denoiser alone."
            )
        return hooks.PyramidAttentionBroadcastConfig(
            **self.model_dump(), current_timestep_callback=lambda: pipeline.current_timestep
        )


# cache-dit ----------------------------------------------------------------------------------------


class CacheDit(Peer):
    """DBCache: the first blocks tell whether those behind them must be computed."""

    info = _info("cache-dit", "DBCache of cache-dit, with a TaylorSeer on top", "CacheDit")

    Fn_compute_blocks: int = Field(default=8, ge=1, description="first blocks, always computed")
    Bn_compute_blocks: int = Field(default=0, ge=0, description="last blocks, always computed")
    residual_diff_threshold: float = Field(default=0.08, ge=0, description="change that is little")
    max_warmup_steps: int = Field(default=8, ge=0, description="full steps at the start")
    taylorseer_order: int | None = Field(
        default=None, ge=1, description="forecast what is reused; None: as it was"
    )
    num_inference_steps: int | None = Field(
        default=None, ge=1, description="of a run, for a bare denoiser"
    )

    @staticmethod
    def is_installed() -> bool:
        return find_spec("cache_dit") is not None

    def attach(self, pipeline: Any) -> Handle:
        if not self.is_installed():
            raise InputError("cache-dit isn't installed; pip install 'pared[peers]' brings it.")
        with redirect_stdout(sys.stderr):  # where it logs from then on: figures aren't its place
            import cache_dit

        settings = self.model_dump(exclude={"taylorseer_order"})
        forecast = None
        if self.taylorseer_order is not None:
            order = self.taylorseer_order
            forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
        with ExitStack() as undo:
            undo.callback(cache_dit.disable_cache, pipeline)
            cache_dit.enable_cache(
                pipeline, cache_dit.DBCacheConfig(**settings), calibrator_config=forecast
            )
            return Handle(undo.pop_all(), (self,), {})


# Trying them --------------------------------------------------------------------------------------

Outcome = Literal["works", "works once", "does nothing", "refuses", "fails", "goes astray"]


@dataclass(frozen=True)
class Finding:
    """What became of a cache on a pipeline.

    Attributes:
        outcome: "works"; "works once", in a first call; "does nothing", without a word: the
            pictures stay the same; "refuses" in a sentence of pared's; "fails" with an error of its
            own; or "goes astray": it changes more than it may.
        detail: the error, or what it did wrong; "" where it works.
        failed: what didn't work in a row of calls, where it "works once".
    """

    outcome: Outcome
    detail: str = ""
    failed: tuple[str, ...] = ()


def tried(cache: RuntimeMethod, pipeline: Any, call: Callable[[], Tensor]) -> Finding:
    """Attach a cache, call the pipeline twice, and take it off again.

    Args:
        cache: a peer, or a run-time method of pared.
        pipeline: what it is attached to, and left on as it was.
        call: one call of the pipeline, always the same; gives pictures or latents.
    """
    return attempt(cache, pipeline, call).finding


class Attempt(NamedTuple):
    """What came of trying a cache: the picture without it, that with it if any, and what is found.

    Attributes:
        plain: without the cache.
        first: with it; None where there is none.
        finding: what to say of it.
    """

    plain: Tensor
    first: Tensor | None
    finding: Finding


def attempt(cache: RuntimeMethod, pipeline: Any, call: Callable[[], Tensor]) -> Attempt:
    """`tried`, with its pictures."""
    plain, first = call(), None
    try:
        with apply(pipeline, cache) as handle:
            stats = handle.stats[cache.info.slug]
            first = call()
            second = call()
    except InputError as error:
        found = Finding("refuses", str(error))
    # Whatever goes wrong in another library is what is asked for.
    except Exception as error:
        found = Finding("fails", said_by(error))
    else:
        found = _judged(plain, first, second, stats)
    left = left_behind(call, plain)
    if left and found.outcome != "goes astray":
        found = Finding("goes astray", f"taken off, {left}")
    return Attempt(plain, first, found)


def left_behind(call: Callable[[], Tensor], plain: Tensor) -> str:
    """What is wrong with a pipeline that a cache was taken off, in words; "" if nothing is."""
    try:
        return "" if torch.equal(call(), plain) else "the pictures stay changed"
    except Exception as error:
        return f"a call fails ({said_by(error)})"


def said_by(error: Exception) -> str:
    """What kind of error it is, and the first line of what it says."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}"


def _judged(plain: Tensor, first: Tensor, second: Tensor, stats: dict[str, Any]) -> Finding:
    if not first.isfinite().all():
        return Finding("goes astray", "the pictures aren't finite")
    if not torch.equal(first, second):
        return Finding("goes astray", "a second call of the pipeline gives another picture")
    if torch.equal(first, plain):
        hooked = stats.get("hooks")
        where = "" if hooked is None else f"; {hooked} modules are hooked"
        return Finding("does nothing", f"the picture stays the same{where}")
    return Finding("works")
