"""The contract: every registered method keeps it, and every function of it can fail."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from pydantic import Field
from torch import nn

from pared import anatomy, info
from pared.bench import contract
from pared.errors import InputError
from pared.method import Claim, Conversion, Handle, RuntimeMethod
from pared.runtime import Clock, detour

# Tracing takes seconds: by default on one family per method.
TRACING = (contract.contract_compile, contract.contract_compiled_blocks)


def case(record, family, function):
    slow = function in TRACING and family != record.families[0]
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
    calls = 0
    shared = nn.Linear(32, 32)

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


@pytest.mark.parametrize(
    "function, method, message",
    [
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
    ],
)
def test_a_broken_conversion_is_caught(registered, function, method, message):
    with pytest.raises(AssertionError, match=message):
        function(method, "dit")


@pytest.mark.parametrize("how", ["breaks"])
def test_a_graph_break_is_caught(how):
    with pytest.raises(Exception, match="graph_break"):
        contract.contract_compile(Broken(how=how), "dit")


class Reuse(RuntimeMethod):
    """Keeps each feed-forward's first output for the later steps; `how` says what it does wrong."""

    info = replace(INFO, kind="runtime", slug="reuse")
    how: str = ""

    def claims(self, family):
        return [Claim(site.path, "reuses") for site in family.sites("feed_forward")]

    def attach(self, pipeline) -> Handle:
        with ExitStack() as undo:
            clock = Clock(pipeline, undo)
            for site in anatomy.of(pipeline).sites("feed_forward"):
                memory = vars(site.module).setdefault("memory", {})
                detour(site.module, Reused(self.how, clock, site.path, memory), undo)
            if self.how == "drifts":
                next(pipeline.parameters()).data += 1
            undo = undo.pop_all()
        return Handle(ExitStack() if self.how == "stays" else undo)


class Reused:
    """A feed-forward at every second step; its output stands for it at the steps between."""

    def __init__(self, how, clock, path, memory):
        self.how, self.clock, self.path, self.memory = how, clock, path, memory

    def __call__(self, own, *args, **kwargs):
        kept = self.memory if self.how == "remembers" else self.clock.kept
        due = self.clock.step % 2 == 0 and not (self.how == "remembers" and self.clock.step == 0)
        if due or self.path not in kept:
            kept[self.path] = own(*args, **kwargs).detach()
        return kept[self.path]


def test_a_good_run_time_method_passes():
    for function in contract.RUNTIME_METHODS:
        function(Reuse(), "dit")


@pytest.mark.parametrize(
    "function, method, message",
    [
        (contract.contract_removal, Reuse(how="stays"), "the output stays changed"),
        (contract.contract_removal, Reuse(how="drifts"), "the output stays changed"),
        (contract.contract_fresh_start, Reuse(how="remembers"), "something of the first sample"),
    ],
)
def test_a_broken_run_time_method_is_caught(function, method, message):
    with pytest.raises(AssertionError, match=message):
        function(method, "dit")
