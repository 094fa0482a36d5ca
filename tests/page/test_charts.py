"""Charts: small, of the page's own colours, and no name in them is read by matplotlib."""

from __future__ import annotations

import re
import warnings
from xml.etree import ElementTree

import pytest

from qwen_ds.page.charts import Curve, curves, histogram, thinned, tick

HOSTILE = "训练 <script>alert(1)</script> $\\frac{x"


def drawing(chart: str) -> ElementTree.Element:
    """The chart's SVG, as a parser reads it."""
    return ElementTree.fromstring(chart[chart.index("<svg") : chart.index("</svg>") + 6])


def test_names_and_labels_are_text_beside_the_drawing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns about letters that its font lacks
        chart = curves([Curve(HOSTILE, [1, 2], [3, 4]), Curve("b", [1], [1])], "步", HOSTILE)
        bars = histogram([0, 1, 2], [3, 4], "长度", {HOSTILE: 1.5})
    for found in (chart, bars):
        assert "<script" not in found and "&lt;script&gt;" in found and "训练" in found
    assert "步" in chart and "长度" in bars and ": 1.5</li>" in bars
    assert not re.search("[\u4e00-\u9fff]", "".join(drawing(chart).itertext()))


def test_ticks_are_text_and_colours_are_the_pages() -> None:
    chart = curves([Curve("a", [0, 10], [1, 2]), Curve("b", [0, 10], [2, 1])], "step", "loss")
    texts = [node.text for node in drawing(chart).iter("text")]
    assert {"0", "10", "1", "2"} <= {*texts}
    assert "var(--series-0)" in chart and "var(--series-1)" in chart
    assert not re.findall(r": #[0-9a-f]{6}", chart)
    assert not re.findall(r"https?:|<style|<metadata|<!--", chart)


def test_identifiers_of_two_charts_differ_and_references_hold() -> None:
    charts = [
        curves([Curve("a", [1, 2, 3], ys, "points")], "x", "y") for ys in ([1, 2, 3], [3, 1, 2])
    ]
    ids = [set(re.findall(r' id="([^"]*)"', chart)) for chart in charts]
    assert ids[0] and not ids[0] & ids[1]
    for chart, own in zip(charts, ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([\w-]*)', chart)) == own


def test_a_long_curve_is_thinned_and_keeps_its_spike() -> None:
    ys = [1.0] * 30_000
    ys[12_345], ys[20_000] = 9.0, -5.0
    points = thinned(list(enumerate(ys)), 400)
    assert len(points) <= 400 and (12_345, 9.0) in points and (20_000, -5.0) in points
    assert points[0] == (0, 1.0) and points[-1] == (29_999, 1.0)
    assert points == sorted(points)
    assert len(curves([Curve("a", range(30_000), ys)], "x", "y")) < 20_000


def test_values_that_are_none_or_not_finite_are_left_out() -> None:
    chart = curves([Curve("a", [1, 2, 3, 4], [1, None, float("inf"), 2])], "x", "y")
    assert chart == curves([Curve("a", [1, 4], [1, 2])], "x", "y")
    assert curves([Curve("a", [1], [None])], "x", "y") == ""
    assert curves([], "x", "y") == ""


def test_a_curve_keeps_its_colour_when_another_is_left_out() -> None:
    chart = curves([Curve("a", [1], [None]), Curve("b", [1, 2], [1, 2])], "x", "y")
    assert "--series-1" in chart and "--series-0" not in chart


def test_one_value_is_seen() -> None:
    assert "<use" in curves([Curve("a", [7], [3.25])], "x", "y")


def test_a_spike_makes_the_scale_logarithmic_and_the_label_says_so() -> None:
    ys = [1.0, 1.1, 1.2, 500.0]
    assert "y (logarithmic)" in curves([Curve("a", range(4), ys)], "x", "y")
    assert "logarithmic" not in curves([Curve("a", range(4), [-1.0, *ys[1:]])], "x", "y")


def test_an_axis_can_begin_at_zero() -> None:
    curve = Curve("a", [0, 1], [100, 101])
    charts = [curves([curve], "x", "y", from_zero=zero) for zero in (False, True)]
    texts = [[node.text for node in drawing(chart).iter("text")] for chart in charts]
    assert "50" not in texts[0] and "50" in texts[1]


def test_a_histogram_needs_an_edge_more_than_bars() -> None:
    with pytest.raises(ValueError, match="2 edges of 2 bars; expected one more"):
        histogram([0, 1], [3, 4], "x")
    assert "var(--series-0)" in histogram([0, 1, 2], [3, 4], "x")


def test_the_same_values_give_the_same_bytes() -> None:
    one, other = (curves([Curve("a", [1, 2], [1, 2], "points")], "x", "y") for _ in range(2))
    assert one == other


def test_ticks_are_short() -> None:
    values = (0, 2.5, 12_300, 3e-4, 2_500_000, 950, 0.001, -0.00025)
    assert [tick(v) for v in values] == [
        "0", "2.5", "12.3k", "3e-4", "2.5M", "950", "0.001", "-2.5e-4",
    ]  # fmt: skip
