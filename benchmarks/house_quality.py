"""Measures the house models: the autoencoder's error, and retrieval by the judge.

    python benchmarks/house_quality.py              # ten minutes on two cores
    python benchmarks/house_quality.py --pictures 64

Writes its tables into results/house.json.
"""

import argparse

import painting
import record
import torch

from pared.bench.alignment import retrieval
from pared.bench.distances import frechet
from pared.bench.judge import judge_of
from pared.checkpoint import load
from pared.worlds import emoji
from pared.worlds.emoji import Emoji
from pared.worlds.house import folder_of, names

PIPELINES = ("pixart", "sd3", "unet", "pixart-edit")


class Examiner:
    """The judge, and the captions among which a picture has to find its own."""

    def __init__(self) -> None:
        self.judge = judge_of("house:judge")
        self.captions = sorted(set(emoji.load(size=None).captions))
        self.texts = self.judge.of_texts(self.captions)

    def row(
        self, shown: str, split: str, world: Emoji, pictures: torch.Tensor
    ) -> dict[str, object]:
        """One row of the table; `pictures` (count, 3, height, width) in [0, 1]."""
        features = self.judge.of_images(pictures)
        real = self.judge.of_images(world.images.float() / 255)
        found = retrieval(
            features,
            self.texts,
            torch.tensor([self.captions.index(c) for c in world.captions]),
        )
        row = {
            "pictures": shown,
            "prompts": split,
            "count": len(pictures),
            "top-1": round(found[1], 4),
            "top-5": round(found[5], 4),
            "cosine to the real picture": round(float((features * real).sum(-1).mean()), 4),
        }
        if len(pictures) > self.judge.dimensions:
            row["Frechet to real"] = round(frechet(features, real), 4)
        print(row, flush=True)
        return row


@torch.no_grad()
def reconstructed(vae, images: torch.Tensor) -> torch.Tensor:
    """What is left of pictures, uint8 (count, 3, height, width), after encoding and decoding."""
    pixels = images.float() / 127.5 - 1
    decoded = [vae.decode(vae.encode(x).latent_dist.mean).sample for x in pixels.split(64)]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


def psnr(pictures: torch.Tensor, world: Emoji) -> float:
    """Mean over pictures, in dB."""
    error = (pictures - world.images.float() / 255).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(error)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=384, help="training prompts to paint")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args()
    examiner = Examiner()
    pipelines = {name: load(folder_of(f"house:{name}")) for name in PIPELINES if name in names()}
    vae = pipelines["pixart"].vae
    rows, errors = [], []
    for split in ("train", "heldout"):
        world = emoji.load(split=split, size=64)
        count = min(options.pictures, len(world))
        world = world.select(torch.arange(count) * len(world) // count)
        again = reconstructed(vae, world.images)
        errors.append(
            {"prompts": split, "pictures": count, "PSNR (dB)": round(psnr(again, world), 2)}
        )
        rows.append(examiner.row("real", split, world, world.images.float() / 255))
        rows.append(examiner.row("reconstructed by house:vae", split, world, again))
        for name, pipeline in pipelines.items():
            pipeline.set_progress_bar_config(disable=True)
            pictures = painting.painted(pipeline, world.captions, options.steps, options.guidance)
            rows.append(examiner.row(f"painted by house:{name}", split, world, pictures))
    conditions = {
        "steps": options.steps,
        "guidance": options.guidance,
        "captions to choose from": len(examiner.captions),
        "judge's weights": examiner.judge.digest,
    }
    tables = {
        "Retrieval": rows,
        "The autoencoder": errors,
        "Conditions": record.conditions(conditions),
    }
    print(record.write("house", (), tables))


if __name__ == "__main__":
    main()
