"""`horizon report compare a.json b.json`: two measurements of tiers side by side."""

from __future__ import annotations

from pathlib import Path

from horizon.config.arguments import ArgumentParser
from horizon.errors import ConfigError
from horizon.report.compare import COLUMNS, read_both
from horizon.report.page import require_report_extra
from horizon.report.tables import table


def run(arguments: list[str]) -> int:
    """Run the command; the exit code.

    Raises:
        DataError: a file cannot be read, or they have no row in common.
        ConfigError: the comparison cannot be written as asked.
    """
    args = _parser().parse_args(arguments)
    kind = args.out.suffix if args.out else None
    if kind not in (None, ".html", ".md"):
        raise ConfigError(f"--out={args.out}: expected a name that ends in .html or .md")
    if kind == ".html":
        require_report_extra()
    compared = read_both(args.a, args.b)
    print("\n".join(compared.summary()))
    print()
    print(table(COLUMNS, compared.cells()))
    if args.out:
        try:
            args.out.write_text(compared.html() if kind == ".html" else compared.markdown(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out={args.out} cannot be written ({error.strerror})") from error
        print(f"\n{args.out}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="horizon report", description="Reports on what was measured.")
    commands = parser.add_subparsers(dest="what", required=True)
    compare = commands.add_parser("compare", help="two files of horizon bench tiers side by side")
    compare.add_argument("a", type=Path, help="tiers.json of one run")
    compare.add_argument("b", type=Path, help="tiers.json of another, such as another machine's")
    compare.add_argument("--out", type=Path, help="also write it: a file that ends in .html or .md")
    return parser
