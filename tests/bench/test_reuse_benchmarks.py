"""The scripts that measure reuse: what they make of figures, and which steps of a run skip."""

import importlib
from types import SimpleNamespace

import pytest

from pared.bench import grid
from tests.docs.markdown import ROOT

SEER = "taylorseer:interval=2,warmup=1"
RUN = {"cost": 0.5, "time": 0.6, "PSNR": 30.0, "steps": 10, "PSNR of steps": 25.0, "machine": "m"}


@pytest.fixture
def of(monkeypatch):
    """Modules of `benchmarks/` by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def runs(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return [RUN | {"distance": a, "distance of steps": b} for a, b in pairs]


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ((0.1, 0.12), (0.2, 0.23), "yes"),
        ((0.2, 0.23), (0.1, 0.12), "no"),
        # On average nearer, by less than the seeds differ.
        ((0.1, 0.3), (0.2, 0.25), "within the spread"),
        ((0.1,), (0.2,), "one seed"),
    ],
)
def test_nearer_than_fewer_steps(of, ours, theirs, said):
    row = of("caching").row_of("ras", runs(ours, theirs))
    assert row["nearer than these"] == said
    assert ("distance sd" in row) == (len(ours) > 1)


def test_the_front_of_a_table_is_named_in_its_figure(of):
    caching = of("caching")
    plain = grid.plain_reuse("unet")[0]
    rows = [
        caching.row_of("deepcache", runs((0.01, 0.02), (0.04, 0.04))),
        caching.row_of("deepcache:interval=5", runs((0.05, 0.05), (0.04, 0.04))),
        caching.row_of(plain, runs((0.06, 0.06), (0.04, 0.04))),
        caching.row_of("cache-dit:max_warmup_steps=4", runs((0.07, 0.07), (0.04, 0.04))),
    ]
    figure = caching.drawn(SimpleNamespace(family="unet", steps=20), rows)
    assert figure["points"] == {
        "fewer steps": [("", 0.5, 0.04)],
        "deepcache": [("defaults", 0.5, 0.015), ("", 0.5, 0.05)],
        "baselines": [("plain, interval=2", 0.5, 0.06), ("cache-dit", 0.5, 0.07)],
    }


def test_pieces_are_summed_up_and_measured_once(of, tmp_path, monkeypatch):
    caching = of("caching")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid, "settings", lambda family: [SEER])
    monkeypatch.setattr(caching, "CLAIMS", ())
    bench = caching.Bench("unet", 3, 1)
    done = caching.measured(bench, [1], with_peers=False)
    assert list(done) == [SEER] and list(done[SEER]) == [1]
    monkeypatch.setattr(bench, "painted", None)
    assert caching.measured(bench, [1], with_peers=False) == done
    assert caching.kept(bench, [0, 1, 2]) == done


def test_a_claim_is_a_ratio_of_distances_by_seed(of, monkeypatch):
    caching, written = of("caching"), []
    monkeypatch.setattr(caching.record, "write", lambda slug, claims: written.extend(claims))
    runs_of = {"ras": runs((0.1, 0.2), (0.2, 0.8)), "ras:resets=[]": runs((0.3, 0.5), (1, 1))}
    done = {spec: dict(enumerate(made)) for spec, made in runs_of.items()}
    for rival in ("", "ras:resets=[]"):
        caching.Rivals("ras", "distance-fewer-steps-over-ras", "sd3", "ras", rival).write(done, "")
    assert [claim.ours for claim in written] == pytest.approx([(2 + 4) / 2, (3 + 2.5) / 2])


def test_which_steps_skip_is_as_the_papers_have_it(of):
    speed = of("cache_speed")
    seer = speed.skips("taylorseer", "flux", 50)
    assert [step for step, skips in enumerate(seer) if not skips] == [0, 1, 2, *range(6, 50, 4)]
    assert [not s for s in speed.skips("deepcache:interval=5,branch=1", "unet", 11)] == [
        step % 5 == 0 for step in range(11)
    ]
    ras = speed.skips("ras:resets=[12,20],high_ratio=0.3", "sd3", 28)
    assert [step for step, skips in enumerate(ras) if not skips] == [0, 1, 2, 3, 12, 20]
    families = {"pixart-sigma": "pixart", "sd3.5-medium": "sd3", "dit-xl-2": "dit"}
    families |= {"sd1.5": "unet", "flux.1-dev": "flux"}
    for preset, scene in speed.SCENES.items():
        for way in scene.ways:
            # Up to the first step that skips little more is to be seen.
            assert speed.skips(way.spec, families[preset], 6).index(True) > 0


def test_what_schedules_decide_is_counted(of, monkeypatch):
    speed, written = of("cache_speed"), {}
    monkeypatch.setattr(
        speed.record, "write", lambda slug, claims: written.update({c.key: c.ours for c in claims})
    )
    speed.counted_claims()
    assert written == {"speedup-50": 3.5714, "cost-1024": pytest.approx(1.6, abs=2e-3)}
