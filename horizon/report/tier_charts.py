"""The charts of a report on tiers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial

from horizon.report.charts import Axis, BarChart, Chart, LineChart, Matrix, Series, Style
from horizon.report.measurements import (
    LESS_IS_BETTER,
    Measurements,
    Row,
    by_setting,
    short_bytes,
    short_number,
    show_setting,
)

Points = tuple[str, Sequence[float], Sequence[float]]  # label, xs, ys
SOURCES = ("A: ", "B: ")  # with which places begin in the charts of a comparison
GB_PER_S = Axis("GB/s", from_zero=True)


def charts_of(measured: Measurements, tests: Collection[str] | None = None) -> list[Chart]:
    """Those of the tests that have rows; None: of all."""
    return [
        draw(measured.of(test))
        for test, draw in _drawings(measured)
        if measured.of(test) and (tests is None or test in tests)
    ]


def _drawings(measured: Measurements) -> Iterator[tuple[str, Callable[[list[Row]], Chart]]]:
    yield "latency", _latency
    yield "loaded latency", _loaded
    yield "bandwidth", _by_threads
    yield "bandwidth", _by_block
    reads = [row for row in measured.of("bandwidth") if row.settings["access"] == "read"]
    if len({(row.place.removeprefix(_source(row.place)), row.settings["cpus"]) for row in reads}) > 1:
        yield "latency", _latency_by_pair
        yield "bandwidth", partial(_read_by_pair, reads)
    yield "link", _link
    yield "link", _link_by_size
    for access in ("read", "write"):
        yield "disk", partial(_disk, access)
    yield "nvme", _engines
    yield "adamw", _adamw
    yield "adamw", _adamw_by_threads
    yield "step", _steps


# ---- over an axis


def _latency(rows: Sequence[Row]) -> Chart:
    rows = _nearest(rows)
    return LineChart(
        title="Idle latency",
        says="Nanoseconds of one load whose address is the value of the load before, by the size of what is loaded "
        f"from{_whence(rows)}. Steps are the caches; the right end is the memory itself.",
        x=_bytes("size of what is loaded from", rows, "size"),
        y=_log("ns a load", rows),
        series=_lines(_points(rows, lambda row: row.place, "size")),
    )


def _loaded(rows: Sequence[Row]) -> Chart:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in _nearest(rows):
        found.setdefault(row.place, []).append((row.also["load_gb_per_s"], row.median))
    return LineChart(
        title="Latency under load",
        says="The same over the largest size, while all other processors read from that memory in blocks of 64 KiB, "
        "with pauses of several lengths or none. Where the line bends up, the memory is full.",
        x=Axis("GB/s that the others read meanwhile"),
        y=Axis("ns a load", from_zero=True),
        series=_lines((n, [x for x, _ in sorted(p)], [y for _, y in sorted(p)]) for n, p in found.items()),
    )


def _by_threads(rows: Sequence[Row]) -> Chart:
    rows = _readable(rows)
    return LineChart(
        title=f"{_what(rows)} by threads",
        says=f"With the best block size{_whence(rows)}. Mixed is two reads and a write; a write counts once, though it "
        "fetches first.",
        x=_counts("threads", rows, "threads"),
        y=GB_PER_S,
        series=_lines(_points(rows, partial(_access, rows), "threads")),
    )


def _by_block(rows: Sequence[Row]) -> Chart:
    rows = largest(_readable(rows), "threads")
    return LineChart(
        title=f"{_what(rows)} by block",
        says=f"How much is moved in one go before jumping elsewhere, with all threads{_whence(rows)}.",
        x=_bytes(f"block ({rows[0].settings['threads']} threads)", rows, "block"),
        y=GB_PER_S,
        series=_lines(_points(rows, partial(_access, rows), "block")),
    )


def _disk(access: str, rows: Sequence[Row]) -> Chart:
    rows = [row for row in rows if row.settings["access"] == access]
    buffered = any(row.settings["io"] == "buffered" for row in rows)
    how = "through the page cache, as the file system asks for" if buffered else "past the page cache"
    return LineChart(
        title=f"Disk, {access}",
        says=f"One request after another through a file, {how}, by how many are under way; a line for each size.",
        x=_counts("requests under way", rows, "depth"),
        y=_log("GB/s", rows),
        series=_lines(
            _points(rows, lambda row: _source(row.place) + short_bytes(float(row.settings["block"])), "depth")
        ),
    )


def _adamw(rows: Sequence[Row]) -> Chart:
    ticks = sorted({float(row.settings["parameters"]) for row in rows})
    return LineChart(
        title="AdamW by parameters",
        says='With the best number of threads. A tier alone: all states are on it; with "gradients": only these, and '
        "the rest in DRAM.",
        x=Axis("parameters" + _dashed(rows), "log", ticks, text=lambda value: f"{value / 1e6:g} M"),
        y=Axis("Gparam/s", from_zero=True),
        series=_lines(_points(rows, _states, "parameters")),
    )


def _adamw_by_threads(rows: Sequence[Row]) -> Chart:
    rows = largest(rows, "parameters")
    return LineChart(
        title="AdamW by threads",
        says=f"Of {show_setting('parameters', rows[0].settings['parameters'])} parameters. Where a line is level, more "
        "threads find no more memory bandwidth.",
        x=_counts("threads" + _dashed(rows), rows, "threads"),
        y=Axis("Gparam/s", from_zero=True),
        series=_lines(_points(rows, _states, "threads")),
    )


def _states(row: Row) -> str:
    return f"{row.place}: {row.settings['states']}" if row.settings["states"] != "all" else row.place


def _dashed(rows: Sequence[Row]) -> str:
    return " (dashed: simulated)" if any(row.simulated for row in rows) else ""


def _lines(points: Iterable[Points]) -> tuple[Series, ...]:
    """Series told apart; simulated ones are dashed, and of a comparison the second's, in the colours of the first's."""
    points = list(points)
    colors = {
        name: i for i, name in enumerate(dict.fromkeys(label.removeprefix(_source(label)) for label, *_ in points))
    }
    return tuple(
        Series(
            label, xs, ys, colors[label.removeprefix(_source(label))],
            Style.dashed if "simulated" in label or _source(label) == SOURCES[1] else Style.line,
        )
        for label, xs, ys in points
    )  # fmt: skip


def _points(rows: Sequence[Row], label: Callable[[Row], str], x: str) -> list[Points]:
    """Medians by a setting, a series for each label; of rows with the same label and x, the best."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        points, at = found.setdefault(label(row), {}), float(row.settings[x])
        better = min if row.unit in LESS_IS_BETTER else max
        points[at] = better(points.get(at, row.median), row.median)
    return [(name, sorted(points), [points[at] for at in sorted(points)]) for name, points in found.items()]


