import dataclasses
import json
import math

from horizon.report.metrics import MetricsWriter
from tests.report.rows import STEP as ROW


def test_a_row_is_on_disk_before_the_next_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        for step in (1, 2, 3):
            metrics.write(dataclasses.replace(ROW, step=step))
            assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, step + 1))
    assert json.loads(path.read_text().splitlines()[0]) == dataclasses.asdict(ROW)


def test_what_is_not_finite_is_null_so_that_every_reader_accepts_it(tmp_path):
    with MetricsWriter(tmp_path / "m") as metrics:
        metrics.write(dataclasses.replace(ROW, loss=math.nan, grad_norm=math.inf))
    row = json.loads((tmp_path / "m").read_text(), parse_constant=lambda name: 1 / 0)
    assert (row["loss"], row["grad_norm"], row["lr"]) == (None, None, 1e-3)
