"""One record of each kind that a run emits."""

from horizon.records import CheckpointRow, EvalRow, RunSummary, Score, StepRow

STEP = StepRow(
    step=1, epoch=0, loss=2.5, lr=1e-3, grad_norm=0.75, num_tokens=2048, num_trained_tokens=2000, seconds=0.5,
    tokens_per_s=4096.0, host_bytes=3 << 30, device_bytes=5 << 20, skipped=False, clip_scale=1.0, corrected_blocks=0,
    resident_share=0.97, projected_gradients=[], simulated=False, time=1.7e9,
)  # fmt: skip
EVAL = EvalRow(
    step=2, loss=2.0, perplexity=7.5, accuracy=0.25, num_tokens=40, num_rows=4, seconds=0.25, time=1.7e9,
    sources={
        "code": Score(loss=1.0, perplexity=2.7, accuracy=0.5, num_tokens=20, num_rows=2),
        "prose": Score(loss=3.0, perplexity=20.0, accuracy=0.0, num_tokens=20, num_rows=2),
    },
)  # fmt: skip
CHECKPOINT = CheckpointRow(
    step=1, folder="checkpoints/step-00000001", num_bytes=1000, seconds=2.0, bytes_per_s=500.0, stall_s=0.1, room_s=0.0,
    time=1.7e9,
)  # fmt: skip
SUMMARY = RunSummary(
    steps=2, num_tokens=4096, seconds=1.0, tokens_per_s=4096.0, loss=2.0, clip="exact", clipped_steps=0,
    corrected_blocks=0, simulated=False, validation_loss_before=3.0, validation_loss_after=2.0, stopped_early=None,
    sample_before=None, sample_after=None, split=None, output_dir="out", model_dir=None, checkpoint=None,
    resumed_from=None, trace_file=None,
)  # fmt: skip
