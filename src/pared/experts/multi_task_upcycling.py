"""MTU: Upcycling Text-to-Image Diffusion Models for Multi-Task Capabilities.

arXiv 2503.11905, ICML 2025.

One denoiser learns text-to-image, instruction editing, super-resolution and removal of objects, at
the cost of the model that it came from. Every feed-forward is cut into N narrow experts, mixed by
weights that a router computes from a learned embedding of the task; each task has its own input
convolution and its own norm before each feed-forward. All else is shared and frozen. For one task
the experts fold back into a plain feed-forward, and the model into one of its stock class
(`pared.experts.folding.fold`).

Implemented from the paper; no code taken, none was found. Left open by what could be read of it and
chosen here: the experts' start (equal slices of the hidden units, W_out times N, the router's last
layer zero, which computes exactly what the model did), the router (128, SiLU, 128, embeddings of
width 128 shared by all layers), one norm per layer and task, shared by the experts, and what tasks
read (the noised latents, and behind them the latents of the given picture). A batch should hold
equally many rows of each task, so that the mean over it is the paper's sum over tasks; weight decay
stays at zero, since it would pull on norms and embeddings. Departures, for models that the paper
doesn't use: in SD3 both streams' feed-forwards are converted, since the prompt means something else
in each task; and where the norm before a feed-forward has no weights (PixArt, SD3) the task scales
and shifts what comes out of the modulation behind it, since that folds into the feed-forward, and
a scale before the modulation doesn't fold in PixArt, whose layers share it. DiT isn't served: its
labels can't say what to change. Not verified: quality at the paper's scale. On the small trained
U-Net that comes with pared, within the short budget of the bench, one expert does as well as
several, and painting from text loses quality though its loss on unseen pictures falls: so does, and
by more, a fine-tune for painting alone, at a high learning rate and without averaged weights. With
each at the better of two learning rates it ends with the least mean loss there, but LoRA and
DiffFit come close with a thirtieth of the weights trained.
"""

from typing import Any, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import Family
from pared.errors import InputError
from pared.experts.task_layers import (
    RoutedFeedForward,
    TaskAffine,
    TaskConv,
    TaskNorm,
    Tasks,
    checked,
    put_input_layer,
    require_words_and_convolution,
)
from pared.info import Headline, Info
from pared.method import Claim, Conversion, denoiser, stack_of
from pared.worlds import tasks as known

INFO = Info(
    slug="multi-task-upcycling",
    title="Upcycling Text-to-Image Diffusion Models for Multi-Task Capabilities",
    arxiv="2503.11905",
    venue="ICML 2025",
    kind="conversion",
    families=("unet", "pixart", "sd3"),
    training=True,
    trained_by="recipe",
    exact=False,
    maturity="faithful",
    summary="one denoiser for many tasks: feed-forward experts mixed by the task",
    cls="MultiTaskUpcycling",
    headlines=(
        Headline(
            key="macs-over-base",
            text="multiply-adds of a call of Stable Diffusion 1.5 at 512x512, upcycled over base "
            "(paper: the same TFLOPs)",
            paper=1.0,
            direction="lower",
            bound=1.001,
        ),
        Headline(
            key="edit-over-single",
            text="editing, directional similarity of picture and text, one model for all tasks "
            "over one trained on editing alone (paper: 17.2 / 15.4)",
            paper=1.117,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="upscale-single-over-all",
            text="super-resolution, perceptual distance to the truth, one trained on it alone over "
            "one model for all tasks (paper: LPIPS 38.0 / 24.8)",
            paper=1.532,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="painting-base-over-all",
            text="text-to-image, distance to real pictures, the base over one model for all tasks "
            "(paper: FID of SDXL 4.1 / 3.9)",
            paper=1.051,
            direction="higher",
            bound=0.95,
        ),
        Headline(
            key="loss-ia3-over-all",
            text="mean denoising loss over the tasks, IA3 on the feed-forwards over upcycling "
            "(paper: editing on SDXL 20.1 against 8.4)",
            paper=2.39,
            direction="higher",
            bound=1.0,
        ),
        Headline(
            key="loss-all-over-single",
            text="mean denoising loss over the tasks, one model for all over one model for each "
            "(paper: single-task quality)",
            paper=1.0,
            direction="lower",
            bound=1.05,
        ),
        Headline(
            key="painting-loss-over-base",
            text="denoising loss of text-to-image, one model for all tasks over the base",
            paper=1.0,
            direction="lower",
            bound=1.01,
        ),
        Headline(
            key="loss-lora-over-all",
            text="mean denoising loss over the tasks, LoRA of rank 4 on the feed-forwards over "
            "upcycling (paper: upcycling far ahead on every task, without one number)",
            paper=1.0,
            direction="higher",
            bound=1.0,
        ),
    ),
)

