"""Pages: self-contained, well-formed, safe; plots that show what they are given."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pared.bench import graphs, plots, sections
from pared.bench.axes import NARROW, WIDE, Axis, linear_ticks, log_ticks
from pared.bench.figures import Figure
from pared.bench.page import Section, first_sentence, picture, render
from pared.bench.report import Report, Row

NASTY = '<script>alert("x")</script> & "quotes"'
VOID = {"meta", "img", "br", "input", "link"}


class Checker(HTMLParser):
    """Reads a page: every tag must close in order; attributes and texts are collected."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for each, attributes in self.tags if each == tag]


def row(name, kind, time, ssim=None, **more):
    figures = {
        "seconds": Figure(time, 0.9 * time, 1.1 * time),
        "macs_per_image": Figure(time * 1e9),
    }
    if kind != "base":
        figures["ratio"] = Figure(2 / time, 1.9 / time, 2.1 / time)
    if ssim is not None:
        figures |= {"ssim": Figure(ssim, ssim - 0.01, ssim + 0.01), "sharpness": Figure(0.9)}
    bill = {"attention core": time * 4e8, "feed-forward": time * 6e8}
    return Row(name, kind, (), 20, figures | more, bill, f"{name} is judged.", (30.0, 100.0))


@pytest.fixture
def report():
    rows = (
        row("base", "base", 2.0, mmd_reference=Figure(8.0)),
        row(NASTY, "runtime", 1.0, 0.9, mmd_reference=Figure(9.0)),
        row("base, 10 steps", "fewer steps", 1.0, 0.8, mmd_reference=Figure(9.5)),
        row("slow", "converted", 4.0, 0.7, mmd_reference=Figure(8.5)),
    )
    generator = np.random.default_rng(0)
    images = {r.name: generator.integers(0, 255, (2, 16, 16, 3), dtype=np.uint8) for r in rows}
    return Report("A toy", "It works. Somewhat.", {"command": NASTY, "steps": 20}, rows,
                  (NASTY, "a sailboat"), images, (f"A note on {NASTY}.",))  # fmt: skip


@pytest.fixture
def page(report, tmp_path):
    curve = [(step, 1 / step) for step in range(1, 200)]
    times = {"softmax": [(64, 1.0), (256, 4.0), (1024, 30.0)], "linear": [(64, 2.0), (1024, 9.0)]}
    extra = [graphs.healing_section(curve, [(100, 0.02)]), graphs.crossover_section(times)]
    return report.html(tmp_path / "report.html", extra).read_text()


# The page ---------------------------------------------------------------------------------------


def test_nothing_is_loaded_from_elsewhere(page):
    assert not re.search(r"https?:|//[a-z]+\.[a-z]", re.sub(r"base64,[\w+/=]+", "", page))
    checker = Checker(page)
    assert not checker.all("link") and not checker.all("iframe")
    assert all("src" not in script for script in checker.all("script"))
    assert all(image["src"].startswith("data:image/webp;base64,") for image in checker.all("img"))
    assert "@import" not in page and "url(" not in page
    (policy,) = (m["content"] for m in checker.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")


def test_what_others_wrote_stays_text(page):
    assert NASTY not in page
    assert NASTY in Checker(page).texts
    # Only the page's own script.
    assert len(Checker(page).all("script")) == 1


def test_sections_come_in_order_and_can_be_reached(page):
    checker = Checker(page)
    anchors = [attributes["id"] for attributes in checker.all("section")]
    assert anchors == [
        "verdicts", "pictures", "time-and-closeness", "time-and-realism", "the-bill", "figures",
        "healing", "where-it-pays", "conditions",
    ]  # fmt: skip
    links = [a["href"] for a in checker.all("a")]
    assert links == ["#main", *(f"#{anchor}" for anchor in anchors)]


def test_commands_have_a_section_of_their_own(report, tmp_path):
    rows = tuple(replace(r, command=f"pared sample toy {NASTY}") for r in report.rows[:3])
    path = replace(report, rows=rows).html(tmp_path / "page.html")
    checker = Checker(path.read_text())
    assert "commands" in [section["id"] for section in checker.all("section")]
    assert checker.texts.count(f"pared sample toy {NASTY}") == 3
    # The rival is as fast as the second arm and less near.
    assert len(checker.all("strong")) == 2 and graphs.front(rows) == [NASTY, "base"]


def test_pictures_have_alternatives_and_rows(page):
    images = Checker(page).all("img")
    assert len(images) == 8
    assert images[1]["alt"] == f"{NASTY}: {NASTY}"
    assert images[-1]["alt"] == "slow: a sailboat"
    assert all(image["width"] == image["height"] == "16" for image in images)
    shots = [b for b in Checker(page).all("button") if b.get("class") == "shot"]
    assert [shot["data-row"] for shot in shots] == ["0"] * 4 + ["1"] * 4


def test_plots_are_described_and_hold_finite_numbers(page):
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in Checker(page).all("svg"))
    for attribute in re.findall(r' (?:d|x|y|cx|cy|width)="([^"]*)"', page):
        assert "nan" not in attribute and "inf" not in attribute


