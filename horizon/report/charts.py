"""Charts as data, and drawn: an SVG inside the page, whose colours are the page's own, on screens and on paper.

A chart keeps the points that it draws, so that they can be written beside the picture.
"""

from __future__ import annotations

import io
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from html import escape
from typing import TYPE_CHECKING, Any

from horizon.report.measurements import three_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stand for those of style.css.j2: --text, --line and --series-0, ... replace them in the SVG.
TEXT, LINE = "#000001", "#000002"
SERIES = tuple(f"#0000{16 + i:02x}" for i in range(8))
MARKERS = "osD^vP*X"
MARKED_POINTS = 24  # more are a line without markers
SHORT_LABEL = 16  # characters; three columns of such fit
DARKEST = 0.45  # how much of a color a cell has, so that its number is read on light and dark pages

SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "horizon", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.5, "text.color": TEXT,
    "axes.labelcolor": TEXT, "axes.edgecolor": LINE, "xtick.color": TEXT, "ytick.color": TEXT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "axes.formatter.limits": (-3, 6), "axes.formatter.useoffset": False,
    "legend.frameon": False, "legend.fontsize": 8.5, "legend.handlelength": 3.0,
    "lines.linewidth": 1.8, "lines.markersize": 4.5,
}  # fmt: skip


class Style(StrEnum):
    """How a series is drawn."""

    line = "line"
    dashed = "dashed"
    faint = "faint"  # behind another that says what it means
    points = "points"
    level = "level"  # one value, across the chart
    marks = "marks"  # at the bottom: where something has no value


