"""The charts of a report on tiers, each drawn twice as SVG: for light pages and paper, and for dark screens."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from horizon.errors import ConfigError
from horizon.report.measurements import LESS_IS_BETTER, Measurements, Row, by_setting, short_bytes, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart also with colour-blind eyes and in print; see also the markers.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c", "#b8860b")
DARK_SERIES = ("#56b4e9", "#ff8a3d", "#2fc9a0", "#e6a0cc", "#f0c14b", "#9ad0f5", "#b0b0b0", "#d8b04a")
MARKERS = "osD^vP*X"


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a page."""

    text: str
    grid: str
    series: tuple[str, ...]


LIGHT, DARK = Theme("#24292f", "#d8dee4", SERIES), Theme("#d7dde4", "#3a4350", DARK_SERIES)


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture for a page; both are data URIs."""

    title: str
    says: str  # what is drawn and how to read it
    light: str
    dark: str


Draw = Callable[["Axes", Theme], None]


def require_report_extra() -> None:
    """Raise a ConfigError where a report cannot be drawn or written."""
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"a report needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'horizon[report]'"
        )


def charts_of(measured: Measurements) -> list[Chart]:
    """One for each kind of test that has rows."""
    return [chart(title, says, draw) for test, title, says, draw in _drawings(measured) if measured.of(test)]


def _drawings(measured: Measurements) -> Iterator[tuple[str, str, str, Draw]]:
    yield (
        "latency", "Idle latency",
        "Nanoseconds of one load whose address is the value of the load before, by the size of what is loaded from. "
        "Steps are the caches; the right end is the memory itself.",
        lambda axes, theme: _latency(axes, theme, measured.of("latency")),
    )  # fmt: skip
    yield (
        "loaded latency", "Latency under load",
        "The same chase while all other processors read from that memory. Where it bends up, the memory is full.",
        lambda axes, theme: _loaded(axes, theme, measured.of("loaded latency")),
    )  # fmt: skip
    yield (
        "bandwidth", "Bandwidth by threads",
        "Median of the best block size. Mixed is two reads and a write; a write counts once, though it fetches first.",
        lambda axes, theme: _by_threads(axes, theme, measured.of("bandwidth")),
    )  # fmt: skip
    yield (
        "bandwidth", "Bandwidth by block",
        "With all threads: how much is moved in one go before jumping elsewhere.",
        lambda axes, theme: _by_block(axes, theme, measured.of("bandwidth")),
    )  # fmt: skip
    reads = [row for row in measured.of("bandwidth") if row.settings["access"] == "read"]
    if len({(row.place, row.settings["cpus"]) for row in reads}) > 1:
        yield (
            "latency", "Latency by pair",
            "Idle latency of the largest size, from each node's processors to each memory.",
            lambda axes, theme: _pairs(axes, theme, largest(measured.of("latency"), "size")),
        )  # fmt: skip
        yield (
            "bandwidth", "Read bandwidth by pair",
            "With the best number of threads and block, from each node's processors to each memory.",
            lambda axes, theme: _pairs(axes, theme, reads),
        )  # fmt: skip
    yield (
        "link", "Link to the GPU",
        "Host to device and back, from pinned and from pageable memory, with the largest copies.",
        lambda axes, theme: _link(axes, theme, measured.of("link")),
    )  # fmt: skip
    yield (
        "disk", "Disk",
        "Median by requests under way, for each size of a request, past the page cache where the file system lets it.",
        lambda axes, theme: _disk(axes, theme, measured.of("disk")),
    )  # fmt: skip
    yield (
        "adamw", "AdamW with its states on each tier",
        "Parameters updated in a second with the best number of threads, by how many there are; caches hold few.",
        lambda axes, theme: _adamw(axes, theme, measured.of("adamw")),
    )  # fmt: skip
    yield (
        "step", "Planned against measured step",
        "A small model under each policy: what the plan said before the first step, the median step, and the best.",
        lambda axes, theme: _steps(axes, theme, measured.of("step")),
    )  # fmt: skip


def chart(title: str, says: str, draw: Draw) -> Chart:
    """Draw it for both kinds of page."""
    return Chart(title, says, _svg(draw, LIGHT), _svg(draw, DARK))


def _svg(draw: Draw, theme: Theme) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.hashsalt": "horizon", "svg.fonttype": "path", "font.size": 9.5, "text.color": theme.text,
        "axes.labelcolor": theme.text, "axes.edgecolor": theme.grid, "xtick.color": theme.text,
        "ytick.color": theme.text, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": theme.grid, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
        "legend.fontsize": 8.5, "lines.linewidth": 1.8, "lines.markersize": 4.5,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.6, 3.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes, theme)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue().encode()).decode()


# ---- the drawings


def _lines(
    axes: Axes, theme: Theme, series: Sequence[tuple[str, Sequence[float], Sequence[float]]], dashed: str = "nothing"
) -> None:
    """(label, xs, ys) each; those with `dashed` in their label are, and share colours with the others in turn."""
    counts = {"-": 0, "--": 0}
    for label, xs, ys in series:
        style = "--" if dashed in label else "-"
        i = counts[style] if dashed == "write" else sum(counts.values())
        counts[style] += 1
        color, marker = theme.series[i % len(theme.series)], MARKERS[i % len(MARKERS)]
        axes.plot(xs, ys, style, marker=marker, color=color, label=label)
    if len(series) > 4:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    else:
        axes.legend(loc="best")


def _series(rows: Sequence[Row], label: Callable[[Row], str], x: str) -> list[tuple[str, list[float], list[float]]]:
    """Medians by a setting, a series for each label; of rows with the same label and x, the best."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        points, at = found.setdefault(label(row), {}), float(row.settings[x])
        better = min if row.unit in ("ns", "s") else max
        points[at] = better(points.get(at, row.median), row.median)
    return [(name, sorted(points), [points[at] for at in sorted(points)]) for name, points in found.items()]


