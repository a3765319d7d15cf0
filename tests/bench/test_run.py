"""The bench itself, on a real pipeline at toy size and on toy denoisers, on a clock of its own."""

import copy
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import accelerate
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.hooks import apply_group_offloading
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

import pared
import pared.bench.timing
from pared import anatomy
from pared.anatomy import presets
from pared.attention.edit import EDiT
from pared.attention.sana import Sana
from pared.bench import floor, metering, selfcheck, session, verdicts
from pared.bench import timing as timing_module
from pared.bench.arms import Arm, arms_of, rival_steps
from pared.bench.bill import bill
from pared.bench.commands import command_of
from pared.bench.distances import mmd
from pared.bench.figures import Figure
from pared.bench.judge import judge_of, weight_digest
from pared.bench.quality import as_images, paired_mmd
from pared.bench.subjects import PipelineSubject, Sample, open_target
from pared.bench.timing import interleave, summarize
from pared.errors import InputError
from pared.guidance.guidance_distillation import GuidanceDistillation
from pared.info import Info
from pared.method import Claim, Handle, RuntimeMethod, denoiser
from pared.worlds.house.tokenizer import train_tokenizer

PROMPTS = ["red apple", "green apple", "sailboat"]
SIZE = {"height": 16, "width": 16}
STEPS = 8


class Repeat(RuntimeMethod):
    """A run-time method for these tests: the blocks run at every other call, and are repeated.

    Settings:
        every: at every call of this number they run; 1 changes nothing.
    """

    info = Info(
        slug="repeat",
        title="",
        arxiv="",
        venue="",
        kind="runtime",
        families=("pixart",),
        training=False,
        exact=False,
        maturity="experimental",
        summary="",
        cls="Repeat",
    )
    every: int = 2

    def claims(self, family):
        return [Claim("step_loop", "reuses")] if family.name == "pixart" else []

    def attach(self, pipeline):
        model, undo, kept = anatomy.unwrap(denoiser(pipeline)), ExitStack(), []
        forward = model.forward

        def repeated(*args, **kwargs):
            kept.append(kept[-1] if len(kept) % self.every else forward(*args, **kwargs))
            return kept[-1]

        model.forward = repeated
        undo.callback(lambda: delattr(model, "forward"))
        return Handle(undo, (self,))


class Quiet:
    """Neighbours that keep a number of cores busy."""

    def __init__(self, busy=0.0):
        self.busy = busy

    def cores(self):
        return self.busy


class World:
    """A clock that a model's own work moves: a second for each pass, half of one for decoding."""

    def __init__(self):
        self.now = 0.0

    def clock(self):
        return self.now

    def tick(self, module, seconds):
        def hook(*_):
            self.now += seconds

        module.register_forward_pre_hook(hook)


@pytest.fixture
def world(monkeypatch):
    """A clock for all timings, and rates of the machine that cost no time to measure."""
    world = World()
    timed = partial(interleave, clock=world.clock, neighbours=Quiet)
    monkeypatch.setattr(session, "interleave", timed)
    # Watching the memory takes longer than all else here; one test below does it.
    monkeypatch.setattr(session, "peak_memory", lambda call, device: call() or 1000)
    rates = floor.Floor("cpu", 1, {"float32": 2e9, "bfloat16": 4e9}, 1e9)
    monkeypatch.setattr(floor, "_measure", lambda device, threads: rates)
    return world


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(PROMPTS, merges=20)
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=300, **settings)
    vae = AutoencoderKL(
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
    )
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        use_additional_conditions=False,
        interpolation_scale=1,
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(text).eval(),
        "vae": vae.eval(),
        "transformer": transformer.eval(),
    }


@pytest.fixture
def pipe(parts, world):
    """The pipeline, whose denoiser and decoder move the clock."""
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    models = {name: copy.deepcopy(parts[name]) for name in ("vae", "transformer")}
    world.tick(models["transformer"].transformer_blocks[0], 1.0)
    world.tick(models["vae"].decoder, 0.5)
    return PixArtSigmaPipeline(**(parts | models), scheduler=scheduler)


