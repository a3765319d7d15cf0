"""From what a bench found to the rows of its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from pared.bench import verdicts
from pared.bench.commands import command_of
from pared.bench.figures import Figure
from pared.bench.floor import floor
from pared.bench.quality import closer
from pared.bench.report import Report, Row
from pared.bench.session import KEPT, Session
from pared.errors import InputError


def report(
    session: Session,
    title: str,
    conditions: dict[str, Any],
    models: Mapping[str, str],
    dtype: str | None = None,
) -> Report:
    """What was found, in words and figures.

    Args:
        session: that is over.
        title: what was benched.
        conditions: under which.
        models: by arm, where its pipeline comes from, as commands take it.
        dtype: that the commands load it in; by default as saved.
    """
    names = [n for n in session.order() if not session.qualities or n in session.qualities]
    rows = [_row(session, name, models, dtype) for name in names]
    sound = session.timings.verdict.notes
    arms = [(r.name, r.kind, r.figures.get("ratio"), r.verdict) for r in rows[1:]]
    images = {n: i.permute(0, 2, 3, 1).numpy() for n, i in session.images.items() if n in names}
    return Report(
        title=title,
        headline=verdicts.headline(arms, sound),
        conditions=conditions,
        rows=tuple(rows),
        prompts=tuple(str(s.prompt) for s in session.samples[:KEPT]) if images else (),
        images=images,
        notes=(*dict.fromkeys((*sound, *session.notes)),),
    )


def _row(session: Session, name: str, models: Mapping[str, str], dtype: str | None) -> Row:
    arm, look, quality = session.arms[name], session.looks[name], session.qualities.get(name)
    figures = _costs(session, name) | _times(session, name) | (quality.figures if quality else {})
    place = models.get(name if arm.kind == "model" else session.base, "")
    finding = verdicts.Finding(
        unhealed=arm.kind == "converted" and any(m.info.training for m in arm.stack),
        timing=session.timings.get(name),
        sound=session.timings.verdict.notes,
        failures=session.failures[name],
        identical=_identical(session, name),
        psnr=figures.get("psnr"),
        rival=_rival(session, name),
        paints=bool(session.qualities),
    )
    return Row(
        name=name,
        kind=arm.kind,
        stack=tuple(m.spec() for m in arm.stack),
        steps=arm.steps or arm.subject.steps,
        figures=figures,
        bill={kind: float(macs) for kind, macs in look.count.macs.items()},
        verdict="" if name == session.base else verdicts.verdict(finding),
        psnr=tuple(quality.psnr[:KEPT].tolist()) if quality and quality.psnr is not None else (),
        command=command_of(arm, place, dtype),
    )


def _identical(session: Session, name: str) -> bool | None:
    if name in session.qualities:
        return session.qualities[name].identical
    ours, base = session.looks[name].output, session.looks[session.base].output
    if ours is None or base is None or session.arms[name].kind == "fewer steps":
        return None
    return torch.equal(ours, base)


def _rival(session: Session, name: str) -> verdicts.Rival | None:
    rival = session.rivals.get(name)
    if rival not in session.qualities:
        return None
    ours, theirs = session.qualities[name], session.qualities[rival]
    return verdicts.Rival(
        name=rival,
        speed=session.timings[rival].ratio,
        psnr=theirs.figures["psnr"].value,
        nearer=closer(ours, theirs),
    )


def _costs(session: Session, name: str) -> dict[str, Figure]:
    look, model = session.looks[name], session.arms[name].subject.model
    found = {
        "passes": look.count.passes,
        "macs_per_pass": look.count.per_pass,
        "macs_per_image": look.count.total,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": _weight_bytes(model),
        "peak_bytes": look.peak,
    }
    return {key: Figure(float(value)) for key, value in found.items()}


def _times(session: Session, name: str) -> dict[str, Figure]:
    found = {}
    if (whole := session.timings.get(name)) is not None:
        found["seconds"] = Figure(whole.median, whole.p10, whole.p90)
        found["ratio"] = Figure(whole.ratio, whole.ratio_low, whole.ratio_high)
    if (one := session.calls.get(name)) is not None:
        found["call_seconds"] = Figure(one.median, one.p10, one.p90)
        found["call_ratio"] = Figure(one.ratio, one.ratio_low, one.ratio_high)
        if (least := _least_seconds(session, name)) is not None:
            found["floor"] = Figure(one.median / least)
    if name == session.base:
        # Against itself, it is 1 by definition.
        found = {key: value for key, value in found.items() if not key.endswith("ratio")}
    return found


def _least_seconds(session: Session, name: str) -> float | None:
    """The least time that this machine can need for one denoiser call."""
    look, model = session.looks[name], session.arms[name].subject.model
    kind = cast(Any, model).dtype
    macs = look.count.per_pass * look.count.passes / max(1, look.count.calls)
    try:
        return floor(session.device).seconds(2 * macs, _weight_bytes(model), kind) or None
    except InputError:  # no rate was measured for this number format
        return None


def _weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
