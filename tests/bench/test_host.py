"""Readings of the operating system, from files written for the test."""

import os
import time

import pytest

from pared.bench import host


def test_this_machine_answers():
    assert host.usable_cores() >= 1
    assert host.cpu_name()
    assert host.resident_bytes() > 2**20
    assert host.load_average() >= 0
    assert host.Neighbours().cores() >= 0


def test_cpu_name_is_the_model_name(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Abacus 9: Mark II\nmodel name\t: other\n")
    monkeypatch.setattr(host, "CPU_INFO", info)
    assert host.cpu_name() == "Abacus 9: Mark II"


def test_resident_bytes_without_proc_are_about_the_same(tmp_path, monkeypatch):
    with_proc = host.resident_bytes()
    monkeypatch.setattr(host, "OWN_MEMORY", tmp_path / "none")
    # The process grows a little between the two readings.
    assert host.resident_bytes() == pytest.approx(with_proc, rel=0.2)


def test_foreign_cpu_seconds_leave_out_idle_time_and_ourselves(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    ticks = os.sysconf("SC_CLK_TCK")
    fields = [40, 1, 5, 9000, 700, 2, 1, 1, 0, 0]
    stat.write_text("cpu  " + " ".join(str(ticks * each) for each in fields) + "\ncpu0 1 2 3\n")
    monkeypatch.setattr(host, "CPU_TIMES", stat)
    monkeypatch.setattr(time, "process_time", lambda: 30.0)
    assert host.foreign_cpu_seconds() == pytest.approx(50 - 30)


def test_neighbours_are_cpu_seconds_over_elapsed_seconds(monkeypatch):
    used, now = iter([100.0, 112.0]), iter([0.0, 8.0])
    monkeypatch.setattr(host, "foreign_cpu_seconds", lambda: next(used))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    assert host.Neighbours().cores() == 1.5


def test_neighbours_fall_back_to_the_load_before(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "CPU_TIMES", tmp_path / "none")
    monkeypatch.setattr(host, "load_average", lambda: 1.25)
    assert host.Neighbours().cores() == 1.25