def test_the_verdict_stands_first(page):
    texts = [text.strip() for text in Checker(page).texts]
    assert texts.index("It works.") < texts.index("Somewhat.") < texts.index("Verdicts", 20)


def test_any_sections_make_a_page():
    page = render(
        "Demo", "All is well.", [Section("One & two", "<p>here</p>", "lead")], "pared demo"
    )
    checker = Checker(page)
    assert checker.all("section") == [{"id": "one-two"}]
    assert {"One & two", "lead", "here", "pared demo"} <= set(checker.texts)


def test_a_report_without_pictures_has_a_page(report, tmp_path):
    bare = Report("Speed", "Fast.", {}, tuple(r for r in report.rows if r.kind != "converted"))
    page = bare.html(tmp_path / "bare.html").read_text()
    assert not Checker(page).all("img")


@pytest.mark.parametrize(
    ("text", "first", "rest"),
    [
        ("1.42x (1.38x to 1.47x). PSNR 31.2 dB.", "1.42x (1.38x to 1.47x).", "PSNR 31.2 dB."),
        ("One only", "One only", ""),
        ("A. B. C.", "A.", "B. C."),
    ],
)  # fmt: skip
def test_first_sentence(text, first, rest):
    assert first_sentence(text) == (first, rest)


def test_small_pictures_lose_nothing():
    import base64
    import io

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for given_image in (pixels, Image.fromarray(pixels), pixels / 255):
        data = base64.b64decode(picture(given_image).partition(",")[2])
        assert (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) == pixels).all()


# Sections ---------------------------------------------------------------------------------------


def test_rivals_share_the_base_s_colour(report):
    assert list(sections.colours_of(report.rows).values()) == [0, 1, 0, 2]
    many = [row("base", "base", 1.0), *(row(f"arm {n}", "model", 1.0) for n in range(9))]
    assert 0 not in list(sections.colours_of(many).values())[1:]


def test_pareto_set():
    points = [(1, 5), (2, 7), (2, 6), (3, 7), (4, 9)]
    assert graphs.pareto(points, higher=True) == [0, 1, 4]
    assert graphs.pareto(points, higher=False) == [0]
    # Twins don't beat each other.
    assert graphs.pareto([(1, 1), (1, 1)], higher=True) == [0, 1]


def test_the_bill_takes_measured_and_counted_lines():
    counted = [
        {"part": "denoiser", "kind": "feed-forward", "macs": 5, "total": 100},
        {"part": "vae", "kind": "decode", "macs": 40, "total": 40},
    ]
    section = graphs.bill_section(
        [
            {"arm": "base", "lines": counted},
            {"arm": "less", "lines": [{"kind": "feed-forward", "macs": 70.0}]},
        ]
    )
    assert "less, feed-forward: 70 MACs (100%)" in section.html
    assert "base, encoders and decoder: 40 MACs (29%)" in section.html
    assert "70 MACs, 0.50x" in section.html
    assert graphs.bill_section([{"arm": "base", "lines": []}]) is None


