"""The public configurations of models people use, by name, and toy ones of the same classes.

A preset is enough to build a model with random weights, so cost, memory and speed can be measured
with nothing downloaded. Each component carries its parameter count, which the tests count again.
Nothing here imports torch before `build` is called, so listing is instant.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pared.anatomy.presets.published import PUBLISHED
from pared.anatomy.presets.records import Component, Preset, SpeechPreset
from pared.anatomy.presets.speech import PUBLISHED_SPEECH, TOY_SPEECH
from pared.anatomy.presets.toys import TOYS
from pared.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Component", "Preset", "SpeechPreset", "build", "get", "names"]

PRESETS: dict[str, Preset | SpeechPreset] = {
    preset.name: preset for preset in (*PUBLISHED, *PUBLISHED_SPEECH, *TOYS, *TOY_SPEECH)
}


def names(kind: str | None = None) -> tuple[str, ...]:
    """Names of all presets, the toys last.

    Args:
        kind: of the model that methods work on, "denoiser" or "speech encoder"; None takes all.
    """
    return tuple(name for name, preset in PRESETS.items() if kind in (None, preset.kind))


def get(name: str) -> Preset | SpeechPreset:
    """A preset by name.

    Raises:
        InputError: there is none of that name; the message says which are near, and all.
    """
    if name in PRESETS:
        return PRESETS[name]
    plain = {_letters(known): known for known in PRESETS}
    near = [known for key, known in plain.items() if key.startswith(_letters(name) or "-")]
    near = near or [plain[key] for key in difflib.get_close_matches(_letters(name), plain, n=2)]
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise InputError(f"there is no preset {name!r}{hint}; the presets are {', '.join(PRESETS)}.")


def _letters(name: str) -> str:
    """A name without case and punctuation, in which people differ most."""
    return "".join(char for char in name.lower() if char.isalnum())


def build(
    name: str,
    device: str | torch.device = "meta",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    component: str | None = None,
    layers: int | None = None,
) -> nn.Module:
    """A component of a preset with random weights, in evaluation mode.

    Weights are drawn by the class's own initialisation, on the device and in the type asked for, so
    a large model needs no more memory than its weights. They differ between types and devices. The
    global random state is left as it was.

    Args:
        name: of the preset.
        device: "meta" for shapes only (no memory), or a real device.
        dtype: of the weights; torch's default type if None.
        seed: of the random weights.
        component: "denoiser", "vae", "text_encoder", "text_encoder_2", ..., "recogniser"; by
            default the one that methods work on.
        layers: keep only so many blocks of a transformer, to measure one block at full size.

    Raises:
        InputError: no such preset or component.
    """
    preset = get(name)
    parts = preset.components
    if component is not None and component not in parts:
        raise InputError(f"{name} has no component {component!r}; it has {', '.join(parts)}.")
    import torch

    device = torch.device(device)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), _default_dtype(dtype), device:
        torch.manual_seed(seed)
        part = preset.main if component is None else parts[component]
        model = part.make(**({} if layers is None else {part.depth: layers})).eval()
        # Some classes of transformers make a weight on the CPU, whatever the device.
        torch.nn.Module.to(model, device)
        # Lumina-Next has a weight that nothing reads, and leaves in it what memory held.
        if (unread := getattr(model, "pad_token", None)) is not None:
            torch.nn.init.zeros_(unread)
        return model


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
