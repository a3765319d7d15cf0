"""LinFusion: its paper's checks; those that come with the package run here too."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention import linfusion_checks
from pared.attention.linfusion import GeneralisedLinearAttention, LinFusion
from pared.attention.mixing import projected
from pared.nn.layout import merge_heads
from pared.objectives.denoising import Denoising
from pared.objectives.distillation import Distillation

CHECKS = [f for name, f in inspect.getmembers(linfusion_checks) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


def test_text_attention_is_left_alone():
    model = presets.build("sd1.5", device="meta")
    pared.convert(model, LinFusion())
    changed = [n for n, m in model.named_modules() if type(m).__name__.startswith("Generalised")]
    assert len(changed) == 16
    assert all(".attn1." in name for name in changed)


def test_cost_grows_with_the_tokens():
    model = presets.build("toy:unet", device="meta")
    pared.convert(model, LinFusion())
    site = anatomy.of(model).sites("self_attention")[0]

    def flops(side):
        with FlopCounterMode(display=False) as counter:
            site.module(torch.empty(1, side * side, site.width, device="meta"))
        return counter.get_total_flops()

    assert flops(64) == 4 * flops(32)


# This teacher knows nothing of the noise: learning the truth would lead away from it.
TASK = Distillation(Denoising("noise"), truth=0)


def _distilled(student, teacher, steps=500):
    objective = copy.copy(TASK).bind(student, teacher)
    family = anatomy.of(teacher)
    trained = [p for path in objective.paths for p in student.get_submodule(path).parameters()]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        latents, _, condition = family.example(batch=4, generator=generator)
        terms = objective(student, {"latents": latents} | condition, generator)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        losses.append({name: float(term.detach()) for name, term in terms.items()})
    return losses


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = presets.build("toy:unet", device="cpu")
    for site in anatomy.of(model).sites("self_attention"):
        site.module.to_q.weight.data.mul_(4)  # fresh weights give nearly flat attention
    return model.requires_grad_(True)


@pytest.fixture(scope="module")
def copied(teacher):
    """A distilled student whose projections were the teacher's, and its losses."""
    student = pared.convert(copy.deepcopy(teacher), LinFusion())
    return student, _distilled(student, teacher)


@pytest.mark.slow
def test_distillation_lowers_both_terms_and_copied_projections_end_lower(teacher, copied):
    _, losses = copied
    for name in ("output", "feature"):
        assert losses[-1][name] < losses[0][name], name
    torch.manual_seed(1)
    fresh = pared.convert(copy.deepcopy(teacher), LinFusion())
    for site in anatomy.of(fresh).sites("self_attention"):
        for part in (site.module.to_q, site.module.to_k, site.module.to_v, site.module.to_out[0]):
            part.reset_parameters()
    assert losses[-1]["feature"] < _distilled(fresh, teacher)[-1]["feature"]


class Unnormalised(GeneralisedLinearAttention):
    """The same over a constant: what the denominator is on average at the first call."""

    usual = None

    def mix(self, attn, hidden_states):
        x = hidden_states
        q, k, v = projected(attn, x + self.query_map(x), x + self.key_map(x), x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if self.usual is None:
            self.usual = float((q @ k.sum(-2).unsqueeze(-1)).mean().detach())
        return merge_heads(q @ (k.mT @ v) / self.usual)


def _errors(student, teacher, side):
    """Both terms of the distillation on latents of a size."""
    objective, generator = copy.copy(TASK).bind(student, teacher), torch.Generator().manual_seed(9)
    latents, _, condition = anatomy.of(teacher).example(
        batch=4, height=side, width=side, generator=generator
    )
    with torch.no_grad():
        terms = objective(student, {"latents": latents} | condition, generator)
    return terms["output"], terms["feature"]


@pytest.mark.slow
def test_on_larger_latents_only_an_unnormalised_student_degrades(teacher, copied):
    student, _ = copied
    rival = pared.convert(copy.deepcopy(teacher), LinFusion())
    for site in anatomy.of(rival).sites("self_attention"):
        ours = site.module.processor
        site.module.set_processor(Unnormalised(LinFusion(), site.width, ours.grid))
        site.module.processor.load_state_dict(ours.state_dict())
    _distilled(rival, teacher)
    side = anatomy.of(teacher).sample_size
    for model, bound in ((student, lambda ratio: ratio < 1.5), (rival, lambda ratio: ratio > 10)):
        sizes = _errors(model, teacher, side), _errors(model, teacher, 2 * side)
        for here, there in zip(*sizes, strict=True):
            assert bound(float(there / here))


def test_only_normalised_attention_keeps_its_scale_on_larger_pictures(teacher):
    student = pared.convert(copy.deepcopy(teacher), LinFusion())
    attn = anatomy.of(student).sites("self_attention")[0].module
    processor, generator = attn.processor, torch.Generator().manual_seed(0)

    def unnormalised(attn, x):
        q, k, v = (f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                   for f in (attn.to_q, attn.to_k, attn.to_v))  # fmt: skip
        return merge_heads((F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v))

    def growth(mix):
        sizes = [
            mix(attn, torch.randn(2, n, attn.to_q.in_features, generator=generator)).std()
            for n in (64, 256)
        ]
        return float(sizes[1] / sizes[0])

    with torch.no_grad():
        assert growth(processor.mix) < 1.1
        assert growth(unnormalised) > 1.5
