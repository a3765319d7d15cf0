"""Data of users, small enough to train a toy on."""

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three captioned pictures."""
    place = tmp_path_factory.mktemp("photos")
    for number in range(3):
        Image.effect_noise((80, 80), 60).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"cat face {number}")
    return place
