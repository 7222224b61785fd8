"""The charts of a report on tiers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from horizon.report.charts import Axis, BarChart, Chart, LineChart, Matrix, Series, Style
from horizon.report.measurements import LESS_IS_BETTER, Measurements, Row, by_setting, short_bytes, short_number

Points = tuple[str, Sequence[float], Sequence[float]]  # label, xs, ys
GB_PER_S = Axis("GB/s", from_zero=True)


def charts_of(measured: Measurements) -> list[Chart]:
    """One for each kind of test that has rows."""
    return [draw(measured.of(test)) for test, draw in _drawings(measured) if measured.of(test)]


def _drawings(measured: Measurements) -> Iterator[tuple[str, Callable[[list[Row]], Chart]]]:
    yield "latency", _latency
    yield "loaded latency", _loaded
    yield "bandwidth", _by_threads
    yield "bandwidth", _by_block
    reads = [row for row in measured.of("bandwidth") if row.settings["access"] == "read"]
    if len({(row.place, row.settings["cpus"]) for row in reads}) > 1:
        yield "latency", _latency_by_pair
        yield "bandwidth", partial(_read_by_pair, reads)
    yield "link", _link
    yield "disk", _disk
    yield "adamw", _adamw
    yield "step", _steps


# ---- over an axis


def _latency(rows: Sequence[Row]) -> Chart:
    rows = _nearest(rows)
    low, high = min(row.median for row in rows), max(row.median for row in rows)
    ticks = [t * 10**e for e in range(-1, 6) for t in (1, 2, 5) if low / 2 <= t * 10**e <= high * 2]
    return LineChart(
        title="Idle latency",
        says="Nanoseconds of one load whose address is the value of the load before, by the size of what is loaded "
        "from. Steps are the caches; the right end is the memory itself.",
        x=_bytes("size of what is loaded from"),
        y=Axis("ns a load", "log", ticks, short_number),
        series=_lines(_points(rows, lambda row: _place(row, rows), "size")),
    )


def _loaded(rows: Sequence[Row]) -> Chart:
    found: dict[str, list[tuple[float, float]]] = {}
    rows = _nearest(rows)
    for row in rows:
        found.setdefault(_place(row, rows), []).append((row.also["load_gb_per_s"], row.median))
    return LineChart(
        title="Latency under load",
        says="The same chase while all other processors read from that memory. Where it bends up, the memory is full.",
        x=Axis("GB/s that the others read meanwhile"),
        y=Axis("ns a load", from_zero=True),
        series=_lines((n, [x for x, _ in sorted(p)], [y for _, y in sorted(p)]) for n, p in found.items()),
    )


def _by_threads(rows: Sequence[Row]) -> Chart:
    rows = _readable(rows)
    return LineChart(
        title="Bandwidth by threads",
        says="Median of the best block size. Mixed is two reads and a write; a write counts once, though it fetches "
        "first.",
        x=_counts("threads", rows, "threads"),
        y=GB_PER_S,
        series=_lines(_points(rows, lambda row: f"{row.settings['access']}, {_place(row, rows)}", "threads")),
    )


def _by_block(rows: Sequence[Row]) -> Chart:
    rows = largest(_readable(rows), "threads")
    return LineChart(
        title="Bandwidth by block",
        says="With all threads: how much is moved in one go before jumping elsewhere.",
        x=_bytes(f"block ({rows[0].settings['threads']} threads)"),
        y=GB_PER_S,
        series=_lines(_points(rows, lambda row: f"{row.settings['access']}, {_place(row, rows)}", "block")),
    )


def _disk(rows: Sequence[Row]) -> Chart:
    def label(row: Row) -> str:
        return f"{row.settings['access']} {short_bytes(float(row.settings['block']))}"

    return LineChart(
        title="Disk",
        says="Median by requests under way, for each size of a request, past the page cache where the file system "
        "lets it.",
        x=_counts("requests under way", rows, "depth"),
        y=Axis("GB/s (dashed: writes)", from_zero=True),
        series=_lines(_points(rows, label, "depth"), dashed="write"),
    )


def _adamw(rows: Sequence[Row]) -> Chart:
    def label(row: Row) -> str:
        return f"{row.place}: {row.settings['states']}" if row.settings["states"] != "all" else row.place

    simulated = " (dashed: simulated)" if any(row.simulated for row in rows) else ""
    return LineChart(
        title="AdamW with its states on each tier",
        says="Parameters updated in a second with the best number of threads, by how many there are; caches hold few.",
        x=Axis(f"parameters{simulated}", "log", text=lambda value: f"{value / 1e6:g} M"),
        y=Axis("Gparam/s", from_zero=True),
        series=_lines(_points(rows, label, "parameters"), dashed="simulated"),
    )


def _lines(points: Iterable[Points], dashed: str = "nothing") -> tuple[Series, ...]:
    """Series told apart; those with `dashed` in their label are, and writes have the colours of the reads in turn."""
    counts, series = {Style.line: 0, Style.dashed: 0}, []
    for label, xs, ys in points:
        style = Style.dashed if dashed in label else Style.line
        color = counts[style] if dashed == "write" else sum(counts.values())
        counts[style] += 1
        series.append(Series(label, xs, ys, color, style))
    return tuple(series)


def _points(rows: Sequence[Row], label: Callable[[Row], str], x: str) -> list[Points]:
    """Medians by a setting, a series for each label; of rows with the same label and x, the best."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        points, at = found.setdefault(label(row), {}), float(row.settings[x])
        better = min if row.unit in LESS_IS_BETTER else max
        points[at] = better(points.get(at, row.median), row.median)
    return [(name, sorted(points), [points[at] for at in sorted(points)]) for name, points in found.items()]


