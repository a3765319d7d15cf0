"""Folding of a multi-task model: for one task, a plain model of the stock class.

For a fixed task the weights w of the experts are numbers, so W_out [w_1 h_1; ...; w_N h_N] is one
matrix product with w_i multiplied into expert i's columns, and the output biases add up to
sum_i w_i b_i. The task's norm and input layer become the model's own; a scale and shift behind the
modulation go into the first matrix. The way back is lost: a folded model knows one task.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.experts.multi_task_upcycling import carried, number_of
from pared.experts.task_layers import RoutedFeedForward, TaskConv, TaskNorm
from pared.method import convert, denoiser, stack_of


@torch.no_grad()
def fold(target: Any, task: str, source_scale: float = 1.0) -> nn.Module:
    """A plain model for one task, with the base's architecture and cost; `target` stays as it is.

    For a task that reads a picture the input layer and `config.in_channels` have twice the
    channels, the noised latents first, as the stock pipelines for editing call it. Other
    conversions that the model carries are kept.

    Args:
        target: a converted model, or a pipeline that holds one.
        task: one that it was taught.
        source_scale: latents of a picture as the model was taught, over those that it will be
            given. `StableDiffusionInstructPix2PixPipeline` leaves the autoencoder's
            `scaling_factor` out of them; give that factor here to fold for it.

    Returns:
        A new model in eval mode, which shares no weights with `target`.

    Raises:
        InputError: the model carries no upcycling (any more), or doesn't know the task.
    """
    method, number = carried(target), number_of(target, task)
    model: Any = anatomy.unwrap(denoiser(target))
    family = anatomy.of(model)
    conv = cast(TaskConv, model.get_submodule(family.input_layer))
    kernel = conv.kernels()[number].clone()
    kernel[:, conv.channels :] *= source_scale
    channels = {
        "in_channels": kernel.shape[1],
        "out_channels": model.config.out_channels or model.config.in_channels,
    }
    with torch.device("meta"):
        plain = type(model).from_config(model.config, **channels)
    convert(plain, *(m for m in stack_of(model) if m is not method))
    replaced = tuple(f"{claim.site}." for claim in method.claims(family))
    weights = {n: w for n, w in model.state_dict().items() if not n.startswith(replaced)}
    weights |= _named(family.input_layer, {"weight": kernel, "bias": conv.bias[number]})
    for site in family.sites("feed_forward"):
        layer = cast(RoutedFeedForward, site.module)
        weights |= _named(site.path, feed_forward(layer, number))
        norm = model.get_submodule(family.norm_before(site))
        if isinstance(norm, TaskNorm):
            rows = {"weight": norm.weight[number], "bias": norm.bias[number]}
            weights |= _named(family.norm_before(site), rows)
    # Tables that aren't saved.
    buffers = dict(model.named_buffers())
    for name in set(buffers) - set(weights):
        place, _, last = name.rpartition(".")
        plain.get_submodule(place)._buffers[last] = buffers[name].clone()
    plain.load_state_dict({n: w.detach().clone() for n, w in weights.items()}, assign=True)
    plain.pared_folded = task
    return plain.eval()


def feed_forward(layer: RoutedFeedForward, number: int) -> dict[str, Tensor]:
    """The weights of the plain feed-forward that a routed one is for a task.

    Args:
        layer: the routed one.
        number: of the task.
    """
    tau = torch.tensor([number], device=layer.out.weight.device)
    w = layer.routes(tau)[0]
    first, bias = layer.act.proj.weight.to(w), layer.act.proj.bias.to(w)
    if layer.affine is not None:
        # W (x g + b) + c = (W g) x + (W b + c)
        bias = bias + first @ layer.affine.bias[number].to(w)
        first = first * layer.affine.weight[number].to(w)
    per_unit = w.repeat_interleave(layer.out.in_features // layer.experts)
    folded = {
        "net.0.proj.weight": first,
        "net.0.proj.bias": bias,
        "net.2.weight": layer.out.weight.to(w) * per_unit,
        "net.2.bias": w @ layer.bias.to(w),
    }
    return {name: weight.to(layer.out.weight.dtype) for name, weight in folded.items()}


def _named(path: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{path}.{name}": weight for name, weight in weights.items()}
