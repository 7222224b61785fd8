"""`horizon bench tiers`: measures, and writes a page, a table and the rows."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from horizon.bench.tiers import FULL, QUICK, Found, Options, measure_tiers
from horizon.config.arguments import ArgumentParser
from horizon.errors import ConfigError
from horizon.report.measurements import Measurements
from horizon.report.page import require_report_extra
from horizon.report.tiers import write_html, write_markdown

NAME = "tiers"  # of the files


def run(arguments: list[str]) -> int:
    """Run the command; the exit code.

    Raises:
        ConfigError: an argument, or a missing library, makes it impossible; nothing has been measured then.
    """
    args = _parser().parse_args(arguments)
    if args.simulate is not None and not 0 <= args.simulate < float("inf"):
        raise ConfigError(f"--simulate={args.simulate}: expected GB/s, or 0 for no simulated tier")
    require_report_extra()
    out = args.out or Path("outputs") / time.strftime(f"{NAME}-%Y-%m-%d-%H-%M-%S")
    with _folder(out):
        _require_writable("--out", out)
        if args.disk is not None:
            _require_writable("--disk", args.disk)
        command = ["horizon", "bench", *arguments]
        options = Options(QUICK if args.quick else FULL, args.disk or out, args.simulate, command)
        _write(measure_tiers(options, _watch), out)
    return 0


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make it, and remove it again where nothing was written into it."""
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out={path} is not a folder that can be made ({error.strerror})") from error
    try:
        yield
    finally:
        if new:
            with suppress(OSError):
                path.rmdir()


def _write(measured: Measurements, out: Path) -> None:
    """The files, and on the terminal what is in them."""
    measured.write(out / f"{NAME}.json")
    write_markdown(measured, out / f"{NAME}.md")
    write_html(measured, out / f"{NAME}.html")
    for one in measured.skipped:
        print(f"not measured: {one.test}, {one.place}: {one.reason}", file=sys.stderr)
    simulated = " (some of them simulated)" if measured.simulated else ""
    print(f"{len(measured.rows)} rows{simulated} in {measured.run.seconds:.0f} s")
    for kind in ("html", "md", "json"):
        print(f"{kind:<5}{out / NAME}.{kind}")


def _require_writable(argument: str, folder: Path) -> None:
    """Raise a ConfigError now rather than after minutes of measuring."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"{argument}={folder} is not a folder that can be written to ({error.strerror}); make it, or name another"
        ) from error


def _watch(what: str, found: Iterator[Found]) -> Iterable[Found]:
    """Passes on what a test finds: with a count and the time on a terminal, with a line before it elsewhere."""
    if not sys.stderr.isatty():
        print(f"measuring {what}", file=sys.stderr, flush=True)
        return found
    counted: Iterable[Found] = tqdm(found, desc=what, bar_format="{desc}: {n_fmt} rows, {elapsed}")
    return counted


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="horizon bench",
        description="Measure what every memory tier of this machine gives: latency, bandwidth, the link to the GPU, "
        "the disk, AdamW with its states on each, and steps under each policy against their plan.",
    )
    parser.add_argument("what", choices=[NAME])
    parser.add_argument(
        "--out", type=Path, help="folder for tiers.html, tiers.md and tiers.json (default: in outputs/)"
    )
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute on two cores")
    parser.add_argument("--disk", type=Path, help="folder of the disk to measure (default: the folder of --out)")
    parser.add_argument(
        "--simulate", type=float, metavar="GB_PER_S",
        help="bandwidth of a simulated cxl tier, 0 for none (default: a quarter of what updates reach in DRAM where "
        "the machine has no memory-only node)",
    )  # fmt: skip
    return parser