def _place(row: Row, rows: Sequence[Row]) -> str:
    """The place, and from which processors where there are several."""
    several = len({one.settings["cpus"] for one in rows}) > 1
    return f"{row.place}, from {row.settings['cpus']}" if several else row.place


def _byte_axis(axes: Axes, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: short_bytes(value))
    axes.set_xlabel(label)


def _count_axis(axes: Axes, label: str, counts: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(counts)), [f"{count:g}" for count in sorted(set(counts))])
    axes.set_xlabel(label)


def _nearest(rows: Sequence[Row]) -> list[Row]:
    """Of each place the rows from the processors that reach it best (judged by what no cache holds)."""
    chosen: dict[str, Row] = {}
    for row in largest(rows, "size") or rows:
        less = row.unit in LESS_IS_BETTER
        best = chosen.setdefault(row.place, row)
        if (row.median < best.median) is less:
            chosen[row.place] = row
    return [row for row in rows if row.settings["cpus"] == chosen[row.place].settings["cpus"]]


def _readable(rows: Sequence[Row]) -> list[Row]:
    """Few enough lines to tell apart: from the nearest processors, and reads alone where there are many places."""
    rows = _nearest(rows)
    many = len({row.place for row in rows}) > 2
    return [row for row in rows if row.settings["access"] == "read"] if many else rows


