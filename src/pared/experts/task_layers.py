"""Layers that follow the task of the running call: feed-forward experts, norm, input convolution.

Each keeps what belongs to a task as rows of one parameter and takes the rows of the call's tasks,
one per sample, so that a batch may mix tasks.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pared.anatomy.base import Family
from pared.anatomy.denoiser import Input
from pared.errors import InputError
from pared.nn.linear_attention import full_precision
from pared.worlds import tasks as known


def checked(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Names of tasks, once they are found to be known, different, and in an order that works.

    Raises:
        InputError: they are not.
    """
    for name in tasks:
        known.get(name)
        if tasks.count(name) > 1:
            raise InputError(f"{name} is there twice; name each task once")
    if known.get(tasks[0]).reads_image:
        raise InputError(
            f"{tasks[0]} comes first and reads a picture, which calls without a task don't give; "
            "begin with text-to-image"
        )
    return tasks


def require_words_and_convolution(family: Family, slug: str) -> None:
    """Refuse a model that tasks can't be told to, or whose input layer can't have one kernel each.

    Raises:
        InputError: the message names the method.
    """
    if "text" not in family.conditions:
        takes = ", ".join(family.conditions)
        raise family.refuse(slug, f"its tasks are told in words, and this model takes {takes}.")
    if not isinstance(family.model.get_submodule(family.input_layer), nn.Conv2d):
        raise family.refuse(
            slug, f"its input layer {family.input_layer} is no convolution of latents."
        )


class Tasks:
    """The tasks of the running call, and the embeddings e_tau that all routers read.

    One object for all layers of a model. The embeddings' owner is the model, under one name.

    Attributes:
        names: of the tasks, in the order of their numbers.
        entry: where the numbers of a call's tasks arrive.
        embedding: e_tau, (tasks, width), where there are routers.
    """

    def __init__(
        self, names: Sequence[str], entry: Input, embedding: nn.Embedding | None = None
    ) -> None:
        self.names, self.entry, self.embedding = tuple(names), entry, embedding

    def of(self, x: Tensor) -> Tensor:
        """Numbers of the tasks of the samples in `x`, (batch,), or (1,) where all share one.

        Without any the task is the first one.

        Raises:
            InputError: there is neither one task nor one for each sample.
        """
        given = self.entry.value
        if given is None:
            return torch.zeros(1, dtype=torch.int64, device=x.device)
        if len(given) not in (1, len(x)):
            raise InputError(
                f"the call has {len(given)} tasks for {len(x)} samples; give one task per sample, "
                "or one for all."
            )
        return given.to(x.device)

    def add(self, name: str, like: int) -> None:
        """Add a task whose embedding starts as a copy of another one's."""
        self.names, e = (*self.names, name), cast(nn.Embedding, self.embedding)
        e.weight, e.num_embeddings = with_row(e.weight, e.weight[like]), len(self.names)


