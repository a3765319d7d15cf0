"""`pared search`: a schedule that is found, stopped, gone on with and used."""

import json

import pytest

from pared.bench.subjects import CLASSES
from pared.caching.runs import Runs
from pared.caching.schedules import ReuseSchedule, hurry
from pared.worlds import emoji
from tests.caching.pipelines import WAYS

QUICK = ["--steps", 4, "--count", 2, "--prompts", 2, "--latents", "--guidance", 1]


def test_a_schedule_is_found_and_used(run, tmp_path, pipeline):
    result = run("search", pipeline, *QUICK, "--out", "new/schedule.json")
    assert result.exit_code == 0, result.output
    schedule = ReuseSchedule.load(tmp_path / "new" / "schedule.json")
    assert schedule.steps == 4 and schedule.count == 2 and schedule.complete
    assert schedule.model == str(pipeline) and schedule.sampler == "DPMSolverMultistepScheduler"
    assert schedule.curve[-1] >= schedule.curve[0]
    text = "".join(map(str, schedule.bits))
    assert f"found, {text}" in result.stdout and "no reuse, 3 steps" in result.stdout
    words = result.stdout.partition("use it by: pared ")[2].split()
    words[words.index("PROMPT")] = "apple"
    result = run(*words)
    assert result.exit_code == 0, result.output
    words[words.index("--steps") + 1] = "5"
    assert "is for 4 steps and the run has 5" in run(*words).stderr


def test_json_and_pictures(run, pipeline):
    words = ["--steps", 3, "--count", 1, "--prompts", 1, "--seeds", 2, "--way", "exhaustive"]
    result = run("search", pipeline, *words, "--json", "-o", "s.json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["bits"] in ("001", "010") and (found["steps"], found["count"]) == (3, 1)


def test_a_stopped_search_goes_on(run, tmp_path, pipeline, monkeypatch):
    own, asked = Runs.__call__, []

    def stopping(runs, bits):
        asked.append(bits)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return own(runs, bits)

    monkeypatch.setattr(Runs, "__call__", stopping)
    result = run("search", pipeline, *QUICK, "--out", "s.json")
    assert result.exit_code == 130
    start = f"pared: stopped; go on with: pared search {pipeline} --steps 4 --count 2 --prompts 2"
    assert f"{start} --latents --guidance 1.0 -o s.json\n" in result.stderr
    assert not ReuseSchedule.load(tmp_path / "s.json").complete
    words = result.stderr.partition("go on with: pared ")[2].split()
    assert run(*words).exit_code == 0
    assert ReuseSchedule.load(tmp_path / "s.json").complete
    assert asked.count(hurry(4, 2)) == 1 and len(set(asked)) == len(asked) - 1


def test_curves_of_single_steps(run, tmp_path, pipeline):
    words = [*QUICK, "--way", "adjacent", "--out", "s.json", "--curve", "new/curve.html"]
    result = run("search", pipeline, *words)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "new" / "curve.html").read_text()
    assert "Reuse at one step alone" in page and "Any small error" in page
    # Three of four steps can reuse, on plots for wide and for narrow screens.
    assert page.count('class="dot"') == 2 * 2 * 3
    scores = [json.loads(line) for line in (tmp_path / "s.json.log").read_text().splitlines()[1:]]
    alone = {row["bits"]: row["psnr"] for row in scores if sum(map(int, row["bits"])) == 1}
    assert sorted(alone) == ["0001", "0010", "0100"]
    best = max(alone, key=lambda bits: alone[bits]).index("1")
    assert f"Reuse harms least at step {best} " in page


def test_a_model_of_classes(run, tmp_path):
    way = next(way for way in WAYS if way.family == "dit")
    way.build().save_pretrained(tmp_path / "dit")
    words = ["--steps", 4, "--count", 2, "--prompts", 2, "--guidance", 2, "--way", "adjacent"]
    result = run("search", "dit", *words, "--out", "s.json", "--curve", "curve.html")
    assert result.exit_code == 0, result.output
    log = json.loads((tmp_path / "s.json.log").read_text().splitlines()[0])
    assert len(set(log["prompts"])) == 2 and not set(log["prompts"]) & set(CLASSES)
    page = (tmp_path / "curve.html").read_text()
    # Its pipeline gives pictures alone, so no error can be followed through latents.
    assert "Reuse at one step alone" in page and "Any small error" not in page
    told = result.stdout.partition("use it by: pared ")[2].split()
    told[told.index("PROMPT")] = "207"
    result = run(*told, "--guidance", 2)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "picture.png").exists()
    for more, part in (
        (["--latents"], "dit gives pictures alone"),
        (["--prompts", 999], "there are 996 classes"),
        (["--height", 64], "takes no --height"),
    ):
        result = run("search", "dit", *words, *more, "--out", "t.json")
        assert result.exit_code == 2 and part in result.stderr


@pytest.mark.parametrize(
    "words, part",
    [
        (["PIPE", "-o", "x.json"], "missing option '--count'"),
        (["PIPE", "--count", "3"], "missing option '-o'"),
        (["PIPE", "--count", "20", "-o", "x"], "20 of 20 steps can't reuse: the first computes"),
        (["PIPE", "--count", "0", "-o", "x"], "0 is not in the range x>=1"),
        (["toy:dit", "--count", "3", "-o", "x"], "toy:dit is a configuration with random weights"),
        (["PIPE", "--count", "3", "-o", "."], "is a folder; give the name of a file, e.g. sched"),
        (["PIPE", "--count", "3", "-o", "x", "--curve", "."], "is a folder; give the name of a f"),
        (["PIPE", "--count", "3", "--method", "edit", "-o", "x"], "use `pared convert`"),
        (
            ["PIPE", "--count", "3", "--method", "re-ttention", "-o", "x"],
            "re-ttention follows no schedule",
        ),
        (
            ["PIPE", "--count", "3", "--method", "attention-map-reuse:sites=all", "-o", "x"],
            "sites='all' doesn't work",
        ),
        (["PIPE", "--count", "3", "--prompts", "9999", "-o", "x"], "give a smaller --prompts"),
        (["PIPE", "--count", "3", "--height", "60", "-o", "x"], "--height 60 doesn't work"),
        (["PIPE", "--count", "3", "--device", "tpu", "-o", "x"], "there is no device 'tpu' here"),
        (["PIPE", "--count", "3", "-o", "old"], "old.log is no log of a search"),
    ],
)
def test_refusals(refused, tmp_path, pipeline, words, part):
    (tmp_path / "old.log").write_text("something else\n")
    assert part in refused("search", *(pipeline if word == "PIPE" else word for word in words))


def test_what_is_searched_on_is_not_what_benches_paint():
    from pared.bench.subjects import PROMPTS
    from pared.cli.search import _captions

    found = _captions(16)
    assert len(set(found)) == 16 and not set(found) & set(PROMPTS)
    assert set(found) <= set(emoji.load(split="train", size=None).captions)


def test_a_student_that_reads_the_scale_is_searched_as_it_is_sampled(run, student_calls):
    """One call a step, at the weight of the pipeline's own scale."""
    result = run(
        "search", "student", "--steps", 3, "--count", 1, "--prompts", 1, "--out", "found.json"
    )
    assert result.exit_code == 0, result.output
    assert set(student_calls) == {(1, 3.5)}
