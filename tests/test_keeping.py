"""Where what methods keep lies: in main memory, within a budget, in a coarser type; exact bytes."""

import copy
from functools import cache

import pytest
import torch

import pared
from pared import anatomy
from pared.bench.peers import FirstBlockCache
from pared.errors import InputError
from pared.keeping import Keeping, Store, bytes_apart, held_bytes, keeping, size_of, spelled
from pared.nn.forecast import History
from tests.caching.pipelines import SPECS, WAYS

# Every method that keeps something, and a pipeline.
CASES = {
    "deepcache:min_steps=1": "sd",
    "delta-dit": "pixart-sigma",
    "delta-dit:order=1": "sd3.5",
    "taylorseer:interval=3,warmup=1": "pixart-sigma",
    "taylorseer:interval=2,warmup=1,sites=block": "wan, guided in turn",
    "taylorseer:interval=2,warmup=1,sites=output": "sd, second order",
    "harmonica": "sd3.5",
    "attention-map-reuse": "flux, guided in turn",
    SPECS["ras"]: "lumina",
    SPECS["re-ttention"]: "pixart-sigma",
}
cases = pytest.mark.parametrize("spec", CASES)
pytestmark = pytest.mark.filterwarnings("ignore:ras is validated for Euler")


@cache
def usual(spec):
    """Pipeline, how it's called, what it paints with a method that keeps as usual, and stats."""
    way = next(way for way in WAYS if way.name == CASES[spec])
    pipe = way.build()
    return pipe, way.paint, *painted(pipe, way.paint, spec)


def painted(pipe, paint, spec, **how):
    with pared.apply(pipe, pared.parse(spec), **how) as handle:
        found = paint(pipe)
        # A second run finds nothing of the first.
        assert torch.equal(paint(pipe), found)
    (stats,) = handle.stats.values()
    return found, stats


@cases
def test_offloading_changes_no_bit(spec):
    pipe, paint, wanted, plain = usual(spec)
    found, stats = painted(pipe, paint, spec, offload="cpu")
    assert torch.equal(found, wanted)
    assert stats["bytes"] + stats["offloaded"] == plain["bytes"] > 0
    # Numbers of patches stay where they are.
    assert (stats["bytes"] > 0) == spec.startswith("ras")
    assert stats["bytes"] < plain["bytes"] / 50
    assert {k: v for k, v in stats.items() if k not in ("bytes", "offloaded")} == {
        k: v for k, v in plain.items() if k != "bytes"
    }


@cases
def test_half_precision_takes_half_the_bytes(spec):
    pipe, paint, wanted, plain = usual(spec)
    found, stats = painted(pipe, paint, spec, dtype="bfloat16")
    assert not torch.equal(found, wanted) and found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.2 * float(wanted.std()))
    whole = 0 if not spec.startswith("ras") else numbers_of(spec)
    half = (plain["bytes"] - whole) / 2
    # HarmoniCa's are parts of larger tensors, which a copy of the part doesn't hold.
    assert 0.8 * half <= stats["bytes"] - whole <= half
    assert spec == "harmonica" or stats["bytes"] - whole == half
    # What isn't finer stays as it is.
    found, stats = painted(pipe, paint, spec, dtype="float32")
    assert torch.equal(found, wanted) and stats == plain


def numbers_of(spec):
    pipe, paint, *_ = usual(spec)
    return painted(pipe, paint, spec, offload="cpu")[1]["bytes"]


