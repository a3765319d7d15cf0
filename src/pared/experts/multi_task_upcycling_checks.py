"""What must hold of MTU without trained weights: its start, its experts, its folding.

Run by `pared check multi-task-upcycling`.
"""

from typing import cast

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import presets
from pared.experts.folding import fold
from pared.experts.multi_task_upcycling import MultiTaskUpcycling, add_task, routes
from pared.experts.task_layers import RoutedFeedForward, routed_reference
from pared.method import convert

# Feed-forwards with gates and weights in the norm; without either; in two streams.
PRESETS = ("toy:unet", "toy:pixart", "toy:sd3")


def _base(preset: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Module.to(presets.build(preset, device="cpu"), dtype)


def _stirred(preset: str, **settings) -> nn.Module:
    """A converted toy with all weights moved, so that no branch is at its start."""
    torch.manual_seed(0)
    model = convert(_base(preset), MultiTaskUpcycling(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


Call = tuple[Tensor, Tensor, dict[str, Tensor]]


def _call(model: nn.Module, tasks: list[int] | None = None, source: bool = True) -> Call:
    """Fixed inputs: a sample for each of `tasks`, or four plain ones."""
    generator = torch.Generator().manual_seed(1)
    latents, timestep, condition = anatomy.of(model).example(4, 8, 8, 8, generator)
    picture = torch.randn(latents.shape, generator=generator, dtype=latents.dtype)
    if tasks is not None:
        condition["task"] = torch.tensor(tasks)
    if tasks is not None and source:
        condition["source"] = picture
    return latents, timestep, condition


def _output(model: nn.Module, tasks: list[int] | None = None, source: bool = True) -> Tensor:
    return anatomy.of(model).denoise(model, *_call(model, tasks, source))


def check_it_starts_as_the_base() -> None:
    """Converted, every task computes what the base did, within 1e-12, for any N."""
    with torch.no_grad():
        for preset in PRESETS:
            wanted = _output(_base(preset))
            for settings in ({"experts": n} for n in (1, 2, 4, 8)):
                model = convert(_base(preset), MultiTaskUpcycling(**settings))
                for got in (_output(model), _output(model, [0, 1, 2, 3])):
                    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
            model = convert(_base(preset), MultiTaskUpcycling(split="random", seed=3))
            torch.testing.assert_close(_output(model, [3, 2, 1, 0]), wanted, rtol=0, atol=1e-12)


def check_experts_one_by_one() -> None:
    """Two matrix products give what a loop over the experts gives, gradients included."""
    for preset in PRESETS:
        site = anatomy.of(_stirred(preset)).sites("feed_forward")[0]
        layer = cast(RoutedFeedForward, site.module)
        layer.tasks.entry.value = torch.tensor([2, 0])
        x = torch.randn(2, 5, layer.out.out_features, dtype=torch.float64)
        weights = [x.requires_grad_(), *layer.parameters(), layer.tasks.embedding.weight]
        results = []
        for compute in (layer, lambda x, layer=layer: routed_reference(layer, x)):
            y = compute(x)
            results.append((y, *torch.autograd.grad(y.sin().sum(), weights)))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def check_parameters() -> None:
    """All experts of a layer of width d have 12 d^2 + 8 d + N d parameters (gated, 4 d wide)."""
    for n in (1, 4, 8):
        model = convert(_base("toy:unet"), MultiTaskUpcycling(experts=n))
        for site in anatomy.of(model).sites("feed_forward"):
            d = site.module.out.out_features
            sizes = [sum(w.numel() for w in site.module.expert(i).values()) for i in range(n)]
            assert len(set(sizes)) == 1, f"the experts have {sizes} parameters"
            wanted = 12 * d**2 + 8 * d + n * d
            assert sum(sizes) == wanted, f"{sum(sizes)} parameters, the formula gives {wanted}"


def check_routes() -> None:
    """The weights of the experts add up to one, and are 1/N at the start."""
    for n in (1, 4):
        model = convert(_base("toy:unet"), MultiTaskUpcycling(experts=n))
        for w in routes(model).values():
            assert (w == 1 / n).all(), f"the routes start at {w}, not at 1/{n}"
    for task, w in routes(_stirred("toy:unet")).items():
        total = w.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
        assert w.std() > 0, f"the routes of {task} are all alike"


def check_a_batch_may_mix_tasks() -> None:
    """A batch of several tasks gives each sample what it gets in a batch of its own task."""
    with torch.no_grad():
        for preset in PRESETS:
            model = _stirred(preset)
            mixed = _output(model, [0, 3, 1, 0])
            for row, task in enumerate((0, 3, 1, 0)):
                alone = _output(model, [task] * 4)[row]
                torch.testing.assert_close(mixed[row], alone, rtol=1e-9, atol=1e-11)
                others = _output(model, [(task + 1) % 4] * 4)[row]
                assert not torch.allclose(others, alone), "two tasks compute the same"


def check_text_to_image_sees_no_picture() -> None:
    """Text-to-image takes no notice of channels behind the noised ones, in a call without too."""
    with torch.no_grad():
        model = _stirred("toy:unet")
        torch.testing.assert_close(
            _output(model, [0] * 4), _output(model, [0] * 4, source=False), rtol=0, atol=1e-12
        )


def check_tasks_apart() -> None:
    """The gradient of one task leaves embedding, norms and input layer of the others alone."""
    for preset in PRESETS:
        model = _stirred(preset)
        _output(model, [1] * 4).square().sum().backward()
        embedding = model.task_embedding.weight.grad
        family = anatomy.of(model)
        conv = model.get_submodule(family.input_layer)
        site = family.sites("feed_forward")[0]
        norm = site.module.affine or model.get_submodule(family.norm_before(site))
        for gradient in (embedding, conv.bias.grad, norm.weight.grad, norm.bias.grad):
            moved = gradient.flatten(1).any(1).tolist()
            assert moved == [False, True, False, False], f"tasks {moved} got a gradient"
        sizes = [kernel.shape[1] for kernel in conv.kernels()]
        moved = [bool(part.any()) for part in conv.weight.grad.split(sizes, dim=1)]
        assert moved == [False, True, False, False], f"input layers {moved} got a gradient"


def check_folding() -> None:
    """Folded for a task, a plain model computes the same with other weights in every layer."""
    with torch.no_grad():
        for preset in PRESETS:
            model = _stirred(preset, split="random")
            for number, task in enumerate(MultiTaskUpcycling().tasks):
                folded = fold(model, task)
                assert type(folded) is type(model), f"it became a {type(folded).__name__}"
                wanted = _output(model, [number] * 4)
                call = _call(model, [number] * 4, source=number > 0)
                got = anatomy.of(folded).denoise(folded, *call)
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def check_another_task() -> None:
    """A task is added without any change to the others, and starts as the first one."""
    with torch.no_grad():
        model = _stirred("toy:unet", tasks=("text-to-image", "edit"))
        before = _output(model, [0, 1, 1, 0])
        add_task(model, "inpaint")
        assert torch.equal(_output(model, [0, 1, 1, 0]), before), "an old task changed"
        first = _output(model, [0] * 4)
        torch.testing.assert_close(_output(model, [2] * 4), first, rtol=0, atol=1e-12)
