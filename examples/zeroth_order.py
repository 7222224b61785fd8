"""Optimise what has no gradient: an accuracy, by two forward passes a step.

    python examples/zeroth_order.py

A zeroth-order step asks for nothing but the loss at w + eps z and w - eps z, so `loss_fn` may return any number: here
the share of wrong answers to "is this digit even?". Nothing is differentiated, and weights are perturbed in
copies only. The steps are a log of some kilobytes, from which the weights are rebuilt bit for bit.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import horizon

ODD, EVEN = 10, 11  # tokens 0 to 9 are digits
SMALL: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 12, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SETTINGS = horizon.ZerothOrder(lr=1e-3, eps=5e-2, queries=4, momentum=0.8, momentum_steps=6)


def questions(num_rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows of one digit, and whether it is even."""
    digits = torch.randint(10, (num_rows, 1), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": digits, "answer": torch.where(digits[:, 0] % 2 == 0, EVEN, ODD)}


def wrong_answers(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> float:
    """Share of rows whose likelier answer of the two is wrong."""
    guesses = logits[:, -1, ODD:].argmax(-1) + ODD
    return float((guesses != batch["answer"]).float().mean())


def main(steps: int = 100, device: str = "auto") -> tuple[float, float]:
    """Share of wrong answers before and after."""
    held_out = questions(500, seed=-1)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "replay.jsonl"
        with horizon.Engine.from_config(SMALL, optimizer=SETTINGS, device=device) as engine:
            engine.log_steps(log)
            before = engine.evaluate(held_out, loss_fn=wrong_answers)
            for step in range(steps):
                engine.step(questions(100, seed=step), loss_fn=wrong_answers)
            after = engine.evaluate(held_out, loss_fn=wrong_answers)
        with horizon.Engine.from_config(SMALL, optimizer=SETTINGS, device=device) as again:
            again.replay(log)
            replayed = again.evaluate(held_out, loss_fn=wrong_answers)
        print(f"wrong answers: {before:.1%} before, {after:.1%} after {steps} steps")
        print(f"replayed from {log.stat().st_size / 1024:.0f} KiB: {replayed:.1%}")
    return before, after


if __name__ == "__main__":
    main()