def clip(dimensions: int, tokenizer) -> CLIPModel:
    """A judge with random weights."""
    torch.manual_seed(1)
    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    common |= {"num_attention_heads": 2}
    text = common | {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": 0}
    vision = common | {"image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dimensions))


def run(pipe, arms, **changes):
    settings = {"prompts": PROMPTS, "steps": STEPS, "rounds": 2, "judge": None, **SIZE}
    return pared.bench(pipe, arms, **(settings | changes))


# The verb ---------------------------------------------------------------------------------------


def test_the_package_is_the_verb():
    assert callable(pared.bench)
    assert pared.bench.timing is sys.modules["pared.bench.timing"]
    with pytest.raises(InputError, match="there is no preset 'nothing'"):
        pared.bench("nothing", {"edit": []})


def test_importing_the_package_does_not_import_torch():
    code = "import sys, pared.bench, pared.bench.page; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Pictures ---------------------------------------------------------------------------------------


def test_noise_belongs_to_the_sample_and_not_to_its_batch(pipe):
    samples = [Sample("red apple", 0), Sample("sailboat", 1), Sample("red apple", 2)]
    subject = PipelineSubject(pipe, samples, {"num_inference_steps": 2, **SIZE})
    together = subject.paint(samples)
    alone = torch.cat([subject.paint([sample]) for sample in samples])
    assert together.shape == (3, 3, 16, 16)
    # A batched product adds up in another order than a single one.
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (together[0] - together[2]).abs().max() > 0.01


def test_an_arm_without_methods_has_no_effect(pipe):
    report = run(pipe, {"again": []}, steps=2)
    row = report.row("again")
    assert row.verdict == (
        "As fast as the base, within the spread: 1.00x (1.00x to 1.00x). "
        "No effect: its outputs are bit-identical to the base's."
    )
    assert row.figures["psnr"] == (100, 100, 100)
    assert row.figures["relative_mse"].value == 0
    assert report.images["again"].shape == (3, 16, 16, 3)
    assert (report.images["again"] == report.images["base"]).all()


def test_the_pipeline_is_left_as_it_was(pipe):
    pipe.transformer.train()
    transformer, settings = pipe.transformer, dict(pipe.config)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    run(pipe, {"edit": [EDiT()], "repeat": [Repeat()]}, prompts=["sailboat"], steps=2)
    assert pipe.transformer is transformer and transformer.training
    assert "forward" not in vars(transformer)
    assert dict(pipe.config) == settings
    assert not hasattr(pipe, "_progress_bar_config")
    assert pared.method.stack_of(transformer) == []
    assert all(torch.equal(tensor, before[n]) for n, tensor in transformer.state_dict().items())


# Arms -------------------------------------------------------------------------------------------


def test_a_run_time_method_meets_fewer_steps_at_equal_time(pipe):
    report = run(pipe, {"base": [], "repeat": [Repeat()]})
    names = [row.name for row in report.rows]
    # Half of eight passes, as four steps have.
    assert names == ["base", "repeat", "base, 4 steps"]
    repeat, rival = report.row("repeat"), report.row("base, 4 steps")
    assert repeat.figures["seconds"].value == rival.figures["seconds"].value == 4.5
    assert repeat.figures["ratio"].value == pytest.approx(8.5 / 4.5)
    assert rival.kind == "fewer steps" and rival.steps == 4 and rival.stack == ()
    assert repeat.stack == ("repeat",)
    assert '"base, 4 steps"' in repeat.verdict and "1.89x as fast as the base" in repeat.verdict
    assert repeat.figures["macs_per_image"].value < report.rows[0].figures["macs_per_image"].value
    # What works across calls isn't timed on one.
    assert "call_seconds" not in repeat.figures
    assert report.rows[0].figures["call_seconds"].value == 1.0


def test_peak_memory_is_that_of_a_run(pipe, monkeypatch):
    monkeypatch.setattr(session, "peak_memory", timing_module.peak_memory)
    report = run(pipe, {"again": []}, steps=1, prompts=["sailboat"], quality=False)
    assert 0 <= report.rows[0].figures["peak_bytes"].value < 2**30


def test_a_method_that_saves_nothing_has_no_rival(pipe):
    report = run(pipe, {"repeat": [Repeat(every=1)]}, steps=3, prompts=["sailboat"])
    assert [row.name for row in report.rows] == ["base", "repeat"]
    assert "No effect: its outputs are bit-identical" in report.row("repeat").verdict


@pytest.mark.parametrize(
    ("steps", "full", "half", "wanted", "expected"),
    [
        (20, 10.5, 5.5, 10.5, 20),
        (20, 10.5, 5.5, 5.6, 10),
        (20, 10.5, 5.5, 3.0, 5),
        (20, 10.5, 5.5, 0.1, 1),  # no run is shorter than one step
        (20, 10.5, 5.5, 30.0, 20),  # slower than the base: the base itself
        (5, 5.0, 2.0, 3.0, 3),  # half of five is two
        (20, 5.0, 5.1, 3.0, 20),  # steps that cost nothing can't be traded
    ],
)
def test_rival_steps(steps, full, half, wanted, expected):
    assert rival_steps(steps, full, half, wanted) == expected


def test_a_conversion_is_done_to_a_copy_and_not_healed(pipe):
    report = run(pipe, {"edit": [EDiT()]}, prompts=["sailboat"], steps=2)
    row = report.row("edit")
    assert row.kind == "converted" and row.stack == ("edit",)
    assert "Not healed" in row.verdict
    assert row.figures["parameters"].value > report.rows[0].figures["parameters"].value
    assert row.bill["attention core"] < report.rows[0].bill["attention core"]
    assert row.bill["convolutions"] > report.rows[0].bill["convolutions"]
    assert pared.method.stack_of(pipe.transformer) == []


def test_specs_models_and_pipelines_are_arms(pipe, parts):
    torch.manual_seed(5)
    other = PixArtTransformer2DModel.from_config(pipe.transformer.config).eval()
    whole = PixArtSigmaPipeline(**(pipe.components | {"transformer": copy.deepcopy(other)}))
    report = run(
        pipe, {"spec": "sana", "model": other, "pipeline": whole}, steps=2, prompts=["sailboat"]
    )
    assert [row.kind for row in report.rows] == ["base", "converted", "model", "model"]
    # The same weights from the same noise, whether they come as a model or in a pipeline.
    assert (report.images["model"] == report.images["pipeline"]).all()
    assert (report.images["model"] != report.images["base"]).any()
    assert "PSNR to the base's pictures" in report.row("model").verdict


def test_commands_say_how_each_arm_was_painted(pipe):
    subject = PipelineSubject(pipe, [Sample("red apple", 0)], {"num_inference_steps": 8, **SIZE})
    size = "--height 16 --width 16"
    arms = arms_of(
        subject,
        {"cached": ["taylorseer:interval=2"], "both": ["edit", "taylorseer"], "odd": [Repeat()]},
        "base",
    )
    told = {name: command_of(arm, "house:pixart") for name, arm in arms.items()}
    sample = "pared sample house:pixart 'red apple'"
    assert told["base"] == f"{sample} {size} --steps 8 -o picture.png"
    with_seer = f"{sample} --with taylorseer:interval=2 {size} --steps 8 -o picture.png"
    assert told["cached"] == with_seer
    assert told["both"].startswith("pared convert house:pixart --with edit -o student && pared sa")
    assert f"student 'red apple' --with taylorseer {size}" in told["both"]
    # Of a method that no command knows, of arguments likewise, and of a model from nowhere.
    assert told["odd"] == "" == command_of(arms["base"], "")
    fewer = command_of(arms["base"].fewer(3), "house:pixart")
    assert fewer == f"{sample} {size} --steps 3 -o picture.png"
    odd = PipelineSubject(pipe, [Sample("x", 0)], {"guidance_scale": 2.0, "max_sequence_length": 8})
    assert command_of(Arm("base", "base", odd), "house:pixart") == ""
    plain = PipelineSubject(pipe, [Sample("x", 0)], {"guidance_scale": 2.0})
    command = command_of(Arm("base", "base", plain), "m")
    assert command == "pared sample m x --guidance 2.0 --steps 20 -o picture.png"
    # In another type than it was saved in.
    typed = command_of(arms["base"], "house:pixart", "bfloat16")
    assert typed == f"{sample} {size} --steps 8 -o picture.png --dtype bfloat16"
    typed = command_of(arms["both"], "house:pixart", "bfloat16")
    assert "--with edit --dtype bfloat16 -o student && " in typed and typed.count("--dtype") == 1


def test_a_method_whose_checks_fail_is_not_timed(pipe, tmp_path, monkeypatch):
    class Broken(Repeat):
        """Its checks stand in a file of their own."""

    Broken.__module__ = "broken_method"
    checks = "def check_sums():\n    assert 1 + 1 == 3, 'sums are off'\n"
    (tmp_path / "broken_method_checks.py").write_text(checks)
    monkeypatch.syspath_prepend(tmp_path)
    report = run(pipe, {"repeat": [Broken()]}, steps=2, prompts=["sailboat"])
    row = report.row("repeat")
    assert row.verdict == "No speed-up is stated: repeat: check_sums fails (sums are off)."
    assert "seconds" not in row.figures and "ratio" not in row.figures
    assert "psnr" in row.figures
    assert report.headline == "No arm was timed."


def test_methods_without_checks_pass():
    assert selfcheck.failures_of([Repeat(), Repeat(every=3)]) == []


# Verdicts ---------------------------------------------------------------------------------------


def test_a_busy_machine_gets_a_warning_instead_of_a_verdict(pipe, world, monkeypatch):
    busy = partial(interleave, clock=world.clock, neighbours=lambda: Quiet(100.0))
    monkeypatch.setattr(session, "interleave", busy)
    report = run(pipe, {"again": []}, steps=1, prompts=["sailboat"], quality=False)
    assert report.row("again").verdict.startswith("No verdict on time")
    assert report.headline.startswith("No verdict on time. The machine was busy")
    assert any("The machine was busy" in note for note in report.notes)


def timing(ratio, spread=0.01):
    found = [2.0 * (1 - spread), 2.0, 2.0 * (1 + spread)]
    return summarize(found, [2.0 * ratio] * 3)


@pytest.mark.parametrize(
    ("finding", "expected"),
    [
        ({"timing": timing(1.5)}, "1.50x as fast as the base (1.49x to 1.51x)."),
        ({"timing": timing(0.8)}, "Slower than the base: 0.80x"),
        ({"timing": timing(1.0)}, "As fast as the base, within the spread: 1.00x"),
        (
            {"timing": timing(1.5), "identical": True},
            "Its outputs are bit-identical to the base's.",
        ),
        ({"timing": timing(0.8), "identical": True}, "No effect: its outputs are bit-identical"),
        ({"timing": timing(1.5), "paints": False}, "Speed alone: no pictures were made."),
        ({"timing": timing(1.5), "unhealed": True}, "Not healed"),
        ({"timing": timing(1.5), "sound": ["drift"]}, "No verdict on time"),
        ({"timing": None}, "Not timed."),
    ],
)
def test_verdicts(finding, expected):
    assert expected in verdicts.verdict(verdicts.Finding(**finding))


@pytest.mark.parametrize(
    ("nearer", "words"),
    [
        (1, 'It stays closer than "base, 9 steps", nearest in time at 1.45x, does'),
        (-1, 'Fewer steps do better: "base, 9 steps"'),
        (0, "is about as close"),
        (None, "is about as close"),
    ],
)
def test_the_rival_is_named(nearer, words):
    rival = verdicts.Rival("base, 9 steps", 1.45, 30.0, nearer)
    finding = verdicts.Finding(timing(1.5), psnr=Figure(29.0), rival=rival)
    said = verdicts.verdict(finding)
    assert words in said and "(29.0 against 30.0 dB)" in said
    for silent in ({"sound": ["drift"]}, {"unhealed": True}, {"identical": True}):
        assert "base, 9 steps" not in verdicts.verdict(replace(finding, **silent))


# Quality ----------------------------------------------------------------------------------------


def test_sets_are_compared_by_a_judge(pipe, parts):
    judge = clip(2, parts["tokenizer"]), parts["tokenizer"]
    real = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    report = run(
        pipe,
        {"sana": [Sana()]},
        steps=1,
        seeds=2,
        batch_size=4,
        judge=judge,
        reference=real,
        captions=["red apple", "a boat", "a tree", "a house"],
    )
    base, arm = report.rows
    # Six captions: the four given and the two other prompts.
    assert {"mmd_reference", "frechet_reference", "top1", "top5"} <= base.figures.keys()
    assert {"mmd_base", "frechet_base", "judge_cosine", "ssim", "sharpness"} <= arm.figures.keys()
    assert "mmd_base" not in base.figures and "psnr" not in base.figures
    assert report.conditions["judge_weights"] == weight_digest(judge[0])
    assert report.conditions["pictures"] == 6 and report.conditions["real_pictures"] == 5
    assert any("biased upwards" in note for note in report.notes)


def test_pairs_are_not_compared_with_themselves():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 3, generator=generator)
    assert paired_mmd(a, a, 1.0) == pytest.approx(0, abs=1e-12)
    # Partners that share their noise: close one by one, and of one distribution.
    values = []
    for _ in range(50):
        shared, own = torch.randn(2, 40, 3, generator=generator)
        values.append(paired_mmd(shared, 0.8 * shared + 0.6 * own, 1.0))
    mean, error = torch.tensor(values).mean(), torch.tensor(values).std() / 50**0.5
    assert abs(mean) < 3 * error
    # Independent sets: what the estimator for those gives.
    b = torch.randn(400, 3, generator=generator) + 0.5
    assert paired_mmd(a, b, 1.0) == pytest.approx(mmd(a, b, bandwidth=1.0), rel=0.05)


def test_too_few_pictures_have_no_frechet_distance(pipe, parts):
    judge = clip(8, parts["tokenizer"]), parts["tokenizer"]
    report = run(pipe, {"sana": [Sana()]}, steps=1, judge=judge)
    assert "mmd_base" in report.row("sana").figures
    assert not any("frechet" in key for row in report.rows for key in row.figures)
    assert any("too few for a Frechet distance" in note for note in report.notes)


def test_without_a_judge_the_report_says_so(pipe, monkeypatch):
    monkeypatch.setattr("pared.worlds.house.names", lambda: [])
    report = run(pipe, {"sana": [Sana()]}, steps=1, prompts=["sailboat"])
    assert any("No judge is at hand" in note for note in report.notes)
    assert "judge" not in report.conditions


def test_a_judge_is_a_pair_or_a_folder(parts, tmp_path):
    model = clip(4, parts["tokenizer"])
    model.save_pretrained(tmp_path)
    parts["tokenizer"].save_pretrained(tmp_path)
    from_folder, from_pair = judge_of(str(tmp_path)), judge_of((model, parts["tokenizer"]))
    assert from_folder.digest == from_pair.digest == weight_digest(model)
    images = torch.rand(2, 3, 20, 24)
    torch.testing.assert_close(from_folder.of_images(images), from_pair.of_images(images))
    assert from_folder.of_texts(["red apple"]).norm().item() == pytest.approx(1)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert weight_digest(model) != from_folder.digest
    with pytest.raises(InputError, match="can't be opened as a CLIP model"):
        judge_of(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="the judge is a int"):
        judge_of(3)


def test_reference_pictures_come_in_many_forms():
    tensor = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    for given in (tensor, tensor / 255, tensor.permute(0, 2, 3, 1).numpy()):
        torch.testing.assert_close(as_images(given), tensor / 255)
    with pytest.raises(InputError, match="the reference pictures must be"):
        as_images(torch.rand(3, 4, 5))


# Stopping ---------------------------------------------------------------------------------------


def stop_at(monkeypatch, name):
    painted = session.Session._painted

    def stopping(self, arm):
        if arm.name == name:
            raise KeyboardInterrupt
        return painted(self, arm)

    monkeypatch.setattr(session.Session, "_painted", stopping)


def test_ctrl_c_keeps_the_arms_that_are_done(pipe, monkeypatch):
    stop_at(monkeypatch, "second")
    report = run(pipe, {"first": [], "second": [], "third": []}, steps=1, prompts=["sailboat"])
    assert [row.name for row in report.rows] == ["base", "first"]
    assert list(report.images) == ["base", "first"]
    assert "Stopped by Ctrl-C before these were done: second, third." in report.notes


def test_ctrl_c_with_nothing_to_compare_is_passed_on(pipe, monkeypatch):
    stop_at(monkeypatch, "first")
    with pytest.raises(KeyboardInterrupt):
        run(pipe, {"first": [], "second": []}, steps=1, prompts=["sailboat"])


def test_a_base_that_changes_meanwhile_is_noticed(pipe, monkeypatch):
    painted = session.Session._painted

    def spoiling(self, arm):
        found = painted(self, arm)
        if arm.name == "again":
            with torch.no_grad():
                pipe.transformer.proj_out.bias.add_(1)
        return found

    monkeypatch.setattr(session.Session, "_painted", spoiling)
    report = run(pipe, {"again": []}, steps=1, prompts=["sailboat"])
    assert any("painted something else at the end" in note for note in report.notes)


# Bare denoisers ---------------------------------------------------------------------------------


def test_a_preset_is_timed_with_random_weights(world):
    report = pared.bench("toy:pixart", {"edit": ["edit"], "again": []}, rounds=2, height=64)
    assert report.title == "toy:pixart" and report.images == {}
    assert "psnr" not in report.row("edit").figures
    assert "Speed alone" in report.row("edit").verdict
    assert "No effect: its outputs are bit-identical" in report.row("again").verdict
    assert any("weights are random" in note for note in report.notes)


def test_the_type_is_not_that_of_the_weights_that_diffusers_keeps_in_float32(
    world, tmp_path, monkeypatch
):
    presets.build("toy:wan", device="cpu").save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    world.tick(model.blocks[0], 1.0)
    report = pared.bench(model, {"again": []}, rounds=1, height=8, width=8)
    assert report.conditions["dtype"] == "bfloat16"
    assert report.rows[0].figures["weight_bytes"].value == sum(p.nbytes for p in model.parameters())


def test_class_labels_are_prompts_too(world):
    parts = {n: presets.build("toy:dit", device="cpu", component=n) for n in ("denoiser", "vae")}
    pipe = DiTPipeline(parts["denoiser"], parts["vae"], DDIMScheduler())
    # Without guidance: the pipeline's empty class is the 1000th, and the toy has ten.
    report = pared.bench(pipe, {"again": []}, prompts=[3, 7], steps=1, guidance=1.0, rounds=1)
    assert report.prompts == ("3", "7")
    assert (report.images["base"][0] != report.images["base"][1]).any()
    assert report.rows[0].figures["passes"].value == 1


def test_steps_of_a_denoiser_give_methods_something_to_reuse(world):
    model = presets.build("toy:pixart", device="cpu")
    world.tick(model.transformer_blocks[0], 1.0)
    report = pared.bench(model, {"repeat": [Repeat()]}, steps=6, rounds=1, height=8, width=8)
    assert report.rows[0].figures["seconds"].value == 6
    assert report.row("repeat").figures["seconds"].value == 3
    assert report.row("base, 3 steps").figures["ratio"].value == 2
    assert report.rows[0].figures["call_seconds"].value == 1
    # One pass over the least time: its arithmetic at the machine's rate, or its weights at its own.
    figures = report.rows[0].figures
    least = max(2 * figures["macs_per_pass"].value / 2e9, figures["weight_bytes"].value / 1e9)
    assert figures["floor"].value == pytest.approx(1 / least)


@pytest.mark.parametrize("family", ["pixart", "dit", "sd3", "flux", "unet"])
def test_a_run_costs_what_its_bill_says(family):
    model = presets.build(f"toy:{family}", device="cpu")
    reader = anatomy.of(model)
    preset = presets.get(f"toy:{family}")
    example = reader.example(text_tokens=preset.text_tokens or None, height=16, width=16)
    counted = metering.count(lambda: reader.denoise(model, *example), model)
    expected = bill(f"toy:{family}", height=128, width=128)
    assert counted.calls == counted.passes == 1
    assert counted.total == expected.per_pass
    for kind, macs in counted.macs.items():
        assert macs == expected.kind(kind).macs, kind


# Students, and weights that rest elsewhere --------------------------------------------------------


@torch.no_grad()
def test_a_student_of_guidance_is_called_once_a_step_at_its_scale(pipe):
    pared.convert(pipe, GuidanceDistillation())
    family = anatomy.of(pipe.transformer)
    embedder = pipe.transformer.get_submodule(family.timestep_embedders[0])
    torch.nn.init.ones_(embedder.guidance.linear_2.weight)
    by_hand = family.input("guidance_weight")
    by_hand.value = torch.tensor(1.0)
    call, sample = {"num_inference_steps": 2, **SIZE}, Sample("red apple", 0)
    subject = PipelineSubject(pipe, [sample], call | {"guidance_scale": 4.0})
    counted = metering.count(subject.run, subject.model)
    assert counted.calls == counted.passes == 2
    painted = subject.run()
    assert by_hand.value == 1.0, "the user's own weight is lost"
    plain = PipelineSubject(pipe, [sample], call | {"guidance_scale": 2.0})
    assert not torch.equal(plain.run(), painted)
    pipe.set_progress_bar_config(disable=True)
    by_hand.value = torch.tensor(3.0)
    settings = call | {"guidance_scale": 1.0, "use_resolution_binning": False, "output_type": "pt"}
    wanted = pipe("red apple", generator=torch.Generator().manual_seed(0), **settings).images
    torch.testing.assert_close(painted, wanted)


def moved_as_a_whole(model):
    accelerate.cpu_offload_with_hook(model, torch.device("cuda:0"))


def moved_by_groups(model):
    apply_group_offloading(model, torch.device("cuda:0"), offload_type="leaf_level")


@pytest.mark.parametrize("offload", [moved_as_a_whole, moved_by_groups])
def test_an_offloaded_pipeline_is_where_it_computes(pipe, offload):
    """Nothing runs here, so that no accelerator is needed."""
    offload(pipe.transformer)
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cpu"}
    opened, _ = open_target(pipe, "cuda")
    subject = PipelineSubject(opened, [], {})
    base = Arm("base", "base", subject)
    assert session.Session({"base": base}, "base", 1, 1, []).device == "cuda:0"
    with pytest.raises(InputError, match=r'"other" lies on cpu and "base" on cuda:0'):
        arms_of(subject, {"other": presets.build("toy:pixart", device="cpu")}, "base")


def test_weights_that_are_fetched_layer_by_layer_are_measured(pipe):
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        accelerate.cpu_offload(part, "cpu")
    report = run(pipe, {"again": []}, steps=2, rounds=1, quality=False)
    assert report.conditions["machine"]["device"] == "cpu"
    assert report.row("again").figures["seconds"].value == 2.5
    with pytest.raises(InputError, match=r"fetched layer by layer .* give it the whole pipeline"):
        pared.bench(pipe.transformer, {"again": []})


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arms", "changes", "message"),
    [
        ({}, {}, 'no arm beside "base"'),
        ({"a": 3}, {}, 'the arm "a" is a int'),
        ({"a": [3]}, {}, 'the arm "a" lists 3'),
        ({"a": []}, {"seeds": 0}, "seeds=0 doesn't work"),
        ({"a": []}, {"rounds": 0}, "rounds=0 doesn't work"),
        ({"a": []}, {"prompts": []}, "no prompts to paint"),
        ({"a": []}, {"colour": "red"}, "takes no 'colour'"),
        ({"a": []}, {"reference": 3}, "the reference pictures must be"),
        ({"a": []}, {"device": "cuda"}, "lies on cpu"),
    ],
)
def test_bad_requests_are_refused_in_a_sentence(pipe, arms, changes, message):
    with pytest.raises(InputError, match=message):
        run(pipe, arms, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["a fox"]}, "a bare denoiser paints nothing"),
        ({"guidance": 3.0}, "a bare denoiser has no 'guidance_scale'"),
        ({"height": 60}, "can't be 60; it must be a multiple of 8"),
    ],
)
def test_a_preset_takes_no_pictures(world, changes, message):
    with pytest.raises(InputError, match=message):
        pared.bench("toy:pixart", {"a": []}, **changes)


def test_a_model_without_weights_cannot_run(world):
    with pytest.raises(InputError, match=r"use pared\.bill"):
        pared.bench(presets.build("toy:pixart"), {"a": []})


def test_a_pipeline_is_no_arm_of_a_denoiser(pipe, world):
    with pytest.raises(InputError, match="is a pipeline and the base a bare denoiser"):
        pared.bench(pipe.transformer, {"a": pipe})


def test_a_video_is_no_picture(world):
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    video = WanPipeline(transformer=presets.build("toy:wan", device="cpu"), **parts)
    with pytest.raises(InputError, match=r"WanPipeline makes videos.* give it the transformer"):
        pared.bench(video, {"base": [], "taylorseer": ["taylorseer"]})
