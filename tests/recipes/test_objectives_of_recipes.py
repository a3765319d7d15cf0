"""What recipes train: settings over what pipelines and methods say; and who saves the result."""

from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate import PartialState

from pared import recipe
from pared.errors import InputError
from pared.healing import task_of
from pared.method import parse, stack_of
from pared.objectives.denoising import Denoising
from pared.training import processes
from tests.recipes.pipelines import pipeline

HOUSE = Path(__file__).parents[2] / "recipes" / "house"
PLAIN = """
name = "plain"
[model]
from = "PIPE"
[data]
source = "PHOTOS"
kind = "latents"
[objective]
name = "denoising"
[[stages]]
size = 64
training = { steps = 2, batch_size = 2 }
"""


@pytest.fixture(scope="module", params=["pixart", "sd3"])
def start(request, tmp_path_factory):
    """The folder of a pipeline of noise, on another schedule than Stable Diffusion's, or a flow."""
    place = tmp_path_factory.mktemp("start") / request.param
    pipeline(request.param).save_pretrained(place)
    return place


@pytest.fixture
def seen(monkeypatch):
    """The objectives that are trained, in the place of training them."""
    objectives = []

    def train(model, objective, *others):
        objectives.append(objective)
        return SimpleNamespace(finished=True)

    monkeypatch.setattr(recipe, "train", train)
    return objectives


@pytest.fixture
def planned(tmp_path, photos, start):
    """The recipe above, changed."""

    def plan(*changes):
        (tmp_path / "plain.toml").write_text(PLAIN)
        places = [f"model.from={start}", f"data.source={photos}"]
        return recipe.read(tmp_path / "plain.toml", [*places, *changes])

    return plan


# What a given pipeline's scheduler says -----------------------------------------------------------


@pytest.mark.parametrize("start", ["pixart"], indirect=True)
@pytest.mark.parametrize("prediction", [None, "noise", "v"])
def test_another_prediction_keeps_the_schedule(prediction, planned, seen, start, tmp_path):
    changes = [f"objective.settings.prediction={prediction}"] if prediction else []
    recipe.run(planned(*changes), tmp_path / "out")
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(start / "scheduler")
    assert not torch.allclose(scheduler.alphas_cumprod, Denoising().alpha_bars, atol=1e-2)
    assert seen[0].prediction == (prediction or "noise")
    assert torch.equal(seen[0].alpha_bars, scheduler.alphas_cumprod)


@pytest.mark.parametrize("start", ["sd3"], indirect=True)
def test_settings_and_task_both_hold(planned, seen, tmp_path):
    changes = ["objective.settings.prediction=flow", "objective.task.time_sampling=logit_normal"]
    recipe.run(planned(*changes), tmp_path / "out")
    assert (seen[0].prediction, seen[0].time_sampling) == ("flow", "logit_normal")


@pytest.mark.parametrize("start", ["pixart"], indirect=True)
def test_times_of_flows_make_no_flow_of_it(planned, seen, tmp_path):
    plan = planned("objective.settings.time_sampling=logit_normal")
    with pytest.raises(InputError, match="time_sampling 'logit_normal' is for flows"):
        recipe.run(plan, tmp_path / "out")
    assert not seen


# What a method says -------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pixart"], indirect=True)
@pytest.mark.parametrize(("settings", "w_max"), [("{}", 7), ("{w_max = 6}", 6)])
def test_a_method_is_trained_as_it_is_set(settings, w_max, planned, seen, tmp_path):
    spec = "guidance-distillation:w_min=2,w_max=7,weighting=truncated_snr"
    changes = [f"model.methods=['{spec}']", "objective.name=guided"]
    recipe.run(planned(*changes, f"objective.settings={settings}"), tmp_path / "out")
    found = seen[0]
    assert (found.w_min, found.w_max, found.weighting) == (2, w_max, "truncated_snr")
    assert found.task.prediction == "noise"


@pytest.mark.parametrize(("settings", "learns"), [("{}", True), ("{learn_prior = false}", False)])
def test_a_prior_learns_where_its_method_says_so(settings, learns):
    mini = HOUSE.parent / "explicit-conditioning" / "mini.toml"
    plan = recipe.read(mini, [f"objective.settings={settings}"])
    methods = [parse("explicit-conditioning:learn_prior=true")]
    assert recipe._objective(plan.objective, methods=methods).learn_prior is learns


