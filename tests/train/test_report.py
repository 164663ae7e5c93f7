"""The report: every number is in it, it is well formed, escaped and self-contained."""

import html.parser
import itertools
import math
import re

import pytest

from jaxdistill.train.chart import line_chart, moving_average, thin, ticks
from jaxdistill.train.report import curve, format_value, write_report

VOID = {"meta"}  # SVG elements without content close themselves: <path/>


class Page(html.parser.HTMLParser):
    """Fails on tags that do not match; collects text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.attributes, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


CONTENT = {
    "title": "Pruned & healed",
    "summary": ["KL fell from 5.06 to 1.17."],
    "tables": {
        "Held-out": [
            {"model": "teacher", "perplexity": 17.234, "KL": None, "parameters": 134515008},
            {"model": "student", "perplexity": 36.1, "KL": 1.17, "parameters": 113276160},
        ]
    },
    "curves": {"Loss <nats>": {"kd": [(1, 3.0), (2, math.nan), (3, 2.5)], "ce": [(1, 4.0)]}},
    "samples": {"Hi?": {"student": "<script>alert('x')</script> & more\nsecond line"}},
    "config": {"steps": 240, "optimizer": {"name": "adamw", "rates": (1, 2)}},
}


def test_the_page_contains_everything_and_is_well_formed(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, **CONTENT)
    source = path.read_text()
    page = Page(source)
    text = " ".join(page.text)
    for expected in (
        *("Pruned & healed", "KL fell from 5.06 to 1.17.", "teacher", "17.23", "36.10", "1.170"),
        *("134,515,008", "113,276,160", "Loss <nats>", "kd, 3: 2.5", "ce, 1: 4"),
        *("<script>alert('x')</script> & more", "optimizer.name", "adamw", "240", "(1, 2)"),
    ):
        assert expected in text, expected
    assert source.startswith("<!doctype html>")
    assert ("lang", "en") in page.attributes
    assert "svg" in page.tags


def test_the_page_refers_to_nothing_outside_itself_and_runs_no_code(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, **CONTENT)
    page = Page(path.read_text())
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "onclick"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", path.read_text())


def test_a_page_without_anything_to_show_is_still_a_page(tmp_path):
    empty = {"tables": {"none": []}, "curves": {}, "samples": {}, "config": {}, "summary": []}
    write_report(tmp_path / "report.html", title="Empty", **empty)
    page = Page((tmp_path / "report.html").read_text())
    assert "table" not in page.tags
    assert "svg" not in page.tags
    assert "Empty" in page.text


def test_a_wrong_table_leaves_the_old_report(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("the old one")
    content = CONTENT | {"tables": {"T": [{"a": 1}, {"b": 2}]}}
    with pytest.raises(ValueError, match=r"row 2 of the table 'T' has the columns \['b'\]"):
        write_report(path, **content)
    assert path.read_text() == "the old one"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_curve_picks_one_metric_of_each_run():
    rows = [
        {"run": "ce", "step": 1, "loss": 3.0},
        {"run": "kd", "step": 1, "loss": 2.0},
        {"run": "kd", "step": 1, "kl": 9.0},
        {"run": "kd", "step": 2, "loss": 1.5},
    ]
    assert curve(rows, "loss") == {"ce": [(1, 3.0)], "kd": [(1, 2.0), (2, 1.5)]}
    assert curve(rows, "kl") == {"kd": [(1, 9.0)]}


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (1.17, 5.06), (-3, 7), (1e-5, 3e-4), (100, 100), (0, 0), (0.99, 1.01), (1, 1e6)],
)
def test_ticks_are_few_even_and_cover_the_range(low, high):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 3 <= len(found) <= 8
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert max(steps) - min(steps) <= 1e-6 * max(steps)


def path_points(svg, kind="line"):
    """The pixel coordinates of the first path of a class."""
    data = re.search(rf'class="{kind}" d="([^"]*)"', svg).group(1)
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", data)[1:]]


def test_a_line_goes_where_its_values_are():
    points = [(0, 0.0), (10, 5.0), (40, 10.0)]
    (x0, y0), (x1, y1), (x2, y2) = path_points(line_chart({"a": points}))
    assert (x1 - x0) / (x2 - x0) == pytest.approx(10 / 40, abs=1e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(5 / 10, abs=1e-3)
    assert y2 < y0  # up is up
    assert x0 < x2


def test_a_gap_is_left_at_values_that_are_not_finite():
    svg = line_chart({"a": [(1, 1.0), (2, math.nan), (3, 2.0), (4, math.inf), (5, 1.0)]})
    assert re.search(r'class="line" d="([^"]*)"', svg).group(1).count("M") == 3
    assert "nan" not in svg
    assert "No finite values" in line_chart({"a": [(1, math.nan)]})


def test_a_noisy_line_is_smoothed_and_a_smooth_one_is_not():
    noisy = [(x, 1 / (1 + x) + (-1) ** x) for x in range(100)]
    assert 'class="line faint"' in line_chart({"a": noisy})
    assert 'class="line faint"' not in line_chart({"a": [(x, 1 / (1 + x)) for x in range(100)]})
    assert moving_average([(0, 1.0), (1, 4.0), (2, math.nan)], 2) == [(0, 2.5), (1, 2.5), (2, 4.0)]


def test_long_lines_are_thinned_by_means():
    points = thin([(x, float(x % 2)) for x in range(2000)])
    assert len(points) <= 400
    assert points[0] == (2.0, 0.4)
    assert thin([(1, 2.0)]) == [(1.0, 2.0)]
    assert thin([]) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.0001234, "0.0001234"),
        (5.06, "5.060"),
        (12345.6, "12,346"),
        (True, "True"),
        (math.nan, "not a number"),
        (-math.inf, "−∞"),
        (None, "–"),
        ("text", "text"),
    ],
)
def test_cells_are_written_for_people(value, text):
    assert format_value(value) == text
