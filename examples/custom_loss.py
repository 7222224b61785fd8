"""A loss of your own: distil a teacher into a student.

    python examples/custom_loss.py

`loss_fn(logits, batch)` gets the logits of one micro-batch [rows, tokens, vocabulary] and the batch as you made it, on
the device, whatever tensors you put in: here the teacher's logits. It returns a scalar. All logits of a micro-batch
exist at once, which the built-in cross-entropy avoids, so take fewer rows at a time.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import horizon

VOCABULARY = 64
STUDENT: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def make_teacher() -> LlamaForCausalLM:
    """A model with opinions: random weights, larger than models usually begin with."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**STUDENT, "hidden_size": 96, "initializer_range": 0.2})).eval()


def distillation(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean divergence of the student's next-token distribution from the teacher's."""
    student = F.log_softmax(logits.float().flatten(0, 1), dim=-1)
    teacher = F.log_softmax(batch["teacher_logits"].flatten(0, 1), dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def main(steps: int = 150, device: str = "auto") -> tuple[float, float]:
    """Train the student; its divergence from the teacher before and after, on rows it was not trained on."""
    teacher, generator = make_teacher(), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def make_batch() -> dict[str, torch.Tensor]:
        input_ids = torch.randint(VOCABULARY, (16, 32), generator=generator)
        return {"input_ids": input_ids, "teacher_logits": teacher(input_ids).logits}

    held_out = make_batch()
    with horizon.Engine.from_config(STUDENT, optimizer=horizon.AdamW(lr=5e-3), device=device) as engine:
        before = engine.evaluate(held_out, loss_fn=distillation)
        for _ in range(steps):
            engine.step(make_batch(), loss_fn=distillation)
        after = engine.evaluate(held_out, loss_fn=distillation)
    print(f"divergence from the teacher: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
