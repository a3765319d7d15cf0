"""How good the answers of a model that was taught tasks are: what the scripts on tasks share."""

import torch

from pared.bench import edits
from pared.bench.distances import frechet
from pared.bench.judge import Judge
from pared.worlds.tasks import Examples


def marks_of(judge: Judge, examples: Examples, painted: torch.Tensor) -> dict[str, float]:
    """Figures of one task, means over its examples.

    Args:
        judge: encoder of pictures and texts that no model was trained with.
        examples: of the task, held out.
        painted: what was made of them, (examples, 3, height, width) in [0, 1].
    """
    target = examples.images[examples.after].float() / 255
    seen = judge.of_images(painted), judge.of_images(target)
    if examples.task == "text-to-image":
        return {"Frechet to real": frechet(*seen)}
    given = examples.images[examples.before].float() / 255
    near = {name: float(x.mean()) for name, x in edits.closeness(painted, target).items()}
    found = {"PSNR": near["psnr"], "squared error": near["mse"]}
    found["judge's distance to truth"] = float((1 - (seen[0] * seen[1]).sum(-1)).mean())
    if examples.task != "upscale":
        direction = edits.target_direction(judge, given, painted, target)
        found["DVS"] = edits.average(direction)[0]
        words = edits.caption_direction(judge, given, painted, examples.captions or [])
        found["DCS"] = edits.average(words)[0]
    return found
