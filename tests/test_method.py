"""Claims, specs, combination: what holds for methods before any of them does anything."""

from contextlib import ExitStack

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import pared
from pared import anatomy, info
from pared.anatomy import presets
from pared.errors import InputError
from pared.info import Info
from pared.method import Claim, Handle, RuntimeMethod


def claim(how, aspect="output", site="blocks.0.attn1") -> Claim:
    return Claim(site, how, aspect)


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        (claim("replaces"), claim("replaces"), True),
        (claim("reuses"), claim("reuses"), True),
        (claim("replaces"), claim("reuses"), False),  # a cache over a converted layer
        (claim("replaces"), claim("reads"), False),
        (claim("replaces"), claim("reuses", "map"), True),  # no softmax map is left
        (claim("reuses", "map"), claim("replaces"), True),
        (claim("reuses", "map"), claim("reads", "map"), False),
        (claim("reuses", "map"), claim("reuses", "map"), True),
        (claim("reuses", "map"), claim("reuses"), False),
        (claim("replaces"), claim("replaces", site="blocks.1.attn1"), False),
    ],
)
def test_clashes_follow_from_what_is_done_to_a_site(first, second, clash):
    assert second.clashes(first) is clash
    assert first.clashes(second) is clash


class Doubled(RuntimeMethod):
    """A run-time method for these tests: a self-attention's output counts twice."""

    info = Info(
        slug="doubled",
        title="",
        arxiv="",
        venue="",
        kind="runtime",
        families=("pixart",),
        training=False,
        exact=False,
        maturity="experimental",
        summary="",
        cls="Doubled",
    )
    block: int = 0

    def claims(self, family):
        sites = [s for s in family.sites("self_attention") if s.block == self.block]
        return [Claim(s.path, "reuses") for s in sites]

    def attach(self, pipeline):
        undo, stats = ExitStack(), {"calls": 0}
        (site,) = (s for s in anatomy.of(pipeline).sites("self_attention") if s.block == self.block)

        def double(module, args, output):
            stats["calls"] += 1
            return 2 * output

        undo.callback(site.module.register_forward_hook(double).remove)
        return Handle(undo, (self,), stats)


def output(model) -> torch.Tensor:
    family = anatomy.of(model)
    with torch.no_grad():
        return family.denoise(model, *family.example(generator=torch.Generator().manual_seed(0)))


def test_run_time_methods_come_off_without_a_trace():
    model = presets.build("toy:pixart", device="cpu")
    base = output(model)
    with pared.apply(model, Doubled()) as handle:
        assert not torch.equal(output(model), base)
        assert handle.stats["doubled"]["calls"] == 1
    assert torch.equal(output(model), base)


def test_run_time_methods_stack_on_conversions_and_come_off_after_errors():
    model = pared.convert(presets.build("toy:pixart", device="cpu"), pared.EDiT())
    base = output(model)
    with pytest.raises(ZeroDivisionError), pared.apply(model, Doubled()):
        raise ZeroDivisionError
    assert torch.equal(output(model), base)


def test_two_run_time_methods_on_one_site_are_refused_before_anything_happens():
    model = presets.build("toy:pixart", device="cpu")
    base = output(model)
    with pytest.raises(InputError, match=r"doubled reuses transformer_blocks\.0\.attn1"):
        pared.apply(model, Doubled(), Doubled())
    assert torch.equal(output(model), base)


def test_a_run_time_method_is_not_attached_over_one_that_is():
    model = presets.build("toy:pixart", device="cpu")
    base = output(model)
    with pared.apply(model, Doubled()):
        once = output(model)
        with pytest.raises(InputError, match=r"doubled reuses .*attn1, which doubled already reus"):
            pared.apply(model, Doubled())
        assert torch.equal(output(model), once)
        with pared.apply(model, Doubled(block=1)):
            assert not torch.equal(output(model), once)
    with pared.apply(model, Doubled()):
        assert torch.equal(output(model), once)
    assert torch.equal(output(model), base)


def test_a_family_that_a_method_does_not_list_is_refused():
    """What a method finds there has the name it looks for, but nobody made it fit."""
    model = presets.build("toy:dit", device="cpu")
    with pytest.raises(InputError, match=r"doubled can't be used .*: it serves the families pixar"):
        pared.apply(model, Doubled())
    model = presets.build("toy:wan", device="cpu")
    with pytest.raises(InputError, match=r"edit can't be used on Wan.*: it serves the families"):
        pared.convert(model, pared.EDiT())


def test_a_run_time_method_that_matches_nothing_is_refused():
    with pytest.raises(InputError, match="finds no site"):
        pared.apply(presets.build("toy:pixart", device="cpu"), Doubled(block=99))


def test_the_two_verbs_refuse_each_others_methods():
    model = presets.build("toy:pixart", device="cpu")
    with pytest.raises(InputError, match=r"use pared\.apply"):
        pared.convert(model, Doubled())
    with pytest.raises(InputError, match=r"use pared\.convert"):
        pared.apply(model, pared.EDiT())


def test_a_refused_conversion_changes_nothing():
    model = presets.build("toy:pixart", device="cpu")
    with pytest.raises(InputError):
        pared.convert(model, pared.EDiT(), pared.Sana())
    for site in anatomy.of(model).sites("self_attention"):
        assert isinstance(site.module.processor, AttnProcessor2_0)


def test_converting_twice_is_converting_once():
    model = pared.convert(presets.build("toy:pixart", device="cpu"), pared.EDiT())
    names = set(model.state_dict())
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    pared.convert(model, pared.EDiT())
    assert set(model.state_dict()) == names
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "spec", ["edit", "edit:r=8", "edit:layers=[0,2],query=none", "linfusion:zero_init=false"]
)
def test_specs_round_trip(spec):
    method = pared.parse(spec)
    assert pared.parse(method.spec()) == method


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("edti", "did you mean edit"),
        ("edit:r", "has no value"),
        ("edit:rr=3", "did you mean r"),
        ("edit:r=0", "greater than or equal to 1"),
        ("edit:r=many", "r='many' doesn't work"),
    ],
)
def test_bad_specs_are_refused_in_one_sentence(spec, words):
    with pytest.raises(InputError, match=words) as caught:
        pared.parse(spec)
    assert "\n" not in str(caught.value)


def test_registry_is_whole():
    for slug, record in info.registry().items():
        cls = record.load()
        assert cls.info.slug == slug
        assert cls.__name__ == record.cls
        assert getattr(pared, record.cls) is cls


def test_methods_are_hashable_settings():
    assert pared.EDiT(r=8) == pared.EDiT(r=8) != pared.EDiT()
    with pytest.raises(Exception, match="frozen"):
        pared.EDiT().r = 8
