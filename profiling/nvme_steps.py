"""Steps with states on a disk: what the plan said before they ran, then what they took and waited for.

    python profiling/nvme_steps.py --dir /path/on/the/disk
    python profiling/nvme_steps.py --dir /path/on/the/disk --policy nvme_all --clip none --rows 4 --tokens 128

A Llama of random weights on this machine's CPU or GPU; times are medians. The prediction is the engine's own, made from
passes, copies, an update and the disk, each timed alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

from horizon import AdamW, Engine, MemoryConfig
from horizon.plan.policies import POLICY_RULES

SHAPE = {"model_type": "llama", "vocab_size": 8000, "hidden_size": 768, "intermediate_size": 2048,
         "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4,
         "max_position_embeddings": 512}  # fmt: skip
WARM = 2  # steps before those that count
PARTS = "arithmetic", "link", "optimizer", "disk", "launch"


def run(policy: str, clip: str, folder: str, rows: int, tokens: int, steps: int) -> None:
    memory = MemoryConfig(policy=policy, nvme_dir=folder if policy in POLICY_RULES else None)
    clipping = {"max_grad_norm": None} if clip == "none" else {"clip": clip}
    optimizer = AdamW(lr=1e-5)
    with Engine.from_config(SHAPE, optimizer=optimizer, memory=memory, self_check=False, **clipping) as engine:
        part = engine.plan_micro_batch(rows, tokens)
        plan, said = engine.plan, engine.plan.prediction
        assert said is not None
        print(f"{policy}, clip={clip}, {rows} x {tokens} tokens, {plan.num_parameters / 1e6:.0f} M parameters, "
              f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
        print("  predicted", _line(said.seconds, [getattr(said, f"{name}_s") for name in PARTS]), said.bound)
        ids = torch.randint(0, engine.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
        batches = [{"input_ids": ids_part, "labels": ids_part} for ids_part in torch.split(ids, part)]
        for _ in range(WARM):
            engine.step(batches)
        seconds = []
        with engine.trace() as recording:
            for _ in range(steps):
                started = time.perf_counter()
                engine.step(batches)
                seconds.append(time.perf_counter() - started)
        split = recording.split
        print("  measured ", _line(statistics.median(seconds), [getattr(split, f"{n}_ms") / 1e3 for n in PARTS]))
        disk = [f"{t.what} {t.num_bytes / 1e9:.2f} GB" for t in split.traffic if t.direction == "disk"]
        print("  a step moves", ", ".join(disk) or "nothing to or from disk")


def _line(total: float, parts: list[float]) -> str:
    return f"{total:.2f} s: " + ", ".join(f"{n} {s:.2f}" for n, s in zip(PARTS, parts, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--policy", nargs="*", default=["dram", "nvme_optimizer", "nvme_all"])
    parser.add_argument("--clip", nargs="*", default=["exact", "none"])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args()
    for clip in asked.clip:
        for policy in asked.policy:
            run(policy, clip, asked.dir, asked.rows, asked.tokens, asked.steps)


if __name__ == "__main__":
    main()