def _source(name: str) -> str:
    """That of `SOURCES` that a place, or a label, begins with."""
    return name[: len(SOURCES[0])] if name.startswith(SOURCES) else ""


def _whence(rows: Sequence[Row]) -> str:
    """Where there are several, that rows are from the processors that `_nearest` chose."""
    return ", from the nearest processors" if len({row.settings["cpus"] for row in rows}) > 1 else ""


def _what(rows: Sequence[Row]) -> str:
    return "Bandwidth" if len({row.settings["access"] for row in rows}) > 1 else "Read bandwidth"


def _access(rows: Sequence[Row], row: Row) -> str:
    """The label of a line among `rows`: what it reads or writes, where others do something else."""
    source = _source(row.place)
    access = f"{row.settings['access']}, " if _what(rows) == "Bandwidth" else ""
    return f"{source}{access}{row.place.removeprefix(source)}"


def _bytes(label: str, rows: Sequence[Row], setting: str) -> Axis:
    return Axis(label, "log2", sorted({float(row.settings[setting]) for row in rows}), short_bytes)


def _log(label: str, rows: Sequence[Row]) -> Axis:
    """Of medians, with ticks at 1, 2 and 5; of more than three decades at 1 alone."""
    low, high = min(row.median for row in rows), max(row.median for row in rows)
    steps = (1, 2, 5) if high < 1000 * low else (1,)
    ticks = [t * 10**e for e in range(-6, 7) for t in steps if low / 2 <= t * 10**e <= high * 2]
    return Axis(label, "log", ticks, short_number)


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
    better = min if rows[0].unit in LESS_IS_BETTER else max
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        source = _source(row.place)
        key = f"{source}from\n{row.settings['cpus']}", row.place.removeprefix(source).replace(" ", "\n", 1)
        best[key] = better(best.get(key, row.median), row.median)
    cpus, places = (tuple(dict.fromkeys(names)) for names in zip(*best, strict=True))
    return Matrix(
        title=title,
        says=says,
        rows=cpus,
        columns=places,
        values=tuple(tuple(best.get((one, place), float("nan")) for place in places) for one in cpus),
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
        title="Copies by memory",
        says="Host to device and back, from pinned and from pageable memory, with the largest copies.",
        names=places,
        x=Axis(f"GB/s, {short_bytes(float(rows[0].settings['size']))} a copy"),
        bars=tuple((f"{to} {memory}", tuple(found.get((p, to, memory), 0.0) for p in places)) for to, memory in kinds),
    )


def _link_by_size(rows: Sequence[Row]) -> Chart:
    return LineChart(
        title="Copies by size",
        says="One copy at a time, from before it is issued to when its end is known; of the fastest memory.",
        x=_bytes("size of a copy", rows, "size"),
        y=GB_PER_S,
        series=_lines(_points(rows, _way, "size")),
    )


def _way(row: Row) -> str:
    return f"{_source(row.place)}{row.settings['direction']} {row.settings['memory']}"


def _engines(rows: Sequence[Row]) -> Chart:
    found = {(_source(row.place) + str(row.settings["engine"]), row.settings["access"]): row.median for row in rows}
    names, accesses = (tuple(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    return BarChart(
        title="Engines of the nvme tier",
        says="What the tier's engines reach with the pages that updates move, beside raw access to the same disk; both "
        "reads and writes at once.",
        names=names,
        x=Axis("GB/s"),
        bars=tuple((access, tuple(found.get((name, access), 0.0) for name in names)) for access in accesses),
    )


def _steps(rows: Sequence[Row]) -> Chart:
    seconds = {
        "planned": [row.also.get("planned_s", 0.0) for row in rows],
        "median": [row.median for row in rows],
        "best": [row.best for row in rows],
    }
    simulated = tuple(row.simulated for row in rows)
    unit, scale = ("s", 1.0) if max(row.median for row in rows) >= 1 else ("ms", 1e3)
    return BarChart(
        title="Planned against measured step",
        says="What the plan said before the first step, the median step, and the best.",
        names=tuple(row.place for row in rows),
        x=Axis(f"{unit} a step" + (" (hatched: simulated tier)" if any(simulated) else "")),
        bars=tuple((label, tuple(s * scale for s in values)) for label, values in seconds.items()),
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