# Where the embeddings e_tau stand in a converted model.
EMBEDDING = "task_embedding"


class MultiTaskUpcycling(Conversion):
    """Feed-forward experts routed by the task, task norms and task input layers, section 3."""

    info = INFO

    experts: int = Field(
        default=4,
        ge=1,
        description="N per feed-forward, which must divide its hidden units; the paper takes 4 for "
        "SD 1.5 and 1 for SDXL",
    )
    tasks: tuple[str, ...] = Field(
        default=tuple(known.TASKS),
        min_length=1,
        description="what is learnt; the first is what calls without a task get, those of stock "
        "pipelines among them",
    )
    embedding: int = Field(default=128, ge=1, description="width of the task embeddings")
    hidden: int = Field(default=128, ge=1, description="width of the routers' hidden layer")
    split: Literal["contiguous", "random"] = Field(
        default="contiguous", description="which hidden units make an expert"
    )
    seed: int = Field(default=0, ge=0, description="of the random split")

    @field_validator("tasks")
    @classmethod
    def _of_known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return checked(tasks)

    @property
    def serves(self) -> int:
        return len(self.tasks)

    def claims(self, family: Family) -> list[Claim]:
        sites = family.sites("feed_forward")
        if not sites:
            return []
        self._require_fit(family)
        norms = [path for path in map(family.norm_before, sites) if _has_weights(family, path)]
        paths = (EMBEDDING, family.input_layer, *(site.path for site in sites), *norms)
        return [Claim(path, "replaces") for path in paths]

    def _require_fit(self, family: Family) -> None:
        slug, config = self.info.slug, family.config
        require_words_and_convolution(family, slug)
        if (folded := getattr(family.model, "pared_folded", None)) is not None:
            raise family.refuse(
                slug,
                f"it was folded for {folded!r}, and folding goes one way; use the model that it "
                "was folded from.",
            )
        if config.in_channels > (config.out_channels or config.in_channels):
            raise family.refuse(
                slug,
                f"it reads {config.in_channels} channels and predicts {config.out_channels}, so it "
                "reads pictures already; upcycle a text-to-image model.",
            )
        for site in family.sites("feed_forward"):
            # A converted one has no second layer by that name, and was seen before.
            for path in family.linear_layers(site, "fc2"):
                if (units := _hidden_units(family, path)) % self.experts:
                    raise InputError(
                        f"{slug}: experts={self.experts} doesn't divide the {units} hidden units "
                        f"of {site.path}; choose a divisor of them."
                    )

    @torch.no_grad()
    def convert(self, model: nn.Module) -> None:
        family = anatomy.of(model)
        conv = cast(nn.Conv2d, model.get_submodule(family.input_layer))
        embedding = nn.Embedding(len(self.tasks), self.embedding)
        embedding = embedding.to(conv.weight.device, conv.weight.dtype)
        tasks = Tasks(self.tasks, family.input("task"), embedding)
        family.replace(EMBEDDING, embedding)
        put_input_layer(family, tasks)
        generator = torch.Generator().manual_seed(self.seed)
        for site in family.sites("feed_forward"):
            path = family.norm_before(site)
            if normed := _has_weights(family, path):
                family.replace(path, TaskNorm(tasks, model.get_submodule(path)))
            order = None
            if self.split == "random":
                (second,) = family.linear_layers(site, "fc2")
                order = torch.randperm(_hidden_units(family, second), generator=generator)
            routed = RoutedFeedForward(
                site.module, tasks, self.experts, self.hidden, affine=not normed, order=order
            )
            family.replace(site.path, routed)

    def healing(self, task: Any) -> Any:
        """L = sum_tau E ||target - prediction||^2: the task loss, on batches that mix tasks."""
        return task


