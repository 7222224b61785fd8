"""What `pip install .` gives: a wheel that brings conf/ along, and requirements whose tested versions are pinned."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel's contents, unpacked as an installation would."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_package_with_every_config_and_nothing_else(site):
    configs = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert {path.relative_to(site / "horizon/conf") for path in (site / "horizon/conf").rglob("*.yaml")} == configs
    modules = {path.relative_to(ROOT) for path in (ROOT / "horizon").rglob("*.py")}
    assert {path.relative_to(site) for path in site.rglob("*.py")} == modules
    assert sorted(path.name.partition("-")[0] for path in site.iterdir()) == ["horizon", "horizon"]


def test_the_installed_command_finds_its_configs_far_from_a_checkout(site, tmp_path):
    code = "import horizon.config.compose as c; print(c.conf_dir()); from horizon.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--cfg", "job", "train.steps=3"],
        capture_output=True, text=True, cwd=tmp_path, timeout=100, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{site}/horizon/conf\n")
    assert "steps: 3" in done.stdout


def test_the_script_is_the_cli_and_every_direct_requirement_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"horizon": "horizon.cli:main"}
    needed = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[\w-]+", line)[0] for line in needed}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert names <= set(pinned)
