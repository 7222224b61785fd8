import math
import re

import pytest

from horizon.report.charts import Axis, BarChart, LineChart, Matrix, Series, Style
from tests.report.pages import Elements

LINES = LineChart(
    title="A <b> & c",
    says='of "all"',
    x=Axis("step"),
    y=Axis("loss"),
    series=(
        Series("$x_1$ <i>", [1, 2, 3], [1.0, math.nan, 3.0]),
        Series("", [1, 2, 3], [0.5, 0.5, 0.5], 1, Style.faint),
        Series("at", [], [2.0], 2, Style.level),
        Series("lost", [2], [math.nan], 3, Style.marks),
        Series("held out", [3], [2.5], 4, Style.points),
    ),
)


def texts(chart):
    return [data for tag, data in Elements(chart.svg).text if tag == "text"]


def test_what_is_written_in_a_chart_is_escaped_and_no_formula():
    svg = LINES.svg
    assert "$x_1$ <i>" in texts(LINES) and {"step", "loss", "at", "lost", "held out"} <= set(texts(LINES))
    assert "<i>" not in svg and "<b>" not in svg
    assert Elements(svg).tags[0][1]["aria-label"] == 'A <b> & c: of "all"'


def test_a_chart_is_as_wide_as_its_place_and_has_the_colors_of_the_page():
    head, rest = LINES.svg.split(">", 1)
    assert 'class="chart"' in head and "viewBox" in head and "width" not in head and "height" not in head
    used = set(re.findall(r"var\((--[\w-]+)\)", rest))
    assert used == {"--text", "--line", *(f"--series-{i}" for i in range(5))}


def test_the_data_are_the_points():
    data = LINES.as_json()
    assert (data["title"], data["x"], data["y"]) == ("A <b> & c", "step", "loss")
    assert data["series"][1] == {"label": "", "x": [1, 2, 3], "y": [0.5, 0.5, 0.5]}
    assert [line["y"] for line in data["series"][2:]] == [[2.0], pytest.approx([math.nan], nan_ok=True), [2.5]]


def paths_of(chart):
    """The coordinates of every line that has a color of a series."""
    found = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--series-(\d)\)', chart.svg)
    return [
        (int(color), [tuple(map(float, p)) for p in re.findall(r"[ML] ([\d.]+) ([\d.]+)", d)]) for d, color in found
    ]


def test_a_line_is_drawn_where_its_points_are():
    chart = LineChart(title="t", says="s", x=Axis("x"), y=Axis("y"), series=(Series("", [0, 1, 3], [1.0, 3.0, 2.0]),))
    ((_, points),) = paths_of(chart)
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (x2 - x0) == pytest.approx(3 * (x1 - x0), rel=1e-3)
    assert (y0 - y1) == pytest.approx(2 * (y2 - y1), rel=1e-3) and y1 < y0  # a picture's y grows downwards


def test_bars_that_are_stacked_stand_end_to_end():
    chart = BarChart(
        title="t", says="s", names=("one", "two"), x=Axis("ms"), bars=(("a", (1.0, 2.0)), ("b", (3.0, 0.5))),
        stacked=True,
    )  # fmt: skip
    found = re.findall(
        r'<path d="M ([\d.]+) [\d.]+ \s*L ([\d.]+) [^"]*"[^>]*style="fill: var\(--series-(\d)\)', chart.svg
    )
    bars = [(int(color), float(left), float(right)) for left, right, color in found][:4]
    (_, a0, a1), (_, _, a2), (_, b0, b1), _ = bars
    assert [color for color, _, _ in bars] == [0, 0, 1, 1]
    assert b0 == pytest.approx(a1) and (b1 - b0) == pytest.approx(3 * (a1 - a0), rel=1e-3)
    assert (a2 - a0) == pytest.approx(2 * (a1 - a0), rel=1e-3)
    assert chart.as_json()["bars"] == [{"label": "a", "values": [1.0, 2.0]}, {"label": "b", "values": [3.0, 0.5]}]


def test_a_matrix_writes_its_numbers():
    chart = Matrix(
        title="t", says="s", rows=("r",), columns=("c", "d"), values=((1.0, 2.0),), unit="GB/s", text="{:.1f}".format
    )
    assert {"1.0", "2.0", "GB/s", "r", "c", "d"} <= set(texts(chart))
    assert chart.as_json() == {
        "title": "t",
        "unit": "GB/s",
        "rows": ["r"],
        "columns": ["c", "d"],
        "values": [[1.0, 2.0]],
    }


def test_a_cell_of_a_matrix_is_shaded_by_its_number_in_a_color_of_the_page():
    values = ((1.0, 2.0), (math.nan, 4.0))
    chart = Matrix(title="t", says="s", rows=("r", "q"), columns=("c", "d"), values=values, unit="u", text=str)
    shades = [float(found) for found in re.findall(r"fill: var\(--series-0\); opacity: ([\d.]+)", chart.svg)]
    assert shades == pytest.approx([0.45 / 4, 0.45 / 2, 0.45]) and "<image" not in chart.svg
    assert "-" in texts(chart) and "nan" not in texts(chart)


def test_bars_beside_one_another_have_their_numbers():
    chart = BarChart(
        title="t", says="s", names=("one", "two"), x=Axis("ms"), bars=(("a", (1.5, 0.0)), ("b", (3.0, 785.0)))
    )
    assert {"1.50", "785"} <= set(texts(chart)) and "0.00" not in texts(chart)


@pytest.mark.parametrize("number", [1, 4, 7])
def test_a_legend_stands_above_and_covers_nothing(number):
    series = tuple(Series(f"line {i}", [0, 1], [float(i), 2.0], i) for i in range(number))
    chart = LineChart(title="t", says="s", x=Axis("x"), y=Axis("y", from_zero=True), series=series)
    legend = [float(y) for y in re.findall(r'<text[^>]*y="([\d.]+)"[^>]*>line \d', chart.svg)]
    drawn = [y for _, points in paths_of(chart) for _, y in points if len(points) == 2]  # lines of a legend have three
    assert (len(legend), len(drawn)) == (number, 2 * number)
    assert max(legend) < min(drawn)  # a picture's y grows downwards


def test_ticks_are_those_that_were_asked_for():
    axis = Axis("lr", "log", ticks=[1e-3, 3e-3], text=lambda value: f"<{value:g}>")
    chart = LineChart(title="t", says="s", x=axis, y=Axis("y"), series=(Series("", [1e-3, 3e-3], [1.0, 2.0]),))
    assert {"<0.001>", "<0.003>"} <= set(texts(chart))


def test_what_is_of_no_points_is_drawn_too():
    LineChart(title="t", says="s", x=Axis("x"), y=Axis("y", from_zero=True), series=(Series("a", [1], [math.nan]),)).svg  # noqa: B018
