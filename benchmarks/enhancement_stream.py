"""An enhancer in a stream, on one thread: how long hops take, and what is held meanwhile."""

import argparse
from typing import Any

import record
import torch
from torch import Tensor

import pared
from pared.bench import host
from pared.export.onnx import OnnxStep, example_enrolment, export_step
from pared.recipe import Recipe
from pared.speech.streaming_pse.method import SAMPLE_RATE
from pared.speech.streaming_pse.model import StreamingPSEModel, load
from pared.speech.streaming_pse.stream import Report, Stream
from pared.speech.streaming_pse.training import data_of
from pared.training import generator_for
from pared.worlds import house
from pared.worlds.house import folder_of

SLUG = "streaming-pse"
# What real time is claimed of: the settings' defaults.
DEFAULT = "default size, random weights"


def measure(options: argparse.Namespace) -> None:
    """Both runtimes, for the default size and for the enhancer given or shipped."""
    rows, reports = [], {}
    sound = minute(options.plan)
    for name, model in models(options.model).items():
        path = options.folder / f"step-{len(reports)}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        for runtime, step in (("torch", None), ("onnxruntime", OnnxStep(export_step(model, path)))):
            row, reports[name, runtime] = streamed(model, step, sound, options)
            rows.append({"model": name, "runtime": runtime} | row)
            print(rows[-1], flush=True)
    ours, theirs = (reports[DEFAULT, runtime] for runtime in ("torch", "onnxruntime"))
    note = (
        f"one thread of torch, {options.minutes:g} minutes, with an enrolment of 10 s; "
        f"onnxruntime {theirs.real_time_factor:.3f}"
    )
    factor = record.claim(SLUG, "real-time-factor", ours.real_time_factor, None, (0,), note)
    title = f"real time on one thread, {options.minutes:g} minutes; memory over {options.hold:g}"
    record.write(SLUG, [factor], {title: rows})


def models(given: str | None) -> dict[str, StreamingPSEModel]:
    """What is measured, by name."""
    torch.manual_seed(0)
    found = {DEFAULT: pared.StreamingPSE().build()}
    shipped = SLUG in house.names()
    if given or shipped:
        name = given or f"house:{SLUG}"
        found[name] = load(folder_of(name))
    return found


def minute(plan: Recipe) -> Tensor:
    """Two held-out talkers for a minute, with their pauses, (samples,)."""
    talkers = data_of(plan.data, "heldout").mixer.talkers
    passages = [talkers.passage(n, 60 * SAMPLE_RATE, generator_for(n)) for n in range(2)]
    return 0.5 * sum(passages[1:], passages[0])


def streamed(
    model: StreamingPSEModel, step: Any, sound: Tensor, options: argparse.Namespace
) -> tuple[dict[str, Any], Report]:
    """One row: hop by hop as a microphone gives them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = model.settings
    frames = int(settings.enrolment_seconds * SAMPLE_RATE / settings.hop)
    stream = Stream(model, example_enrolment(model, frames), step)
    neighbours, report, held = host.Neighbours(), None, []
    hops = round(60 / stream.latency.hop)
    for number in range(round(max(options.minutes, options.hold) * hops)):
        start = number % hops * stream.hop
        stream(sound[start : start + stream.hop])
        if number + 1 == round(options.minutes * hops):
            report, busy = stream.latency.report(), neighbours.cores()
        # What libraries set up at first use has been set up after a tenth.
        if (number + 1) % round(options.hold * hops / 10) == 0:
            held.append(host.resident_bytes())
    torch.set_num_threads(threads)
    assert report is not None
    state = sum(tensor.nbytes for tensor in model.state())
    row = {
        "parameters": model.num_parameters(),
        "real-time factor": float(f"{report.real_time_factor:.3g}"),
        "latency by construction, ms": round(1000 * settings.latency, 1),
        "hop, ms": 1000 * report.hop,
        "50 %, ms": round(1000 * report.median, 3),
        "99 %, ms": round(1000 * report.p99, 3),
        "worst, ms": round(1000 * report.worst, 3),
        "late": f"{report.late} of {report.hops}",
        "state, KiB": round(state / 1024, 1),
        "held in addition at the end, KiB": round((held[-1] - held[0]) / 1024),
        "cores busy elsewhere": round(busy, 2),
    }
    return row, report
