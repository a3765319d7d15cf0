"""Recipes that end in few steps: both stages or the second, resumed, sampled, refused."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tqdm import tqdm

import pared
from pared import anatomy, recipe
from pared.errors import InputError
from pared.few_step import progressive
from pared.guidance.guidance_distillation import one_pass
from pared.healing import task_of
from pared.method import denoiser, stack_of
from pared.objectives.guided import WEIGHT
from pared.objectives.paths import Path as Way
from pared.training import loop
from tests.recipes.pipelines import pipeline
from tests.recipes.test_recognition_recipes import interruption

RECIPES = Path(__file__).parents[2] / "recipes" / "guidance-distillation"
MINI, PAPER = RECIPES / "few-steps-mini.toml", RECIPES / "few-steps-paper.toml"
# Of the former, in the place of its own.
ROUNDS = ["stages.1.objective.steps=8", "stages.1.objective.last=4"]
SECOND = """
name = "second"
[model]
from = "runs/guided/model"
[data]
kind = "latents"
drop = 0
[objective]
name = "progressive"
settings = { steps = 4, last = 2, w_max = 7 }
[[stages]]
size = 64
training = { steps = 2 }
"""
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
V = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V |= {"prediction_type": "v_prediction", "steps_offset": 1}
SCHEDULERS = {"pixart": FLOW, "unet": V}


@pytest.fixture
def second(tmp_path):
    """A recipe of the second stage alone."""
    (tmp_path / "second.toml").write_text(SECOND)
    return tmp_path / "second.toml"


def teacher(family: str, place: Path, *methods) -> Path:
    """The folder of a pipeline, with methods where some are given."""
    pipe = pipeline(family)
    if family in SCHEDULERS:
        pipe.scheduler = DPMSolverMultistepScheduler(**SCHEDULERS[family])
    return pared.save(pared.convert(pipe, *methods), place / "teacher")


def planned(path: Path, start: Path, photos: Path, *changes: str) -> recipe.Recipe:
    short = ["steps=2", "batch_size=2", "warmup=0", "log_every=1", "precision=no", "accumulation=1"]
    stages = path.read_text().count("[[stages]]")
    every = [f"stages.{n}.training.{x}" for n in range(stages) for x in short]
    sizes = [f"stages.{n}.size=64" for n in range(stages)]
    places = [f"model.from={start}", f"data.source={photos}"]
    rounds = ROUNDS if path == MINI else []
    return recipe.read(path, [*places, *sizes, *every, *rounds, *changes])


@torch.no_grad()
def both_ways(pipe, steps: int, scale: float):
    """Latents by the stock pipeline and by the student's own sampler, and the pipeline's calls."""
    model, calls = denoiser(pipe), []
    family = anatomy.of(model)
    noise = family.example(generator=torch.Generator().manual_seed(0), height=8, width=8)[0]
    condition = family.encode(pipe, ["a fox"]) | {WEIGHT: torch.tensor([scale - 1])}
    way = Way.of(task_of(pipe))
    wanted = progressive.sample(way.estimate(model, condition), noise, way, steps)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": steps, "guidance_scale": scale}
    if family.name == "pixart":
        call |= {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 12}
    call = one_pass(pipe, **call)
    return pipe("a fox", latents=noise, output_type="latent", **call).images, wanted, len(calls)


# Both stages in one -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["pixart", "sd3"])
def test_a_pipeline_comes_out_that_paints_in_few_steps(family, tmp_path, photos):
    plan = planned(MINI, teacher(family, tmp_path), photos)
    assert recipe.steps_of(plan) == 2 + 4 + 4
    recipe.run(plan, tmp_path / "out")
    runs = {p.parent.relative_to(tmp_path / "out").as_posix() for p in tmp_path.rglob("log.jsonl")}
    assert runs == {"stage-1", "stage-2/round-1-steps-8", "stage-2/round-2-steps-4"}
    again = pared.load(tmp_path / "out" / "model")
    assert [m.info.slug for m in stack_of(denoiser(again))] == ["guidance-distillation"]
    painted, wanted, calls = both_ways(again, steps=4, scale=3.0)
    assert calls == 4
    torch.testing.assert_close(painted, wanted, rtol=0, atol=3e-3 * float(wanted.abs().max()))
    other, _, _ = both_ways(again, steps=4, scale=8.0)
    assert not torch.equal(painted, other)


class Killed(Exception):
    pass


def test_stopped_within_and_between_rounds_it_ends_with_the_same_weights(
    tmp_path, photos, monkeypatch
):
    changes = ["stages.1.training.ema=0.9", "stages.1.training.checkpoint_every=1"]
    plan = planned(MINI, teacher("pixart", tmp_path), photos, *changes)
    whole, parts = recipe.run(plan, tmp_path / "whole"), tmp_path / "parts"
    with interruption(at=2):  # the first stage has no third step
        assert recipe.run(plan, parts) is None
    place = parts / "stage-2" / "round-1-steps-8"
    assert [p.name for p in place.glob("checkpoint-*")] == ["checkpoint-00000003"]
    train = progressive.train

    def killed(student, objective, data, settings, folder, on_step):
        if folder.name == "round-2-steps-4":
            raise Killed
        return train(student, objective, data, settings, folder, on_step)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(progressive, "train", killed)
        recipe.run(plan, parts)
    assert not (parts / "model").exists()
    lines = [json.loads(line)["step"] for line in (place / "log.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]
    one = denoiser(whole).state_dict()
    other = denoiser(recipe.run(plan, parts)).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_progress_bar_tells_the_round(tmp_path, photos, capsys, monkeypatch):
    # The hub's bars, of which these are, are off in tests.
    monkeypatch.setattr(loop, "tqdm", lambda name, **bar: tqdm(**bar))
    recipe.run(planned(MINI, teacher("pixart", tmp_path), photos), tmp_path / "out")
    shown = capsys.readouterr().err
    assert "round 1 of 2, N = 8:" in shown and "round 2 of 2, N = 4:" in shown


# From a first stage -------------------------------------------------------------------------------


def test_the_second_stage_from_the_folder_of_the_first(tmp_path, photos, second):
    start = teacher("unet", tmp_path, pared.GuidanceDistillation(w_max=7.0))
    recipe.run(planned(second, start, photos), tmp_path / "out")
    again = pared.load(tmp_path / "out" / "model")
    assert again.scheduler.config.timestep_spacing == "trailing"
    painted, wanted, calls = both_ways(again, steps=2, scale=4.0)
    assert calls == 2
    torch.testing.assert_close(painted, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_a_plain_pipeline_without_guidance(tmp_path, photos, second):
    plan = planned(second, teacher("pixart", tmp_path), photos, "objective.settings.w_max=0")
    recipe.run(plan, tmp_path / "out")
    again = pared.load(tmp_path / "out" / "model")
    assert not stack_of(denoiser(again)) and again.scheduler.config.solver_order == 1


def test_a_model_that_reads_no_weight_is_refused_before_anything(tmp_path, photos, second):
    plan = planned(second, teacher("pixart", tmp_path), photos)
    with pytest.raises(InputError, match="the model to distil reads no guidance weight; convert"):
        recipe.run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_steps_than_times_are_refused_before_anything(tmp_path, photos):
    changes = ["stages.1.objective.steps=512", "data.held=true"]
    plan = planned(PAPER, teacher("unet", tmp_path), photos, *changes)
    with pytest.raises(InputError, match="1024 different times don't fit into the 1000"):
        recipe.run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_the_paper_starts(tmp_path, photos):
    changes = ["stages.1.objective.steps=8", "stages.1.training.steps=1"]
    plan = planned(PAPER, teacher("unet", tmp_path), photos, *changes)
    recipe.run(plan, tmp_path / "out")
    assert (tmp_path / "out" / "model" / "pared.json").exists()


# Refusals -----------------------------------------------------------------------------------------

BAD = [
    (MINI, ["data.kind=images"], "'progressive' halves the steps of a pipeline on data of kind"),
    (MINI, ["data.kind=tasks", "data.tasks={edit='emoji'}"], "of a pipeline on data of kind 'lat"),
    (MINI, ["stages.1.objective.name=distillation"], "the objective of the recipe, 'guided', or n"),
    (MINI, ["stages.1.objective.name=[1]"], "the objective of the recipe, 'guided', or names 'pro"),
    (None, ['model.methods=["edit"]'], "methods are trained by the objectives"),
    (None, ["data.kind=transcripts"], "kind 'transcripts' goes with the objective 'ctc'"),
    (None, ["data.kind=images"], "'progressive' halves the steps of a pipeline on data of kind"),
]


@pytest.mark.parametrize(("path", "changes", "told"), BAD)
def test_bad_recipes_are_refused_in_a_sentence(path, changes, told, second):
    with pytest.raises(InputError, match=told):
        recipe.read(path or second, changes)


WRONG = [
    ("steps=6", "halving 6 steps doesn't lead to 4; begin with 4 times a power of two"),
    ("last=16", "halving 8 steps doesn't lead to 16"),
    ("w_max=-1", "guidance weights from 0 to -1 can't be drawn"),
    ("stepper=sampler", "stepper 'sampler' doesn't exist"),
    ("weighting=snr", "weighting 'snr' doesn't exist"),
    ("final_round_multiplier=0", "final_round_multiplier 0 doesn't work; give a whole number"),
    ("w_mx=3", "the objective progressive can't be set so: .*'w_mx'"),
    ("steps=many", "the objective progressive can't be set so"),
]


@pytest.mark.parametrize(("change", "told"), WRONG)
def test_what_only_the_objective_can_tell(change, told):
    plan = recipe.read(MINI, [*ROUNDS, f"stages.1.objective.{change}"])
    with pytest.raises(InputError, match=told):
        recipe.check(plan)