def _has_weights(family: Family, norm: str) -> bool:
    return getattr(family.model.get_submodule(norm), "weight", None) is not None


def _hidden_units(family: Family, second: str) -> int:
    return cast(nn.Linear, family.model.get_submodule(second)).in_features


# A converted model and its tasks ------------------------------------------------------------------


def carried(target: Any) -> MultiTaskUpcycling:
    """The conversion as a model (or a pipeline's denoiser) carries it.

    Raises:
        InputError: it carries none.
    """
    model = denoiser(target)
    for method in stack_of(model):
        if isinstance(method, MultiTaskUpcycling):
            return method
    raise InputError(
        f"this {type(anatomy.unwrap(model)).__name__} carries no {INFO.slug}; convert it first, "
        "or give the model that it was folded from."
    )


def number_of(target: Any, task: str) -> int:
    """The number of a task in a converted model.

    Raises:
        InputError: there is no such task, or the model wasn't taught it.
    """
    taught = carried(target).tasks
    known.get(task)
    if task not in taught:
        raise InputError(
            f"the model was not taught {task!r}, it knows {', '.join(taught)}; "
            "add the task and train it."
        )
    return taught.index(task)


def select(target: Any, task: str) -> None:
    """Set the task of calls that give none, those of stock pipelines among them.

    Args:
        target: a converted model, or a pipeline that holds one.
        task: its name. For one that reads a picture, the calls must bring its latents, in channels
            behind the noised ones.

    Raises:
        InputError: there is no such task, or the model wasn't taught it.
    """
    number = number_of(target, task)
    anatomy.of(denoiser(target)).input("task").value = torch.tensor([number])


def routes(target: Any) -> dict[str, Tensor]:
    """The weights w of the experts, by task: (layers, experts) each, as in the paper's figure 5."""
    taught = carried(target).tasks
    layers = _layers(anatomy.of(denoiser(target)))
    with torch.no_grad():
        tables = [layer.routes(_numbers(layer, len(taught))) for layer in layers]
    return dict(zip(taught, torch.stack(tables, dim=1), strict=True))


@torch.no_grad()
def add_task(target: Any, task: str) -> None:
    """Teach a converted model one more task: an embedding, norms and an input layer of its own.

    They start as copies of the first task's, new input channels at zero. What the model does for
    the other tasks stays as it is, until shared experts train. Parameters that grow are new ones,
    so an optimiser must be made anew.

    Args:
        target: a converted model, or a pipeline that holds one.
        task: its name.

    Raises:
        InputError: there is no such task, or the model was taught it already.
    """
    method, model = carried(target), anatomy.unwrap(denoiser(target))
    reads = known.get(task).reads_image
    if task in method.tasks:
        raise InputError(
            f"the model was taught {task!r} already; it knows {', '.join(method.tasks)}."
        )
    grown = method.model_copy(update={"tasks": (*method.tasks, task)})
    family = anatomy.of(model)
    conv = cast(TaskConv, model.get_submodule(family.input_layer))
    conv.tasks.add(task, like=0)
    conv.add(like=0, reads=reads)
    for module in model.modules():
        if isinstance(module, TaskAffine):
            module.add(like=0)
    cast(Any, model).pared_stack = [grown if m is method else m for m in stack_of(model)]


def _layers(family: Family) -> list[RoutedFeedForward]:
    return [cast(RoutedFeedForward, site.module) for site in family.sites("feed_forward")]


def _numbers(layer: RoutedFeedForward, count: int) -> Tensor:
    return torch.arange(count, device=layer.out.weight.device)
