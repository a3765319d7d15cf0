"""`pared doctor`: what it finds, also where nothing works, and never the network."""

import json
import socket
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pared
from pared.cli import doctor

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_text(run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("doctor")
    assert result.exit_code == 0, result.output
    rows = {line[:16].strip(): line[16:] for line in result.stdout.splitlines()}
    assert rows["pared"] == pared.__version__
    assert rows["offline"] == "HF_HUB_OFFLINE=1"
    assert "bfloat16" in rows["cpu"]
    assert "clip" in rows["house models"]
    assert "GiB free" in rows["disk here"]
    assert set(doctor.LIBRARIES) <= set(rows)


def test_bfloat16_that_is_wrong_comes_with_its_remedy(run, monkeypatch):
    """Tests run without AMX, so that it is right whatever they run on."""
    assert "WRONG" not in run("doctor").stdout
    own = F.conv1d

    def wrong(x, *given, **named):
        y = own(x, *given, **named)
        return y.roll(1, dims=1) if x.dtype == torch.bfloat16 else y

    monkeypatch.setattr(F, "conv1d", wrong)
    told = "torch gets it WRONG here: set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment"
    assert told in run("doctor").stdout
    assert json.loads(run("doctor", "--json").stdout)["devices"][0]["bf16_right"] is False


def test_json(run):
    found = json.loads(run("doctor", "--json").stdout)
    assert found["devices"][0]["name"] == "cpu"
    assert isinstance(found["devices"][0]["bf16"], bool)
    assert found["threads"]["cores"] >= 1
    assert found["libraries"]["torch"]
    assert found["cache"]["free_gib"]["here"] > 0
    assert {extra["extra"] for extra in found["extras"]} >= {"data", "adapters"}


def test_what_is_missing_comes_with_the_line_that_installs_it(run, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    result = run("doctor")
    assert result.exit_code == 0
    assert 'not installed (for low-rank adapters): pip install "pared[adapters]"' in result.stdout
    assert "MISSING: pip install torch" in result.stdout


def test_without_torch(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "torch can't be imported" in result.stdout


def test_extras_are_those_of_the_project():
    project = tomllib.loads(PROJECT.read_text())["project"]
    for package, (extra, _) in doctor.OPTIONAL.items():
        assert any(package in line for line in project["optional-dependencies"][extra]), package
