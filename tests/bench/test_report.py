"""Reports: what is written is what was measured, in every form."""

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from pared.bench.figures import BY_KEY, COLUMNS, Figure, seconds, times
from pared.bench.report import Report, Row
from pared.errors import InputError


@pytest.fixture
def report():
    """Two arms of which one is identical to the base, so that it has no finite relative figure."""
    base = {"seconds": Figure(2.0, 1.9, 2.2), "passes": Figure(40.0), "parameters": Figure(6.1e8)}
    fast = base | {
        "seconds": Figure(1.0, 0.9, 1.1),
        "ratio": Figure(2.0, 1.9, 2.1),
        "psnr": Figure(31.26, 30.0, 32.0),
        "sharpness": Figure(math.inf),
    }
    rows = (
        Row("base", "base", (), 20, base, {"feed-forward": 2e9}),
        Row(
            "fast | odd",
            "runtime",
            ("taylorseer:order=1",),
            20,
            fast,
            {},
            "Twice as fast.",
            (31.2,),
            "pared sample toy 'red apple' --with taylorseer:order=1 -o picture.png",
        ),
    )
    return Report(
        title="toy",
        headline="fast: twice as fast.",
        conditions={"steps": 20, "machine": {"cpu": "a chip", "gpu": None}, "threads": 2},
        rows=rows,
        prompts=("red apple",),
        images={row.name: np.zeros((1, 8, 8, 3), dtype=np.uint8) for row in rows},
        notes=("Only one picture.",),
    )


def test_text_holds_arms_figures_verdicts_and_notes(report):
    text = report.table()
    assert text == str(report)
    lines = text.splitlines()
    assert lines[0] == "toy"
    assert lines[2].split() == [
        "time",
        "speed",
        "passes",
        "parameters",
        "PSNR",
        "(dB)",
        "sharpness",
    ]
    assert lines[3].split() == ["base", "2.00", "s", "-", "40", "610.0", "M", "-", "-"]
    assert "fast | odd: Twice as fast." in lines
    assert lines[-1] == "Only one picture."


def test_markdown_is_a_table_of_even_rows(report):
    table = [line for line in report.table("md").splitlines() if line.startswith("|")]
    assert len(table) == 4
    bars = [line.replace("\\|", "").count("|") for line in table]
    assert len(set(bars)) == 1
    assert "31.3 (30.0 to 32.0)" in table[3]


def test_csv_gives_every_number_in_full(report):
    rows = list(csv.DictReader(io.StringIO(report.table("csv"))))
    assert [row["name"] for row in rows] == ["base", "fast | odd"]
    assert rows[1]["psnr"] == "31.26" and rows[1]["psnr_high"] == "32.0"
    assert rows[0]["psnr"] == "" and rows[1]["sharpness"] == ""
    assert rows[1]["stack"] == "taylorseer:order=1"
    assert rows[0]["command"] == "" and rows[1]["command"].startswith("pared sample toy")


def test_every_arm_s_command_is_told_and_the_front_marked(report):
    command = report.rows[1].command
    assert f"  fast | odd: {command}" in report.table().splitlines()
    near = {"ssim": Figure(0.9)}
    rows = tuple(replace(r, figures=r.figures | near, command=command) for r in report.rows)
    worse = replace(rows[1], name="worse", figures=rows[1].figures | {"ssim": Figure(0.8)})
    told = replace(report, rows=(*rows, worse))
    assert told.front == ["fast | odd"]  # the base is given as no nearer to itself
    assert told.to_dict()["front"] == told.front
    for text in (told.table(), told.table("md")):
        assert f"* fast | odd: {command}" in text.splitlines()
        assert f"  worse: {command}" in text.splitlines()
    alone = replace(report, rows=(report.rows[0], rows[1]))
    assert alone.front == ["fast | odd", "base"]


def test_json_is_strict_and_without_pictures(report, tmp_path):
    path = report.save_json(tmp_path / "deep" / "report.json")
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found == json.loads(report.table("json")) == report.to_dict()
    assert "images" not in found
    fast = found["rows"][1]
    assert fast["figures"]["ratio"] == {"value": 2.0, "low": 1.9, "high": 2.1}
    assert fast["figures"]["sharpness"]["value"] is None
    assert found["rows"][0]["bill"] == {"feed-forward": 2e9}
    assert found["conditions"]["machine"]["cpu"] == "a chip"


def test_a_row_is_found_by_name(report):
    assert report.row("base").steps == 20
    with pytest.raises(InputError, match="no arm 'slow'; it has base, fast"):
        report.row("slow")


def test_an_unknown_format_is_refused(report):
    with pytest.raises(InputError, match="text, md, csv and json"):
        report.table("xml")


def test_a_page_is_written_where_it_is_wanted(report, tmp_path):
    page = report.html(tmp_path / "pages" / "report.html").read_text()
    assert "twice as fast" in page and "a chip, 2 threads" in page
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        report.html(tmp_path / "file" / "report.html")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0000004, "0.40 us"),
        (0.0005, "500 us"),
        (0.0021, "2.10 ms"),
        (0.0482, "48.2 ms"),
        (2.314, "2.31 s"),
        (61.0, "61.0 s"),
        (720.4, "720 s"),
    ],
)
def test_durations(value, expected):
    assert seconds(value) == expected


def test_figures_name_their_spread_unless_there_is_none():
    assert Figure(1.42, 1.38, 1.47).write(times) == "1.42x (1.38x to 1.47x)"
    assert Figure(1.42, 1.38, 1.47).write(times, spread=False) == "1.42x"
    assert Figure(1.42).write(times) == "1.42x"
    assert Figure(1.0, 1.0, 1.0).write(times) == "1.00x"
    assert Figure(100.0).write(BY_KEY["psnr"].form) == "equal"


def test_columns_are_complete():
    assert len(BY_KEY) == len(COLUMNS)
    for column in COLUMNS:
        assert column.about.endswith(".") and column.title and column.group
        assert column.form(1.5)
