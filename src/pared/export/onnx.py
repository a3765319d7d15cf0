"""The streaming step of `streaming-pse` as an ONNX file, and running it in onnxruntime.

The state goes in and comes out by name, so that any runtime can carry it: inputs `chunk`, `state.*`
and `enrolment.*`, outputs `enhanced` and `after.*`, which is the `state.*` of the next hop. What
every layer has for itself is one tensor for each, `state.keys.0` and so on: taking a layer out of
a stack would copy it in every hop. The number of enrolment frames is free, the batch is one. There
is no mask: frames that don't count are left out, as `pared.speech.streaming_pse.enrolment.enrol`
does, which spares every hop of `OnnxStep` from doing it.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pared.errors import InputError
from pared.speech.streaming_pse.layers import Enrolment
from pared.speech.streaming_pse.model import State, StreamingPSEModel
from pared.worlds.optional import need

# Enrolment frames of the example that the graph is traced with.
EXAMPLE_FRAMES = 100
# onnxruntime rounds otherwise than torch, here in every layer and hop.
TOLERANCE = 1e-4


# What has one tensor for each layer.
LAYERED = ("keys", "values", "key", "value")


class _Step(nn.Module):
    """The step with everything named that goes in; empty parts of the state are left out."""

    def __init__(self, model: StreamingPSEModel) -> None:
        super().__init__()
        self.model = model
        self.empty = {name: t for name, t in model.state()._asdict().items() if not t.numel()}

    def forward(
        self, chunk: Tensor, state: dict[str, Any], enrolment: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        rings = {name: [ring.clone() for ring in state[name]] for name in ("keys", "values")}
        before: Any = State(**state | rings, **self.empty)
        enhanced, after = self.model.step_(chunk, before, enrolment)
        return enhanced, *flat({name: getattr(after, name) for name in state}).values()


def by_layer(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors, those that have a layer in front as lists of one for each."""
    return {k: list(t.contiguous()) if k in LAYERED else t for k, t in tensors.items()}


def flat(tensors: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Every tensor by its name, those of a layer as `name.number`."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in LAYERED:
            found |= {f"{prefix}{name}.{number}": each for number, each in enumerate(value)}
        else:
            found[prefix + name] = value
    return found


def export_step(model: StreamingPSEModel, path: str | Path) -> Path:
    """Write the streaming step, and check that onnxruntime computes with it what torch does.

    Args:
        model: the enhancer, on the CPU in float32.
        path: of the .onnx file.

    Returns:
        The path.

    Raises:
        InputError: onnx, onnxscript or onnxruntime isn't installed, or the model is elsewhere.
        RuntimeError: the outputs differ.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, extra="export")
    if (model.dtype, model.device.type) != (torch.float32, "cpu"):
        raise InputError(
            f"the model is in {model.dtype} on {model.device}; export it in float32 on the CPU "
            "(model.float().cpu())."
        )
    path, step = Path(path), _Step(model.eval())
    whole = {k: v for k, v in model.state()._asdict().items() if k not in step.empty}
    state, enrolment = by_layer(whole), by_layer(example_enrolment(model))
    frames = torch.export.Dim("enrolment_frames", min=2, max=1 << 16)
    free = {k: [{2: frames} for _ in v] if k in LAYERED else {} for k, v in enrolment.items()}
    fixed: dict[str, Any] = {k: [{} for _ in v] if k in LAYERED else {} for k, v in state.items()}
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            step,
            (torch.zeros(1, model.settings.hop),),
            path,
            kwargs={"state": state, "enrolment": enrolment},
            input_names=["chunk", *flat(state, "state."), *flat(enrolment, "enrolment.")],
            output_names=["enhanced", *flat(state, "after.")],
            dynamic_shapes={"chunk": {}, "state": fixed, "enrolment": free},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if (distance := furthest(model, OnnxStep(path))) > TOLERANCE:
        raise RuntimeError(f"onnxruntime's output is {distance:.2g} away from torch's")
    return path


def example_enrolment(model: StreamingPSEModel, frames: int = EXAMPLE_FRAMES) -> Enrolment:
    """An enrolment of random encoded frames."""
    generator = torch.Generator().manual_seed(0)
    settings = model.settings
    with torch.no_grad():
        if settings.conditioning == "static_vector":
            return model.encode(torch.randn(1, settings.vector_width, generator=generator))
        if settings.conditioning == "none":
            return {}
        return model.cached(torch.randn(1, frames, settings.width, generator=generator))


@torch.inference_mode()
def furthest(model: StreamingPSEModel, step: "OnnxStep", hops: int = 20) -> float:
    """Largest difference of two steps over noise and then silence, each with its own state."""
    generator = torch.Generator().manual_seed(0)
    enrolment = example_enrolment(model, EXAMPLE_FRAMES // 2)
    ours = theirs = model.state()
    found = 0.0
    for number in range(hops):
        chunk = 0.1 * torch.randn(1, model.settings.hop, generator=generator)
        chunk *= number < hops // 2
        a, ours = model.step(chunk, ours, enrolment)
        b, theirs = step(chunk, theirs, enrolment)
        found = max(found, float((a - b).abs().amax()))
    return found


def without_pauses(enrolment: Enrolment) -> Enrolment:
    """One user's enrolment without the frames that don't count, and so without a mask.

    Raises:
        InputError: none counts.
    """
    if "valid" not in enrolment:
        return enrolment
    valid = enrolment["valid"][0]
    if not valid.any():
        raise InputError("the enrolment is silent; encode at least one second of speech.")
    return {name: enrolment[name][..., valid, :] for name in ("key", "value")}


class OnnxStep:
    """An exported step in onnxruntime, called as `StreamingPSEModel.step` is.

    Args:
        path: what `export_step` wrote.
        threads: of the processor.

    Raises:
        InputError: onnxruntime isn't installed; when called, the enrolment is silent or of another
            model.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        runtime: Any = need("onnxruntime", extra="export")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        self.session = runtime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {each.name for each in self.session.get_inputs()}
        self.told = {name for name in self.inputs if name.startswith("enrolment.")}
        self.outputs = [each.name for each in self.session.get_outputs()]

    def __call__(self, chunk: Tensor, state: State, enrolment: Enrolment) -> tuple[Tensor, State]:
        told = flat(without_pauses(enrolment), "enrolment.")
        if told.keys() != self.told:
            held, taken = (", ".join(sorted(names)) or "nothing" for names in (told, self.told))
            raise InputError(
                f"the enrolment holds {held}, and the exported step takes {taken}; give one that "
                "the exported model encoded."
            )
        given = {"chunk": chunk} | flat(state._asdict(), "state.") | told
        # Of the state the graph hasn't got the parts that are empty.
        feed = {name: each.numpy() for name, each in given.items() if name in self.inputs}
        found = map(torch.from_numpy, self.session.run(self.outputs, feed))
        named = dict(zip(self.outputs, found, strict=True))
        after: dict[str, Any] = {}
        for name, tensor in named.items():
            _, field, number = f"{name}..".split(".")[:3]
            if number:
                after.setdefault(field, []).append(tensor)
            elif field:
                after[field] = tensor
        return named["enhanced"], state._replace(**after)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and its remarks on versions."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
