"""Progressive distillation: its targets, its samplers, its rounds, and that it learns."""

import copy
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.few_step import progressive
from pared.few_step.progressive import Progressive, halve, halvings, target, times
from pared.nn.diffusion import ddim_step, guided, noised
from pared.objectives.denoising import Denoising
from pared.objectives.guided import WEIGHT
from pared.objectives.paths import Path
from pared.training import TrainingSettings
from pared.worlds.datasets import LatentData

FLOW = Path("flow")
KINDS = ("flow", "v", "noise")
STEPPERS = ("deterministic", "stochastic", "encoder")
F64 = torch.float64


def path(kind: str) -> Path:
    return Path.of(Denoising(kind))


# Gaussian data: everything is known ---------------------------------------------------------------

MU, S = 1.5, 0.6


def gaussian(along: Path):
    """The clean estimate of N(MU, S^2): its posterior mean."""

    def estimate(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (a.to(z).view(-1, *[1] * (z.ndim - 1)) for a in along.level(t))
        return MU + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (z - alpha * MU)

    return estimate


def exact_flow(z: Tensor, along: Path, t: float, s: float) -> Tensor:
    """The probability flow of N(MU, S^2): positions in units of the marginal's deviation stay."""
    levels = [along.level(torch.tensor([x], dtype=F64)) for x in (t, s)]
    (a_t, s_t), (a_s, s_s) = ((float(a), float(b)) for a, b in levels)
    ratio = math.sqrt((a_s**2 * S**2 + s_s**2) / (a_t**2 * S**2 + s_t**2))
    return a_s * MU + ratio * (z - a_t * MU)


def start(along: Path, count: int = 2000) -> Tensor:
    """Points of the path at t = 1."""
    x, noise = torch.randn(2, count, 1, generator=torch.Generator().manual_seed(0)).double()
    return noised(MU + S * x, noise, along.level(torch.ones(1, dtype=F64)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_deterministic_sampler_follows_the_probability_flow(kind):
    along = path(kind)
    z = start(along)
    wanted = exact_flow(z, along, 1, 0)
    errors = [
        (progressive.sample(gaussian(along), z, along, steps) - wanted).abs().mean()
        for steps in (50, 100)
    ]
    assert errors[1] < 0.02
    assert errors[1] < 0.6 * errors[0]  # of first order: half


@pytest.mark.parametrize("kind", KINDS)
def test_encoded_and_decoded_again_the_data_come_back(kind):
    along = path(kind)
    x = MU + S * torch.randn(500, 1, generator=torch.Generator().manual_seed(1)).double()
    errors = []
    for steps in (250, 500) if kind != "flow" else (256, 512):
        z = progressive.encode(gaussian(along), x, along, steps)
        again = progressive.sample(gaussian(along), z, along, steps)
        errors.append((again - x).abs().mean())
    assert errors[0] < 0.02
    assert errors[1] < 0.65 * errors[0]  # of first order, up to what t = 0.001 leaves out


@torch.no_grad()
def test_a_network_comes_back_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2)).double()

    def estimate(z: Tensor, t: Tensor) -> Tensor:
        return FLOW.clean(net(torch.cat([z, t[:, None]], dim=1)), z, FLOW.level(t))

    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(1)).double()
    errors = []
    for steps in (64, 256):
        z = progressive.encode(estimate, x, FLOW, steps)
        errors.append((progressive.sample(estimate, z, FLOW, steps) - x).abs().mean())
    assert errors[1] < 0.01
    assert errors[1] < 0.5 * errors[0]  # of first order, up to what t = 0.001 leaves out


def test_an_encoder_brings_data_to_the_noise_of_its_own_picture():
    x = MU + S * torch.randn(500, 1, generator=torch.Generator().manual_seed(1)).double()
    z = progressive.encode(gaussian(FLOW), x, FLOW, 400)
    torch.testing.assert_close(z, exact_flow(x, FLOW, 0, 1), rtol=0, atol=0.03)


# Targets ------------------------------------------------------------------------------------------


