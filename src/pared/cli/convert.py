"""`pared convert`: rebuild a model with published methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pared.cli import common
from pared.cli.models import ModelName, Source, locate

if TYPE_CHECKING:
    from torch import nn

# What transformers calls the files of feature extractors, processors and tokenizers, without which
# a recogniser neither hears nor writes.
COMPANIONS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@click.command()
@click.argument("model", type=ModelName())
@common.with_option("conversion", required=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
@common.dtype_option
def command(model: str, specs: tuple[str, ...], output: Path, dtype: str | None) -> None:
    """Rebuild a model with published methods.

    The methods are applied in the order given and the result is saved as an ordinary diffusers
    folder with one more file, pared.json, from which `pared.load` rebuilds it. Weights are carried
    over. What a method puts in new has to learn first: see `pared heal`.

    \b
    Examples:
      pared convert house:pixart --with edit -o student
      pared convert toy:sd3 --with edit:r=8,layers=[0] -o student
    """
    common.records_of(specs, "conversion")
    source = locate(model)
    common.check_writable(output)
    from pared import anatomy, checkpoint
    from pared.bench.targets import read
    from pared.method import convert, denoiser

    checkpoint.check_replaceable(output)
    methods = common.conversions_of(specs)
    if source.kind != "hub":
        # A rehearsal without weights: what doesn't fit is refused before a large model is loaded.
        convert(read(source.without_weights()).denoiser(None), *methods)
    target = source.load(common.dtype_of(dtype))
    denoising = anatomy.unwrap(denoiser(target))
    before = _parameters(denoising)
    # Asked before the surgery: afterwards a claimed site may be gone.
    family = anatomy.of(denoising)
    claims = [(m.spec(), c.how, c.site) for m in methods for c in m.claims(family)]
    convert(target, *methods)
    folder = checkpoint.save(target, output, files=_companions(source))

    click.echo(f"{model}: {type(denoising).__name__}, {common.count(before)} parameters")
    for spec, how in dict.fromkeys((spec, how) for spec, how, _ in claims):
        sites = [site for s, h, site in claims if (s, h) == (spec, how)]
        click.echo(f"{spec} {how} {_in_short(sites)}")
    after = _parameters(denoising)
    click.echo(f"{folder}: {common.count(after)} parameters ({after / before - 1:+.1%})")


def _companions(source: Source) -> list[Path]:
    """Files of what goes with a single model; the parts of a pipeline are written with it."""
    if source.kind == "preset" or source.is_pipeline:
        return []
    folder = source.folder()
    return [path for name in COMPANIONS if (path := folder / name).is_file()]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _in_short(sites: list[str]) -> str:
    """`blocks.0.attn, blocks.1.attn, blocks.2.attn` as `blocks.{0-2}.attn (3)`."""
    groups: dict[tuple[str, str], list[int]] = {}
    alone = []
    for site in sites:
        parts = site.split(".")
        at = next((i for i in reversed(range(len(parts))) if parts[i].isdigit()), None)
        if at is None:
            alone.append(site)
        else:
            key = ".".join(parts[:at]), ".".join(parts[at + 1 :])
            groups.setdefault(key, []).append(int(parts[at]))
    texts = [f"{head}.{_ranges(numbers)}.{tail}" for (head, tail), numbers in groups.items()]
    return ", ".join(texts + alone) + (f" ({len(sites)} places)" if len(sites) > 1 else "")


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `{0-2,5}`; one number as it is."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"
