"""Killed at any instant, a run loses what came after its last checkpoint, and nothing else."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUM_STEPS_OF_A_COMMIT = 11


@pytest.fixture
def memory(tmp_path):
    """A folder in memory, where there is one: what a killed process leaves does not depend on the disk."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def run(*arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_at_each_step_of_the_commit(memory):
    assert len(run(memory, "commit").splitlines()) == NUM_STEPS_OF_A_COMMIT


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_at_random_instants(memory, kills):
    told = json.loads(run(memory, kills))
    assert (told["killed"], told["last"]) == (kills, 40)
    assert told["checkpoints_seen"] >= kills // 4  # enough that not all were killed before the first
