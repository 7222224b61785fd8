"""A run that diverges says at which step and where, and keeps what it knew so far."""

import json

from horizon.config.compose import compose
from horizon.errors import NonFiniteError
from horizon.trainer import Trainer

SETTINGS = [
    "model.config.hidden_size=32", "model.config.intermediate_size=64", "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4", "data=text", "data.tokenizer=bytes", "train.batch_size=4",
    "train.seq_len=32", "eval.rows=0", "train.sample_tokens=0", "device=cpu", "optim.lr=1e30",
    "optim.warmup_steps=0",
]  # fmt: skip


def test_a_diverging_run_names_the_step_and_where_and_keeps_the_metrics_so_far(tmp_path, fails):
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    out = tmp_path / "out"
    with fails(NonFiniteError, r"^step 2: the (loss is (nan|inf); block|gradient of model)"):
        Trainer(compose([*SETTINGS, f"data.path={tmp_path / 'texts'}"]), out).run()
    assert [json.loads(row)["step"] for row in (out / "metrics.jsonl").read_text().splitlines()] == [1]
    assert not (out / "model").exists()