@pytest.mark.parametrize("start", ["pixart"], indirect=True)
def test_what_can_not_be_together_is_refused_before_anything(planned):
    guided = ["objective.name=guided", "model.methods=['guidance-distillation:w_min=5']"]
    for change, told in (
        ("objective.settings.w_max=3", "guidance weights from 5 to 3 can't be drawn"),
        ("objective.task.tme=3", "the objective guided can't be set so: .*'tme'"),
        ("objective.settings.task=3", "the objective guided can't be set so: .*'task'"),
    ):
        with pytest.raises(InputError, match=told):
            recipe.check(planned(*guided, change))
    with pytest.raises(InputError, match="the objective 'autoencoding' has no task; leave"):
        recipe.read(HOUSE / "vae.toml", ["objective.task.prediction=v"])


# A model of a class, packed into a pipeline -------------------------------------------------------


def test_a_model_is_trained_for_the_scheduler_that_it_is_packed_with(seen, photos, tmp_path):
    config = '{prediction_type="v_prediction", beta_schedule="linear", steps_offset=1}'
    changes = [f"data.source={photos}", "data.balance=0", "objective.settings={}"]
    plan = recipe.read(HOUSE / "unet.toml", [*changes, f"pipeline.scheduler_config={config}"])
    done = recipe.run(plan, tmp_path / "out")
    assert seen[0].prediction == "v"
    assert torch.equal(seen[0].alpha_bars, done.scheduler.alphas_cumprod)


@pytest.mark.parametrize("name", ["pixart", "sd3", "unet", "pixart-long", "sd3-long", "unet-long"])
def test_the_house_models_are_trained_as_their_settings_say(name):
    plan = recipe.read(HOUSE / f"{name}.toml")
    scheduler = getattr(diffusers, plan.pipeline.scheduler.removeprefix("diffusers."))
    packed = SimpleNamespace(scheduler=scheduler(**plan.pipeline.scheduler_config))
    found, wanted = task_of(packed, **plan.objective.settings), Denoising(**plan.objective.settings)
    assert found.prediction == wanted.prediction and found.time_sampling == wanted.time_sampling
    # Schedulers compute in float32.
    torch.testing.assert_close(found.alpha_bars, wanted.alpha_bars, rtol=0, atol=1e-6)


def test_a_model_of_a_class_is_converted_ahead_of_its_training(seen, photos, tmp_path):
    changes = [f"data.source={photos}", "data.balance=0", "model.methods=['linfusion']"]
    done = recipe.run(recipe.read(HOUSE / "unet.toml", changes), tmp_path / "out")
    assert [method.info.slug for method in stack_of(done.unet)] == ["linfusion"]
    assert (tmp_path / "out" / "model" / "pared.json").exists()


def test_a_model_of_a_class_has_no_teacher_to_learn_from():
    changes = ["objective={name = 'distillation'}", "model.methods=['linfusion']"]
    with pytest.raises(InputError, match="learns from a teacher, and diffusers"):
        recipe.check(recipe.read(HOUSE / "unet.toml", changes))


# Several processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pixart"], indirect=True)
@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("given", [True, False])
def test_only_the_main_process_saves(given, process, planned, seen, photos, monkeypatch, tmp_path):
    """And all go on once it has."""
    waited = []
    monkeypatch.setattr(processes.this_process(), "process_index", process)
    monkeypatch.setattr(
        PartialState, "wait_for_everyone", lambda self: waited.append((tmp_path / "out").exists())
    )
    plan = planned()
    if not given:
        plan = recipe.read(HOUSE / "vae.toml", [f"data.source={photos}", "data.balance=0"])
    assert recipe.run(plan, tmp_path / "out") is not None
    assert waited == [process == 0]
    assert (tmp_path / "out" / "model").exists() == (process == 0)


def test_a_pipeline_goes_to_the_device_of_its_process(monkeypatch):
    pipe = pipeline("pixart")
    monkeypatch.setattr(processes.this_process(), "device", torch.device("meta"))
    processes.to_accelerator(pipe)
    assert {pipe.transformer.device.type, pipe.vae.device.type} == {"meta"}
