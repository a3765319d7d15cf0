"""`pared route`: routers that are learned, trainings that stop and go on, and what is refused."""

import json
import os
import shlex
import signal

import pytest
import torch

from pared.caching.harmonica_tables import Routing
from pared.caching.harmonica_training import Lesson
from pared.cli import route
from pared.errors import InputError
from tests.signals import ctrl_c

# Three steps, two trajectories of two updates, 32 x 32 pixels.
QUICK = ("--steps", 3, "--updates", 4, "--batch-size", 2, "--size", 32, "--prompts", "prompts.txt")


@pytest.fixture(autouse=True)
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("red heart\n\nhammer\n")
    return path


def test_a_router_for_sampling(run, pipeline, tmp_path):
    result = run("route", pipeline, *QUICK, "--target-reuse", 0.5, "-o", "router.safetensors")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["step", "timestep", "computed"]
    assert lines[1].split() == ["0", "999", "6", "of", "6"]
    assert lines[-2] == "reused: 50.0% of 3 x 6 outputs"
    command = lines[-1].partition("use it by: pared ")[2].replace("PROMPT", "hammer")
    words = [*shlex.split(command), "--width", "32", "--height", "32"]
    assert run(*words).exit_code == 0
    assert (tmp_path / "picture.png").exists()
    refused = run(*[word if word != "3" else "4" for word in words])
    assert refused.exit_code == 2 and "was learned for runs of 3 steps" in refused.stderr


def test_json(run, pipeline, tmp_path):
    result = run("route", pipeline, *QUICK, "--beta", 1, "--json", "--out", "a.safetensors")
    facts, routing = json.loads(result.stdout), Routing.load(tmp_path / "a.safetensors")
    assert (facts["router"], facts["steps"], facts["sites"]) == ("a.safetensors", 3, 6)
    assert (facts["tau"], facts["beta"], facts["cur"]) == (0.1, 1.0, routing.cur)
    assert (facts["guidance"], routing.model) == (4.5, str(pipeline))
    assert facts["timesteps"] == list(routing.timesteps) and facts["computed"][0] == 6


def test_a_stopped_training_goes_on_to_the_same_router(run, pipeline, tmp_path, monkeypatch):
    words = ["--dtype", "bfloat16", "-o", "whole.safetensors"]
    assert run("route", pipeline, *QUICK, *words).exit_code == 0
    trajectory = Lesson.one_trajectory

    def interrupted(self, number):
        os.kill(os.getpid(), signal.SIGINT)
        return trajectory(self, number)

    with ctrl_c(), monkeypatch.context() as patch:
        patch.setattr(Lesson, "one_trajectory", interrupted)
        words = ["--dtype", "bfloat16", "--json", "-o", "my router.safetensors"]
        result = run("route", pipeline, *QUICK, *words)
    assert result.exit_code == 130 and not (tmp_path / "my router.safetensors").exists()
    words = result.stderr.splitlines()[-1].partition("go on with: pared ")[2]
    assert run(*shlex.split(words)).exit_code == 0
    whole, parts = (Routing.load(tmp_path / f"{n}.safetensors") for n in ("whole", "my router"))
    assert torch.equal(whole.scores, parts.scores) and whole.tau == parts.tau
    log = (tmp_path / "my router.safetensors.training" / "log.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == [1, 2]


@pytest.mark.parametrize(
    "words, part",
    [
        (["--beta", 1, "--target-reuse", 0.5], "--beta and --target-reuse both settle what"),
        (["-o", "."], ". is a folder; give the name of a file"),
        (["--prompts", "none.txt"], "none.txt can't be read (No such file or directory)"),
        (["--size", 33], "give a multiple of 16"),
        (["--target-reuse", 0.9], "a run of 3 steps can't reuse the share 0.9 of all outputs"),
    ],
)
def test_what_is_refused(refused, pipeline, words, part):
    given = [*QUICK, "-o", "router.safetensors", *words]
    assert part in refused("route", pipeline, *given)


def test_a_configuration_has_no_sampling_to_learn_along(refused, prompts):
    assert "needs a whole pipeline" in refused("route", "toy:dit", *QUICK, "-o", "a.safetensors")
    prompts.write_text("\n")
    assert "has no prompts" in refused("route", "toy:dit", *QUICK, "-o", "a.safetensors")


def test_sizes_of_videos(tmp_path):
    """Wan's patch is one of time, height and width."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"patch_size": [1, 2, 2]}')
    assert route._latents(tmp_path, "wan", 32) == (4, 4)
    with pytest.raises(InputError, match="--size 40 doesn't work with wan; give a multiple of 16"):
        route._latents(tmp_path, "wan", 40)
