"""What checkpoints cost: steps with and without them in one process, against what the raw disk takes; then a resume.

    python profiling/checkpoint.py --shape qwen2.5-3b --tokens 65536 --every 10 --steps 20 --folder /scratch
    python profiling/checkpoint.py --shape tiny --device cpu --tokens 512 --seq-len 128 --every 4 --steps 8

Steps without come before and after those with, for a machine may change meanwhile; all follow one another with nothing
awaited in between, so that both kinds begin and end in the middle of updates: to wait for these at the end of each
would make the shorter one look slow. Steps that the last checkpoint still takes after its turn count for neither.

Every checkpoint is removed before the next one begins, so the disk needs room for one only; the time that takes is not
counted. The row tells: tokens per second of the steps without and with checkpoints, and seconds of those steps during
which one was being written; bytes, seconds and stall of each; the raw disk's speed by direct writes, before anything
else. A save that is due while one is being written is late: it begins with the first step after that. The last
checkpoint is then loaded by a new engine, whose next step must give the loss that the old one gave, where --seconds
leaves time for that.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import shutil
import statistics
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from step import SHAPES, facts, rows_of

import horizon
from horizon.checkpoint.saves import Save
from horizon.errors import CheckpointError
from horizon.units import GIB, MIB, format_bytes

LOAD_FACTOR = 1.5  # seconds that a load takes, of those that its save took; kept back for it


def raw_disk(folder: Path, num_bytes: int, num_threads: int = 4, block: int = 16 * MIB) -> float:
    """Bytes per second of direct writes to a new file, from the first until all is on disk."""
    path, buffer = folder / ".raw", mmap.mmap(-1, block)
    buffer.write(os.urandom(MIB) * (block // MIB))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        descriptor = os.open(path, flags | os.O_DIRECT)
    except OSError:  # no direct I/O here
        descriptor = os.open(path, flags)
    offsets = list(range(0, num_bytes, block))
    try:
        began = time.perf_counter()

        def write(number: int) -> None:
            for offset in offsets[number::num_threads]:
                os.pwrite(descriptor, buffer, offset)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.fsync(descriptor)
        return len(offsets) * block / (time.perf_counter() - began)
    finally:
        os.close(descriptor)
        path.unlink()


class Bench:
    """Runs steps and saves, and knows how long it may."""

    def __init__(self, engine: horizon.Engine, batches: list, args: argparse.Namespace, deadline: float) -> None:
        self.engine, self.batches, self.args, self.deadline = engine, batches, args, deadline
        self.losses: list[float] = []
        self.saves: list[dict] = []
        self.save: Save | None = None
        self.loss_after_save: float | None = None
        self.num_late, self.removal_s = 0, 0.0
        self.during: list[float] = []  # seconds of steps while a checkpoint was being written

    def steps(self, num_steps: int, every: int | None) -> tuple[int, float]:
        """Do so many steps, saving before each `every`th: (steps, seconds without what removing took)."""
        began, removed, done, due = time.perf_counter(), self.removal_s, 0, False
        while done < num_steps and time.perf_counter() < self.deadline:
            due = due or (every is not None and done % every == 0)
            if due and (self.save is None or self.save.done):
                self.begin_save()
                due = False
            elif due:
                self.num_late += 1
            writing = self.save is not None and not self.save.done
            started = time.perf_counter()
            loss = self.engine.step(self.batches).loss
            if writing:
                self.during.append(time.perf_counter() - started)
            if self.save is not None and self.loss_after_save is None:
                self.loss_after_save = loss
            done += 1
        return done, time.perf_counter() - began - (self.removal_s - removed)

    def steps_until_saved(self) -> None:
        """Do steps, which nobody counts, until the save under way is on disk."""
        while self.save is not None and not self.save.done and time.perf_counter() < self.deadline:
            self.steps(1, None)

    def begin_save(self) -> None:
        """Make room for the next checkpoint and begin it."""
        self.end_save()
        began = time.perf_counter()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.removal_s += time.perf_counter() - began
        self.save, self.loss_after_save = self.engine.save_checkpoint(self.folder), None

    def end_save(self) -> None:
        """Wait for the save under way, and keep what it took."""
        if self.save is not None:
            row = asdict(self.save.wait())
            self.saves.append(row)
            print(
                f"  checkpoint at step {row['step']}: {format_bytes(row['num_bytes'])} in {row['seconds']:.1f} s, "
                f"{row['bytes_per_s'] / 1e9:.2f} GB/s, stall {row['stall_s']:.3f} s (disk: {row['room_s']:.3f} s)",
                flush=True,
            )
            self.save = None

    @property
    def folder(self) -> Path:
        """Of the one checkpoint that there is."""
        return self.args.folder / "checkpoint"


def build(args: argparse.Namespace) -> dict:
    """The engine's settings."""
    memory = {"device_budget": args.device_budget, "policy": args.policy, "hbm_blocks": args.hbm_blocks}
    return {
        "optimizer": horizon.AdamW(lr=1e-5, moments=args.moments), "memory": horizon.MemoryConfig(**memory),
        "device": args.device, "clip": args.clip, "self_check": False,
    }  # fmt: skip