def test_times_end_in_exactly_zero():
    i = torch.arange(1, 50)
    start, middle, end = times(i, 49, "deterministic")
    assert end[0] == 0 and start[-1] == 1
    torch.testing.assert_close(start - middle, torch.full((49,), 0.5 / 49, dtype=F64))
    torch.testing.assert_close(middle - end, torch.full((49,), 0.5 / 49, dtype=F64))
    start, middle, end = times(i, 49, "stochastic")
    assert end[0] == end[1] == 0 and middle[0] == start[0]
    torch.testing.assert_close(start[1:] - middle[1:], torch.full((48,), 1 / 49, dtype=F64))
    torch.testing.assert_close(middle[1:] - end[1:], torch.full((48,), 1 / 49, dtype=F64))
    start, middle, end = times(i, 49, "encoder")
    assert start[0] == progressive.T_0 and end[-1] == 1
    assert (start < middle).all() and (middle < end).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stepper", STEPPERS)
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_one_step_with_the_target_goes_where_two_of_the_teacher_go(kind, stepper, steps):
    along = path(kind)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def teacher(z: Tensor, t: Tensor) -> Tensor:
        return net(torch.cat([z, t[:, None]], dim=1))

    t = times(torch.arange(1, steps + 1), steps, stepper)
    z = torch.randn(steps, 2, dtype=F64)
    level, middle, end = (along.level(x) for x in t)
    halfway = ddim_step(z, teacher(z, t.start), level, middle)
    there = ddim_step(halfway, teacher(halfway, t.middle), middle, end)
    x = target(teacher, z, t, along)
    torch.testing.assert_close(ddim_step(z, x, level, end), there, rtol=1e-10, atol=1e-10)
    # The form that the paper gives, and what it says of the last step.
    ratio = (end.sigma / level.sigma)[:, None]
    naive = (there - ratio * z) / (end.alpha[:, None] - ratio * level.alpha[:, None])
    torch.testing.assert_close(x, naive, rtol=1e-7, atol=1e-7)
    if stepper == "stochastic":
        torch.testing.assert_close(x[0], teacher(z, t.start)[0])


# Samplers -----------------------------------------------------------------------------------------


def counted(estimate):
    calls = []

    def counting(z: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t[0]))
        return estimate(z, t)

    return counting, calls


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samplers_make_a_call_per_step(steps):
    z = start(FLOW, 10)
    grid = [i / steps for i in range(steps, 0, -1)]
    estimate, calls = counted(gaussian(FLOW))
    progressive.sample(estimate, z, FLOW, steps)
    assert calls == grid
    estimate, calls = counted(gaussian(FLOW))
    progressive.sample_stochastically(estimate, z, FLOW, steps, torch.Generator())
    assert calls == grid
    estimate, calls = counted(gaussian(FLOW))
    progressive.encode(estimate, z, FLOW, steps)
    assert calls == [progressive.T_0, *grid[:0:-1]]


