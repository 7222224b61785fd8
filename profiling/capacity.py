"""Train models that host memory alone, or a small device, would not hold: losses, peaks, and time against its bounds.

    python profiling/capacity.py --dir /path/on/the/disk --out results.jsonl              all cases, one process each
    python profiling/capacity.py --dir /path/on/the/disk --case 14b-nvme --steps 4
    python profiling/capacity.py --tiny                                                   a minute on a laptop's CPU

Each case takes steps on the same random tokens, so the loss must fall. The last step is recorded. Its bounds: the
kernels' own time, and the bytes that it read and wrote on disk at the rate that raw access to the same disk reaches
doing both at once (as in `horizon bench tiers`), measured before the engine is built. `of_bound` is its time over the
larger.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from step import SHAPES, facts, rows_of

import horizon
from horizon.bench.nvme import Raw
from horizon.report.split import describe_split
from horizon.store.disk import PIECE
from horizon.units import GIB

RAW_PIECES, RAW_THREADS = 128, 4

QWEN = {"model_type": "qwen2", "vocab_size": 152064, "tie_word_embeddings": False, "num_key_value_heads": 8,
        "num_attention_heads": 40, "hidden_size": 5120}  # fmt: skip
QWEN_14B = {**QWEN, "intermediate_size": 13824, "num_hidden_layers": 48}
QWEN_32B = {**QWEN, "intermediate_size": 27648, "num_hidden_layers": 64}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    shape: dict[str, Any]
    optimizer: dict[str, Any]
    max_grad_norm: float | None
    memory: dict[str, Any] = field(default_factory=dict)
    on_nvme: bool = False  # what host memory does not hold
    clip: str = "exact"
    tokens: int = 32768
    seq_len: int = 1024


CASES = {
    "14b-int8": Case(QWEN_14B, {"moments": "int8"}, None, {"policy": "dram"}),
    "14b-int8-exact": Case(QWEN_14B, {"moments": "int8"}, 1.0, {"policy": "dram"}),
    "14b-nvme": Case(QWEN_14B, {}, None, {"hbm_blocks": 0}, on_nvme=True),
    "32b-bf16": Case(QWEN_32B, {"master": "bf16_stochastic", "moments": "int8"}, None, {}, on_nvme=True),
    "7b-8gib": Case(SHAPES["qwen2.5-7b"], {}, 1.0, {"policy": "dram", "device_budget": "8GiB", "weight_slots": 1}),
}


def tiny(case: Case) -> Case:
    """The same settings for a model that trains in seconds on a CPU, where nothing spills by itself."""
    memory = {key: value for key, value in case.memory.items() if key != "device_budget"}
    if case.on_nvme:
        memory = {"policy": "nvme_optimizer"}
    shape = {"model_type": "qwen2", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512,
             "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    return dataclasses.replace(case, shape=shape, memory=memory, tokens=512, seq_len=64)


def disk_rate(folder: Path) -> float:
    """Bytes a second of raw access that reads and writes at once."""
    num_bytes = RAW_PIECES * PIECE
    raw = Raw(folder, num_bytes, RAW_THREADS)
    try:
        raw.move((True,))
        times = []
        for _ in range(3):
            started = time.perf_counter()
            raw.move((False, True))
            times.append(time.perf_counter() - started)
        return 2 * num_bytes / min(times)
    finally:
        raw.close()


def run(case: Case, folder: Path, num_steps: int, lr: float) -> dict[str, Any]:
    """Train, and what there is to say of it."""
    rate = disk_rate(folder) if case.on_nvme else None
    started = time.perf_counter()
    disk = {"nvme_dir": str(folder)} if case.on_nvme else {}
    engine = horizon.Engine.from_config(
        case.shape,
        optimizer=horizon.AdamW(lr=lr, **case.optimizer),
        memory=horizon.MemoryConfig(**case.memory, **disk),
        max_grad_norm=case.max_grad_norm,
        clip=case.clip,
        self_check=False,
    )
    print(f"engine built in {time.perf_counter() - started:.1f} s", flush=True)
    with engine, tempfile.TemporaryDirectory() as scratch:
        rows = case.tokens // case.seq_len
        micro_batch = engine.plan_micro_batch(rows, case.seq_len)
        print(engine.plan.table(), flush=True)
        batches = rows_of(case.shape["vocab_size"], rows, case.seq_len, micro_batch)
        results = []
        for _ in range(num_steps):
            results.append(engine.step(batches))
            print(f"  loss {results[-1].loss:.4f} in {results[-1].seconds:.2f} s", flush=True)
        with engine.trace(Path(scratch) / "trace.json") as recording:
            results.append(engine.step(batches))
        print(f"  loss {results[-1].loss:.4f}, recorded", flush=True)
        split, plan = recording.split, engine.plan
        assert split is not None
        print(describe_split(split), flush=True)
        moved = sum(traffic.num_bytes for traffic in split.traffic if traffic.direction == "disk")
        arithmetic_s, disk_s = split.arithmetic_ms / 1e3, moved / rate if rate else 0.0
        losses = [result.loss for result in results]
        return {
            "parameters": plan.num_parameters, "tokens": case.tokens, "micro_batch": micro_batch, "losses": losses,
            "falls": all(b < a for a, b in pairwise(losses)),
            "step_s": split.step_ms / 1e3, "all_step_s": [result.seconds for result in results],
            "arithmetic_s": arithmetic_s, "disk_s": disk_s, "disk_gb_per_s": rate and rate / 1e9,
            "of_bound": split.step_ms / 1e3 / max(arithmetic_s, disk_s, 1e-9),
            "host_bytes_per_param": engine.host_bytes / plan.num_parameters,
            "host_gib": engine.host_bytes / GIB, "planned_host_gib": plan.num_bytes("host") / GIB,
            "device_gib": engine.device_bytes / GIB, "planned_device_gib": plan.num_bytes("device") / GIB,
            "nvme_gib": plan.num_bytes("nvme") / GIB, "split": dataclasses.asdict(split),
        }  # fmt: skip


def main() -> None:
    """Run the cases, each in a process of its own, or one of them in this."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="in this process; default: all, each in its own")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="a folder on the disk that states go to")
    parser.add_argument("--steps", type=int, default=3, help="before the one that is recorded")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    parser.add_argument("--out", type=Path, help="append result rows (JSON lines) here")
    args = parser.parse_args()
    if args.case is None:
        failed = [case for case in CASES if subprocess.run([*sys.orig_argv, "--case", case]).returncode]
        sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
    print(f"== {args.case}", flush=True)
    torch.manual_seed(0)
    case = tiny(CASES[args.case]) if args.tiny else CASES[args.case]
    row = {"case": args.case, "tiny": args.tiny, **run(case, args.dir, args.steps, args.lr), **facts()}
    print(json.dumps({key: row[key] for key in row if key not in ("split", "versions")}), flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
