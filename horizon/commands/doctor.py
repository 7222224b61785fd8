"""`horizon doctor`: looks at this machine, and measures it where asked."""

from __future__ import annotations

import dataclasses
import json

from horizon.errors import ConfigError

USAGE = """\
usage: horizon doctor [--measure] [--json]

Looks at this machine: each line is ok, warn or fail, with what to do. Exit code 1 where something fails.

  --measure   measure the machine for the plan, for about a minute, and keep that for `horizon plan`; the disk is
              measured with a file of 128 MiB in the folder that you start it in
  --json      print one JSON object and nothing else
"""
FLAGS = {"--measure", "--json"}


def run(arguments: list[str]) -> int:
    """The command; gives its exit code.

    Raises:
        ConfigError: it takes no such argument.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE, end="")
        return 0
    if set(arguments) - FLAGS:
        raise ConfigError(f"horizon doctor takes no {min(set(arguments) - FLAGS)!r}; expected --measure or --json")
    from horizon.doctor.checks import CHECKS, run_checks
    from horizon.doctor.finding import Status
    from horizon.forecast.here import cache_file, measure_and_keep, read_kept
    from horizon.forecast.report import machine_json

    facts = measure_and_keep() if "--measure" in arguments else read_kept(cache_file())
    findings = run_checks(CHECKS)
    failed = any(finding.status is Status.fail for finding in findings)
    if "--json" in arguments:
        checks = [dataclasses.asdict(finding) | {"status": str(finding.status)} for finding in findings]
        machine = None if facts is None else machine_json(facts)
        print(json.dumps({"ok": not failed, "checks": checks, "machine": machine}, indent=2))
    else:
        for finding in findings:
            fix = f"\n{'':6}{'':16}-> {finding.fix}" if finding.fix else ""
            print(f"{finding.status:<6}{finding.name:<16}{finding.found}{fix}")
    return 1 if failed else 0