@cases
def test_a_run_that_needs_more_than_its_budget_ends_in_a_sentence(spec):
    pipe, paint, wanted, plain = usual(spec)
    need = plain["bytes"] - numbers_of(spec)
    found, stats = painted(pipe, paint, spec, budget=need)
    assert torch.equal(found, wanted) and stats == plain
    found, stats = painted(pipe, paint, spec, budget=need // 2, offload="cpu")
    assert torch.equal(found, wanted)
    assert stats["bytes"] <= need // 2 + numbers_of(spec)
    assert need // 2 <= stats["offloaded"] <= need
    words = rf"would take {spelled(need)} .* budget is {spelled(need - 1)}; .* offload='cpu'.*dtype"
    with (
        pared.apply(pipe, pared.parse(spec), budget=need - 1) as handle,
        pytest.raises(InputError, match=words) as caught,
    ):
        paint(pipe)
    assert "\n" not in str(caught.value)
    (stats,) = handle.stats.values()
    assert stats["bytes"] < need
    with pared.apply(pipe, pared.parse(spec)):
        assert torch.equal(paint(pipe), wanted)


def test_a_budget_is_for_all_methods_together():
    way = next(way for way in WAYS if way.name == "pixart-sigma")
    pipe = way.build()
    methods = pared.parse("delta-dit:cached=1"), pared.parse("taylorseer:interval=3,warmup=1")
    with pared.apply(pipe, *methods) as handle:
        way.paint(pipe)
    sizes = [stats["bytes"] for stats in handle.stats.values()]
    with (
        pared.apply(pipe, *methods, budget=max(sizes)),
        pytest.raises(InputError, match="the budget is"),
    ):
        way.paint(pipe)
    with pared.apply(pipe, *methods, budget=sum(sizes)):
        way.paint(pipe)


def test_a_copy_keeps_like_the_original():
    way = next(way for way in WAYS if way.name == "pixart-sigma")
    pipe = way.build()
    with pared.apply(pipe, pared.parse("harmonica"), budget=1):
        pipe.transformer = copy.deepcopy(pipe.transformer)
    with pytest.raises(InputError, match="the budget is 1 B"):
        way.paint(pipe)


def test_caches_of_others_keep_in_their_own_way():
    way = next(way for way in WAYS if way.name == "flux")
    pipe = way.build()
    with pytest.raises(
        InputError, match=r"diffusers-fbc keeps .* in a way of its own, which offlo"
    ):
        pared.apply(pipe, FirstBlockCache(), offload="cpu")
    assert not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"offload": "disk"}, "offload='disk' can't be; give 'cpu'"),
        ({"budget": "much"}, "budget='much' is no size; give bytes"),
        ({"budget": 0}, "budget=0 is no size"),
        ({"budget": "0 GB"}, "budget='0 GB' is no size"),
        ({"dtype": "int8"}, "dtype='int8' can't be to keep in; give one of 'float16', 'bfloat16'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_attached(how, words):
    pipe = next(way for way in WAYS if way.name == "pixart-sigma").build()
    with pytest.raises(InputError, match=words):
        pared.apply(pipe, pared.parse("harmonica"), **how)
    assert not pipe.transformer._forward_pre_hooks


def test_sizes():
    wanted = {7: 7, "7B": 7, "2 kB": 2000, "1.5MB": 1_500_000, "2GB": 2e9, "2GiB": 2 * 2**30}
    assert {text: size_of(text) for text in wanted} == wanted
    assert [spelled(size) for size in (7, 1234, 2_000_000, 2_150_000_000)] == [
        "7 B",
        "1.23 kB",
        "2 MB",
        "2.15 GB",
    ]
    assert keeping() is None


# A store is a dictionary ------------------------------------------------------------------------


def test_a_store_gives_back_what_was_put_in():
    store = Store(Keeping(dtype=torch.bfloat16))
    x, numbers = torch.arange(4.0), torch.arange(3)
    history = History((2, 1), ((x, x + 1), None), (torch.float32, None))
    store["site"] = history
    store.update({"numbers": numbers, "word": "so", "list": (known := [1])})
    store |= {"more": (x.double(), {"in": x.half()})}
    nested = store.setdefault("nested", {})
    nested["x"] = x
    assert isinstance(store["nested"], Store) and torch.equal(store["nested"]["x"], x)
    assert store["site"].steps == (2, 1) and store["site"].factors[1] is None
    assert torch.equal(store["site"].factors[0][1], x + 1)
    assert store["numbers"] is numbers and store["word"] == "so" and store["list"] is known
    assert store["more"][0].dtype == torch.float64 and store["more"][1]["in"].dtype == torch.half
    # As they lie, nothing is brought back.
    assert dict(store.items())["site"].factors[0][0].dtype == torch.bfloat16
    assert next(type(value) for value in store.values()) is History
    assert held_bytes({"all": [store]}) == 2 * 4 * 2 + 3 * 8 + 2 * 4 * 2 + 4 * 2
    assert torch.equal(store.pop("nested")["x"], x) and store.get("nested", 5) == 5
    assert len(store) == 5 and "site" in store
    store.clear()
    assert not store and held_bytes(store) == 0


def test_what_is_replaced_or_gone_makes_room():
    how = Keeping(budget=32)
    store = Store(how)
    for number in range(5):
        store["same"] = torch.full((8,), float(number))
    assert float(store["same"][0]) == 4
    with pytest.raises(InputError, match="would take 64 B"):
        Store(how)["other"] = torch.zeros(8)
    other = Store(how)
    del store["same"]
    other["x"] = torch.zeros(8)
    del other
    store["same"] = torch.zeros(8)
    assert bytes_apart(store) == (32, 0)


def test_what_has_no_room_goes_into_main_memory():
    store = Store(Keeping(offload="cpu", budget=40))
    for name in "abc":
        store[name] = torch.zeros(4)
    assert bytes_apart([store]) == (32, 16)
    assert all(torch.equal(store[name], torch.zeros(4)) for name in "abc")


def test_values_beyond_half_precision_are_clipped():
    store = Store(Keeping(dtype=torch.float16))
    store["x"] = torch.tensor([1e6, 1.0])
    assert store["x"].tolist() == [65504, 1]


@pytest.mark.gpu
def test_on_a_device_it_lies_where_it_was_put():
    store = Store(Keeping(offload="cpu"))
    x = torch.randn(1000, device="cuda", dtype=torch.bfloat16)
    store["x"] = x
    (lying,) = store.values()
    assert lying.device.type == "cpu" and lying.is_pinned()
    assert store["x"].device == x.device and torch.equal(store["x"], x)
    assert bytes_apart(store) == (0, 2000)


@pytest.mark.parametrize(
    "spec", ["attention-map-reuse", pytest.param("harmonica", marks=pytest.mark.slow)]
)
def test_compiled_blocks_keep_likewise(spec):
    """The processors of attentions keep within what is compiled."""
    way = next(way for way in WAYS if way.name == "pixart-sigma")
    pipe = way.build()
    wanted, stats = painted(pipe, way.paint, spec, dtype="bfloat16", offload="cpu")
    torch._dynamo.reset()
    for block in anatomy.of(pipe.transformer).blocks:
        block.module.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=40, fail_on_recompile_limit_hit=True):
        found, counted = painted(pipe, way.paint, spec, dtype="bfloat16", offload="cpu")
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert counted == stats
