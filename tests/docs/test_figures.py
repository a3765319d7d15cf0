"""Figures of results: what benches make is kept, read, and drawn so that it can be seen."""

import importlib
import json
import re
from xml.etree import ElementTree

import pytest

from pared import results
from pared.bench.plots import LETTER
from pared.errors import InputError
from tests.docs.markdown import DOCS, ROOT

CURVES = {"x": "tokens", "y": "s", "log": True, "series": {"a": [[1, 2.0], [10, 3.0]]}}
BARS = {"x": "change", "bars": {"first": 0.5, "second & last": 0.25}}
# The second is beaten by the first, the last two by none.
POINTS = {
    "x": "ms",
    "y": "error",
    "log": False,
    "points": {"ours": [["1", 1.0, 3.0], ["2", 2.0, 4.0]], "theirs": [["", 3.0, 1.0]]},
}
STORED = [
    pytest.param(name, figure, id=f"{path.stem}: {name}")
    for path in sorted(results.PACKAGED.glob("*.json"))
    for name, figure in json.loads(path.read_text())["figures"].items()
]


@pytest.fixture
def of(monkeypatch):
    """Modules of `docs/` and `benchmarks/` by name."""
    for folder in ("docs", "benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module


def classed(svg: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [each for each in svg.iter() if kind in each.get("class", "").split()]


# Kept and read ------------------------------------------------------------------------------------


def test_what_a_bench_makes_is_read_again(of, tmp_path, monkeypatch):
    record = of("record")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    made = {
        "curves": record.curves("tokens", "s", {"a": [(1, 2.0), (10, 3.0)]}),
        "bars": record.bars("change", BARS["bars"]),
        "points": record.points(
            "ms", "error", {"ours": [("1", 1.0, 3.0), ("2", 2.0, 4.0)], "theirs": [("", 3.0, 1.0)]}
        ),
    }
    record.write("some", (), {}, made)
    found = results.read("some", tmp_path / "results")
    assert found.figures == {"curves": CURVES, "bars": BARS, "points": POINTS}


@pytest.mark.parametrize(
    ("figure", "wrong"),
    [
        (BARS | {"bars": {"first": "much"}}, "figures.it.bars.first: "),
        (BARS | {"y": "error"}, "figures.it.y: "),
        (POINTS | {"points": {"ours": [[1.0, 3.0]]}}, "figures.it.points.ours.0"),
        ({k: v for k, v in POINTS.items() if k != "log"}, "figures.it.log: "),
        (CURVES | {"series": {"a": [1, 2]}}, "figures.it.series.a.0"),
        ({"pie": {}}, "figures.it.x: "),
    ],
)
def test_a_figure_that_is_none_is_refused_by_its_field(figure, wrong, tmp_path):
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"method": "some", "claims": [], "figures": {"it": figure}}))
    with pytest.raises(InputError, match=re.escape(f"{path}: {wrong}")):
        results.read("some", tmp_path)


def test_figures_of_results_are_those_of_their_tables(of):
    upcycling, editing = of("upcycling"), of("editing")
    tasks = results.read(upcycling.SLUG)
    rows, layers = (
        next(table for name, table in tasks.tables.items() if name.startswith(start))
        for start in ("four tasks", "how far layers move")
    )
    made = [(upcycling.figures_of(rows, layers), tasks)]
    edits = results.read(editing.SLUG)
    near = next(table for name, table in edits.tables.items() if name.startswith("near"))
    made.append((editing.figures_of(near), edits))
    for figures, file in made:
        assert json.loads(json.dumps(figures)) == file.figures, f"{file.method}: made of others"