def measure(args: argparse.Namespace) -> dict:
    """One row."""
    started = time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.folder).free
    raw = raw_disk(args.folder, min(args.raw_gib * GIB, free // 4) // (16 * MIB) * 16 * MIB)
    print(f"raw disk: {raw / 1e9:.2f} GB/s direct, {format_bytes(free)} free in {args.folder}", flush=True)
    shape = SHAPES[args.shape]
    with horizon.Engine.from_config(shape, **build(args)) as engine:
        engine.plan_checkpoints(args.staging)
        rows = max(args.tokens // args.seq_len, 1)
        batches = rows_of(shape["vocab_size"], rows, args.seq_len, engine.plan_micro_batch(rows, args.seq_len))
        print(engine.plan.table(), f"built in {time.perf_counter() - started:.1f} s", sep="\n", flush=True)
        bench = Bench(engine, batches, args, deadline=started + args.seconds * 0.6)
        bench.steps(args.warmup, None)
        half = -(-(args.bare_steps or args.every) // 2)
        num_before, before_s = bench.steps(half, None)
        num_with, with_s = bench.steps(args.steps, args.every)
        bench.steps_until_saved()
        num_after, after_s = bench.steps(half, None)
        if not num_after or num_with < args.steps:
            sys.exit(f"--seconds {args.seconds} leave no time for all steps; give more, or fewer --bare-steps")
        bench.end_save()
        expected, planned, host = bench.loss_after_save, engine.plan.num_bytes("host"), engine.host_bytes
    num_bare, bare_s = num_before + num_after, before_s + after_s
    bare = args.tokens * num_bare / bare_s
    saving = args.tokens * num_with / with_s
    row = {
        "system": "checkpoints", "tokens": args.tokens, "num_parameters": engine.plan.num_parameters,
        "every": args.every, "staging": args.staging, "moments": args.moments, "raw_disk_bytes_per_s": raw,
        "tokens_per_s_without": bare, "steps_without": num_bare,
        "step_s_before": before_s / num_before, "step_s_after": after_s / num_after,
        "tokens_per_s_with": saving, "steps_with": num_with, "ratio": saving / bare,
        "step_s_while_saving": statistics.mean(bench.during) if bench.during else None,
        "steps_while_saving": len(bench.during),
        "late_steps": bench.num_late, "removal_s": bench.removal_s, "saves": bench.saves,
        "planned_host_gib": planned / GIB, "host_rss_gib": host / GIB, "device_gib": engine.device_bytes / GIB,
    }  # fmt: skip
    report(row, bare_s / num_bare)
    gc.collect()
    left = started + args.seconds - time.perf_counter()
    if left < LOAD_FACTOR * bench.saves[-1]["seconds"]:
        print(f"not resumed: {left:.0f} s are left of --seconds {args.seconds}", flush=True)
        return row
    return row | resumed(args, bench.folder, batches, expected)


def report(row: dict, step_s: float) -> None:
    """Print what the row says."""
    stall = max(save["stall_s"] for save in row["saves"])
    speed = row["saves"][-1]["bytes_per_s"]
    print(
        f"{row['tokens_per_s_without']:,.0f} tokens/s without, {row['tokens_per_s_with']:,.0f} with a checkpoint every "
        f"{row['every']} steps: {row['ratio']:.3f} (without, before {row['step_s_before']:.3f} s a step, after "
        f"{row['step_s_after']:.3f})\n"
        f"longest stall {stall:.3f} s, {stall / step_s:.1%} of a step; {row['late_steps']} steps late\n"
        f"{speed / 1e9:.2f} GB/s, {speed / row['raw_disk_bytes_per_s']:.0%} of the raw disk",
        flush=True,
    )


def resumed(args: argparse.Namespace, folder: Path, batches: list, expected: float) -> dict:
    """Load the checkpoint into a new engine and take the step that the old one took after it."""
    began = time.perf_counter()
    with horizon.Engine.load_checkpoint(folder, **build(args)) as engine:
        seconds = time.perf_counter() - began
        loss = engine.step(batches).loss
    error = abs(loss - expected) / abs(expected)
    print(f"resumed in {seconds:.1f} s; next loss {loss:.6f}, expected {expected:.6f} ({error:.1e} off)", flush=True)
    return {"load_s": seconds, "loss_resumed": loss, "loss_expected": expected, "loss_error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-3b")
    parser.add_argument("--tokens", type=int, default=65536, help="per step")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=20, help="with checkpoints")
    parser.add_argument("--bare-steps", type=int, help="without, half before those and half after; default: --every")
    parser.add_argument("--warmup", type=int, default=6, help="steps while the staging's pages come into being")
    parser.add_argument("--seconds", type=float, default=190, help="that all of it may take, about")
    parser.add_argument("--folder", type=Path, default=Path("checkpoint-bench"), help="on the disk to measure")
    parser.add_argument("--staging", default="auto")
    parser.add_argument("--raw-gib", type=int, default=4, help="written to measure the raw disk")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device-budget", default="auto")
    parser.add_argument("--policy", choices=["auto", "dram", "hbm_first"], default="auto")
    parser.add_argument("--hbm-blocks", type=int)
    parser.add_argument("--moments", choices=["float32", "bfloat16", "int8"], default="float32")
    parser.add_argument("--clip", choices=["exact", "speculative", "lagged"], default="exact")
    parser.add_argument("--out", type=Path, help="append the row (a JSON line) here")
    args = parser.parse_args()
    try:
        row = {"shape": args.shape, "seq_len": args.seq_len, **measure(args), **facts()}
    except CheckpointError as error:
        raise SystemExit(f"{error}") from error
    finally:
        for name in ("checkpoint", ".checkpoint.partial"):
            shutil.rmtree(args.folder / name, ignore_errors=True)
    print(json.dumps(row), flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
