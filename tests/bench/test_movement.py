"""Movement: the distance of each layer from where it started."""

import copy
import math

import pytest
import torch

from pared import anatomy
from pared.anatomy import presets
from pared.bench.movement import movement
from pared.errors import InputError


def test_each_layer_by_itself():
    before = presets.build("toy:unet", device="cpu")
    after = copy.deepcopy(before)
    site = anatomy.of(after).sites("feed_forward")[1]
    moved = [*site.module.parameters(), after.conv_in.bias]
    with torch.no_grad():
        for parameter in moved:
            parameter.add_(0.5)
    rows = {row.path: row for row in movement(before, after)}
    assert len(rows) == len(movement(before, after))
    feed_forward = rows[site.path]
    count = sum(p.numel() for p in site.module.parameters())
    size = math.sqrt(
        sum(float(p.detach().square().sum()) for p in before.get_submodule(site.path).parameters())
    )
    assert feed_forward.kind == "feed_forward"
    assert feed_forward.norm == pytest.approx(0.5 * math.sqrt(count))
    assert feed_forward.relative == pytest.approx(feed_forward.norm / size, rel=1e-5)
    assert rows["conv_in"].kind == "other"
    assert rows["conv_in"].norm == pytest.approx(0.5 * math.sqrt(32))
    still = set(rows) - {site.path, "conv_in"}
    assert all(rows[path].norm == rows[path].relative == 0 for path in still)
    kinds = {s.path: s.kind for s in anatomy.of(before).sites()}
    assert kinds == {path: row.kind for path, row in rows.items() if row.kind != "other"}


def test_a_layer_that_was_zero():
    before = presets.build("toy:unet", device="cpu")
    after = copy.deepcopy(before)
    with torch.no_grad():
        for parameter in before.conv_out.parameters():
            parameter.zero_()
    rows = {row.path: row for row in movement(before, after)}
    assert rows["conv_out"].relative == math.inf


def test_models_that_differ_in_more_than_numbers():
    unet, pixart = (presets.build(f"toy:{name}", device="cpu") for name in ("unet", "pixart"))
    with pytest.raises(InputError, match=r"has no conv_in.weight of shape \(32, 4, 3, 3\)"):
        movement(unet, pixart)
    wider = copy.deepcopy(unet)
    wider.extra = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"also has extra.weight"):
        movement(unet, wider)
