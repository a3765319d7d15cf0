"""The command that paints what an arm of a bench painted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pared import info
from pared.bench.arms import Arm
from pared.bench.peers import Peer
from pared.bench.subjects import PipelineSubject
from pared.method import Method

# Options of `pared sample` and `pared bench`, by what they set in a pipeline's call.
OPTIONS = {"guidance_scale": "--guidance", "height": "--height", "width": "--width"}
# What both commands settle by themselves.
SETTLED = ("use_resolution_binning", "clean_caption")


def command_of(arm: Arm, model: str, dtype: str | None = None) -> str:
    """What to type for the first picture of an arm.

    Where the bench converted a copy, a command that converts goes before. Caches of other
    libraries, which `pared sample` doesn't know, are measured again, all of them.

    Args:
        arm: of a bench.
        model: where the arm's pipeline comes from, as commands take it; "" where nobody knows.
        dtype: that it was loaded in, e.g. "bfloat16"; by default as saved.

    Returns:
        The command; "" where there is none: for bare denoisers, and where a method or an argument
        of the call was given that only Python knows.
    """
    subject = arm.subject
    if not model or not isinstance(subject, PipelineSubject):
        return ""
    call = {name: value for name, value in subject.arguments.items() if name not in SETTLED}
    if set(call) - set(OPTIONS):
        return ""
    words = [word for name, value in call.items() for word in (OPTIONS[name], str(value))]
    if (steps := arm.steps or subject.steps) is not None:
        words += ["--steps", str(steps)]
    typed = [] if dtype is None else ["--dtype", dtype]
    if any(isinstance(method, Peer) for method in arm.methods):
        return shlex.join(["pared", "bench", model, "--peers", *_prompts(subject), *words, *typed])
    if any(method.info.slug not in info.registry() for method in arm.stack):
        return ""
    words = [str(subject.samples[0].prompt), *_with(arm.methods), *words, "-o", "picture.png"]
    if not arm.converted:
        return shlex.join(["pared", "sample", model, *words, *typed])
    converted = [*_with(arm.converted), *typed, "-o", "student"]
    convert = shlex.join(["pared", "convert", model, *converted])
    return f"{convert} && {shlex.join(['pared', 'sample', 'student', *words])}"


def _with(methods: Sequence[Method]) -> list[str]:
    return [word for method in methods for word in ("--with", method.spec())]


def _prompts(subject: PipelineSubject) -> list[str]:
    """Options of `pared bench` for the same pictures; class labels are its own choice."""
    prompts = list(dict.fromkeys(sample.prompt for sample in subject.samples))
    words = [w for p in prompts if isinstance(p, str) for w in ("--prompt", p)]
    return [*words, "--seeds", str(len(subject.samples) // len(prompts))]
