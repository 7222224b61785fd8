"""How good is a checkpoint? Loss and accuracy by source, choices by likelihood, answers by greedy generation.

    python examples/evaluate_checkpoint.py

`horizon eval model.path=CHECKPOINT data=text data.path=PATH questions=FILE.jsonl` does the same without a script.
"""

import tempfile
from pathlib import Path

import torch

import horizon
from horizon.data.tokenizer import byte_tokenizer
from horizon.eval.metrics import by_source, tally_rows
from horizon.eval.questions import Choice, Exact
from horizon.eval.scoring import Sizes, answer_choices, answer_exactly, is_right
from horizon.generation.prompts import Prompt

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Greece": "Athens", "Norway": "Oslo", "Peru": "Lima"}
MODEL = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def rows_of(sentences: list[str]) -> dict[str, torch.Tensor]:
    """A batch with a sentence a row, padded with masked ends of text."""
    tokenizer = byte_tokenizer()
    rows = [[*tokenizer.encode(sentence), tokenizer.eos_token_id] for sentence in sentences]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
    real = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
    return {"input_ids": ids, "labels": ids.where(real, -100), "attention_mask": real.long()}


def train(folder: Path, steps: int, device: str) -> None:
    """Learn the capitals, and save a checkpoint."""
    batch = rows_of([f"{country}: {capital}" for country, capital in CAPITALS.items()])
    with horizon.Engine.from_config(MODEL, optimizer=horizon.AdamW(lr=3e-3), device=device) as engine:
        for _ in range(steps):
            engine.step(batch)
        engine.save_checkpoint(folder).wait()


def main(work: Path, steps: int = 80, device: str = "auto") -> dict[str, float]:
    """What the checkpoint is worth: token accuracy of learned and of other rows, and shares of right answers."""
    tokenizer, checkpoint = byte_tokenizer(), work / "checkpoint"
    train(checkpoint, steps, device)
    learned = [f"{country}: {capital}" for country, capital in CAPITALS.items()]
    other = ["Mars: nothing to see", "2 + 2 = 5 or so"]
    choices = [
        Choice(Prompt(f"{country}: "), tuple(CAPITALS.values()), number) for number, country in enumerate(CAPITALS)
    ]
    texts = [Exact(Prompt(f"{country}: "), (capital,)) for country, capital in CAPITALS.items()]

    with horizon.InferenceEngine.load_checkpoint(checkpoint, device=device) as engine:  # weights and nothing else
        print(engine.plan.table())
        scores = engine.score(rows_of(learned + other))  # one pass, whatever is asked of it
        sources = by_source(tally_rows(scores), ["learned"] * len(learned) + ["other"] * len(other))
        for source, tally in sources.items():
            print(f"{source}: loss {tally.loss:.3f}, perplexity {tally.perplexity:.3g}, accuracy {tally.accuracy:.1%}")
        chosen = answer_choices(engine, tokenizer, choices, Sizes())
        written = answer_exactly(engine, tokenizer, texts, Sizes(), max_new_tokens=12, stop="\n")
    found = {source: tally.accuracy for source, tally in sources.items()}
    found["choices"] = sum(result.by_sum == result.answer for result in chosen) / len(chosen)
    found["texts"] = sum(is_right(text, answer) for text, answer in zip(texts, written, strict=True)) / len(texts)
    for country, answer in zip(CAPITALS, written, strict=True):
        print(f"{country}: {answer}")
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = main(Path(folder))
    print(f"chosen rightly {found['choices']:.0%}, written rightly {found['texts']:.0%}")
