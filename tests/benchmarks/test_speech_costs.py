"""What benches of speech measure costs by."""

import argparse

import pytest

from pared.bench import host


def test_exponents_are_fitted_over_lengths_that_all_arms_had(costs):
    def points(power, *lengths):
        return [{"length": x, "seconds": 2.0 * x**power} for x in lengths]

    found = {"a": points(1, 5, 20, 40, 80), "b": points(2, 5, 20, 30, 40)}
    over = costs.shared(found, 20)
    assert over == [20, 40]
    one, other = (costs.length_row(each, "seconds", over, [5, 40, 80]) for each in found.values())
    assert one == {"exponent, 20 to 40 s": 1, "5 s": 10, "40 s": 80, "80 s": 160}
    assert other["exponent, 20 to 40 s"] == 2 and other["80 s"] == "too much memory"
    assert list(costs.length_row(found["a"], "seconds", [20], [5])) == ["5 s"]


def test_arms_take_turns_until_they_no_longer_fit(costs, in_this_process):
    asked = []

    def point_at(options, arm, length):
        asked.append((arm, length))
        if arm == "b" and length > 20:
            return None
        seconds = length * (1.2 if len(asked) > 7 else 1)
        return {"length": length, "seconds": seconds, "MiB": 1.0, "cores": 0.0}

    options = argparse.Namespace(lengths=[40, 10, 20, 80], floor=15, gigabytes=1)
    tables, _ = costs.by_length(point_at, options, ["a", "b"], "a call", "its length")
    turns = [("a", 10), ("b", 10), ("a", 20), ("b", 20), ("a", 40), ("b", 40), ("a", 80)]
    assert asked == [*turns, ("a", 20)]
    (a, b), memory = tables.values()
    assert a["note"] == "20% slower at 20 s when all was measured" and b["note"] == "none"
    assert a["80 s"] == 80 and b["40 s"] == "too much memory" and "note" not in memory[0]


@pytest.mark.parametrize(
    "cores, told", [(1.1, "the machine was busy, 4 cores in all"), (1, "none")]
)
def test_a_busy_machine_is_told(costs, monkeypatch, cores, told):
    monkeypatch.setattr(host, "usable_cores", lambda: 4)
    points = [
        {"length": 1, "seconds": 1, "cores": 0.2},
        {"length": 2, "seconds": 2, "cores": cores},
    ]
    found = costs.trust(points)
    assert found["cores busy elsewhere, at most"] == cores and found["note"].startswith(told)


def test_a_time_is_of_several_calls_and_with_what_others_did(costs, monkeypatch):
    monkeypatch.setattr(host.Neighbours, "cores", lambda self: 0.75)
    calls = []
    found = costs.point_of(lambda: calls.append(1), 3.0)
    assert len(calls) == 1 + costs.MOST and found["length"] == 3.0 and found["cores"] == 0.75
    # Calls that take long are still not one sample.
    monkeypatch.setattr(costs, "ENOUGH", 0.0)
    calls.clear()
    costs.point_of(lambda: calls.append(1), 3.0)
    assert len(calls) == 1 + costs.FEWEST