@dataclass(frozen=True, slots=True)
class Series:
    """Points of a chart; where y is NaN there is none."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0  # of the page's eight
    style: Style = Style.line


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis says.

    Attributes:
        scale: linear, log (of 10), or log2.
        ticks, limits: where they are given, those and no others.
        text: of a tick's value; None: matplotlib's.
    """

    label: str
    scale: str = "linear"
    ticks: Sequence[float] | None = None
    text: Callable[[float], str] | None = None
    from_zero: bool = False
    limits: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart(ABC):
    """A picture for a page."""

    title: str
    says: str  # what is drawn and how to read it

    @abstractmethod
    def draw(self, axes: Axes) -> None:
        """Onto empty axes."""

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """The points that are drawn."""

    @property
    def inches(self) -> tuple[float, float]:
        """Width and height."""
        return 5.6, 3.4

    def as_json(self) -> dict[str, Any]:
        """Title and points."""
        return {"title": self.title, **self.data()}

    @property
    def svg(self) -> str:
        """The drawing, as an element for a page."""
        return _drawn(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LineChart(Chart):
    """Series over an axis."""

    x: Axis
    y: Axis
    series: tuple[Series, ...]

    def data(self) -> dict[str, Any]:
        """Axes and series."""
        series = [{"label": s.label, "x": list(s.x), "y": list(s.y)} for s in self.series]
        return {"x": self.x.label, "y": self.y.label, "series": series}

    def draw(self, axes: Axes) -> None:
        """Lines, the first on top."""
        for order, series in enumerate(self.series):
            _plot(axes, series, len(self.series) - order)
        _set_axis(axes, "x", self.x)
        _set_axis(axes, "y", self.y)
        _legend(axes, [s.label for s in self.series])


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart(Chart):
    """Horizontal bars: of each name one beside another, or end to end."""

    names: tuple[str, ...]
    x: Axis
    bars: tuple[tuple[str, tuple[float, ...]], ...]  # label, and a value for each name
    stacked: bool = False
    hatched: tuple[bool, ...] = ()  # of each name

    def data(self) -> dict[str, Any]:
        """Names and values."""
        bars = [{"label": label, "values": list(values)} for label, values in self.bars]
        return {"x": self.x.label, "names": list(self.names), "bars": bars}

    @property
    def inches(self) -> tuple[float, float]:
        """As high as the bars need."""
        num_rows = len(self.names) if self.stacked else len(self.names) * len(self.bars)
        return (5.6, 1.6 + 0.4 * num_rows) if self.stacked else (5.6, min(max(3.4, 1.5 + 0.17 * num_rows), 9.0))

    def draw(self, axes: Axes) -> None:
        """The first name on top."""
        rows, ends = range(len(self.names)), [0.0] * len(self.names)
        height = 0.62 if self.stacked else 0.8 / len(self.bars)
        for i, (label, values) in enumerate(self.bars):
            shift = 0.0 if self.stacked else (i - (len(self.bars) - 1) / 2) * height
            at, color = [row + shift for row in rows], SERIES[i % len(SERIES)]
            drawn: Any = axes.barh(at, values, height, left=ends, color=color, label=label)
            for bar, hatched in zip(drawn, self.hatched, strict=False):
                bar.set_hatch("///" if hatched else "")
                bar.set_edgecolor(LINE)
            if self.stacked:
                ends = [end + value for end, value in zip(ends, values, strict=True)]
            else:
                axes.bar_label(drawn, [three_digits(v) if v else "" for v in values], padding=3, fontsize=7.5)
        axes.set_yticks(rows, self.names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        _set_axis(axes, "x", self.x)
        _legend(axes, [label for label, _ in self.bars], handlelength=1.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix(Chart):
    """A number for each pair of a row and a column."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]  # NaN: none
    unit: str
    text: Callable[[float], str]

    def data(self) -> dict[str, Any]:
        """Names and values."""
        values = [list(line) for line in self.values]
        return {"unit": self.unit, "rows": list(self.rows), "columns": list(self.columns), "values": values}

    def draw(self, axes: Axes) -> None:
        """Darker is more."""
        from matplotlib.patches import Rectangle

        highest = max(value for line in self.values for value in line if not math.isnan(value))
        axes.set(xlim=(-0.5, len(self.columns) - 0.5), ylim=(len(self.rows) - 0.5, -0.5))
        for y, line in enumerate(self.values):
            for x, value in enumerate(line):
                known = not math.isnan(value)
                shade = DARKEST * value / highest if known else 0.0
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=SERIES[0], alpha=shade))
                axes.text(x, y, self.text(value) if known else "-", ha="center", va="center", fontsize=11)
        axes.set_xticks(range(len(self.columns)), self.columns)
        axes.set_yticks(range(len(self.rows)), self.rows)
        axes.grid(visible=False)
        axes.set_title(self.unit, fontsize=9.5, loc="right")


def _plot(axes: Axes, series: Series, order: int) -> None:
    i = series.color
    settings: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "label": series.label or None, "zorder": 2 + order}
    marker = MARKERS[i % len(MARKERS)]
    match series.style:
        case Style.level:
            axes.axhline(series.y[0], linestyle=":", **settings)
        case Style.points:
            axes.plot(series.x, series.y, linestyle="none", marker=marker, **settings | {"zorder": 20})
        case Style.marks:
            at = [0.02] * len(series.x)  # of the height
            axes.plot(series.x, at, "x", transform=axes.get_xaxis_transform(), **settings)
        case Style.faint:
            axes.plot(series.x, series.y, linewidth=0.8, alpha=0.4, **settings)
        case style:
            marker = marker if len(series.x) <= MARKED_POINTS else ""
            axes.plot(series.x, series.y, "--" if style is Style.dashed else "-", marker=marker, **settings)


def _set_axis(axes: Axes, which: str, axis: Axis) -> None:
    if axis.scale != "linear":
        axes.set(**{f"{which}scale": "log"})
        if axis.scale == "log2":
            getattr(axes, f"set_{which}scale")("log", base=2)
    mpl: Any = axes.xaxis if which == "x" else axes.yaxis
    text = axis.text
    if axis.ticks is not None:
        mpl.set_ticks(axis.ticks, labels=[f"{tick:g}" if text is None else text(tick) for tick in axis.ticks])
        axes.minorticks_off()
    elif text is not None:
        mpl.set_major_formatter(lambda value, _: text(value))
        mpl.set_minor_formatter(lambda value, _: "")
    mpl.set_label_text(axis.label)
    highest = axes.dataLim.x1 if which == "x" else axes.dataLim.y1
    if axis.from_zero and 0 < highest < float("inf"):
        axes.set(**{f"{which}lim": (0, 1.06 * highest)})
    if axis.limits is not None:
        axes.set(**{f"{which}lim": axis.limits})


def _legend(axes: Axes, labels: Sequence[str], **more: Any) -> None:
    """Above the chart, where it covers nothing."""
    named = [label for label in labels if label]
    if named:
        columns = 2 if len(named) == 4 or any(len(label) > SHORT_LABEL for label in named) else 3
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, columnspacing=1.2, **more)


def _drawn(chart: Chart) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=chart.inches, layout="constrained", facecolor="none")
        canvas: Any = FigureCanvasSVG(figure)
        chart.draw(figure.add_subplot(facecolor="none"))
        canvas.print_svg(file, metadata={"Date": None})  # savefig would lay everything out twice
    return _for_page(file.getvalue(), f"{chart.title}: {chart.says}")


def _for_page(svg: str, described: str) -> str:
    """A file's content as an element: as wide as its place, in the page's colours and fonts, without addresses."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="(?![pmh][0-9a-f]{10}")[^"]*"', "", svg)  # but those that are referred to
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', head)
    assert view is not None
    variables = {TEXT: "text", LINE: "line"} | {color: f"series-{i}" for i, color in enumerate(SERIES)}
    rest = re.sub(r"#0000[0-9a-f]{2}", lambda found: f"var(--{variables.get(found[0], 'text')})", rest)
    return f'<svg class="chart" role="img" aria-label="{escape(described)}" {view[0]}>{rest}'