def test_the_stochastic_sampler_without_noise_is_not_the_deterministic_one(monkeypatch):
    z = start(FLOW, 10)
    monkeypatch.setattr(progressive, "randn_like", lambda x, generator: torch.zeros_like(x))
    silent = progressive.sample_stochastically(gaussian(FLOW), z, FLOW, 4, torch.Generator())
    assert not torch.allclose(silent, progressive.sample(gaussian(FLOW), z, FLOW, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_stochastic_sampler_gives_the_data(kind):
    """Its student steps exactly where the probability flow goes over 2 / N."""
    along, steps = path(kind), 8
    z = start(along, 20_000)

    def student(z: Tensor, t: Tensor) -> Tensor:
        here = float(t[0])
        end = max(here - 2 / steps, 0)
        level, at_end = (along.level(torch.tensor([x], dtype=F64)) for x in (here, end))
        ratio = at_end.sigma / level.sigma
        there = exact_flow(z, along, here, end)
        return (there - ratio * z) / (at_end.alpha - ratio * level.alpha)

    found = progressive.sample_stochastically(
        student, z, along, steps, torch.Generator().manual_seed(1)
    )
    # Two percent: mean and deviation of 20,000 numbers are known to less than one.
    assert found.mean() == pytest.approx(MU, rel=0.02)
    assert found.std() == pytest.approx(S, rel=0.02)


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize(("kind", "name"), [("v", "v_prediction"), ("noise", "epsilon")])
def test_the_deterministic_sampler_is_the_trailing_ddim_of_diffusers(kind, name, steps):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        prediction_type=name, clip_sample=False, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    along = path(kind)
    z = wanted = start(along, 20)
    for timestep in scheduler.timesteps:
        t = along.time(timestep[None]).double().expand(len(z))
        x = gaussian(along)(wanted, t)
        prediction = along.predicted(x, wanted, along.level(t))
        wanted = scheduler.step(prediction, timestep, wanted).prev_sample
    found = progressive.sample(gaussian(along), z, along, steps)
    # Their schedule is in float32.
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_on_a_flow_it_is_the_euler_sampler_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    z = wanted = start(FLOW, 20).float()
    for timestep in scheduler.timesteps:
        t = FLOW.time(timestep[None]).double().expand(len(z))
        prediction = FLOW.predicted(gaussian(FLOW)(wanted, t), wanted, FLOW.level(t))
        wanted = scheduler.step(prediction, timestep, wanted).prev_sample
    torch.testing.assert_close(progressive.sample(gaussian(FLOW), z, FLOW, 4), wanted)


# Learning without a network: one factor and one offset for each time ------------------------------


class Affine(nn.Module):
    """x = a_t z + b_t with a and b for each of so many times; enough for Gaussian data."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        t = torch.arange(count + 1, dtype=F64) / count
        with torch.no_grad():
            b = gaussian(FLOW)(torch.zeros(count + 1, 1, dtype=F64), t)
            a = gaussian(FLOW)(torch.ones(count + 1, 1, dtype=F64), t) - b
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        j = (t * self.count).round().long()
        return self.a[j] * z + self.b[j]


def distilled(student: nn.Module, steps: int, updates: int, seed: int) -> None:
    """One round in place, of the plain loss, with a rate that falls to zero."""
    teacher = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - update / updates)
        i = torch.randint(1, steps + 1, (256,), generator=generator)
        t = times(i, steps, "deterministic")
        x, noise = torch.randn(2, 256, 1, generator=generator).double()
        level = FLOW.level(t.start)
        z = noised(MU + S * x, noise, level)
        with torch.no_grad():
            wanted = FLOW.predicted(target(teacher, z, t, FLOW), z, level)
        found = FLOW.predicted(student(z, t.start), z, level)
        optimizer.zero_grad()
        FLOW.error(found, wanted, level, "velocity").backward()
        optimizer.step()


@torch.no_grad()
def error_of_one_step(student: nn.Module) -> float:
    z = start(FLOW)
    found = progressive.sample(student, z, FLOW, 1)
    return float((found - exact_flow(z, FLOW, 1, 0)).square().mean().sqrt())


def test_halving_converges_to_the_probability_flow():
    student = Affine(64)
    errors = [error_of_one_step(student)]
    assert errors[0] == pytest.approx(S, rel=0.1)  # one step from noise gives the mean alone
    for number, steps in enumerate(halvings(32, 1)):
        distilled(student, steps, 200, seed=number)
        if steps <= 2:
            errors.append(error_of_one_step(student))
    before, _, after = errors
    # 64 steps of the teacher, all in one; they themselves are off by a few percent.
    limit = progressive.sample(gaussian(FLOW), start(FLOW), FLOW, 64)
    limit = float((limit - exact_flow(start(FLOW), FLOW, 1, 0)).square().mean().sqrt())
    assert after < 0.1 * before
    assert after < 2 * limit + 0.01


def test_one_step_gets_better_as_training_proceeds():
    teacher = Affine(64)
    for number, steps in enumerate(halvings(32, 2)):
        distilled(teacher, steps, 200, seed=number)
    errors = []
    for updates in (0, 10, 200):
        student = copy.deepcopy(teacher)
        distilled(student, 1, updates, seed=9)
        errors.append(error_of_one_step(student))
    assert errors[0] > errors[1] > errors[2]


# Rounds on a real model ---------------------------------------------------------------------------


def student_of_stage_one():
    torch.manual_seed(0)
    model = pared.convert(presets.build("toy:dit", device="cpu"), pared.GuidanceDistillation())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def data(model, count: int = 32) -> LatentData:
    latents, _, condition = anatomy.of(model).example(
        count, 8, 8, generator=torch.Generator().manual_seed(1)
    )
    null = {"label": torch.tensor(10)}
    return LatentData(latents, torch.full_like(latents, 0.01), condition, null, drop=0.0)


def settings(**changes) -> TrainingSettings:
    base = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, "schedule": "linear"}
    return TrainingSettings(**(base | changes))


def batch_of(model) -> dict[str, Tensor]:
    return data(model).batch(torch.arange(32), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stepper", STEPPERS)
def test_the_objective_is_the_error_to_the_target(kind, stepper, monkeypatch):
    """A student that says what the target says loses nothing."""
    model = student_of_stage_one().eval()
    objective = Progressive(4, 0.0, 4.0, stepper, task=Denoising(kind)).bind(model, model)
    loss = objective(model, batch_of(model), torch.Generator().manual_seed(0))["progressive"]
    assert loss.isfinite() and loss > 0
    seen = {}

    def first_alone(teacher, z, times, path):
        seen["t"] = times.start
        return teacher(z, times.start)

    monkeypatch.setattr(progressive, "target", first_alone)
    alone = objective(model, batch_of(model), torch.Generator().manual_seed(0))["progressive"]
    assert alone < 1e-6  # of float32: to the clean estimate and back
    assert len(seen["t"].unique()) == 4


def test_an_encoder_learns_without_guidance():
    model = student_of_stage_one().eval()
    given = []
    embedding = model.transformer_blocks[0].norm1.emb.timestep_embedder.guidance
    embedding.register_forward_pre_hook(lambda module, args: given.append(module.w.value))
    objective = Progressive(4, 2.0, 4.0, "encoder").bind(model, model)
    objective(model, batch_of(model), torch.Generator().manual_seed(0))
    assert given and all((w == 0).all() for w in given)


def test_rounds_halve_and_the_last_two_are_longer(tmp_path):
    model = student_of_stage_one()
    before = copy.deepcopy(model.state_dict())
    objective = Progressive(8, 0.0, 4.0)
    run = halve(model, objective, data(model), settings(), tmp_path)
    assert run.finished and objective.steps == 1
    done = {p.parent.name: int(p.name[-8:]) for p in tmp_path.glob("round-*/checkpoint-*")}
    assert done == {
        "round-1-steps-8": 3, "round-2-steps-4": 3, "round-3-steps-2": 6, "round-4-steps-1": 6,
    }  # fmt: skip
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("ema", [None, 0.5])
def test_stopped_and_resumed_it_ends_with_the_same_weights(tmp_path, ema, monkeypatch):
    of_round = settings(ema=ema, checkpoint_every=1)
    whole = student_of_stage_one()
    halve(whole, Progressive(4), data(whole), of_round, tmp_path / "whole", last=2)

    class Stopped(Exception):
        pass

    calls = []

    def stop(step, terms):
        calls.append(step)
        if len(calls) == 9:  # three updates into the second round of six
            raise Stopped

    again = student_of_stage_one()
    arguments = (data(again), of_round, tmp_path / "parts")
    with pytest.raises(Stopped):
        halve(again, Progressive(4), *arguments, last=2, on_step=stop)
    again, calls = student_of_stage_one(), []
    steps = []
    halve(again, Progressive(4), *arguments, last=2, on_step=lambda step, _: steps.append(step))
    # The finished round isn't run again, the other goes on behind its newest checkpoint.
    assert steps == [3, 4, 5, 6]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_teacher_of_a_round_is_the_student_before(tmp_path):
    before, student = student_of_stage_one(), student_of_stage_one()
    halve(before, Progressive(2), data(before), settings(steps=1), tmp_path / "first", last=2)
    objective = Progressive(2)
    halve(student, objective, data(student), settings(steps=1), tmp_path / "both", last=1)
    wanted = before.state_dict()
    for name, value in objective.teacher.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    # Its input for the weight came along, and is its own.
    assert WEIGHT in anatomy.of(objective.teacher).inputs
    assert anatomy.of(objective.teacher).input(WEIGHT) is not anatomy.of(student).input(WEIGHT)


def test_a_model_without_the_input_is_distilled_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = presets.build("toy:unet", device="cpu")
    latents, _, condition = anatomy.of(model).example(8, 8, 8, text_tokens=4)
    empty = {name: entry[0] for name, entry in condition.items()}
    held = LatentData(latents, torch.zeros_like(latents), condition, empty)
    objective = Progressive(2, w_max=0.0, task=Denoising("v"))
    assert halve(model, objective, held, settings(steps=1), tmp_path).finished
    with pytest.raises(InputError, match="the model to distil reads no guidance weight"):
        halve(model, Progressive(2, w_max=1.0), held, settings(steps=1), tmp_path / "guided")


@pytest.mark.parametrize(("first", "last"), [(6, 1), (4, 3), (2, 4), (4, 0)])
def test_halving_that_leads_elsewhere_is_refused(first, last):
    with pytest.raises(InputError, match=f"halving {first} steps doesn't lead to {last}"):
        halvings(first, last)


def test_more_steps_than_a_grid_has_are_refused():
    task = Denoising("v")
    Progressive(500, task=task)
    Progressive(1000, stepper="stochastic", task=task)
    with pytest.raises(InputError, match="1024 different times"):
        Progressive(512, task=task)
    Progressive(512)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"w_min": 5.0, "w_max": 2.0}, "guidance weights from 5 to 2 can't be drawn"),
        ({"w_min": -1.0}, "guidance weights from -1 to 14 can't be drawn"),
        ({"stepper": "sampler"}, "stepper 'sampler' doesn't exist; give deterministic or stoch"),
        ({"weighting": "snr"}, "weighting 'snr' doesn't exist; give velocity or truncated_snr"),
    ],
)
def test_bad_settings_say_what_is_right(changes, told):
    with pytest.raises(InputError, match=told):
        Progressive(4, **changes)


def test_the_linear_schedule_falls_to_zero():
    rates = [settings(steps=5, warmup=1).rate(step) for step in range(5)]
    assert rates == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


# Learning on a conditional mixture ----------------------------------------------------------------

MODES, SPREAD = 8, 0.15
CENTRES = 2 * torch.stack(
    [torch.tensor([math.cos(a), math.sin(a)]) for a in torch.arange(MODES) * (2 * math.pi / MODES)]
)
# A condition is a pair of neighbours: guidance has something to choose between.
OF_CONDITION = torch.eye(MODES).roll(1, 0) + torch.eye(MODES)
W_MAX = 4.0


def mixture(z: Tensor, t: Tensor, shares: Tensor) -> Tensor:
    """The posterior mean of a mixture on a flow's path; shares (batch, modes)."""
    alpha, sigma = (a.to(z)[:, None] for a in FLOW.level(t))
    variance = alpha**2 * SPREAD**2 + sigma**2
    away = z[:, None] - alpha[..., None] * CENTRES
    logits = shares.log() - away.square().sum(-1) / (2 * variance)
    means = CENTRES + (alpha * SPREAD**2 / variance)[..., None] * away
    return (logits.softmax(-1)[..., None] * means).sum(1)


def guided_mixture(condition: Tensor, w: Tensor):
    """The guided teacher's clean estimate."""
    own, every = OF_CONDITION[condition] / 2, torch.full((len(condition), MODES), 1 / MODES)
    return lambda z, t: guided(mixture(z, t, own), mixture(z, t, every), w)


class Net(nn.Module):
    """The conditional teacher's flow, and three layers that learn what w and long steps change."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + MODES + 3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor, t: Tensor, condition: Tensor, w: Tensor) -> Tensor:
        without = mixture(z, t, OF_CONDITION[condition] / 2)
        one_hot = nn.functional.one_hot(condition, MODES).float()
        t_w = torch.stack([t.float(), t.float() ** 2, w / W_MAX], dim=1)
        learnt = self.layers(torch.cat([z, one_hot, t_w], dim=1))
        return FLOW.predicted(without, z, FLOW.level(t)) + learnt

    def estimate(self, condition: Tensor, w: Tensor):
        return lambda z, t: FLOW.clean(self(z, t, condition, w), z, FLOW.level(t))


def drawn(count: int, generator: torch.Generator):
    condition = torch.randint(MODES, (count,), generator=generator)
    w = W_MAX * torch.rand(count, generator=generator)
    mode = torch.multinomial(OF_CONDITION[condition], 1, generator=generator)[:, 0]
    x = CENTRES[mode] + SPREAD * torch.randn(count, 2, generator=generator)
    return condition, w, x, torch.randn(count, 2, generator=generator)


def trained(net: Net, updates: int, teacher_of, time_of, seed: int, rate: float) -> None:
    """Regress the net on what `teacher_of` says, at times that `time_of` draws."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = rate * (1 - update / updates)
        condition, w, x, noise = drawn(512, generator)
        t = time_of(512, generator)
        level = FLOW.level(t.start)
        z = noised(x, noise, level)
        with torch.no_grad():
            wanted = FLOW.predicted(teacher_of(condition, w)(z, t), z, level)
        found = net(z, t.start, condition, w)
        optimizer.zero_grad()
        FLOW.error(found, wanted, level, "velocity").backward()
        optimizer.step()


def anywhere(count: int, generator: torch.Generator):
    t = torch.rand(count, generator=generator, dtype=F64).clamp(min=1e-3)
    return progressive.Times(t, t, t)


def stage_one() -> Net:
    torch.manual_seed(0)
    net = Net()

    def teacher_of(condition, w):
        estimate = guided_mixture(condition, w)
        return lambda z, t: estimate(z, t.start)

    trained(net, 2500, teacher_of, anywhere, 0, 3e-3)
    return net


def turned(x: Tensor, condition: Tensor) -> Tensor:
    """Samples turned so that all conditions lie on each other; else they'd hide each other."""
    angle = -condition * (2 * math.pi / MODES)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], dim=1)


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """Mean distance of sorted projections, over 64 directions; x and y (count, 2)."""
    angle = torch.arange(64) * (math.pi / 64)
    directions = torch.stack([angle.cos(), angle.sin()])
    return float(((x @ directions).sort(0)[0] - (y @ directions).sort(0)[0]).abs().mean())


