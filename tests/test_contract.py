"""The contract: every registered method keeps it, and every function of it can fail."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from pydantic import Field
from torch import nn

from pared import anatomy, info
from pared.bench import contract
from pared.bench import contract_runtime as runtime
from pared.errors import InputError
from pared.method import Claim, Conversion, Handle, RuntimeMethod
from pared.runtime import Clock, detour

# Seconds: by default on one family per method.
LONG = (
    contract.contract_compile,
    runtime.contract_compiled_blocks,
    runtime.contract_offload,
)


def case(record, family, function):
    slow = function in LONG and family != record.families[0]
    name = f"{record.slug}-{family}-{function.__name__.removeprefix('contract_')}"
    return pytest.param(record, family, function, id=name, marks=[pytest.mark.slow] * slow)


CASES = [
    case(record, family, function)
    for record in info.registry().values()
    for family, function in contract.cases(record)
]


@pytest.mark.parametrize("record, family, function", CASES)
def test_registered_methods(record, family, function):
    function(record.load()(), family)


def test_every_method_has_a_toy_of_each_family():
    toys = set(contract.toy_families())
    for record in info.registry().values():
        assert set(record.families) <= toys, record.slug


@pytest.fixture
def registered(monkeypatch):
    """The method below, known to the registry as loading needs it."""
    monkeypatch.setitem(info.registry(), "broken", replace(INFO, module=__name__))


# Each function of the contract catches a method that breaks it --------------------------------

INFO = replace(info.get("edit"), slug="broken", families=("dit",), cls="Broken", headlines=())


class Broken(Conversion):
    """Puts a small residual branch behind every attention; `how` says what it does wrong."""

    info = INFO
    how: str = ""
    scale: float = Field(default=1.0)

    def claims(self, family):
        return [Claim(site.path, "replaces") for site in family.sites("self_attention")]

    def convert(self, model: nn.Module) -> None:
        for site in anatomy.of(model).sites("self_attention"):
            weight = site.module.to_q.weight
            site.module.to_out[1] = Branch(self.how, site.width).to(weight.dtype)
        if self.how == "touches":
            model.transformer_blocks[0].ff.net[0].proj.weight.data += 1
        if self.how == "spreads":
            model.extra = nn.Linear(2, 2)


class Branch(nn.Module):
    def __init__(self, how: str, width: int) -> None:
        super().__init__()
        self.how = how
        self.linear = nn.Linear(width, width)
        if how == "dead":
            self.unused = nn.Parameter(torch.zeros(1))
        if how == "hidden":
            self.offset = torch.randn(width)
        if how == "random":
            self.linear.weight.data = torch.randn(width, width)

    def __deepcopy__(self, memo):
        if self.how == "shares":
            return self
        twin = Branch(self.how, self.linear.in_features)
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x):
        y = self.linear(x)
        if self.how == "mixes":
            return x + y - y.mean(dim=0, keepdim=True)
        if self.how == "hidden":
            return x + y + self.offset
        if self.how == "float32":
            return (x + y).float()
        if self.how == "breaks":
            torch._dynamo.graph_break()
        if self.how == "forgets autocast" and torch.is_autocast_enabled("cpu"):
            return x + 2 * y
        if self.how == "overflows" and y.dtype == torch.bfloat16:
            return x + y / 0
        return x + y


class Unlike(Broken):
    """Settings that, written down and read again, aren't the same."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None


class Greedy(Broken):
    """Takes every model, and does nothing to it."""

    def claims(self, family):
        return [Claim("proj_out_2", "reads")]

    def convert(self, model: nn.Module) -> None:
        pass


class Rude(Broken):
    """Refuses, but has changed the model by then."""

    def claims(self, family):
        family.model.norm_out = nn.Identity()
        raise InputError("broken can't be used on this model.")


def test_a_good_method_passes(registered):
    for function in contract.CONVERSIONS:
        function(Broken(), "dit")
    contract.contract_refusal(Broken(), "flux")


BROKEN_CONVERSIONS = [
    (contract.contract_weights, Broken(how="touches"), "ff.net.0.proj.weight was changed"),
    (contract.contract_weights, Broken(how="spreads"), "extra.bias is new, outside"),
    (contract.contract_twice, Unlike(), "the settings change"),
    (contract.contract_saving, Broken(how="hidden"), "the outputs differ"),
    (contract.contract_batch, Broken(how="mixes"), "not close"),
    (contract.contract_gradients, Broken(how="dead"), "no gradient reaches"),
    (contract.contract_copy, Broken(how="shares"), "the original shares weights"),
    (contract.contract_copy, Broken(how="hidden"), "the copy's output differs"),
    (contract.contract_bfloat16, Broken(how="overflows"), "isn't finite"),
    (contract.contract_autocast, Broken(how="forgets autocast"), "away from that in float32"),
    (contract.contract_refusal, Greedy(), "took a dit model without complaint"),
    (contract.contract_refusal, Rude(), "the refused model was changed"),
]


@pytest.mark.parametrize("function, method, message", BROKEN_CONVERSIONS)
def test_a_broken_conversion_is_caught(registered, function, method, message):
    with pytest.raises(AssertionError, match=message):
        function(method, "dit")


def test_a_graph_break_is_caught():
    with pytest.raises(Exception, match="graph_break"):
        contract.contract_compile(Broken(how="breaks"), "dit")


