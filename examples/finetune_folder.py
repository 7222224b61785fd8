"""Fine-tune a Hugging Face folder and hand it back: what goes in and what comes out is what transformers reads.

    python examples/finetune_folder.py

So that it runs anywhere, the folder is first made: a tiny Qwen3 with random weights. Yours is a download.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import horizon


def make_folder(folder: Path) -> None:
    """A model folder as `save_pretrained` or the hub give it, in bf16 as most are."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)


def counting_rows(rows: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Something to learn: rows that count up from a random number."""
    starts = torch.randint(256, (rows, 1), generator=generator)
    input_ids = (starts + torch.arange(length)) % 256
    return {"input_ids": input_ids, "labels": input_ids}


def main(work: Path, steps: int = 60, device: str = "auto") -> tuple[float, float]:
    """Train `work`/base into `work`/tuned; the loss before, and that of the saved model as transformers computes it."""
    generator = torch.Generator().manual_seed(0)
    held_out = counting_rows(16, 32, generator)
    make_folder(work / "base")
    with horizon.Engine.from_pretrained(
        work / "base",
        optimizer=horizon.AdamW(lr=3e-3),
        memory=horizon.MemoryConfig(device_budget="8GiB"),  # never more than this; on CPU, of the buffers in its place
        freeze=["*norm*"],  # just to show it: these parameters stay as they are and take no optimizer memory
        device=device,
    ) as engine:
        before = engine.evaluate(held_out)
        for _ in range(steps):
            engine.step(counting_rows(16, 32, generator))
        engine.save_pretrained(work / "tuned", dtype="bfloat16")  # the default, float32, keeps the masters exactly

    model = AutoModelForCausalLM.from_pretrained(work / "tuned", dtype=torch.float32)
    with torch.no_grad():
        after = float(model(**held_out).loss)
    print(f"held-out loss: {before:.3f} before, {after:.3f} after, by transformers from {work / 'tuned'}")
    return before, after


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
