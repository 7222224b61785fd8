"""A loop of your own that can be killed: it saves behind its steps, and goes on from the last checkpoint.

    python examples/resume.py runs/first        run it, stop it with Ctrl-C, run it again

`save_checkpoint` returns at once, and the checkpoint appears when all of it is on disk. `run` keeps what the engine
does not know of: here, where the loop is in its data.
"""

import sys
from pathlib import Path

import torch

import horizon
from horizon.checkpoint.folder import list_checkpoints, step_folder
from horizon.checkpoint.schedule import prune

MODEL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SAVE_EVERY, KEEP = 10, 2


def rows(first: int, num_rows: int) -> torch.Tensor:
    """Rows number `first` and following: each counts up from its own number. [rows, 32]"""
    return (torch.arange(first, first + num_rows)[:, None] + torch.arange(32)) % MODEL["vocab_size"]


def open_engine(folder: Path, device: str) -> tuple[horizon.Engine, int]:
    """The engine, and the next row: of the last checkpoint, or of the beginning."""
    settings = {"optimizer": horizon.AdamW(lr=3e-3), "device": device}
    engine, found = horizon.Engine.from_config(MODEL, **settings), list_checkpoints(folder)
    if not found:
        return engine, 0
    step, path = found[-1]
    print(f"going on from step {step}")
    return engine, engine.restore(path)["next_row"]


def main(folder: Path, steps: int = 60, device: str = "auto") -> dict[int, float]:
    """Train up to step `steps`; the loss of every step that was done now."""
    losses = {}
    engine, next_row = open_engine(folder, device)
    with engine:
        while engine.num_steps < steps:
            batch = rows(next_row, 8)
            next_row += 8
            loss = engine.step({"input_ids": batch, "labels": batch}).loss
            losses[engine.num_steps] = loss
            if engine.num_steps % SAVE_EVERY == 0:
                engine.save_checkpoint(step_folder(folder, engine.num_steps), run={"next_row": next_row})
                prune(folder, KEEP, keep_best=False)
                print(f"step {engine.num_steps}: loss {loss:.4f}, saving")
    return losses


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "resume-example"))
