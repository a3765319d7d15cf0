"""What benches write beside their tables."""

import importlib
import sys

import torch

from tests.docs.markdown import ROOT


def test_conditions_are_what_is_told_and_what_is_always_told(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    record = importlib.import_module("record")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "asr.py"), "--kept", "--seed", "3"])
    rows = {row["what"]: row["value"] for row in record.conditions({"steps": 20})}
    assert list(rows) == ["command", "steps", "machine", "commit", "date"]
    assert (rows["command"], rows["steps"]) == ("python benchmarks/asr.py --seed 3", 20)
    assert torch.__version__ in rows["machine"]
