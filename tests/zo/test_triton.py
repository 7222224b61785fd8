"""The Triton kernel in Triton's interpreter, against the host's; bits on a real GPU are tests/gpu's to compare."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CODE = """
import numpy as np, torch
import horizon
from horizon.store.split import split_master
from horizon.zo import perturb, triton_kernel
from horizon.zo.table import Term, Update, Work
from tests.gpu.test_zo import LAYOUT

updates = [Update(1, 0.99, (Term(1, 0, 2e-3), Term(1, 1, -1e-3))), Update(2, 0.98, (Term(2, 0, 1e-3),))]
w = torch.randn(LAYOUT.num_elements, generator=torch.Generator().manual_seed(0)) * 0.02
for master in ("fp32", "bf16", "fp16"):
    settings = horizon.ZerothOrder(queries=2, master=master, seed=3)
    given = split_master(w) if master == "fp32" else (w.to(settings.master_dtype),)
    found = []
    for kind in ("host", "triton"):
        states = [state.clone() for state in given]
        copies = [torch.zeros(LAYOUT.num_elements) for _ in range(2)]
        run = perturb.HostPerturber([LAYOUT], settings)
        if kind == "triton":
            torch.Tensor.pin_memory = lambda tensor: tensor
            run = perturb.DevicePerturber([LAYOUT], settings, torch.device("cpu"))
        run.begin([Work(0, updates, 3, 2)])
        run(0, states, copies, 1, True)
        found.append([*states, *copies])
    for expected, tensor in zip(*found):
        assert torch.equal(expected, tensor), master
print("the same")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_interpreted_kernel_has_the_hosts_bits():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, timeout=110,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the same"
