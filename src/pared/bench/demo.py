"""The demonstration: a teacher and its EDiT student, healing live, and where it pays."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pared import info
from pared.bench import scaling
from pared.bench.graphs import crossover_section, healing_section
from pared.bench.page import Section
from pared.bench.report import Report
from pared.bench.run import bench
from pared.checkpoint import load
from pared.healing import heal, student_of, task_of
from pared.method import Conversion, convert, denoiser, stack_of
from pared.worlds import emoji
from pared.worlds.datasets import latents_of
from pared.worlds.house import folder_of

TEACHER, STUDENT = "house:pixart", "house:pixart-edit"
PROMPTS = (
    "red heart",
    "grinning face with smiling eyes",
    "woman firefighter: medium skin tone",
    "man cook: dark skin tone",
    "cat face",
    "soccer ball",
    "green apple",
    "rocket",
)
# Small models that know their pictures well want little guidance.
GUIDANCE = 2.0
# The block whose cost decides at the sizes people pay for.
BLOCK, SIZES = "pixart-sigma", (256, 512, 1024, 2048)
# Pictures that live healing learns from; encoding more would take longer than the healing.
LIVE_PICTURES = 256


@dataclass(frozen=True)
class Settings:
    """How much the demonstration does.

    Attributes:
        steps: denoising steps of every picture.
        heal_steps: training steps of the live healing; 0 leaves it out.
        sizes: picture sizes, in pixels, at which a full-size block is timed; () leaves it out.
        seed: of the live healing: its new weights, noise and order.
    """

    steps: int = 12
    heal_steps: int = 24
    sizes: Sequence[int] = SIZES
    seed: int = 0


def demonstrate(
    folder: Path, settings: Settings, say: Callable[[str], None] = lambda text: None
) -> tuple[Report, Path]:
    """Run the demonstration and write `report.html` and `report.json` to `folder`.

    Args:
        folder: where to write.
        settings: how much to do.
        say: told what comes next, in a line.

    Returns:
        The report and the path of the page.
    """
    say("Loading the house teacher and its student")
    teacher, student = load(folder_of(TEACHER)), load(folder_of(STUDENT))
    for pipeline in (teacher, student):
        pipeline.set_progress_bar_config(disable=True)
    say(f"Painting {len(PROMPTS)} prompts from the same noise, and timing both in turn")
    report = bench(
        teacher,
        {"teacher": [], "edit": student},
        base="teacher",
        prompts=PROMPTS,
        steps=settings.steps,
        guidance=GUIDANCE,
        rounds=3,
        batch_size=len(PROMPTS),
        captions=emoji.load(size=None).captions,
        reference=None,
        use_resolution_binning=False,
    )
    sections: list[Section] = []
    if settings.heal_steps:
        say(f"Healing a fresh EDiT conversion live, for {settings.heal_steps} steps")
        sections.append(_heal_live(teacher, stack_of(denoiser(student)), settings))
    if settings.sizes:
        sizes = ", ".join(str(size) for size in settings.sizes)
        say(f"Timing one full-size {BLOCK} block at {sizes} pixels, softmax and EDiT in turn")
        tokens = denoiser(teacher).config.sample_size ** 2
        sections.append(_where_it_pays(stack_of(denoiser(student)), tokens, settings, say))
    report = replace(report, title=f"{TEACHER} and its EDiT student")
    report.save_json(folder / "report.json")
    return report, report.html(folder / "report.html", sections)


def _heal_live(teacher: Any, stack: Sequence[Conversion], settings: Settings) -> Section:
    """A fresh conversion of the teacher, trained for a moment."""
    world = emoji.load(split="train", size=64)
    world = world.select(torch.arange(0, len(world), len(world) // LIVE_PICTURES))
    data = latents_of(teacher, world.images, world.captions)
    original = denoiser(teacher)
    torch.manual_seed(settings.seed)
    student = convert(student_of(original), *stack)
    losses: list[tuple[int, float]] = []
    # In a place of its own: the loop would resume what an earlier demonstration left.
    with tempfile.TemporaryDirectory() as folder:
        heal(
            student,
            original,
            data,
            folder,
            task=task_of(teacher),
            on_step=lambda step, terms: losses.append((step, terms["output"] + terms["feature"])),
            steps=settings.heal_steps,
            batch_size=8,
            learning_rate=1e-3,
            seed=settings.seed,
            precision="bf16",
        )
    first, last = losses[0][1], sum(loss for _, loss in losses[-5:]) / len(losses[-5:])
    lead = (
        f"A fresh conversion, trained here and now for {len(losses)} steps of 8 pictures: its "
        f"distance to the teacher went from {first:.3g} to {last:.3g}. The student above was "
        "healed longer, by recipes/edit/house.toml."
    )
    return healing_section(
        losses, lead=lead, title="Healing, live", label="distance to the teacher"
    )


def _where_it_pays(
    stack: Sequence[Conversion], house: int, settings: Settings, say: Callable[[str], None]
) -> Section:
    """Time of a full-size block against tokens; the house model has `house` of them."""
    points = []
    for pixels in settings.sizes:
        say(f"  {pixels} x {pixels}")
        # A call that takes many seconds needs no warm-up.
        arms, warmup = {"softmax": [], "edit": stack}, int(pixels < 2048)
        points += scaling.measure(BLOCK, arms, [pixels], rounds=1, warmup=warmup)
    series = {
        name: [(point.tokens, point.timings[name].median) for point in points]
        for name in ("softmax", "edit")
    }
    tokens = [point.tokens for point in points]
    crossing = scaling.crossover(tokens, *([y for _, y in line] for line in series.values()))
    largest = points[-1]
    gain = largest.timings["edit"].ratio
    where = f"from {crossing:,.0f} tokens on" if crossing else "at none of these sizes"
    lead = (
        f"The house model has {house} tokens, and there linear attention does not pay. Measured "
        f"here on one full-size block of {BLOCK} (random weights, bfloat16): EDiT is faster "
        f"{where}, and {gain:.1f} times as fast at {largest.pixels} x {largest.pixels} pixels. "
        f"The paper's figures for the whole model on its GPU are {_paper_figures()}."
    )
    return crossover_section(series, lead=lead)


def _paper_figures() -> str:
    claims = [h for h in info.get("edit").headlines if h.key.startswith("speedup-")]
    return ", ".join(f"{h.paper:g}x at {h.key.removeprefix('speedup-')}" for h in claims)
