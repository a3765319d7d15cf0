"""The loop's promises: resuming changes nothing, stops lose nothing, wrong resumes are refused."""

import json
import math
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file
from torch import nn

from pared.errors import InputError
from pared.training import train
from pared.training.checkpoints import latest
from pared.training.data import Order
from tests.signals import ctrl_c
from tests.training.toys import Fit, Points, net, settings

TOYS = "tests.training.toys"
ROOT = Path(__file__).parents[2]


def script(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *launcher, *(["--module"] if launcher else []), TOYS]
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final-40.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole")
    assert script(folder).returncode == 0
    return final(folder)


def assert_equal_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("stop", [1, 7, 23])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, uninterrupted, stop):
    killed = script(tmp_path, stop, "SIGKILL")
    assert killed.returncode == -9
    assert not (tmp_path / "final-40.safetensors").exists()
    assert script(tmp_path).returncode == 0
    assert_equal_bits(final(tmp_path), uninterrupted)


def test_interrupt_checkpoints_and_says_how_to_resume(tmp_path, uninterrupted):
    with ctrl_c():
        stopped = script(tmp_path, 10, "SIGINT")
    assert stopped.returncode == 0
    assert "Stopped after step 10" in stopped.stdout + stopped.stderr
    assert latest(tmp_path).name == "checkpoint-00000010"
    assert script(tmp_path).returncode == 0
    assert_equal_bits(final(tmp_path), uninterrupted)


def test_a_signal_that_is_ignored_stays_so(tmp_path, uninterrupted):
    """In the background of a script Ctrl-C is for something else; to end it there is SIGTERM."""
    with ctrl_c(signal.SIG_IGN):
        assert script(tmp_path, 10, "SIGINT").returncode == 0
        assert_equal_bits(final(tmp_path), uninterrupted)
        script(tmp_path / "stopped", 10, "SIGTERM")
    assert latest(tmp_path / "stopped").name == "checkpoint-00000010"


def test_a_half_written_checkpoint_is_ignored(tmp_path, uninterrupted):
    with ctrl_c():
        script(tmp_path, 10, "SIGINT")
    (tmp_path / "checkpoint-00000099.partial").mkdir()
    assert script(tmp_path).returncode == 0
    assert_equal_bits(final(tmp_path), uninterrupted)


def test_two_processes_train_like_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert script(one, 0, "SIGINT", "exact").returncode == 0
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = script(two, 0, "SIGINT", "exact", launcher=launcher)
    assert done.returncode == 0, done.stderr
    # Sums over the halves of a batch round differently, and 40 Adam steps amplify that a little.
    for name, value in final(one).items():
        torch.testing.assert_close(final(two)[name], value, rtol=1e-3, atol=1e-4)
    # Threads of gloo that live on while Python ends abort a process now and then.
    for rank in range(2):
        joined, *threads = (two / f"end-{rank}.txt").read_text().split()
        assert joined == "False" and not [name for name in threads if "gloo" in name]


def test_loss_falls_and_is_logged(tmp_path):
    model = net()
    run = train(model, Fit(), Points(), settings(steps=120), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert run.finished
    assert [line["step"] for line in lines] == list(range(5, 121, 5))
    first, last = (line["near"] + line["far"] for line in (lines[0], lines[-1]))
    assert last < 0.5 * first
    assert abs(lines[-1]["near"] - 3 * lines[-1]["far"]) < 1e-6


class Breaks(Fit):
    """Without a finite gradient, though with a finite loss, at some steps."""

    def __init__(self, steps) -> None:
        super().__init__()
        self.steps = steps

    def at_step(self, step: int) -> None:
        self.now = step

    def forward(self, model, batch, generator):
        terms = super().forward(model, batch, generator)
        if self.now in self.steps:
            terms["near"] = terms["near"] + 0 * (terms["far"] - terms["far"]).sqrt()
        return terms


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_step_without_finite_gradients_is_not_taken(tmp_path, clip, capsys):
    model, weights = net(), []

    def note(step, terms):
        assert all(map(math.isfinite, terms.values()))
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone())

    chosen = settings(steps=10, clip=clip, ema=None, weight_decay=0.1, log_every=2)
    train(model, Breaks({4, 5}), Points(), chosen, tmp_path, note)
    moved = [not torch.equal(a, b) for a, b in pairwise(weights)]
    assert moved == [True] * 3 + [False] * 2 + [True] * 4
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("skipped") for line in lines] == [None, None, 2, 2, 2]
    assert "Left out 2 steps that had no finite gradients." in "".join(capsys.readouterr())


def test_training_ends_where_gradients_stay_not_finite(tmp_path):
    model, last = net(), {}

    def note(step, terms):
        last.update(step=step)

    told = (
        "no finite gradients in 50 steps up to 70, where the learning rate is 0.01 and precision "
        "'no'; lower learning_rate, or"
    )
    with pytest.raises(InputError, match=told):
        train(model, Breaks(range(20, 99)), Points(), settings(steps=99), tmp_path, note)
    assert last["step"] == 69
    assert all(p.isfinite().all() for p in model.parameters())


