"""All checks of `horizon doctor`, in the order in which it prints them. A check that has nothing to say gives None."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from importlib import metadata

from horizon import __version__
from horizon.doctor import device, host
from horizon.doctor.finding import Finding, fail, ok, warn
from horizon.forecast.here import cache_file, read_kept

Check = Callable[[], Finding | None]
PACKAGES = "torch", "transformers", "numba", "triton", "liger-kernel"


def check_versions() -> Finding:
    """What is installed."""
    found = [f"horizon {__version__}", f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ok("versions", ", ".join(found))


def check_facts() -> Finding:
    """Whether this machine was measured for the plan."""
    path = cache_file()
    kept = read_kept(path)
    if kept is None:
        return warn("facts", "this machine was not measured yet", "horizon doctor --measure: plans are then better")
    return ok("facts", f"measured: {path}")


CHECKS: list[Check] = [
    check_versions,
    device.check_gpu,
    device.check_free_device,
    device.check_registration,
    device.check_link,
    host.check_memory,
    host.check_cores,
    host.check_numa,
    host.check_huge_pages,
    host.check_memlock,
    host.check_update_kernel,
    host.check_fused_kernels,
    host.check_disk,
    check_facts,
]


def run_checks(checks: Iterable[Check]) -> list[Finding]:
    """What each found; one that breaks is a finding, too, so that the others are still made."""
    findings = []
    for check in checks:
        try:
            finding = check()
        except Exception as error:  # whatever a driver or a file system raises is what the user wants to know
            name = check.__name__.removeprefix("check_").replace("_", " ")
            fix = "look into it, as training may fail at the same place"
            finding = fail(name, f"the check broke: {type(error).__name__}: {' '.join(str(error).split())}", fix)
        if finding is not None:
            findings.append(finding)
    return findings
