"""The best way to run a pipeline under a budget: rounds, budgets, plans."""

import json
from dataclasses import replace

import pytest
import torch

import pared
from pared.bench import fidelity, grid
from pared.bench import fit as fitting
from pared.bench.fit import Budget, Plan, Trial, read_plan
from pared.bench.subjects import PROMPTS, PipelineSubject
from pared.errors import InputError
from pared.worlds import house
from tests.caching.pipelines import WAYS
from tests.cli import toy_pipeline

# The first way of each family stands for it.
WAY = {way.family: way for way in reversed(WAYS)}


@pytest.fixture(scope="module")
def pipeline():
    pipe = pared.load(house.folder_of("house:pixart"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_grid_names_attachable_methods_of_the_family(pipeline):
    specs = grid.settings("pixart")
    assert "re-ttention:keep=0.25" in specs
    assert len(set(specs)) == len(specs)
    stacks = grid.attachable(pipeline, ["re-ttention:keep=0.25", "re-ttention:keep=0.125"], True)
    assert stacks == [("re-ttention:keep=0.25",), ("re-ttention:keep=0.125",)]
    with pytest.raises(InputError, match="no run-time method for a pixart model"):
        grid.settings("pixart", ["edit"])


@pytest.mark.parametrize("family", ["pixart", "dit", "sd3", "flux", "wan", "unet", "lumina"])
def test_plain_reuse_is_a_point_of_every_family(family):
    plain = grid.plain_reuse(family)
    assert len(plain) == 2 and set(plain) < set(grid.settings(family))
    assert grid.attachable(WAY[family].build(), plain) == [(spec,) for spec in plain]


def test_quality_finds_the_fastest_that_keeps_it(pipeline):
    told = []
    found = pared.fit(
        pipeline,
        quality=20,
        methods=["re-ttention"],
        pictures=3,
        num_inference_steps=8,
        on_round=lambda alive, pictures: told.append((len(alive), pictures)),
    )
    assert found.complete and found.best.quality >= 20
    assert [pictures for _, pictures in told] == [2, 1]
    assert told[0][0] > told[1][0] >= 1
    longest = [t for t in (found.base, *found.trials) if len(t.seconds) == 3]
    keeping = [t for t in longest if t.quality >= 20]
    assert found.best.time == min(t.time for t in keeping)
    assert found.base.quality == fitting.PSNR_CAP


def test_a_plan_paints_as_its_trial_did(pipeline, tmp_path):
    found = pared.fit(
        pipeline, latency=60, methods=["re-ttention"], pictures=1, num_inference_steps=6
    )
    path = found.save(tmp_path / "sub" / "plan.json")
    plan = read_plan(path)
    assert plan == Plan(**vars(found.conditions), stack=(), steps=6)
    assert (plan.sampler, plan.dtype) == ("DPMSolverMultistepScheduler", "float32")
    assert plan.model == house.folder_of("house:pixart") and "guidance_scale" not in plan.call
    assert json.loads(path.read_text())["budget"] == {"seconds": 60}
    assert not list(path.parent.glob("*.part"))
    # Time is no matter here: what is nearest to the whole model is the whole model.
    assert found.best.stack == () and found.best.steps == 6


def test_methods_join_in_pairs_whose_plan_paints_as_they_did(tmp_path, monkeypatch):
    # Which settings are the best is for the clock to say; here it's one of each method.
    monkeypatch.setattr(fitting, "pareto", lambda points, higher: [0, len(points) - 1])
    pipe = pared.load(toy_pipeline.write(tmp_path / "toy"))
    size = {"guidance_scale": 2.0, "height": 32, "width": 48}
    found = pared.fit(
        pipe,
        quality=1,
        methods=["taylorseer", "delta-dit"],
        pictures=2,
        name="mine",
        num_inference_steps=6,
        **size,
    )
    (pair,) = (trial for trial in found.trials if len(trial.stack) == 2)
    assert [spec.partition(":")[0] for spec in pair.stack] == ["delta-dit", "taylorseer"]
    assert len(pair.seconds) == len(pair.decibels) == 2
    plan = read_plan(replace(found, best=pair).save(tmp_path / "plan.json"))
    assert (plan.model, plan.stack, plan.steps) == ("mine", pair.stack, 6)
    assert size.items() <= plan.call.items()

    def paint():
        noise = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": plan.steps, "output_type": "np", **plan.call}
        return torch.as_tensor(pipe(PROMPTS[0], generator=noise, **call).images).permute(0, 3, 1, 2)

    whole = paint()
    with pared.apply(pipe, *grid.methods_of(plan.stack)) as handle:
        psnr = float(fidelity.psnr(paint(), whole))
    assert handle.stats["delta-dit"]["reused"] and handle.stats["taylorseer"]["forecast"]
    assert psnr == pytest.approx(pair.decibels[0], abs=1e-3)


def test_what_cannot_be_kept_is_said(pipeline):
    with pytest.raises(InputError, match="nothing paints a picture in 1e-05 s: the fastest"):
        pared.fit(
            pipeline, latency=1e-5, methods=["re-ttention"], pictures=1, num_inference_steps=4
        )
    with pytest.raises(InputError, match="one of the two"):
        pared.fit(pipeline)
    with pytest.raises(InputError, match="one of the two"):
        pared.fit(pipeline, latency=1, quality=30)


def stop(done, total):
    if done == 3:
        raise KeyboardInterrupt


def test_ctrl_c_keeps_what_was_found(pipeline):
    found = pared.fit(
        pipeline,
        quality=1,
        methods=["re-ttention"],
        pictures=1,
        num_inference_steps=4,
        on_picture=stop,
    )
    assert not found.complete and found.best.seconds


def test_a_verdict_on_a_part_says_so(pipeline):
    told = "until Ctrl-C nothing paints a picture in 1e-06 s: the fastest way takes"
    with pytest.raises(InputError, match=told):
        pared.fit(pipeline, 1e-6, methods=["re-ttention"], num_inference_steps=4, on_picture=stop)


def test_one_that_had_to_go_wins_where_all_finalists_miss_the_budget(pipeline):
    """The better half may be what lies just beside the budget."""
    near = [Trial(("ras",), 4, seconds=[1.1], decibels=[40.0 + n]) for n in range(4)]
    fast = Trial((), 2, seconds=[0.5], decibels=[20.0])
    for budget, best in ((Budget(seconds=1.0), fast), (Budget(seconds=1.2), near[-1])):
        search = fitting.Search(
            PipelineSubject(pipeline, [], {}), budget, [*near, fast], print, print
        )
        search.base.seconds, search.base.decibels = [4.0], [100.0]
        search.alive = search._survivors(pictures=2, last=False)
        assert fast not in search.alive
        search.alive = search._survivors(pictures=4, last=True)
        assert search._fit(True, None).best == best


def test_the_room_beside_the_budget_shrinks():
    trial = Trial((), 4, seconds=[1.2], decibels=[26.0])
    assert not trial.keeps(Budget(seconds=1.0)) and trial.keeps(Budget(seconds=1.0), room=1)
    assert not trial.keeps(Budget(seconds=1.0), room=0.5)
    assert trial.keeps(Budget(decibels=30), room=1) and not trial.keeps(Budget(decibels=30), 0.5)


@pytest.mark.parametrize(
    "text", [None, "{", "{}", '{"with": 3, "steps": "many"}', '{"with": [], "steps": 4}']
)
def test_what_is_no_plan_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match="pared fit"):
        read_plan(path)


def test_trials_restore_the_pipeline(pipeline):
    call = {"prompt": "red apple", "num_inference_steps": 4, "output_type": "pt"}
    call["use_resolution_binning"] = False

    def paint():
        return pipeline(**call, generator=torch.Generator().manual_seed(0)).images

    before = paint()
    pared.fit(pipeline, quality=10, methods=["re-ttention"], pictures=1, num_inference_steps=4)
    assert torch.equal(paint(), before)
