"""A setting that nothing would read is refused, however sound it is elsewhere."""

from pathlib import Path

import pytest

from pared import recipe
from pared.errors import InputError

RECIPES = Path(__file__).parents[2] / "recipes"
# A recipe of every kind of data.
OF_KIND = {
    "images": "house/vae",
    "image-text": "house/judge",
    "latents": "house/pixart",
    "tasks": "house/tasks",
    "transcripts": "recognition/mini",
    "mixtures": "streaming-pse/mini",
    "recordings": "summarymixing-ssl/mini",
}
VALUES = {
    "drop": "0.2",
    "balance": "0.5",
    "vae": "house:vae",
    "text_encoder": "house:clip",
    "utterances": "{ digits = 9 }",
    "snr": "[5, 25]",
    "extractor": "transformers.SeamlessM4TFeatureExtractor",
    "mixing": "{ babble = 0.5 }",
    "seconds": "3.0",
    "noises": "fans",
}
USELESS = [
    (kind, name) for name, kinds in recipe.USED_BY.items() for kind in OF_KIND if kind not in kinds
]


def test_all_settings_and_kinds_are_asked_for():
    assert VALUES.keys() == recipe.USED_BY.keys()
    for kind, name in OF_KIND.items():
        assert recipe.read(RECIPES / f"{name}.toml").data.kind == kind


@pytest.mark.parametrize(("kind", "name"), USELESS)
def test_of_data(kind, name):
    path = RECIPES / f"{OF_KIND[kind]}.toml"
    with pytest.raises(InputError, match=f"data of kind '{kind}' have no use for {name}, only "):
        recipe.read(path, [f"data.{name}={VALUES[name]}"])


@pytest.mark.parametrize(
    "change", ["model.config={ depth = 2 }", "data.vae=house:vae", "data.text_encoder=house:clip"]
)
def test_of_what_a_pipeline_has_itself(change):
    name = change.partition("=")[0]
    with pytest.raises(InputError, match=f"the pipeline to start from has its own; leave {name} o"):
        recipe.read(RECIPES / "edit" / "mini.toml", [change])


def test_a_setting_of_a_use_is_taken():
    read = recipe.read(RECIPES / "recognition/mini.toml", ["data.snr=[5, 25]", "data.noises=fans"])
    assert (read.data.snr, read.data.noises) == ((5, 25), "fans")
    assert recipe.read(RECIPES / "house/vae.toml", ["data.drop=0"]).data.drop == 0