def _pairs(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    """A matrix of medians: processors down, memories across; of rows of the same pair, the best."""
    places, cpus = (
        list(dict.fromkeys(names)) for names in zip(*((r.place, r.settings["cpus"]) for r in rows), strict=True)
    )
    better = min if rows[0].unit in LESS_IS_BETTER else max
    best: dict[tuple[str, Any], float] = {}
    for row in rows:
        key = row.place, row.settings["cpus"]
        best[key] = better(best.get(key, row.median), row.median)
    grid = [[best.get((place, name), float("nan")) for place in places] for name in cpus]
    axes.imshow(grid, cmap="Blues", aspect="auto", alpha=0.55)
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            axes.text(x, y, short_number(value), ha="center", va="center", fontsize=11)
    axes.set_xticks(range(len(places)), [place.replace(" ", "\n", 1) for place in places])
    axes.set_yticks(range(len(cpus)), [f"from\n{name}" for name in cpus])
    axes.grid(visible=False)
    axes.set_title(rows[0].unit, fontsize=9.5, loc="right", color=theme.text)


def _latency(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    rows = _nearest(rows)
    _lines(axes, theme, _series(rows, lambda row: _place(row, rows), "size"))
    _byte_axis(axes, "size of what is loaded from")
    axes.set_yscale("log")
    low, high = min(row.median for row in rows), max(row.median for row in rows)
    ticks = [t * 10**e for e in range(-1, 6) for t in (1, 2, 5) if low / 2 <= t * 10**e <= high * 2]
    axes.set_yticks(ticks, [short_number(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylabel("ns a load")


def _loaded(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    rows = _nearest(rows)
    for row in rows:
        found.setdefault(_place(row, rows), []).append((row.also["load_gb_per_s"], row.median))
    _lines(axes, theme, [(n, [x for x, _ in sorted(p)], [y for _, y in sorted(p)]) for n, p in found.items()])
    axes.set_xlabel("GB/s that the others read meanwhile")
    axes.set_ylabel("ns a load")
    axes.set_ylim(bottom=0)


def _by_threads(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    rows = _readable(rows)
    _lines(axes, theme, _series(rows, lambda row: f"{row.settings['access']}, {_place(row, rows)}", "threads"))
    _count_axis(axes, "threads", [float(row.settings["threads"]) for row in rows])
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)


def _by_block(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    rows = _readable(rows)
    most = max(float(row.settings["threads"]) for row in rows)
    rows = [row for row in rows if row.settings["threads"] == most]
    _lines(axes, theme, _series(rows, lambda row: f"{row.settings['access']}, {_place(row, rows)}", "block"))
    _byte_axis(axes, f"block ({most:g} threads)")
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)


def _link(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    rows = largest(rows, "size")
    places = list(dict.fromkeys(row.place for row in rows))
    kinds = list(dict.fromkeys((str(row.settings["direction"]), str(row.settings["memory"])) for row in rows))
    height = 0.8 / len(kinds)
    for i, (direction, memory) in enumerate(kinds):
        found = {
            r.place: r.median for r in rows if (r.settings["direction"], r.settings["memory"]) == (direction, memory)
        }
        at = [y + (i - (len(kinds) - 1) / 2) * height for y in range(len(places))]
        axes.barh(at, [found.get(p, 0.0) for p in places], height, color=theme.series[i], label=f"{direction} {memory}")
    axes.set_yticks(range(len(places)), places)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"GB/s, {short_bytes(float(rows[0].settings['size']))} a copy")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _disk(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    def label(row: Row) -> str:
        return f"{row.settings['access']} {short_bytes(float(row.settings['block']))}"

    _lines(axes, theme, _series(rows, label, "depth"), dashed="write")
    _count_axis(axes, "requests under way", [float(row.settings["depth"]) for row in rows])
    axes.set_ylabel("GB/s (dashed: writes)")
    axes.set_ylim(bottom=0)


def _adamw(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    def label(row: Row) -> str:
        return f"{row.place}: {row.settings['states']}" if row.settings["states"] != "all" else row.place

    _lines(axes, theme, _series(rows, label, "parameters"), dashed="simulated")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M")
    axes.set_xlabel("parameters" + (" (dashed: simulated)" if any(row.simulated for row in rows) else ""))
    axes.set_ylabel("Gparam/s")
    axes.set_ylim(bottom=0)


def _steps(axes: Axes, theme: Theme, rows: Sequence[Row]) -> None:
    names, height = [row.place for row in rows], 0.26
    bars = {
        "planned": [row.also.get("planned_s", 0.0) for row in rows],
        "median": [row.median for row in rows],
        "best": [row.best for row in rows],
    }
    for i, (label, seconds) in enumerate(bars.items()):
        at = [y + (i - 1) * height for y in range(len(rows))]
        drawn: Any = axes.barh(at, [s * 1e3 for s in seconds], height, color=theme.series[i], label=label)
        for bar, row in zip(drawn, rows, strict=True):
            bar.set_hatch("///" if row.simulated else "")
            bar.set_edgecolor(theme.grid)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms a step" + (" (hatched: simulated tier)" if any(row.simulated for row in rows) else ""))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(bars))


def largest(rows: Sequence[Row], setting: str) -> list[Row]:
    """Rows with the largest value of a setting."""
    groups = list(by_setting(rows, setting))
    return groups[-1][1] if groups else []