class Reuse(RuntimeMethod):
    """Gives each feed-forward's last output again at odd steps; `how` says what it does wrong."""

    info = replace(INFO, kind="runtime", slug="reuse")
    how: str = ""

    def claims(self, family):
        return [Claim(site.path, "reuses") for site in family.sites("feed_forward")]

    def attach(self, pipeline) -> Handle:
        sites = anatomy.of(pipeline).sites("feed_forward")
        with ExitStack() as undo:
            plan = Plan(self.how, Clock(pipeline, undo), [site.path for site in sites])
            if self.how == "remembers":
                plan.memory = vars(pipeline).setdefault("memory", {})
            if self.how == "leaves a hook":
                undo.pop_all()
            if self.how == "switches copies off":
                Reused.on = True
                undo.callback(setattr, Reused, "on", False)
            for site in sites:
                reused = Reused(plan, site.path)
                if self.how == "goes around by hand":
                    around(site.module.net[2], reused, undo)
                elif self.how == "holds on to the original":
                    detour(site.module, held_on(site.module.forward, reused), undo)
                else:
                    detour(site.module, reused, undo)
            if self.how == "drifts":
                next(pipeline.parameters()).data += 1
            if self.how == "leaves a processor":
                attn = pipeline.transformer_blocks[0].attn1
                attn.set_processor(type(attn.processor)())
            undo = undo.pop_all()
        return Handle(ExitStack() if self.how == "stays" else undo, (self,), plan.clock.stats)


def around(module, reused, undo):
    """What a detour is careful not to do: it forgets who else goes around."""
    own = module.forward
    module.forward = lambda *args: reused(own, *args)
    undo.callback(delattr, module, "forward")


def held_on(original, reused):
    """What a detour must not be: a closure, which a copy of the model shares with the original."""
    return lambda own, *args, **kwargs: reused(original, *args, **kwargs)


class Plan:
    def __init__(self, how, clock, paths):
        self.how, self.clock, self.paths = how, clock, paths
        self.calls, self.passes, self.memory = 0, 1, {}
        clock.on_call = self.decide

    @property
    def kept(self):
        own = self.how in ("remembers", "shares", "counts")
        return self.memory if own else self.clock.kept

    def decide(self):
        step = self.calls if self.how == "counts" else self.clock.step
        self.calls += 1
        if self.how == "learns":
            self.passes = max(self.passes, self.clock.call + 1)
            step += self.passes - 1
        first = self.how == "remembers" and step == 0
        reuses = (step % 2 or first) and self.how != "never" and self.paths[0] in self.kept
        what = "reused" if reuses and self.how != "silent" else "computed"
        self.clock.done.update(dict.fromkeys(self.paths, what))
        return reuses


class Reused:
    on = True

    def __init__(self, plan, path):
        self.plan, self.path = plan, path

    def __call__(self, own, x, *args, **kwargs):
        kept, how = self.plan.kept, self.plan.how
        if how == "steps aside when compiled" and torch.compiler.is_compiling():
            return own(x, *args, **kwargs)
        if how == "switches copies off" and not self.on:
            return own(x, *args, **kwargs)
        if not self.plan.clock.plan:
            kept[self.path] = own(x, *args, **kwargs).detach()
            return kept[self.path]
        y = kept[self.path]
        if how == "mixes":
            return y.mean(dim=0, keepdim=True).expand_as(y)
        if how == "overflows" and y.dtype == torch.bfloat16:
            return y / 0
        if how == "forgets autocast" and torch.is_autocast_enabled("cpu"):
            return 9 * y
        return y if how != "computes" else own(x, *args, **kwargs)


def test_a_good_run_time_method_passes():
    for function in contract.RUNTIME_METHODS:
        function(Reuse(), "dit")


BROKEN_RUNTIME_METHODS = [
    (runtime.contract_removal, "stays", "the output stays changed"),
    (runtime.contract_removal, "drifts", "the output stays changed"),
    (runtime.contract_removal, "never", "nothing was reused"),
    (runtime.contract_removal, "silent", "nothing was reused"),
    (runtime.contract_removal, "computes", "it changes nothing, whatever it counts"),
    (runtime.contract_removal, "leaves a hook", "_hooks of the model stay changed"),
    (runtime.contract_removal, "leaves a processor", r"processors of .*attn1 stay changed"),
    (runtime.contract_fresh_start, "remembers", "something of the first sample"),
    (runtime.contract_next_run, "counts", "depends on those before"),
    (runtime.contract_attached_copy, "holds on to the original", "the copy samples otherwise"),
    (runtime.contract_attached_copy, "switches copies off", "the copy lost the method"),
    (runtime.contract_attached_copy, "drifts", "the original keeps something of its copy"),
    (runtime.contract_turns, "shares", "not close"),
    (runtime.contract_batched_run, "mixes", "not close"),
    (runtime.contract_bfloat16_run, "overflows", "isn't finite"),
    (runtime.contract_autocast_run, "forgets autocast", "away from that in float32"),
    (runtime.contract_compiled_blocks, "steps aside when compiled", "not close"),
    (runtime.contract_threads, "shares", "the thread of .* (got something|failed)"),
    (runtime.contract_faults, "counts", "depends on one that broke off"),
    (runtime.contract_faults, "learns", "depends on one in which guidance in turn ended"),
]


@pytest.mark.parametrize("function, how, message", BROKEN_RUNTIME_METHODS)
def test_a_broken_run_time_method_is_caught(function, how, message):
    with pytest.raises(AssertionError, match=message):
        function(Reuse(how=how), "dit")


def test_a_method_that_breaks_offloading_is_caught():
    with pytest.raises(RuntimeError, match="meta"):
        runtime.contract_offload(Reuse(how="goes around by hand"), "dit")


def test_every_function_is_shown_to_fail():
    shown = {function for function, *_ in BROKEN_CONVERSIONS + BROKEN_RUNTIME_METHODS}
    by_other_errors = {contract.contract_compile, runtime.contract_offload}
    tables = {*contract.CONVERSIONS, *contract.RUNTIME_METHODS, contract.contract_refusal}
    assert shown | by_other_errors == tables
