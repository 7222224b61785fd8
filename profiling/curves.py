"""Throughput against tokens per step and against the device budget, with what was predicted for each beside it.

    python profiling/curves.py tokens --shape qwen2.5-7b --device-budget 24GiB --out rows.jsonl
    python profiling/curves.py budgets --shape qwen2.5-7b --tokens 65536 --out rows.jsonl
    python profiling/curves.py table rows.jsonl > curves.md

Every prediction is made before a step of its shape has run. Tokens are swept in one engine, so that the update's pace
is a guess for the first point (it was tried on a little memory) and has been seen in earlier steps for the others;
each budget has an engine of its own. `table` makes Markdown of the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from step import SHAPES, facts, model_flops, prediction_row, rows_of

import horizon
from horizon.units import GIB

TOKENS = [4096, 8192, 16384, 32768, 65536, 131072, 262144]
BUDGETS = ["12GiB", "16GiB", "24GiB", "40GiB", "80GiB", "auto"]
LONG_S = 8.0  # a step predicted to take longer is timed once


def measured_seconds(step: Callable[[], object], expected_s: float) -> float:
    """The mean of two steps, or of a single long one, after another: the first of a shape may take host memory."""
    times = []
    num_timed = 1 if expected_s > LONG_S else 2
    for _ in range(1 + num_timed):
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    print("   steps:", " ".join(f"{t:.3f}" for t in times), flush=True)
    return statistics.mean(times[-num_timed:])


def build(args: argparse.Namespace, budget: str) -> horizon.Engine:
    started = time.perf_counter()
    engine = horizon.Engine.from_config(
        SHAPES[args.shape],
        optimizer=horizon.AdamW(lr=1e-5),
        memory=horizon.MemoryConfig(device_budget=budget, policy=args.policy),
        max_grad_norm=args.max_grad_norm or None,
        clip=args.clip,
        device="cuda",
        self_check=False,
    )
    print(f"engine of {budget} built in {time.perf_counter() - started:.1f} s", flush=True)
    return engine


def point(engine: horizon.Engine, args: argparse.Namespace, tokens: int, budget: str) -> dict:
    """Plan, predict, then run a few steps of `tokens` tokens."""
    rows = tokens // args.seq_len
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    micro_batch = engine.plan_micro_batch(rows, args.seq_len)
    plan_s = time.perf_counter() - started
    print(engine.plan.table(), flush=True)
    predicted = prediction_row(engine.plan.prediction)
    batches = rows_of(engine.vocab_size, rows, args.seq_len, micro_batch)
    seconds = measured_seconds(lambda: engine.step(batches), predicted.get("predicted_seconds", 0.0))
    num_parameters = engine.plan.num_parameters
    return {
        "shape": args.shape, "seq_len": args.seq_len, "tokens": tokens, "device_budget": budget,
        "max_grad_norm": args.max_grad_norm, "clip": args.clip, "policy": args.policy,
        "activations": [line.purpose for line in engine.plan.activations if line.num_bytes],
        "in_hbm": [line.purpose for line in engine.plan.lines if line.purpose.startswith("states of")],
        "turn_layers": engine.plan.turn_layers, "micro_batch": micro_batch, "seconds": seconds,
        "tokens_per_s": tokens / seconds, **predicted,
        "prediction_error": predicted["predicted_seconds"] / seconds - 1 if predicted else None,
        "model_tflops": model_flops(SHAPES[args.shape], num_parameters, tokens, args.seq_len) / seconds / 1e12,
        "device_gib": engine.device_bytes / GIB, "planned_device_gib": engine.plan.num_bytes("device") / GIB,
        "host_rss_gib": engine.host_bytes / GIB, "plan_s": plan_s,
    }  # fmt: skip


def sweep_tokens(args: argparse.Namespace) -> Iterator[dict]:
    """One engine, steps of growing numbers of tokens."""
    with build(args, args.device_budget) as engine:
        settle(engine, args)
        for tokens in args.tokens:
            yield {"curve": "tokens", **point(engine, args, tokens, args.device_budget)}


def sweep_budgets(args: argparse.Namespace) -> Iterator[dict]:
    """One engine after the other, steps of the same number of tokens."""
    for budget in args.budgets:
        with build(args, budget) as engine:
            settle(engine, args)
            yield {"curve": "budgets", **point(engine, args, args.tokens[0], budget)}
        del engine
        torch.cuda.empty_cache()


def settle(engine: horizon.Engine, args: argparse.Namespace) -> None:
    """A short step: the first update takes the states' pages, which no later one does."""
    engine.step(rows_of(engine.vocab_size, 1, args.seq_len, 1))