def _place(row: Row, rows: Sequence[Row]) -> str:
    """The place, and from which processors where there are several."""
    several = len({one.settings["cpus"] for one in rows}) > 1
    return f"{row.place}, from {row.settings['cpus']}" if several else row.place


def _bytes(label: str) -> Axis:
    return Axis(label, "log2", text=short_bytes)


def _counts(label: str, rows: Sequence[Row], setting: str) -> Axis:
    return Axis(label, "log2", ticks=sorted({float(row.settings[setting]) for row in rows}))


# ---- by pair


def _latency_by_pair(rows: Sequence[Row]) -> Chart:
    says = "Idle latency of the largest size, from each node's processors to each memory."
    return _pairs("Latency by pair", says, largest(rows, "size"))


def _read_by_pair(reads: Sequence[Row], rows: Sequence[Row]) -> Chart:
    says = "With the best number of threads and block, from each node's processors to each memory."
    return _pairs("Read bandwidth by pair", says, reads)


def _pairs(title: str, says: str, rows: Sequence[Row]) -> Chart:
    """Processors down, memories across; of rows of the same pair, the best."""
    places, cpus = (
        list(dict.fromkeys(names)) for names in zip(*((r.place, r.settings["cpus"]) for r in rows), strict=True)
    )
    better = min if rows[0].unit in LESS_IS_BETTER else max
    best: dict[tuple[str, Any], float] = {}
    for row in rows:
        key = row.place, row.settings["cpus"]
        best[key] = better(best.get(key, row.median), row.median)
    return Matrix(
        title=title,
        says=says,
        rows=tuple(f"from\n{name}" for name in cpus),
        columns=tuple(place.replace(" ", "\n", 1) for place in places),
        values=tuple(tuple(best.get((place, name), float("nan")) for place in places) for name in cpus),
        unit=rows[0].unit,
        text=short_number,
    )


# ---- bars


def _link(rows: Sequence[Row]) -> Chart:
    rows = largest(rows, "size")
    places = tuple(dict.fromkeys(row.place for row in rows))
    found = {(row.place, row.settings["direction"], row.settings["memory"]): row.median for row in rows}
    kinds = dict.fromkeys(key[1:] for key in found)
    return BarChart(
        title="Link to the GPU",
        says="Host to device and back, from pinned and from pageable memory, with the largest copies.",
        names=places,
        x=Axis(f"GB/s, {short_bytes(float(rows[0].settings['size']))} a copy"),
        bars=tuple((f"{to} {memory}", tuple(found.get((p, to, memory), 0.0) for p in places)) for to, memory in kinds),
    )


def _steps(rows: Sequence[Row]) -> Chart:
    seconds = {
        "planned": [row.also.get("planned_s", 0.0) for row in rows],
        "median": [row.median for row in rows],
        "best": [row.best for row in rows],
    }
    simulated = tuple(row.simulated for row in rows)
    return BarChart(
        title="Planned against measured step",
        says="A small model under each policy: what the plan said before the first step, the median step, and the "
        "best.",
        names=tuple(row.place for row in rows),
        x=Axis("ms a step" + (" (hatched: simulated tier)" if any(simulated) else "")),
        bars=tuple((label, tuple(s * 1e3 for s in values)) for label, values in seconds.items()),
        hatched=simulated,
    )


# ---- which rows


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


def largest(rows: Sequence[Row], setting: str) -> list[Row]:
    """Rows with the largest value of a setting."""
    groups = list(by_setting(rows, setting))
    return groups[-1][1] if groups else []
