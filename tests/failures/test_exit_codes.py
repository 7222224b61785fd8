"""A run that diverges ends with one line and a code that is not 0; the real command, in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "model.config.hidden_size=32", "model.config.intermediate_size=64", "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4", "data=text", "data.path=texts", "data.tokenizer=bytes", "train.batch_size=4",
    "train.seq_len=32", "eval.rows=0", "train.sample_tokens=0", "device=cpu", "optim.lr=1e30",
    "optim.warmup_steps=0", "hydra.run.dir=out",
]  # fmt: skip


def test_a_diverging_run_names_the_step_and_where_and_keeps_the_metrics_so_far(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    command = [sys.executable, "-m", "horizon", "train", *SETTINGS]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.match(r"horizon: NonFiniteError: step 2: the (loss is (nan|inf); block|gradient of model)", last)
    assert "Traceback" not in done.stderr
    assert [json.loads(row)["step"] for row in (tmp_path / "out/metrics.jsonl").read_text().splitlines()] == [1]
    assert not (tmp_path / "out/model").exists()
