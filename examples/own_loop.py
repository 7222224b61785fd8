"""A training loop of your own: a small Llama, from a dict, on the Python library's sources byte by byte.

    python examples/own_loop.py

The engine knows nothing of data or schedules: a batch is a dict of tensors, and `engine.lr` is yours to set.
"""

import sysconfig
from pathlib import Path

import torch

import horizon

MODEL = {
    "model_type": "llama",
    "vocab_size": 256,  # bytes need no tokenizer
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}
LR, WARMUP = 4e-3, 20


def read_bytes() -> torch.Tensor:
    """The sources of the standard library's top level, one token a byte. [tokens]"""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def draw_batch(tokens: torch.Tensor, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows from random places. Labels are the inputs: the model predicts each token from those before it."""
    starts = torch.randint(len(tokens) - length, (rows,)).tolist()
    input_ids = torch.stack([tokens[start : start + length] for start in starts])
    return {"input_ids": input_ids, "labels": input_ids}


def continue_text(engine: horizon.Engine, text: str, num_bytes: int) -> str:
    """`text` and bytes after it, drawn as the model expects them."""
    ids = torch.tensor([list(text.encode())])
    for _ in range(num_bytes):
        probabilities = engine.next_token_logits({"input_ids": ids}).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
    return bytes(ids[0].tolist()).decode(errors="replace")


def main(steps: int = 200, device: str = "auto") -> list[float]:
    """Train, print the progress and a sample; the loss of every step."""
    torch.manual_seed(0)
    tokens = read_bytes()
    losses = []
    with horizon.Engine.from_config(MODEL, optimizer=horizon.AdamW(lr=LR), device=device) as engine:
        print(engine.plan.table())
        for step in range(1, steps + 1):
            engine.lr = LR * min(1.0, step / WARMUP)
            result = engine.step(draw_batch(tokens, rows=8, length=128))
            losses.append(result.loss)
            if step % 20 == 0:
                print(f"step {step}: loss {result.loss:.3f}, gradient norm {result.grad_norm:.2f}")
        print(continue_text(engine, "    def ", num_bytes=80))
    return losses


if __name__ == "__main__":
    main()
