"""Listening to a run: your own code hears of every step, evaluation and checkpoint, as plain records.

    python examples/callbacks.py

A callback is called between steps and gets numbers that are there already. `horizon train` itself writes them to
metrics.jsonl, evaluations.jsonl and checkpoints.jsonl; docs/metrics.md has a table of all of them.
"""

import tempfile
from pathlib import Path

import horizon
from horizon.config.schema import (
    CheckpointConfig,
    DataConfig,
    DataFormat,
    EvalConfig,
    HorizonConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)  # fmt: skip
from horizon.records import CheckpointRow, EvalRow, RunSummary, StepRow

MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SENTENCE = "Every block of the model is paged in, computes, and is paged out again. "


class Diary(horizon.Callback):
    """Notes what happened; define only what is of interest."""

    def __init__(self) -> None:
        self.slowest: StepRow | None = None
        self.lines: list[str] = []

    def on_step(self, row: StepRow) -> None:
        """The step took `row.seconds`."""
        if self.slowest is None or row.seconds > self.slowest.seconds:
            self.slowest = row

    def on_eval(self, row: EvalRow) -> None:
        """Held-out rows were scored."""
        self.lines.append(f"step {row.step}: perplexity {row.perplexity:.1f}, {row.accuracy:.0%} of tokens right")

    def on_checkpoint(self, row: CheckpointRow) -> None:
        """A checkpoint is on disk."""
        self.lines.append(f"step {row.step} is safe in {Path(row.folder).name}; training waited {row.stall_s:.2f} s")

    def on_end(self, summary: RunSummary) -> None:
        """The run is over."""
        assert self.slowest is not None
        self.lines.append(f"{summary.steps} steps, the slowest was step {self.slowest.step}")


def main(work: Path, steps: int = 60, device: str = "auto") -> list[str]:
    """Train in `work` and read the diary."""
    (work / "texts").mkdir()
    for number in range(8):
        (work / f"texts/{number}.txt").write_text(SENTENCE * 40, encoding="utf-8")
    config = HorizonConfig(
        model=ModelConfig(config=MODEL),
        data=DataConfig(format=DataFormat.text, path=str(work / "texts"), tokenizer="bytes", validation_fraction=0.2),
        optim=OptimConfig(lr=5e-3, warmup_steps=5),
        train=TrainConfig(steps=steps, batch_size=4, seq_len=64, sample_tokens=0, save=False),
        eval=EvalConfig(rows=8, every=str(steps // 3)),
        checkpoint=CheckpointConfig(save_every=str(steps // 2)),
        device=device,
    )
    diary = Diary()
    horizon.Trainer(config, work / "run", callbacks=[diary]).run()
    return diary.lines


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(main(Path(folder))))
