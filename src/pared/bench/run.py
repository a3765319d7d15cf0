"""`pared.bench`: what an arm gains and loses beside the base, measured in one go."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pared import method
from pared.bench import grid, subjects
from pared.bench.arms import arms_of, evaluating
from pared.bench.floor import machine
from pared.bench.judge import Judge, judge_of
from pared.bench.quality import as_images
from pared.bench.report import Report
from pared.bench.rows import report
from pared.bench.session import Session
from pared.bench.subjects import PipelineSubject, Sample, Subject
from pared.errors import InputError

RANDOM = "The weights are random: time and cost mean something, outputs don't."


def bench(
    target: Any,
    arms: Mapping[str, Any],
    prompts: Sequence[Any] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seeds: int = 1,
    rounds: int = 10,
    base: str = "base",
    judge: Any = None,
    reference: Any = None,
    captions: Sequence[str] | None = None,
    quality: bool = True,
    batch_size: int = 1,
    device: str | None = None,
    peers: bool = False,
    models: Mapping[str, str] | None = None,
    dtype: str | None = None,
    **call: Any,
) -> Report:
    """Measures time, cost and quality of several ways to run one model, side by side.

    Base and arms take turns, so that what disturbs the machine disturbs all of them. Arms with
    run-time methods get a rival: the base with as many fewer steps as take the same time.
    A method whose own quick checks fail is not timed. Ctrl-C while pictures are painted gives a
    report of the arms that are done, if these are the base and one more.

    Args:
        target: a pipeline; or a denoiser or the name of a preset, whose calls are timed, but which
            paints nothing. A folder or `house:NAME` is loaded.
        arms: by name a list of methods or specs (run-time methods are attached for each run,
            conversions done to a copy, unhealed), or a model or pipeline of its own.
        prompts: what to paint (class labels for class-to-image pipelines).
        steps: of a run; by default the pipeline's, and 1 for a denoiser.
        guidance: the pipeline's guidance scale.
        height: in pixels; for a bare denoiser, which knows no others, in latent pixels.
        width: likewise.
        seeds: pictures per prompt, each with noise of its own that is the same in all arms.
        rounds: how often each arm is timed.
        base: name of the arm that the others are compared with.
        judge: CLIP model for distances between sets and retrieval, see `judge_of`.
        reference: real pictures to measure distances to, see `as_images`.
        captions: texts among which the judge looks for the prompt; by default the prompts.
        quality: False measures time and cost only.
        batch_size: pictures painted at once for quality; time is always that of one.
        device: where to put what is named, not given.
        peers: also an arm for every cache of diffusers and cache-dit that works on the pipeline.
        models: by arm, what the commands of the report call its model, e.g. {"base":
            "house:pixart"}; by default where it was loaded from.
        dtype: for these commands, e.g. "bfloat16"; by default as saved.
        call: further arguments of the pipeline's call.

    Returns:
        The report: `.table()`, `.html(path)`, `.save_json(path)`.

    Raises:
        InputError: something given can't be used; the message says what, before anything is run.
    """
    _check_counts(seeds=seeds, rounds=rounds, batch_size=batch_size)
    call = _given(steps, guidance, height, width) | call
    opened, preset = subjects.open_target(target, device)
    samples = _samples(opened, prompts, seeds)
    subject = subjects.subject_of(opened, preset, samples, call)
    found, noted = grid.peer_arms(subject) if peers else ({}, [])
    _check_peers(noted, {*arms, *found} - {base}, opened)
    session = Session(arms_of(subject, {**arms, **found}, base), base, rounds, batch_size, samples)
    session.notes += [*noted, *[RANDOM] * (preset is not None)]
    paints = quality and subject.paints
    examiner = judge_of(judge) if paints else None
    real = as_images(reference) if paints and reference is not None else None
    with evaluating(session.arms):
        session.measure()
        if paints:
            session.paint(examiner, real, captions)
    known = _origins(session, {base: target} if isinstance(target, str) else {}, models or {})
    title = (models or {}).get(base) or (target if isinstance(target, str) else _name(opened))
    conditions = _conditions(session, subject, examiner)
    conditions |= {"seeds": seeds, "real_pictures": 0 if real is None else len(real)}
    return report(session, title, conditions, known, dtype)


def _given(
    steps: int | None, guidance: float | None, height: int | None, width: int | None
) -> dict[str, Any]:
    """Arguments of a pipeline's call, those that were given."""
    usual = {"num_inference_steps": steps, "guidance_scale": guidance}
    usual |= {"height": height, "width": width}
    return {name: value for name, value in usual.items() if value is not None}


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name}={value} doesn't work; give a whole number of at least 1.")


def _check_peers(noted: Sequence[str], arms: set[str], opened: Any) -> None:
    """See that caches of other libraries that don't work leave something to measure."""
    if noted and not arms:
        raise InputError(
            f"none of {len(noted)} caches of other libraries works in a {_name(opened)}, and there "
            "is no arm beside them; give one of pared's own."
        )


def _origins(session: Session, *told: Mapping[str, str]) -> dict[str, str]:
    """Where the arms' pipelines come from, as far as anybody knows; who tells last is heard."""
    found = {
        name: str(place)
        for name, arm in session.arms.items()
        if (place := getattr(arm.subject.target, "name_or_path", None))
    }
    for each in told:
        found |= each
    return found


def _name(opened: Any) -> str:
    """What a model is called: the last part of where it came from, or else its class."""
    place = getattr(opened, "name_or_path", None)
    return Path(place).name if isinstance(place, str) and place else type(opened).__name__


def _samples(target: Any, prompts: Sequence[Any] | None, seeds: int) -> list[Sample]:
    """The pictures to paint: first one of each prompt, then the second of each."""
    if not hasattr(target, "components"):
        if prompts is not None:
            raise InputError("a bare denoiser paints nothing; leave the prompts out.")
        return []
    if prompts is None:
        prompts = subjects.usual_prompts(target)
    prompts = [prompts] if isinstance(prompts, (str, int)) else list(prompts)
    if not prompts:
        raise InputError("there are no prompts to paint; give at least one.")
    numbered = [prompt for _ in range(seeds) for prompt in prompts]
    return [Sample(prompt, seed) for seed, prompt in enumerate(numbered)]


def _conditions(session: Session, subject: Subject, judge: Judge | None) -> dict[str, Any]:
    """What the figures hold for, ready for JSON."""
    model, verdict = subject.model, session.timings.verdict
    settings = subject.settings if isinstance(subject, PipelineSubject) else {}
    if judge is not None:
        settings = settings | {"judge": judge.name, "judge_weights": judge.digest}
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": machine(session.device),
        "versions": method.versions(),
        "denoiser": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "steps": subject.steps,
        **settings,
        "prompts": list(dict.fromkeys(str(s.prompt) for s in session.samples)),
        "pictures": len(session.samples) if session.qualities else 0,
        "rounds": session.rounds,
        "batch_size": session.batch_size,
        "threads": verdict.threads,
        "busy_cores_elsewhere": round(verdict.busy_elsewhere, 2),
        "drift": round(verdict.drift, 4),
    }