SHAPES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def adamw(model: nn.Module, steps: int, warmup: int, shape) -> None:
    """Loshchilov and Hutter 2019, algorithm 2, with gradients no longer than 0.1."""
    decay, (beta, gamma), data, order = 0.1, (0.9, 0.98), Points(noise=0), Order(256, 24, seed=0)
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(steps):
        batch = data.batch(order.indices(step), torch.Generator())
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 0.1  # or nothing is clipped
        ready = (step + 1) / warmup if step < warmup else shape((step - warmup) / (steps - warmup))
        rate = 1e-2 * ready
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g * 0.1 / norm
                m += (1 - beta) * (g - m)
                v += (1 - gamma) * (g.square() - v)
                along = m / (1 - beta ** (step + 1))
                spread = (v / (1 - gamma ** (step + 1))).sqrt() + 1e-8
                p -= rate * (along / spread + decay * p)


@pytest.mark.parametrize("schedule", SHAPES)
def test_its_steps_are_those_of_adamw_written_out(tmp_path, schedule):
    model, other = net(), net()
    model[2].p = other[2].p = 0.0
    how = {"betas": (0.9, 0.98), "weight_decay": 0.1, "clip": 0.1, "ema": None}
    chosen = settings(steps=10, warmup=3, schedule=schedule, **how)
    train(model, Fit(), Points(noise=0), chosen, tmp_path)
    adamw(other, 10, 3, SHAPES[schedule])
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


class Notes(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "notes"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__()
        self.config, self.logged, self.finished = {}, {}, False

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **how):
        self.logged[step] = values

    def finish(self):
        self.finished = True


def test_trackers_get_plain_settings_and_every_logged_step(tmp_path):
    """Tensorboard's takes nothing but numbers and text."""
    notes, chosen = Notes(), settings(steps=10, trackers=("notes",))
    accelerator = Accelerator(cpu=True, log_with=notes)
    train(net(), Fit(), Points(), chosen, tmp_path, accelerator=accelerator)
    assert all(x is None or isinstance(x, int | float | str) for x in notes.config.values())
    assert notes.config.keys() == chosen.model_dump().keys()
    told = {"learning_rate": 1e-2, "clip": 1.0, "betas": "[0.9, 0.999]", "trainable": "['*']"}
    assert notes.config.items() >= told.items()
    assert notes.logged.keys() == {5, 10} and all(
        values.keys() == {"near", "far"} for values in notes.logged.values()
    )
    assert notes.finished


def test_trackers_that_a_caller_began_stay_open(tmp_path):
    accelerator = Accelerator(cpu=True, log_with=(notes := Notes()))
    accelerator.init_trackers("mine")
    train(net(), Fit(), Points(), settings(steps=4), tmp_path, accelerator=accelerator)
    assert not notes.finished


def test_closing_trackers_leaves_the_processes_together(tmp_path):
    """A stage behind this one, and whoever saves, still needs the others."""
    accelerator = Accelerator(cpu=True, log_with=Notes())
    meeting = f"file://{tmp_path}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        chosen = settings(steps=4, trackers=("notes",))
        train(net(), Fit(), Points(), chosen, tmp_path, accelerator=accelerator)
        assert dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_trainings_of_one_process_may_differ_in_precision(tmp_path):
    used = []
    for precision in ("no", "bf16", "no"):
        model = net()
        model[0].register_forward_hook(lambda module, args, output: used.append(output.dtype))
        chosen = settings(steps=4, precision=precision)
        assert train(model, Fit(), Points(), chosen, tmp_path / str(len(used))).finished
    assert used == [*4 * [torch.float32], *4 * [torch.bfloat16], *4 * [torch.float32]]


@pytest.mark.parametrize(
    "precision, units, warned",
    [
        ("bf16", {"avx512_bf16": False, "avx512_f": True}, True),
        ("bf16", {}, True),
        ("bf16", {"avx512_bf16": True}, False),
        ("bf16", {"bf16": True}, False),
        ("no", {}, False),
    ],
)
def test_bfloat16_is_warned_of_where_it_is_only_emulated(
    tmp_path, precision, units, warned, monkeypatch, recwarn
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    train(net(), Fit(), Points(), settings(steps=4, precision=precision), tmp_path)
    told = [str(each.message) for each in recwarn if "bfloat16" in str(each.message)]
    assert told == warned * [
        "this processor has no units for bfloat16, with which it trains several times as long as "
        "with float32; precision = 'no' is faster here."
    ]


def test_log_has_each_step_once_after_a_resume(tmp_path):
    script(tmp_path, 23, "SIGKILL")
    script(tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(5, 41, 5))


def test_accumulation_equals_one_large_batch(tmp_path):
    results = []
    for accumulation in (1, 3):
        model = net()
        model[2].p = 0.0
        run_settings = settings(accumulation=accumulation, ema=None)
        train(model, Fit(), Points(noise=0), run_settings, tmp_path / str(accumulation))
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"learning_rate": 1e-3}, "learning_rate"), ({"batch_size": 12}, "batch_size")],
)
def test_resume_with_other_settings_is_refused(tmp_path, change, named):
    train(net(), Fit(), Points(), settings(steps=8), tmp_path)
    with pytest.raises(InputError, match=named):
        train(net(), Fit(), Points(), settings(**change), tmp_path)


