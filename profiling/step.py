"""Time a training step of Horizon against the resident baseline, in one process on one GPU.

    python profiling/step.py --shape qwen2.5-7b --tokens 32768 131072 --device-budget 24GiB --out results.jsonl

The resident baseline keeps everything in GPU memory: the same layers with checkpointing per layer, Liger kernels when
installed, forward and backward only, no optimizer. Horizon's step is whole: forward, backward, global clip, AdamW on
the host. Each row carries machine, commit, versions and command; times are medians over the steady steps. With --trace
FILE one more step of each size is recorded: its timeline goes to FILE (the tokens added to its name where there are
several sizes), and where its time went into the row (`split`).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import horizon
from horizon.models.kernels import liger_available
from horizon.plan.prediction import StepPrediction
from horizon.report.split import describe_split
from horizon.units import GIB

SHAPES = {
    "tiny": {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
             "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000},
    "qwen2.5-0.5b": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                     "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
                     "tie_word_embeddings": True},
    "qwen2.5-3b": {"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                   "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
                   "tie_word_embeddings": True},
    "qwen2.5-7b": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                   "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                   "tie_word_embeddings": False},
}  # fmt: skip


def model_flops(shape: dict, num_parameters: int, tokens: int, seq_len: int) -> float:
    """6 x matmul parameters + causal attention (6 L T H) a token; no recomputation, no input embedding."""
    embedding = 0 if shape.get("tie_word_embeddings") else shape["vocab_size"] * shape["hidden_size"]
    attention = 6 * shape["num_hidden_layers"] * seq_len * shape["hidden_size"]
    return tokens * (6 * (num_parameters - embedding) + attention)


def rows_of(vocab: int, rows: int, seq_len: int, micro_batch: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab, (rows, seq_len), generator=generator)
    return [{"input_ids": part, "labels": part} for part in tokens.split(micro_batch)]


def seconds_per_step(step: Callable[[], object], num_steps: int, num_warmup: int = 2) -> float:
    """Median of the steps after the warm-up."""
    times = []
    for _ in range(num_steps + num_warmup):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    print("   steps:", " ".join(f"{t:.3f}" for t in times), flush=True)
    return statistics.median(times[num_warmup:])


def resident(shape: dict, args: argparse.Namespace) -> Iterator[dict]:
    """One row per number of tokens."""
    config = AutoConfig.for_model(**shape)
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if liger_available():
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model)
    model.train()
    if args.resident_recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    num_parameters = sum(p.numel() for p in model.parameters())
    for tokens in args.tokens:
        rows = tokens // args.seq_len
        batches = rows_of(shape["vocab_size"], rows, args.seq_len, min(rows, args.resident_rows))
        batches = [{k: v.cuda() for k, v in b.items()} for b in batches]
        torch.cuda.reset_peak_memory_stats()

        def step(batches: list = batches) -> None:
            for batch in batches:
                model(**batch, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

        seconds = seconds_per_step(step, args.steps, 2 if tokens == args.tokens[0] else 1)
        yield {
            "system": "resident", "tokens": tokens, "seconds": seconds, "num_parameters": num_parameters,
            "device_gib": torch.cuda.max_memory_reserved() / GIB, "micro_batch": min(rows, args.resident_rows),
            "recompute": args.resident_recompute,
        }  # fmt: skip


def streamed(shape: dict, args: argparse.Namespace) -> Iterator[dict]:
    """One row per number of tokens."""
    started = time.perf_counter()
    engine = horizon.Engine.from_config(
        shape,
        optimizer=horizon.AdamW(lr=1e-5, moments=args.moments),
        memory=horizon.MemoryConfig(
            device_budget=args.device_budget,
            weight_slots=args.weight_slots,
            policy=args.policy,
            hbm_blocks=args.hbm_blocks,
            turn_layers=args.turn_layers,
        ),
        max_grad_norm=args.max_grad_norm or None,
        clip=args.clip,
        device="cuda",
        self_check=False,
    )
    print(f"engine built in {time.perf_counter() - started:.1f} s", flush=True)
    with engine:
        for tokens in args.tokens:
            rows = tokens // args.seq_len
            micro_batch = engine.plan_micro_batch(rows, args.seq_len, args.micro_batch or None)
            predicted = prediction_row(engine.plan.prediction)
            batches = rows_of(shape["vocab_size"], rows, args.seq_len, micro_batch)
            warmup, results = args.warmup if tokens == args.tokens[0] else 1, []
            seconds = seconds_per_step(
                lambda batches=batches, results=results: results.append(engine.step(batches)), args.steps, warmup
            )
            split = recorded(engine, batches, args, tokens) if args.trace else None
            print(engine.plan.table(), flush=True)
            num_parameters = engine.plan.num_parameters
            purposes = [line.purpose for line in engine.plan.lines]
            yield {
                "system": "horizon", "tokens": tokens, "seconds": seconds, "num_parameters": num_parameters,
                "device_gib": engine.device_bytes / GIB, "host_rss_gib": engine.host_bytes / GIB,
                "host_bytes_per_param": engine.host_bytes / num_parameters, "micro_batch": micro_batch,
                "planned_host_gib": engine.plan.num_bytes("host") / GIB,
                "planned_device_gib": engine.plan.num_bytes("device") / GIB,
                "moments": args.moments, "policy": args.policy,
                "in_hbm": next((p for p in purposes if p.startswith("states of")), "none"),
                "turn_layers": engine.plan.turn_layers,
                "device_budget": args.device_budget, "max_grad_norm": args.max_grad_norm,
                "clip": args.clip, "split": split,
                "clip_scales": [result.clip_scale for result in results],
                "corrected_blocks": [result.corrected_blocks for result in results],
                **predicted,
                "prediction_error": predicted["predicted_seconds"] / seconds - 1 if predicted else None,
            }  # fmt: skip


def recorded(engine: horizon.Engine, batches: list, args: argparse.Namespace, tokens: int) -> dict:
    """Write the timeline of one more steady step; give where its time went."""
    path = args.trace if len(args.tokens) == 1 else args.trace.with_stem(f"{args.trace.stem}-{tokens}")
    with engine.trace(path) as recording:
        engine.step(batches)
    assert recording.split is not None
    print(describe_split(recording.split), f"  timeline: {path}", sep="\n", flush=True)
    return dataclasses.asdict(recording.split)


def prediction_row(prediction: StepPrediction | None) -> dict:
    """Of a step of the planned shape, before any was run."""
    if prediction is None:
        return {}
    parts = {name: getattr(prediction, name) for name in ("arithmetic_s", "link_s", "optimizer_s", "launch_s")}
    return {"predicted_seconds": prediction.seconds, "bound": prediction.bound, "predicted_parts": parts}


def facts() -> dict:
    """Machine, commit, versions and command: what makes a row comparable."""
    name = os.environ.get("HORIZON_COMMIT") or _commit()
    packages = ("torch", "transformers", "triton", "numba", "liger-kernel")
    versions = {p: metadata.version(p) for p in packages if _installed(p)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "machine": f"{device}, {os.cpu_count()} cores, {platform.platform()}",
        "commit": name, "versions": versions, "date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv),
    }  # fmt: skip


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768], help="tokens per step")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after those for warm-up")
    parser.add_argument("--warmup", type=int, default=2, help="with clip=speculative 12: the moments must be in swing")
    parser.add_argument("--device-budget", default="24GiB")
    parser.add_argument("--weight-slots", type=int, default=2)
    parser.add_argument("--moments", choices=["float32", "bfloat16", "int8"], default="float32")
    parser.add_argument("--policy", choices=["auto", "dram", "hbm_first"], default="auto")
    parser.add_argument("--turn-layers", type=int, help="so many layers at the turn; default: the plan decides")
    parser.add_argument("--hbm-blocks", type=int, help="so many blocks in HBM; default: the policy decides")
    parser.add_argument("--micro-batch", type=int, default=0, help="rows; 0: the most that fits")
    parser.add_argument("--resident-rows", type=int, default=16, help="rows per micro-batch of the baseline")
    parser.add_argument("--resident-recompute", choices=["full", "none"], default="full", help="of its layers")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="0: no clipping")
    parser.add_argument("--clip", choices=["exact", "speculative", "lagged"], default="exact")
    parser.add_argument("--systems", nargs="+", default=["streamed", "resident"])
    parser.add_argument("--out", type=Path, help="append result rows (JSON lines) here")
    parser.add_argument("--trace", type=Path, help="write the timeline of one steady step here (for Perfetto)")
    args = parser.parse_args()
    shape, rows = SHAPES[args.shape], []
    # Horizon first: applying Liger to the baseline replaces classes in transformers for the rest of the process.
    for run in (streamed, resident):
        if run.__name__ in args.systems:
            rows += list(run(shape, args))
        gc.collect()
        torch.cuda.empty_cache()
    shared = facts()  # only now: asking for the device's name takes it, and the engine measures what that costs
    baseline = {row["tokens"]: row["tokens"] / row["seconds"] for row in rows if row["system"] == "resident"}
    for row in rows:
        row["tokens_per_s"] = row["tokens"] / row["seconds"]
        flops = model_flops(shape, row["num_parameters"], row["tokens"], args.seq_len)
        row["model_tflops"] = flops / row["seconds"] / 1e12
        row["of_resident"] = row["tokens_per_s"] / baseline[row["tokens"]] if baseline else None
        row = {"shape": args.shape, "seq_len": args.seq_len, **row, **shared}
        print(json.dumps({k: row[k] for k in row if k not in shared}), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
