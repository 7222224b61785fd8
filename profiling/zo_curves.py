"""Fine-tune a model to tell which of two standard-library modules a line of code comes from: MeZO beside AdamW.

    horizon train hydra.run.dir=small                # the default small model, from random weights
    python profiling/zo_curves.py --model small/model --out curves.jsonl

The prompt is the line and `# from`, the answer the module's first token; the loss is the cross-entropy of the right
answer between the two. Lines that are tested on are held out, and none is in both modules. Accuracy compares the two
answers' logits; chance is 50 %.
Each row of the file is one evaluation; at the end the curves are printed as a table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from step import facts
from torch.nn import functional as F
from transformers import AutoTokenizer

import horizon

MODULES = "tkinter", "pydoc_data.topics"
ANSWERS = " tkinter", " topics"
PROMPT = " # from"
SHORTEST = 20  # characters of a line that says something
TOKENS = 28  # of a row


def lines_of(module: str) -> list[str]:
    """The module's distinct lines, in order, without the quotes around them."""
    spec = importlib.util.find_spec(module)
    text = Path(spec.origin).read_text(encoding="utf-8")
    lines = (line.strip().strip("'\"") for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if len(line) >= SHORTEST))


class Task:
    """Rows of the two modules' lines: `train` and `test`, each [rows, TOKENS], the answer last, padded in front."""

    def __init__(self, model: Path, num_train: int, num_test: int):
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.answers = [tokenizer.encode(answer)[0] for answer in ANSWERS]
        assert self.answers[0] != self.answers[1]
        every = [lines_of(module) for module in MODULES]
        common = set(every[0]) & set(every[1])
        prompt, rows = tokenizer.encode(PROMPT), []
        for answer, lines in zip(self.answers, every, strict=True):
            lines = [line for line in lines if line not in common]
            random.Random(0).shuffle(lines)
            ids = [tokenizer.encode(line)[: TOKENS - len(prompt) - 1] for line in lines]
            rows.append([[*line, *prompt, answer] for line in ids[: (num_train + num_test) // 2]])
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        mixed = [row for pair in zip(*rows, strict=True) for row in pair]
        self.rows = torch.tensor([[pad] * (TOKENS - len(row)) + row for row in mixed])
        self.mask = torch.tensor([[0] * (TOKENS - len(row)) + [1] * len(row) for row in mixed])
        self.test = torch.arange(num_test)
        self.train = torch.arange(num_test, len(mixed))

    def batch(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows of some numbers, without the answer, and which of the two it is."""
        right = (self.rows[index, -1] == self.answers[1]).long()
        return {"input_ids": self.rows[index, :-1], "attention_mask": self.mask[index, :-1], "right": right}

    def loss(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy between the two answers, after the last token of each row."""
        return F.cross_entropy(logits[:, -1, self.answers].float(), batch["right"])

    def batches(self, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of training rows for ever, in seeded order."""
        generator = torch.Generator().manual_seed(0)
        while True:
            yield self.batch(self.train[torch.randint(len(self.train), (size,), generator=generator)])

    def accuracy(self, engine: horizon.Engine) -> float:
        """Share of test rows whose right answer has the larger logit."""
        right = 0
        for index in self.test.split(100):
            batch = self.batch(index)
            guesses = engine.next_token_logits(batch)[:, self.answers].argmax(-1)
            right += int((guesses == batch["right"]).sum())
        return right / len(self.test)


def curve(name: str, optimizer: object, task: Task, args: argparse.Namespace, steps: int, every: int) -> Iterator[dict]:
    """A row every so many steps, the first before any."""
    batches, losses, started = task.batches(args.batch_size), [], time.perf_counter()
    with horizon.Engine.from_pretrained(
        str(args.model), optimizer=optimizer, device=args.device, max_grad_norm=1.0
    ) as engine:
        for step in range(steps + 1):
            if step % every == 0:
                loss = sum(losses) / len(losses) if losses else None
                row = {"optimizer": name, "step": step, "accuracy": task.accuracy(engine), "loss": loss,
                       "seconds": time.perf_counter() - started}  # fmt: skip
                print(json.dumps(row), flush=True)
                losses = []
                yield row
            losses.append(engine.step(next(batches), task.loss).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model to fine-tune")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2000, help="of MeZO")
    parser.add_argument("--first-order-steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-4, help="of MeZO")
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--momentum-steps", type=int, default=1)
    parser.add_argument("--first-order-lr", type=float, default=3e-4)
    parser.add_argument("--num-train", type=int, default=3000, help="lines to train on")
    parser.add_argument("--num-test", type=int, default=600)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=["mezo", "adamw"])
    parser.add_argument("--out", type=Path, help="append a row per evaluation (JSON lines) here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task, rows = Task(args.model, args.num_train, args.num_test), []
    mezo = horizon.ZerothOrder(
        lr=args.lr, eps=args.eps, queries=args.queries, momentum=args.momentum, momentum_steps=args.momentum_steps
    )
    adamw = horizon.AdamW(lr=args.first_order_lr)
    if args.only != "mezo":
        rows += curve("adamw", adamw, task, args, args.first_order_steps, max(1, args.first_order_steps // 10))
    if args.only != "adamw":
        rows += curve("mezo", mezo, task, args, args.steps, max(1, args.steps // 10))
    for name in ("mezo", "adamw"):
        print(f"| {name}: step | loss | held-out accuracy |\n|--:|--:|--:|")
        for row in (row for row in rows if row["optimizer"] == name):
            loss = "" if row["loss"] is None else f"{row['loss']:.3f}"
            print(f"| {row['step']:,} | {loss} | {row['accuracy']:.1%} |")
    if args.out:
        shared = facts()
        with args.out.open("a") as file:
            file.writelines(json.dumps({**row, **shared}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