def test_parameters_are_counted_of_all_models_that_are_kept(of):
    upcycling = of("upcycling")
    rows = [
        {"model": f"alone-{task}", "parameters": 1e7, f"loss, {task}": 0.1 * n}
        for n, task in enumerate(upcycling.TASKS)
    ]
    rows += [{"model": "bitfit", "parameters": 1.1e7, "mean loss": 0.5}, {"model": "base"}]
    points = upcycling.figures_of(rows, [])["loss against parameters kept"]["points"]
    assert points == {
        "few weights trained": [("BitFit", 11.0, 0.5)],
        "four fine-tunes": [("one for each task", 40.0, 0.15)],
    }
    # Three of four say nothing about four.
    points = upcycling.figures_of(rows[1:], [])["loss against parameters kept"]["points"]
    assert list(points) == ["few weights trained"]


# Drawn --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "figure"), STORED)
def test_nothing_is_cut_off(name, figure, of):
    svg = ElementTree.fromstring(of("drawings").drawn(name, figure))
    _, _, width, height = map(int, svg.get("viewBox").split())
    assert svg.findall(".//{*}text")
    assert (svg.get("width"), svg.get("height")) == (str(width), str(height))
    for text in svg.findall(".//{*}text"):
        x, y, long = float(text.get("x")), float(text.get("y")), len(text.text) * 13 * LETTER
        left = {"end": x - long, "middle": x - long / 2}.get(text.get("text-anchor"), x)
        assert left >= 0 and left + long <= width and 0 < y <= height, text.text
    for circle in svg.findall(".//{*}circle"):
        assert 0 < float(circle.get("cx")) < width and 0 < float(circle.get("cy")) < height


@pytest.mark.parametrize("figure", [CURVES, BARS, POINTS], ids=["curves", "bars", "points"])
def test_every_name_stands_in_the_drawing(figure, of):
    svg = ElementTree.fromstring(of("drawings").drawn("some", figure))
    texts = {text.text for text in svg.findall(".//{*}text")}
    values = next(figure[key] for key in results.FIGURES if key in figure)
    assert {figure["x"], *values} <= texts


def test_points_that_no_other_beats_are_ringed(of):
    svg = ElementTree.fromstring(of("drawings").drawn("some", POINTS))
    ringed = [group for group in svg.findall(".//{*}g") if classed(group, "halo")]
    assert len(classed(svg, "halo")) == len(ringed) == 2
    assert {group.get("class") for group in ringed} == {"s0", "s1"}
    assert len(classed(svg, "front")) == 1


def test_bars_are_as_long_as_their_values(of):
    svg = ElementTree.fromstring(of("drawings").drawn("some", BARS))
    first, second = (float(bar.get("width")) for bar in classed(svg, "k0"))
    assert first == pytest.approx(2 * second, rel=0.001)


# Beside them: tables ------------------------------------------------------------------------------


def test_a_broad_table_is_told_apart_by_what_its_columns_are_about(of):
    generated = of("generated")
    tasks = [f"task {n}" for n in range(generated.BROADEST // 2)]
    rows = [{"model": "base", "size": 5}, {"model": "all", "size": 6, "loss, in all": 0.7}]
    for task in tasks:
        rows[1] |= {f"loss, {task}": 0.5, f"loss, {task} sd": 0.1, f"error, {task}": 0.25}
    found = generated._rows_table(rows).split("\n\n")
    assert found[0].splitlines()[0] == "| model | size | loss, in all |"
    assert found[1::2] == [f"*{task}*" for task in tasks]
    for table in found[2::2]:
        assert table.splitlines() == [
            "| model | loss | error |",
            "| --- | --- | --- |",
            "| all | 0.5 ± 0.1 | 0.25 |",
        ]
    narrow = [{k: v for k, v in row.items() if "task" not in k or "task 0" in k} for row in rows]
    head = generated._rows_table(narrow).splitlines()[0]
    assert head == "| model | size | loss, in all | loss, task 0 | error, task 0 |"


def test_the_page_of_a_method_shows_its_figures_above_its_tables():
    text = (DOCS / "methods" / "multi-task-upcycling.md").read_text()
    names = list(results.read("multi-task-upcycling").figures)
    places = [text.index(f"![{name}](") for name in names]
    assert text.index("## Claims") < min(places) and max(places) < text.index("### ")