def markdown(rows: Sequence[dict]) -> str:
    """A table and a chart per curve; rows of one curve are of one shape."""
    parts = []
    for curve, title, key in (
        ("tokens", "Throughput against tokens per step", "tokens"),
        ("budgets", "Throughput against the device budget", "device_budget"),
    ):
        mine = [row for row in rows if row["curve"] == curve]
        if mine:
            parts += [*_heading(title, mine), *_table(mine, key), "", *_chart(mine, key), ""]
    return "\n".join(parts)


def _heading(title: str, rows: Sequence[dict]) -> Iterable[str]:
    first = rows[0]
    settings = [f"T = {first['seq_len']}", f"clip {first['clip']}" if first["max_grad_norm"] else "no clipping"]
    if first["curve"] == "tokens":
        settings.append(f"device budget {first['device_budget']}")
    else:
        settings.append(f"{first['tokens']:,} tokens a step")
    yield f"## {title}: {first['shape']}"
    yield ""
    yield f"{', '.join(settings)}; {first['machine']}, commit {first['commit']}, {first['date']}."
    yield "Each prediction was made before a step of its shape had run."
    yield ""


def _table(rows: Sequence[dict], key: str) -> Iterable[str]:
    yield (
        f"| {key.replace('_', ' ')} | rows a micro-batch | measured s | predicted s | error | measured tok/s "
        "| predicted tok/s | bound | arithmetic / link / optimizer / launches, predicted s |"
    )
    yield "|" + "---|" * 9
    for row in rows:
        if row.get("predicted_seconds") is None:
            prediction = ["-"] * 5
        else:
            parts = " / ".join(f"{row['predicted_parts'][p]:.2f}" for p in row["predicted_parts"])
            prediction = [
                f"{row['predicted_seconds']:.2f}", f"{row['prediction_error']:+.1%}",
                f"{row['tokens'] / row['predicted_seconds']:,.0f}", row["bound"], parts,
            ]  # fmt: skip
        predicted_s, error, predicted_rate, bound, parts = prediction
        point_ = f"{row[key]:,}" if isinstance(row[key], int) else row[key]
        yield (
            f"| {point_} | {row['micro_batch']} | {row['seconds']:.2f} | {predicted_s} | {error} "
            f"| {row['tokens_per_s']:,.0f} | {predicted_rate} | {bound} | {parts} |"
        )


def _chart(rows: Sequence[dict], key: str) -> Iterable[str]:
    """A Mermaid chart: the first line measured, the second predicted."""
    names = [f"{row[key] // 1024}k" if isinstance(row[key], int) else row[key] for row in rows]
    predicted = [row for row in rows if row.get("predicted_seconds") is not None]
    yield from ("```mermaid", "xychart-beta", '    title "tokens/s: measured, predicted"')
    yield f"    x-axis [{', '.join(names)}]"
    yield f"    line [{', '.join(str(round(row['tokens_per_s'])) for row in rows)}]"
    if len(predicted) == len(rows):
        yield f"    line [{', '.join(str(round(row['tokens'] / row['predicted_seconds'])) for row in rows)}]"
    yield "```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    for name, tokens in (("tokens", TOKENS), ("budgets", [65536])):
        mode = modes.add_parser(name)
        mode.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
        mode.add_argument("--seq-len", type=int, default=1024)
        mode.add_argument("--max-grad-norm", type=float, default=1.0, help="0: no clipping")
        mode.add_argument("--clip", default="exact", help="exact, speculative or lagged")
        mode.add_argument("--policy", default="auto", help="auto, dram or hbm_first")
        mode.add_argument("--tokens", type=int, nargs="+", default=tokens, help="tokens per step")
        mode.add_argument("--out", type=Path, help="append result rows (JSON lines) here")
    modes.choices["tokens"].add_argument("--device-budget", default="24GiB")
    modes.choices["budgets"].add_argument("--budgets", nargs="+", default=BUDGETS)
    modes.add_parser("table").add_argument("rows", type=Path, help="JSON lines")
    args = parser.parse_args()
    if args.mode == "table":
        print(markdown([json.loads(line) for line in args.rows.read_text().splitlines()]))
        return
    for row in (sweep_tokens if args.mode == "tokens" else sweep_budgets)(args):
        print(json.dumps(row), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({**row, **facts()}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
