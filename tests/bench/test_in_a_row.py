"""Caches in a row of calls: what fails is found, and named."""

from contextlib import ExitStack
from functools import partial

import pytest

import pared
from pared.bench import peers
from pared.bench.in_a_row import examined
from pared.bench.peers import Finding, Peer
from pared.method import Handle
from tests.caching.pipelines import OTHERS, WAYS

WAY = {way.name: way for way in WAYS}


def found(cache, name) -> Finding:
    return examined(cache, WAY[name].made, OTHERS)


def test_our_own_methods_last():
    assert found(pared.parse("taylorseer:interval=2"), "flux img2img") == Finding("works")


class Forgetful(Peer):
    """Scales what the first block gives, by what it has seen before; `how` says of what."""

    info = peers._info("forgetful", "", "Forgetful")
    how: str = ""

    def attach(self, pipeline) -> Handle:
        model, undo = pipeline.transformer, ExitStack()
        block, seen = model.transformer_blocks[0], []

        def scale(module, args, output):
            seen.append(args[0])
            if self.how == "size" and args[0].shape != seen[0].shape:
                raise ValueError("another shape\nthan before")
            # Seven calls are a run, whatever is asked for.
            late = len(seen) % 7 > 3 if self.how == "steps" else len(seen) > 100
            return output * (1.3 if late else 1.1)

        hook = block.register_forward_hook(scale)
        undo.callback(hook.remove)
        if self.how == "off":
            undo.callback(partial(setattr, block, "forward", None))
        return Handle(undo, (self,), {})


SIZE, STEPS, AGAIN = "another size", "another number of steps", "first call again"


@pytest.mark.parametrize(
    ("how", "failed", "detail"),
    [
        ("size", (SIZE,), "another size: ValueError: another shape"),
        ("steps", (AGAIN,), "first call again: another picture than by itself"),
    ],
)
def test_what_fails_in_a_row_is_named(how, failed, detail):
    assert found(Forgetful(how=how), "dit") == Finding("works once", detail, failed)
    assert found(Forgetful(), "dit") == Finding("works")


def test_what_cannot_be_taken_off_is_found():
    finding = found(Forgetful(how="off"), "dit")
    assert finding.outcome == "goes astray"
    assert "taken off, a call fails (TypeError: 'NoneType'" in finding.detail