class RoutedFeedForward(nn.Module):
    """E(x) = sum_i w_i E_i(x), w = softmax(g(e_tau)): N narrow feed-forwards, mixed by the task.

    The experts' matrices stay side by side as in the layer that they are cut from: expert i is the
    i-th of N equal ranges of hidden units. As w knows nothing of the tokens,

        sum_i w_i W_i h_i = [W_1 ... W_N] [w_1 h_1; ...; w_N h_N],

    which takes the same two matrix products as before.

    Args:
        feed_forward: what becomes the experts; its weights go over, changed in place.
        tasks: of the call.
        experts: N.
        hidden: width of the router's hidden layer.
        affine: whether each task scales and shifts the input, in the place of a norm's own weights.
        order: of the hidden units before they are cut, (hidden units,); None leaves theirs.
    """

    def __init__(
        self,
        feed_forward: Any,
        tasks: Tasks,
        experts: int,
        hidden: int,
        affine: bool = False,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.tasks, self.experts = tasks, experts
        self.act, self.dropout, self.out, *last = feed_forward.net
        self.last = nn.Sequential(*last)  # a second dropout, in some models
        proj, out = self.act.proj, self.out
        if order is not None:
            order = order.to(out.weight.device)
            proj.weight.data, proj.bias.data = (
                x[self._rows(order)] for x in (proj.weight, proj.bias)
            )
            out.weight.data = out.weight[:, order]
        # The weights w average, they don't add up: at w = 1/N the factor N gives W h back.
        out.weight.data = experts * out.weight
        self.bias = nn.Parameter(out.bias.detach().expand(experts, -1).clone())
        out.register_parameter("bias", None)
        width = tasks.embedding.embedding_dim
        router = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, experts))
        nn.init.zeros_(router[2].weight)
        nn.init.zeros_(router[2].bias)
        self.router = router.to(out.weight.device, out.weight.dtype)
        ones = out.weight.new_ones(proj.in_features)
        self.affine = TaskAffine(tasks, ones, torch.zeros_like(ones)) if affine else None

    def routes(self, tau: Tensor) -> Tensor:
        """The weights w of tasks (rows,), (rows, experts), each row adding up to one."""
        e = cast(nn.Embedding, self.tasks.embedding)(tau)
        with full_precision(e):
            return self.router(e).softmax(-1, dtype=torch.promote_types(e.dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        tau = self.tasks.of(x)
        if self.affine is not None:
            x = self.affine(x)
        h = self.dropout(self.act(x))
        w = self.routes(tau).to(h.dtype)
        h = (h.unflatten(-1, (self.experts, -1)) * w[:, None, :, None]).flatten(-2)
        return self.last(self.out(h) + (w @ self.bias.to(w.dtype))[:, None])

    def expert(self, i: int) -> dict[str, Tensor]:
        """The weights of expert i, named and shaped as those of a feed-forward."""
        units = torch.arange(self.out.in_features, device=self.out.weight.device)
        units = units.chunk(self.experts)[i]
        rows = self._rows(units)
        return {
            "net.0.proj.weight": self.act.proj.weight[rows],
            "net.0.proj.bias": self.act.proj.bias[rows],
            "net.2.weight": self.out.weight[:, units],
            "net.2.bias": self.bias[i],
        }

    def _rows(self, units: Tensor) -> Tensor:
        """The rows of the first matrix that make these hidden units: of a gated one, gates too."""
        gated = self.act.proj.out_features == 2 * self.out.in_features
        return torch.cat([units, units + self.out.in_features]) if gated else units


def routed_reference(layer: RoutedFeedForward, x: Tensor) -> Tensor:
    """What a routed feed-forward computes, one expert after the other. Slow; for tests."""
    w = layer.routes(layer.tasks.of(x))
    if layer.affine is not None:
        x = layer.affine(x)
    y = torch.zeros_like(x)
    for i in range(layer.experts):
        first_weight, first_bias, second_weight, second_bias = layer.expert(i).values()
        first = {"proj.weight": first_weight, "proj.bias": first_bias}
        h = cast(Tensor, functional_call(layer.act, first, (x,)))
        y = y + w[:, i, None, None] * F.linear(h, second_weight, second_bias)
    return y


class TaskAffine(nn.Module):
    """x weight_tau + bias_tau, a pair for each task.

    Args:
        tasks: of the call.
        weight: what all tasks start from, (width,).
        bias: likewise.
    """

    def __init__(self, tasks: Tasks, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.tasks, count = tasks, len(tasks.names)
        self.weight = nn.Parameter(weight.detach().expand(count, -1).clone())
        self.bias = nn.Parameter(bias.detach().expand(count, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        tau = self.tasks.of(x)
        return x * self.weight[tau][:, None] + self.bias[tau][:, None]

    def add(self, like: int) -> None:
        """Add a task that starts as a copy of another one."""
        self.weight, self.bias = (with_row(x, x[like]) for x in (self.weight, self.bias))


class TaskNorm(TaskAffine):
    """LN_tau: a layer norm with weights for each task.

    Args:
        tasks: of the call.
        norm: a `LayerNorm` with weights, from which all tasks start.
    """

    def __init__(self, tasks: Tasks, norm: Any) -> None:
        super().__init__(tasks, norm.weight, norm.bias)
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.layer_norm(x, x.shape[-1:], eps=self.eps))


class TaskConv(nn.Conv2d):
    """The input layer: a convolution for each task, whose input channels differ.

    Every task reads the noised latents; tasks with a picture also read its latents, from as many
    channels behind. The kernels lie one behind the other in `weight`, along its input channels;
    `bias` is (tasks, output channels).

    Args:
        conv: what each task starts from; new channels start at zero.
        tasks: of the call.
        reads: for each task, whether it reads a picture.
    """

    def __init__(self, conv: Any, tasks: Tasks, reads: Sequence[bool]) -> None:
        channels = conv.in_channels
        super().__init__(
            channels * (len(reads) + sum(reads)),
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            device="meta",  # the weights come below
        )
        self.tasks, self.channels, self.reads = tasks, channels, tuple(reads)
        kernels = [_widened(conv.weight.detach(), task) for task in reads]
        self.weight = nn.Parameter(torch.cat(kernels, dim=1))
        self.bias = nn.Parameter(conv.bias.detach().expand(len(reads), -1).clone())

    def kernels(self) -> tuple[Tensor, ...]:
        """The kernel of each task, (output channels, channels that it reads, height, width)."""
        return self.weight.split([self.channels * (1 + task) for task in self.reads], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width), with a picture's latents behind or without.

        Raises:
            InputError: the channels are neither, or a task's picture is missing.
        """
        self._check(x)
        tau, channels = self.tasks.of(x), x.shape[1]
        # A task without a picture takes no notice of one.
        kernels = torch.stack([_padded(k, 2 * self.channels) for k in self.kernels()])
        kernels, bias = kernels[tau][:, :, :channels], self.bias[tau]
        if len(tau) == 1:
            return F.conv2d(x, kernels[0], bias[0], self.stride, self.padding)
        # Samples side by side, each a group of channels with a kernel of its own.
        y = F.conv2d(
            x.flatten(0, 1)[None],
            kernels.flatten(0, 1),
            bias.flatten(),
            self.stride,
            self.padding,
            groups=len(x),
        )
        return y.unflatten(1, (len(x), -1))[0]

    def add(self, like: int, reads: bool) -> None:
        """Add a task that starts as a copy of another one, new channels at zero."""
        kernel = _widened(self.kernels()[like][:, : self.channels].detach(), reads)
        self.weight = nn.Parameter(torch.cat([self.weight.detach(), kernel], dim=1))
        self.bias = with_row(self.bias, self.bias[like])
        self.reads, self.in_channels = (*self.reads, reads), self.weight.shape[1]

    def _check(self, x: Tensor) -> None:
        channels, given = x.shape[1], self.tasks.entry.value
        if channels not in (self.channels, 2 * self.channels):
            raise InputError(
                f"the model reads {self.channels} channels of noised latents, or "
                f"{2 * self.channels} with those of a picture behind; it was given {channels}."
            )
        # Traced code can't look at numbers, and there are none on the meta device.
        if channels == 2 * self.channels or given is None or torch.compiler.is_compiling():
            return
        for number in [] if given.is_meta else given.tolist():
            if self.reads[number]:
                raise InputError(
                    f"the task {self.tasks.names[number]!r} reads the latents of a picture, "
                    f"{self.channels} channels behind the noised ones, and this call has none; "
                    "give them as the condition's 'source'."
                )


def put_input_layer(family: Family, tasks: Tasks) -> None:
    """Give a model's input layer a kernel for each task, which starts as the one it has."""
    conv = family.model.get_submodule(family.input_layer)
    reads = [known.get(name).reads_image for name in tasks.names]
    family.replace(family.input_layer, TaskConv(conv, tasks, reads))


def with_row(rows: nn.Parameter, row: Tensor) -> nn.Parameter:
    """A parameter with one more row."""
    return nn.Parameter(torch.cat([rows.detach(), row.detach()[None]]), rows.requires_grad)


def _widened(kernel: Tensor, reads: bool) -> Tensor:
    """A kernel that reads as many channels again, with zeros, if it `reads` a picture."""
    return _padded(kernel, kernel.shape[1] * (1 + reads))


def _padded(kernel: Tensor, channels: int) -> Tensor:
    """A kernel (output channels, input channels, height, width) with zeros behind its channels."""
    return F.pad(kernel, (0, 0, 0, 0, 0, channels - kernel.shape[1]))