@pytest.mark.slow
@torch.no_grad()
def test_a_student_learns_the_weight_and_beats_ddim_at_four_steps():
    with torch.enable_grad():
        student = stage_one()
    generator = torch.Generator().manual_seed(5)
    condition, w, x, noise = drawn(4000, generator)
    t = anywhere(4000, generator).start
    level = FLOW.level(t)
    z = noised(x, noise, level)

    def flow(w: Tensor) -> Tensor:
        return FLOW.predicted(guided_mixture(condition, w)(z, t), z, level)

    error = (student(z, t, condition, w) - flow(w)).square().mean()
    # The best that ignores w: the mean over w, which is the target at the mean w.
    ignoring = (flow(torch.full_like(w, W_MAX / 2)) - flow(w)).square().mean()
    assert error < 0.1 * ignoring

    for number, steps in enumerate(halvings(8, 4)):
        teacher = copy.deepcopy(student)

        def teacher_of(condition, w, teacher=teacher):
            return lambda z, t: target(teacher.estimate(condition, w), z, t, FLOW)

        def grid(count, generator, steps=steps):
            i = torch.randint(1, steps + 1, (count,), generator=generator)
            return times(i, steps, "deterministic")

        with torch.enable_grad():
            trained(student, 1000, teacher_of, grid, number + 1, 1e-3)

    noise = torch.randn(4000, 2, generator=generator)
    wanted = progressive.sample(guided_mixture(condition, w), noise, FLOW, 256)
    ddim = progressive.sample(guided_mixture(condition, w), noise, FLOW, 4)
    found = progressive.sample(student.estimate(condition, w), noise, FLOW, 4)
    ours, rival = (
        sliced_wasserstein(turned(samples, condition), turned(wanted, condition))
        for samples in (found, ddim)
    )
    assert ours < 0.7 * rival, (ours, rival)
