"""What a run says when it is over, and when it failed."""

from __future__ import annotations

from pathlib import Path

from horizon.config.schema import Clip, HorizonConfig
from horizon.records import RunSummary
from horizon.report.split import describe_split


def describe_end(summary: RunSummary, config: HorizonConfig, clip: Clip) -> str:
    """What a finished run came to, and where its files are; `clip`: how gradients were clipped in the end."""
    folder = Path(summary.output_dir)
    lines = [f"{summary.steps} steps, {summary.num_tokens:,} tokens, {summary.tokens_per_s:,.0f} tokens/s"]
    if summary.stopped_early is not None:
        lines.append(f"stopped early, at step {summary.steps} of {config.train.steps}: {summary.stopped_early}")
    if clip is not Clip.exact:
        corrected = f", {summary.corrected_blocks} updates of blocks corrected" if summary.corrected_blocks else ""
        lines.append(f"{summary.clip}: {summary.clipped_steps} steps clipped{corrected}")
    if summary.simulated:
        lines.append("the cxl tier was simulated: none of these times is that of a real one")
    if summary.split is not None:
        lines.append(describe_split(summary.split))
    if config.optim.name == "mezo":
        log = folder / "replay.jsonl"
        lines.append(f"replay   {log} (horizon replay base=FOLDER log={log} out=FOLDER)")
    lines.append(f"metrics  {folder / 'metrics.jsonl'}\nsettings {folder / 'config.yaml'}")
    if summary.checkpoint is not None:
        lines.append(f"saved    {summary.checkpoint}")
    if summary.trace_file is not None:
        lines.append(f"trace    {summary.trace_file} (open it at https://ui.perfetto.dev) and trace.png beside it")
    if summary.model_dir is not None:
        lines.append(f"model    {summary.model_dir}")
    return "\n".join(lines)


def describe_stop(folder: Path, step: int, config: HorizonConfig, checkpoint: Path | None, command: str | None) -> str:
    """Where a run ended too early, and how to go on.

    Args:
        checkpoint: the last one on disk, or that which the run began with; the log of a run of optim=mezo.
        command: the one that began the run, without `resume`; None: a script did.
    """
    stopped = f"\nstopped after step {step} of {config.train.steps}; metrics in {folder / 'metrics.jsonl'}"
    if checkpoint is None:
        return (
            f"{stopped}\nno checkpoint is on disk to go on from (checkpoint.save_every={config.checkpoint.save_every})"
        )
    resume = "auto" if checkpoint.resolve().is_relative_to(folder.resolve()) else str(checkpoint)
    again = f"resume={resume} and the same folder" if command is None else f"{command} resume={resume}"
    return f"{stopped}\ngo on from {checkpoint.name}: {again}"
