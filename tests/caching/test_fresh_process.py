"""A call after others equals one in a fresh process, with every method on every stock pipeline."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pared
from tests.caching.fresh import digest
from tests.caching.pipelines import FIRST, OTHERS, WAYS, serving
from tests.caching.test_faults import stopped_between, stopped_inside


def cases():
    """Ways of one family at a time, since processes take seconds to begin."""
    for first in FIRST:
        ways = [way for way in WAYS if way.family == first.family]
        if first.family == "sd3":
            yield pytest.param([first], id=first.name)
        yield pytest.param(ways, id=f"all of {first.family}", marks=[pytest.mark.slow])


def in_processes_of_their_own(cases):
    """Digests of what pipelines paint that nothing has run before."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.caching.fresh"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def after_others(way, spec):
    """The digest of a call behind calls of other kinds, of which the last two broke off."""
    pipe = way.build()
    with pared.apply(pipe, *([pared.parse(spec)] if spec else [])):
        for other in OTHERS.values():
            way.paint(pipe, **other)
        stopped_between(way, pipe)
        stopped_inside(way, pipe, ZeroDivisionError, 0.6)
        return digest(way.paint(pipe))


@pytest.mark.skipif(sys.platform == "win32", reason="processes can't be forked there")
@pytest.mark.filterwarnings("ignore:ras is validated for Euler")
@pytest.mark.parametrize("ways", cases())
def test_a_call_after_others_equals_one_in_a_fresh_process(ways):
    pairs = [(way, spec) for way in ways for spec in ("", *serving(way))]
    fresh = in_processes_of_their_own([(way.name, spec) for way, spec in pairs])
    for (way, spec), wanted in zip(pairs, fresh, strict=True):
        assert after_others(way, spec) == wanted, f"{spec} on {way.name}"
