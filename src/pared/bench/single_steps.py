"""Which steps of a run bear reuse, as a page: the curves of single steps (arXiv 2401.01008)."""

from __future__ import annotations

from pathlib import Path

from pared.bench.graphs import curve_section
from pared.bench.page import Section, render
from pared.caching.runs import Runs, sensitivity
from pared.caching.schedules import Score


def write(path: Path, title: str, score: Score, steps: int, latents: Runs | None) -> Path:
    """Write the page; it may take as many runs as there are steps, twice.

    Args:
        path: of the HTML file.
        title: what it is about.
        score: of a schedule, e.g. `Runs`.
        steps: calls of the denoiser in a run.
        latents: runs that end in latents, which an error can be added to; None where the pipeline
            gives pictures alone.
    """
    decibels = sensitivity(score, steps)
    steadiest, touchiest = (1 + decibels.index(f(decibels)) for f in (max, min))
    verdict = (
        f"Reuse harms least at step {steadiest} and most at step {touchiest}. Steps count from 0, "
        "and the first has nothing to reuse."
    )
    sections = [_closeness(decibels)]
    if latents is not None:
        sections.append(_growth(latents.amplification()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(title, verdict, sections, "pared search"), encoding="utf-8")
    return path


def _closeness(decibels: tuple[float, ...]) -> Section:
    return curve_section(
        list(enumerate(decibels, 1)),
        "step that reuses",
        "PSNR (dB)",
        "Reuse at one step alone",
        "How close the end stays to that of the full run.",
    )


def _growth(growth: tuple[float, ...]) -> Section:
    return curve_section(
        list(enumerate(growth, 1)),
        "step",
        "growth",
        "Any small error",
        "Change of the end over a change of the latents ahead of the step: where it falls, an "
        "error harms the less the later it is made.",
    )