def test_resume_with_other_data_is_refused(tmp_path):
    train(net(), Fit(), Points(), settings(steps=8), tmp_path)
    with pytest.raises(InputError, match="data="):
        train(net(), Fit(), Points(noise=0.2), settings(), tmp_path)


def test_a_finished_run_goes_on_when_given_more_steps(tmp_path, uninterrupted):
    train(net(), Fit(), Points(), settings(steps=20), tmp_path)
    model = net()
    train(model, Fit(), Points(), settings(steps=40), tmp_path)
    assert_equal_bits(model.state_dict(), uninterrupted)


def test_only_matching_parameters_train(tmp_path):
    model, before = net(), net().state_dict()
    train(model, Fit(), Points(), settings(steps=5, trainable=("3.*",)), tmp_path)
    after = model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"3.weight", "3.bias"}


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(InputError, match="no parameter matches"):
        train(net(), Fit(), Points(), settings(trainable=("attn*",)), tmp_path)


def test_average_is_what_the_model_ends_with(tmp_path):
    model = net()
    seen: list[torch.Tensor] = []

    def note(*_: object) -> None:
        seen.append(model[0].weight.detach().clone())

    train(model, Fit(), Points(), settings(steps=6), tmp_path, on_step=note)
    average = net()[0].weight.detach()
    for step, weight in enumerate(seen, start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = average * decay + weight * (1 - decay)
    torch.testing.assert_close(model[0].weight, average)


def test_checkpoints_hold_no_pickle(tmp_path):
    train(net(), Fit(), Points(), settings(steps=8), tmp_path)
    assert {p.suffix for p in latest(tmp_path).iterdir()} == {".safetensors", ".json"}


def test_the_scale_of_float16_is_kept(tmp_path):
    """Half precision itself takes a GPU, its scaler doesn't."""

    def run(steps, scale):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
        chosen = settings(steps=steps, clip=None)
        train(net(), Fit(), Points(), chosen, tmp_path, accelerator=accelerator)
        return accelerator.scaler.get_scale()

    assert run(5, 128.0) == 256
    # Three steps since the scale grew, and another one.
    assert run(6, 2.0) == 256 and run(8, 2.0) == 512


def test_a_model_runs_as_before_when_training_ends(tmp_path):
    """In its own types, whatever it trained in: also where it was stopped, or trains again."""
    model, x = net(), torch.randn(4, 6)
    chosen = settings(steps=3, warmup=0, precision="bf16")

    def stop(step, terms):
        if step == 2:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        train(model, Fit(), Points(), chosen, tmp_path / "stopped", on_step=stop)
    assert not vars(model).keys() & {"forward", "_original_forward", "_is_accelerate_prepared"}
    train(model, Fit(), Points(), chosen, tmp_path / "one")
    fresh = net().eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(x), fresh(x))
    model.forward = seen = Seen(model)
    train(model, Fit(), Points(), settings(steps=3, warmup=0), tmp_path / "two")
    assert seen.types == {torch.float32} and vars(model)["forward"] is seen


class Seen:
    """What a forward gives, and in which types."""

    def __init__(self, model):
        self.inner, self.types = type(model).forward.__get__(model), set()

    def __call__(self, x):
        output = self.inner(x)
        self.types.add(output.dtype)
        return output


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    from pared.anatomy import presets

    weights = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = presets.build("toy:pixart", device="cpu")
        objective = _SquaredOutput()
        run_settings = settings(steps=2, warmup=0, ema=None, gradient_checkpointing=checkpointing)
        train(model, objective, Points(), run_settings, tmp_path / str(checkpointing))
        weights.append(model.state_dict())
    assert_equal_bits(*weights)


def test_a_model_without_gradient_checkpointing_is_told_so(tmp_path):
    with pytest.raises(InputError, match="Sequential has no gradient checkpointing; leave grad"):
        train(net(), Fit(), Points(), settings(gradient_checkpointing=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class _SquaredOutput(nn.Module):
    def forward(self, model, batch, generator):
        from pared import anatomy

        family = anatomy.of(model)
        output = family.denoise(model, *family.example(generator=generator))
        return {"square": output.square().mean()}
