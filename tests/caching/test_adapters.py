"""Run-time methods on models with adapters of peft: put in before or after, changed in mid-run."""

import pytest
import torch

from pared import info
from pared.bench.contract_runtime import run_with, spared
from pared.bench.contract_toys import ROUNDING, apply, sampled, toy
from pared.errors import InputError

peft = pytest.importorskip("peft")

CASES = [
    pytest.param(record.load()(), family, id=f"{slug}-{family}")
    for slug, record in info.registry().items()
    if record.kind == "runtime"
    for family in record.families
]


def adapt(model):
    """Put LoRA into all attentions, which adds something from the start."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model, "lora").eval()


def layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]


def switch(model, on):
    for layer in layers(model):
        layer.enable_adapters(on)


@pytest.mark.parametrize("method, family", CASES)
@torch.no_grad()
def test_on_an_adapted_model(method, family):
    model = adapt(toy(family))
    plain, wanted = sampled(model), run_with(model, method)
    without = run_with(toy(family), method)
    assert not torch.equal(wanted, without)
    with apply(model, method):
        for on, right in ((True, wanted), (False, without), (True, wanted)):
            switch(model, on)
            assert torch.equal(sampled(model), right), f"adapters on: {on}"
    assert torch.equal(sampled(model), plain)


@pytest.mark.parametrize("method, family", CASES)
@torch.no_grad()
def test_adapters_that_come_after_the_method(method, family):
    """They work in the next run, or it says what to do; it never runs without them."""
    model = toy(family)
    with apply(model, method):
        sampled(model)
        adapt(model)
        try:
            found = sampled(model)
        except InputError as error:
            assert "was replaced since" in str(error) and "attach it again" in str(error)
        else:
            assert torch.equal(found, run_with(adapt(toy(family)), method))
    assert torch.equal(sampled(model), sampled(adapt(toy(family))))


@pytest.mark.parametrize("method, family", CASES)
@torch.no_grad()
def test_adapters_that_change_in_mid_run(method, family):
    """The call behind the change computes everything, and the next run equals the first."""
    model = adapt(toy(family))
    wanted = run_with(model, method)

    def change(module, args):
        if switched == len(calls):
            switch(model, False)

    def note(module, args, kwargs, output):
        calls.append((args, kwargs, output[0].clone(), spared(counts)))

    with apply(model, method) as handle:
        counts = handle.stats[method.info.slug]
        # Ahead of what the method hears of a call, and behind it.
        hooks = [model.register_forward_pre_hook(change, prepend=True)]
        hooks.append(model.register_forward_hook(note, with_kwargs=True))
        switched, calls = None, []
        sampled(model)
        totals = [0, *(total for *_, total in calls)]
        last = max(n for n in range(len(calls)) if totals[n + 1] > totals[n])
        switched, calls = last, []
        sampled(model)
        switch(model, True)
        assert torch.equal(sampled(model), wanted)
    for hook in hooks:
        hook.remove()
    args, kwargs, output, total = calls[last]
    assert total == calls[last - 1][-1], "something was reused behind the change"
    switch(model, False)
    torch.testing.assert_close(model(*args, **kwargs)[0], output, **ROUNDING)