def test_the_crossing_is_found_and_named():
    # 1e-6 n^2 meets 1e-3 n at n = 1000.
    tokens = [100, 500, 2000, 5000]
    section = graphs.crossover_section(
        {"softmax": [(n, 1e-6 * n**2) for n in tokens], "linear": [(n, 1e-3 * n) for n in tokens]}
    )
    assert section.lead == "Linear is faster than softmax from 1,000 image tokens on."
    assert "1,000 image tokens" in section.html and "mark-dot" in section.html


@pytest.mark.parametrize(("factor", "word"), [(0.5, "faster"), (2.0, "slower")])
def test_lines_that_do_not_cross_say_so(factor, word):
    base = [(n, float(n)) for n in (10, 100, 1000)]
    section = graphs.crossover_section({"a": base, "b": [(n, factor * t) for n, t in base]})
    assert section.lead == f"B is {word} than a throughout."
    assert "mark-dot" not in section.html


def test_long_curves_are_smoothed_by_medians():
    points = [(x, 1.0) for x in range(100)]
    points[50] = (50, 100.0)
    assert {y for _, y in graphs.smoothed(points)} == {1.0}
    assert "faint" in graphs.healing_section(points).html
    assert "faint" not in graphs.healing_section(points[:20]).html


# Plots ------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_linear_ticks_are_few_even_and_inside(low, width, count):
    high = low + width
    ticks = linear_ticks(low, high, count)
    assert len(ticks) <= count + 1
    slack = 1e-6 * max(abs(low), abs(high), 1e-6)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    steps = [b - a for a, b in pairwise(ticks)]
    assert all(math.isclose(s, steps[0], rel_tol=1e-3, abs_tol=1e-9) for s in steps)


@given(st.floats(1e-9, 1e9), st.floats(1.1, 1e12), st.integers(3, 8))
def test_logarithmic_ticks_are_inside_and_ascend(low, ratio, count):
    ticks = log_ticks(low, low * ratio, count)
    assert all(low * 0.999 <= tick <= low * ratio * 1.001 for tick in ticks)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= max(2 * count, 8)


def test_ticks_are_round():
    assert linear_ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert linear_ticks(3, 3) == [3]
    assert log_ticks(1, 1000, 6) == [1, 3, 10, 30, 100, 300, 1000]
    assert log_ticks(0.5, 3, 6) == [0.5, 0.7, 1, 1.5, 2, 3]


@pytest.mark.parametrize("log", [False, True])
def test_points_lie_inside_of_both_sizes(log):
    points = [
        plots.Point(f"arm {n}", 1.0 + n, 10.0**n, n, x_range=(0.5 + n, 2.0 + n)) for n in range(4)
    ]
    svg = plots.scatter_plot(points, Axis("x", log), Axis("y", log), "points", [0, 1], "top left")
    for size, drawing in zip((WIDE, NARROW), svg.split("</svg>"), strict=False):
        for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawing):
            assert size.left <= float(x) <= size.width - size.right
            assert size.top <= float(y) <= size.height - size.bottom


def test_names_do_not_cover_each_other():
    points = [plots.Point(name, 1.0 + n / 50, 1.0) for n, name in enumerate(("one", "two"))]
    points.append(plots.Point("far", 9.0, 2.0))
    points.append(plots.Point("", 5.0, 1.5))  # without one
    svg = plots.scatter_plot(points, Axis("x"), Axis("y"), "points").split("</svg>")[0]
    names = re.findall(r'class="name" x="([\d.]+)" y="([\d.]+)"', svg)
    assert len(names) == len(set(names)) == 3


def test_one_value_is_enough_for_a_plot():
    svg = plots.line_plot([plots.Series("a", [(5, 3.0)])], Axis("x", True), Axis("y"), "one")
    assert "nan" not in svg and svg.count("<svg") == 2


def test_a_gauge_stays_on_its_scale():
    svg = plots.interval_gauge(5.0, 0.1, 20.0, 2.0, 1, "speed")
    assert all(6 <= float(x) <= 234 for x in re.findall(r'cx="([\d.]+)"', svg))
