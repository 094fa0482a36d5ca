"""Charts for a page: inline SVG by matplotlib, in the page's own colours and fonts.

matplotlib draws lines and the figures at their ticks. Names and labels are HTML beside the drawing:
they wrap on a phone, the browser has a font for them, and nothing in them is read as mathematics.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from qwen_ds.page.html import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES_COLOURS = 8  # --series-0 ... in page.css
# A curve has at most so many points: two in a pixel of a wide screen.
MAX_POINTS = 400
MAX_POINTS_WITH_MARKS = 30
# Beyond this share of the largest value in the median one, a linear scale shows nothing.
_LOGARITHMIC_BEYOND = 100
_WIDTH, _HEIGHT = 340, 200  # units of the drawing, about pixels
# Colours that matplotlib writes and that become the page's: it knows no variables.
_SERIES, _INK, _LINE = "#00fe{:02x}", "#00fd00", "#00fd01"
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "page", "path.simplify": False}


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart. Points whose y is None, infinite or no number are left out.

    A `faint` curve lies behind the others, such as raw values behind their mean; `points` marks
    each value, such as evaluations.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    look: Literal["line", "faint", "points"] = "line"
    colour: int | None = None
    """Number of its colour; by default its place in the chart."""


def curves(
    series: Sequence[Curve], x_label: str, y_label: str, *, from_zero: bool = False
) -> Markup:
    """A chart of curves as a <figure>. Curves without a finite value are left out; without any
    curve there is no chart: an empty markup.

    `from_zero`: the vertical axis begins at 0, as where lengths are compared. Long curves are
    thinned: the least and the greatest value of each stretch stay.
    """
    drawn = []
    for number, curve in enumerate(series):
        points = _finite(curve)
        if points:
            colour = (number if curve.colour is None else curve.colour) % SERIES_COLOURS
            drawn.append((curve, colour, thinned(points, MAX_POINTS)))
    if not drawn:
        return Markup("")
    axes = _axes()
    for order, (curve, colour, points) in enumerate(drawn):
        faint, marked = curve.look == "faint", curve.look == "points"
        axes.plot(
            *zip(*points, strict=True),
            color=_SERIES.format(colour),
            linewidth=1 if faint else 1.6,
            alpha=0.4 if faint else None,
            linestyle="-" if order < SERIES_COLOURS else "--",
            marker="o" if marked or len(points) == 1 else None,
            markersize=5 if len(points) <= MAX_POINTS_WITH_MARKS else 3,
            clip_on=False,
            zorder=2 if faint else 3,
        )
    values = sorted(y for _, _, points in drawn for _, y in points)
    if values[0] > 0 and values[-1] > _LOGARITHMIC_BEYOND * values[len(values) // 2]:
        axes.set_yscale("log")
        y_label += " (logarithmic)"
    elif from_zero:
        axes.set_ylim(0, 1.05 * values[-1] or 1)
    if len({x for _, _, points in drawn for x, _ in points}) == 1:
        axes.set_xlim(drawn[0][2][0][0] - 1, drawn[0][2][0][0] + 1)
    names = [(curve.name, colour, curve.look) for curve, colour, _ in drawn]
    return _figure(axes, x_label, y_label, names if len(names) > 1 else [])


def histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    x_label: str,
    marks: Mapping[str, float] | None = None,
) -> Markup:
    """A histogram as a <figure>: `counts` rows between each two of `edges`, of which there is one
    more, and an upright line for each of `marks`, by name. ValueError: another number of edges."""
    if len(edges) != len(counts) + 1:
        raise ValueError(f"{len(edges)} edges of {len(counts)} bars; expected one more than bars")
    axes = _axes()
    axes.stairs(counts, edges, fill=True, color=_SERIES.format(0), linewidth=0)
    for number, value in enumerate((marks or {}).values(), start=1):
        colour = _SERIES.format(number % SERIES_COLOURS)
        axes.axvline(value, color=colour, linewidth=1.4, linestyle="--", clip_on=False)
    axes.set_ylim(bottom=0)
    names = [
        (f"{name}: {value:,.6g}", number % SERIES_COLOURS, "line")
        for number, (name, value) in enumerate((marks or {}).items(), start=1)
    ]
    return _figure(axes, x_label, "rows", names)


def _finite(curve: Curve) -> list[tuple[float, float]]:
    pairs = zip(curve.xs, curve.ys, strict=True)
    return [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]


def thinned(points: list[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most `limit` (even) of the points: of each stretch of equal length the lowest and the
    highest, in their order; the first and the last point stay."""
    if len(points) <= limit:
        return points
    stretches = limit // 2 - 1
    kept = {0, len(points) - 1}
    for i in range(stretches):
        part = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        kept |= {min(part, key=lambda at: points[at][1]), max(part, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(kept)]


def _axes() -> Axes:
    # The figure class and not pyplot: no display, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
    # Margins of our own: to fit them to the texts, matplotlib would draw everything twice.
    axes = figure.add_axes((44 / _WIDTH, 20 / _HEIGHT, 1 - 56 / _WIDTH, 1 - 28 / _HEIGHT))
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", left=False, bottom=False, labelcolor=_INK, labelsize=11)
    axes.margins(x=0.01)
    return axes


def tick(value: float, _: object = None) -> str:
    """The text at a tick: "2.5", "12k", "3e-4"."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / min(unit, 1e3 if name == 'k' else unit):.4g}{name}"
    if size >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _figure(
    axes: Axes, x_label: str, y_label: str, names: Sequence[tuple[str, int, str]]
) -> Markup:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(tick)
    axes.yaxis.set_major_formatter(tick)
    items = Markup("").join(
        Markup('<li class="{}"><i style="background: var(--series-{})"></i>{}</li>').format(
            look, colour, shown(name)
        )
        for name, colour, look in names
    )
    legend = Markup('<ul class="legend">{}</ul>').format(items) if names else ""
    return Markup(
        '<figure class="chart"><figcaption>{}</figcaption>{}{}<p class="axis">{}</p></figure>'
    ).format(shown(y_label), legend, _svg(axes, y_label), shown(x_label))


def _svg(axes: Axes, title: str) -> Markup:
    """The drawing, without its prologue, in the page's colours, with identifiers of its own."""
    from matplotlib import rc_context

    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure = axes.get_figure(root=True)
    assert figure is not None
    with rc_context(_SETTINGS):
        figure.savefig(written, format="svg", metadata=nothing)
    text = written.getvalue()
    inner = text[text.index(">", text.index("<svg")) + 1 :]
    # A style sheet in it would be one for the whole page.
    inner = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", inner, count=1, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#(\w+)', inner))
    own = hashlib.sha256(inner.encode()).hexdigest()[:8]
    inner = re.sub(r' id="([^"]*)"', lambda m: f' id="{own}-{m[1]}"' if m[1] in used else "", inner)
    inner = re.sub(r'(href="|url\()#(\w+)', rf"\1#{own}-\2", inner).replace("xlink:href", "href")
    inner = re.sub(r' d="[^"]*"', _rounded, inner)
    inner = re.sub(r"#00fe(..)", lambda m: f"var(--series-{int(m[1], 16)})", inner)
    inner = inner.replace(_INK, "var(--soft)").replace(_LINE, "var(--line)")
    inner = re.sub(r"<!--.*?-->", "", inner, flags=re.DOTALL)
    inner = re.sub(r"\s*\n\s*", "\n", inner)
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return head.format(_WIDTH, _HEIGHT, shown(title)) + Markup(inner)


def _rounded(path: re.Match[str]) -> str:
    """A path with a tenth of a pixel, which is finer than a screen, for its numbers."""
    return re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), path[0])
