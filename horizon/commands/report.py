"""`horizon report`: a run's report, several runs side by side, or two measurements of tiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from horizon.config.arguments import ArgumentParser
from horizon.errors import ConfigError
from horizon.report.compare import COLUMNS, read_both
from horizon.report.page import require_report_extra
from horizon.report.run_comparison import COMPARISON, RunComparison
from horizon.report.run_report import REPORT, write_report
from horizon.report.runs import find_runs, read_run
from horizon.report.tables import table


def run(arguments: list[str]) -> int:
    """Run the command; the exit code.

    Raises:
        DataError: a file or folder cannot be read, or has nothing to report.
        ConfigError: the report cannot be written as asked.
    """
    return _compare_tiers(arguments[1:]) if arguments[:1] == ["compare"] else _report_runs(arguments)


def _report_runs(arguments: list[str]) -> int:
    args = _runs_parser().parse_args(arguments)
    _check_out(args.out, (".html",))
    folders = [found for folder in args.runs for found in find_runs(folder)]
    if len(folders) == 1:
        require_report_extra()
        report, out = read_run(folders[0]), args.out or folders[0] / REPORT
        _writing(out, lambda: write_report(report, out))
    else:
        comparison = RunComparison(tuple(read_run(folder) for folder in folders))
        print(comparison.text())
        out = args.out or (args.runs[0] / COMPARISON if len(args.runs) == 1 else None)
        if out is None:
            return 0
        _writing(out, lambda: comparison.write(out))
    print(out)
    return 0


def _compare_tiers(arguments: list[str]) -> int:
    args = _tiers_parser().parse_args(arguments)
    _check_out(args.out, (".html", ".md"))
    if args.out and args.out.suffix == ".html":
        require_report_extra()
    compared = read_both(args.a, args.b)
    if args.out:
        text = compared.html() if args.out.suffix == ".html" else compared.markdown()
        _writing(args.out, lambda: args.out.write_text(text, encoding="utf-8"))
    print("\n".join(compared.summary()))
    print()
    print(table(COLUMNS, compared.cells()))
    if args.out:
        print(f"\n{args.out}")
    return 0


def _check_out(out: Path | None, endings: Sequence[str]) -> None:
    if out is not None and out.suffix not in endings:
        raise ConfigError(f"--out={out}: expected a name that ends in {' or '.join(endings)}")


def _writing(out: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise ConfigError(f"--out={out} cannot be written ({error.strerror})") from error


def _runs_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="horizon report",
        description="The report of a run as a page that needs nothing else, and its numbers as JSON beside it; of "
        "several runs, or of a folder with several, a table and a page that compares them. "
        "`horizon report compare A.json B.json` puts two measurements of horizon bench tiers side by side.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or one with runs below it")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help=f"a file that ends in .html (default: {REPORT} in the run's folder, {COMPARISON} in a folder of runs; "
        "of several RUNs none)",
    )  # fmt: skip
    return parser


def _tiers_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="horizon report compare", description="Two files of horizon bench tiers side by side.")
    parser.add_argument("a", type=Path, help="tiers.json of one run")
    parser.add_argument("b", type=Path, help="tiers.json of another, such as another machine's")
    parser.add_argument("--out", type=Path, help="also write it: a file that ends in .html or .md")
    return parser
