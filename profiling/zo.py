"""Time zeroth-order steps: tokens per second against the link and the arithmetic of the same machine, measured here.

    python profiling/zo.py --shape opt-6.7b --batch 1 8 --master fp16 --writeback-every 1 8 --out results.jsonl
    python profiling/zo.py --shape tiny --device cpu --seq-len 64

Weights are cheap random values, drawn once and repeated, so that a model of 30B begins in the time that touching its
memory takes. Each row carries machine, commit, versions and command; `seconds` is the mean of the steps after the
warm-up, as many as `--seconds` allows. The limits: `link_tokens_per_s` moves the streamed weights up alone, in pieces
as large as a layer; `link_both_tokens_per_s` up and down at once; `matmul_tflops` is two products as large as a
layer's at the row's tokens, repeated for half a second. With --trace FILE two more steps of each row are recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from step import SHAPES as DECODERS
from step import facts, rows_of
from torch.nn.attention import SDPBackend

import horizon
from horizon.building import Parts
from horizon.config.schema import ComputeDtype, Kernels, MemoryConfig, OnNonFinite
from horizon.engine import Engine
from horizon.models import attention
from horizon.models.skeleton import build_skeleton
from horizon.optim.clipping import Clipping
from horizon.report.split import describe_split
from horizon.store.arena import Arena
from horizon.units import GIB, MIB
from horizon.zo.runtime import Write, ZerothOrderRuntime, build_zeroth_order

OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048, "do_layer_norm_before": True,
       "activation_function": "relu", "tie_word_embeddings": True, "dropout": 0.0}  # fmt: skip


def opt(hidden: int, layers: int, heads: int) -> dict:
    return {**OPT, "hidden_size": hidden, "word_embed_proj_dim": hidden, "ffn_dim": 4 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads}  # fmt: skip


SHAPES = {
    "tiny": opt(256, 4, 4) | {"vocab_size": 4096},
    "opt-1.3b": opt(2048, 24, 32),
    "opt-6.7b": opt(4096, 32, 32),
    "opt-13b": opt(5120, 40, 40),
    "opt-30b": opt(7168, 48, 56),
    **{name: shape for name, shape in DECODERS.items() if name != "tiny"},
}
ATTENTION = {
    "default": attention.WHOLE_ROWS,
    "cudnn": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "flash": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
}
PATTERN = 16 * MIB + 7  # random values, repeated so that no two rows are the same
WARMUP = 3  # the first step has no update to apply, the second compiles the kernel that does


def random_weights(
    parameters: list[tuple[str, torch.Size]], dtype: torch.dtype
) -> Callable[[Write, torch.device], None]:
    """Matrices of N(0, 0.02), norm weights of 1, biases of 0, by repeating one pattern."""

    def load(write: Write, device: torch.device) -> None:
        pattern = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
        for name, shape in parameters:
            if len(shape) > 1:
                numel = shape.numel()
                value = pattern.repeat(-(-numel // pattern.numel()))[:numel].view(shape)
            else:
                value = torch.full(shape, 0.0 if "bias" in name else 1.0)
            write(name, value)

    return load


def make_engine(shape: dict, args: argparse.Namespace, every: int) -> Engine:
    skeleton = build_skeleton(shape)
    names = [(name, parameter.shape) for name, parameter in skeleton.named_parameters()]
    settings = horizon.ZerothOrder(
        lr=1e-7, eps=1e-3, queries=args.queries, master=args.master, writeback_every=every,
    )  # fmt: skip
    runtime = build_zeroth_order(
        skeleton, random_weights(names, settings.master_dtype), settings=settings, device=args.device, freeze=(),
        memory=MemoryConfig(device_budget=args.device_budget, weight_slots=args.weight_slots),
        compute_dtype=ComputeDtype.auto, kernels=Kernels(args.kernels),
    )  # fmt: skip
    return Engine(Parts(runtime, settings.lr, Clipping(None), OnNonFinite.stop), seed=0)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_per_step(step: Callable[[], object], args: argparse.Namespace) -> tuple[float, list[float]]:
    """Median of the steps after the warm-up, and all of these."""
    for _ in range(args.warmup):
        step()
    synchronize(args.device)
    times, started = [], time.perf_counter()
    while len(times) < args.steps and (len(times) < 2 or time.perf_counter() - started < args.seconds):
        before = time.perf_counter()
        step()
        times.append(time.perf_counter() - before)
    synchronize(args.device)
    # As steps run into each other, the mean of all is the pace; the median says that none was odd.
    print("   steps:", " ".join(f"{t:.3f}" for t in times), flush=True)
    return statistics.median(times), times


def link_limits(num_bytes: int, piece: int, device: str) -> tuple[float, float]:
    """Seconds that `num_bytes` take up, and up and down at once, in pinned pieces; 0 without a link."""
    if device != "cuda":
        return 0.0, 0.0
    arena = Arena([piece, piece], "link", pin=True)
    on_device = [torch.empty(piece, dtype=torch.uint8, device=device) for _ in range(2)]
    up, down = torch.cuda.Stream(), torch.cuda.Stream()
    count = max(4, min(40, 8 * GIB // piece))

    def run(both: bool) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            with torch.cuda.stream(up):
                on_device[0].copy_(arena.regions[0], non_blocking=True)
            if both:
                with torch.cuda.stream(down):
                    arena.regions[1].copy_(on_device[1], non_blocking=True)
        torch.cuda.synchronize()
        return (time.perf_counter() - started) * num_bytes / (count * piece)

    try:
        run(True)
        return run(False), run(True)
    finally:
        arena.close()


def matmul_rate(hidden: int, wide: int, tokens: int, dtype: torch.dtype) -> float:
    """FLOP/s of the two products of an MLP, alternating for half a second and more."""
    x = torch.randn(tokens, hidden, device="cuda", dtype=dtype)
    up = torch.randn(wide, hidden, device="cuda", dtype=dtype)
    down = torch.randn(hidden, wide, device="cuda", dtype=dtype)
    (x @ up.t()) @ down.t()
    torch.cuda.synchronize()
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.5:
        for _ in range(8):
            (x @ up.t()) @ down.t()
        torch.cuda.synchronize()
        rounds += 8
    return 4 * rounds * tokens * hidden * wide / (time.perf_counter() - started)


def forward_flops(engine: Engine, shape: dict, tokens: int, seq_len: int) -> float:
    """Of one forward pass: 2 x matmul parameters and causal attention (2 L T H) a token; no input embedding."""
    tables = shape["vocab_size"] + (2050 if shape["model_type"] == "opt" else 0)
    embedding = tables * shape["hidden_size"] - (
        shape["vocab_size"] * shape["hidden_size"] if shape.get("tie_word_embeddings") else 0
    )
    matmul = engine.plan.num_parameters - embedding
    return tokens * (2 * matmul + 2 * shape["num_hidden_layers"] * seq_len * shape["hidden_size"])


def kernel_ms(runtime: ZerothOrderRuntime) -> float | None:
    """Milliseconds that one layer's update and copies take, alone."""
    if runtime.device.type != "cuda":
        return None
    from horizon.zo.perturb import make_perturber
    from horizon.zo.table import Term, Update, Work

    perturb = make_perturber(runtime.model.layouts, runtime.settings, runtime.device)
    update = Update(1, 1.0, (Term(1, 0, 1e-9),))
    perturb.begin([Work(b, [update], 2, 1) for b in range(runtime.model.num_blocks)])
    layout = runtime.model.layouts[1]
    states = [torch.zeros(layout.num_elements, dtype=s.dtype, device="cuda") for s in runtime.store.states[1]]
    dtype = runtime._needs.compute_dtype
    copies = [torch.empty(layout.num_elements, dtype=dtype, device="cuda") for _ in range(2)]
    times = []
    for _ in range(5):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        perturb(1, states, copies, 0, True)
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return min(times)


def rows(shape: dict, args: argparse.Namespace) -> Iterator[dict]:
    """One row per write-back interval and batch size."""
    for every in args.writeback_every:
        started = time.perf_counter()
        engine = make_engine(shape, args, every)
        print(f"engine built in {time.perf_counter() - started:.1f} s", flush=True)
        with engine:
            for batch in args.batch:
                yield timed_row(engine, shape, args, every, batch)
        del engine
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def timed_row(engine: Engine, shape: dict, args: argparse.Namespace, every: int, batch: int) -> dict:
    tokens = batch * args.seq_len
    micro_batch = engine.plan_micro_batch(batch, args.seq_len, args.micro_batch or None)
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # what measuring took is not the step's
    batches = rows_of(shape["vocab_size"], batch, args.seq_len, micro_batch)
    losses: list[float] = []
    median, times = seconds_per_step(lambda: losses.append(engine.step(batches).loss), args)
    mean = sum(times) / len(times)
    split = recorded(engine, batches, args, f"{batch}-{every}") if args.trace else None
    print(engine.plan.table(), flush=True)
    device, host = engine.device_bytes, engine.host_bytes  # before the limits below take memory of their own
    runtime = engine._runtime
    assert isinstance(runtime, ZerothOrderRuntime)
    from horizon.zo.plan import least_traffic

    streamed = least_traffic(runtime._needs)["H2D", "weights"]
    piece = max(sum(state.nbytes for state in states) for states in runtime.store.states[1:-1])
    up, both = link_limits(streamed, piece, args.device)
    flops = 2 * args.queries * forward_flops(engine, shape, tokens, args.seq_len)
    rate = None
    if args.device == "cuda":
        wide = shape.get("ffn_dim") or shape["intermediate_size"]
        rate = matmul_rate(shape["hidden_size"], wide, micro_batch * args.seq_len, runtime._needs.compute_dtype)
    num_parameters = engine.plan.num_parameters
    return {
        "system": "horizon zo", "batch": batch, "seq_len": args.seq_len, "tokens": tokens, "master": args.master,
        "writeback_every": every, "attention": args.attention, "queries": args.queries,
        "micro_batch": micro_batch, "seconds": mean, "median_seconds": median, "tokens_per_s": tokens / mean,
        "first_loss": losses[0],
        "num_parameters": num_parameters, "device_gib": device / GIB,
        "planned_device_gib": engine.plan.num_bytes("device") / GIB, "host_rss_gib": host / GIB,
        "host_bytes_per_param": host / num_parameters,
        "store_bytes_per_param": runtime.store.num_bytes / num_parameters,
        "tflops": flops / mean / 1e12, "matmul_tflops": rate and rate / 1e12,
        "matmul_tokens_per_s": rate and tokens * rate / flops,
        "link_gb_per_s": streamed / up / 1e9 if up else None, "link_tokens_per_s": tokens / up if up else None,
        "link_both_tokens_per_s": tokens / both if both else None, "kernel_ms_per_layer": kernel_ms(runtime),
        "split": split,
    }  # fmt: skip


def recorded(engine: Engine, batches: list, args: argparse.Namespace, name: str) -> dict:
    """Write the timeline of two more steps; give where their time went."""
    path = args.trace.with_stem(f"{args.trace.stem}-{name}")
    with engine.trace(path) as recording:
        engine.step(batches)
        engine.step(batches)
    assert recording.split is not None
    print(describe_split(recording.split), f"  timeline: {path}", sep="\n", flush=True)
    return dataclasses.asdict(recording.split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-6.7b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows per step")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--master", choices=["fp32", "bf16", "fp16"], default="fp16")
    parser.add_argument("--writeback-every", type=int, nargs="+", default=[1])
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=0, help="rows; 0: the most that fits")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a row, at most")
    parser.add_argument("--warmup", type=int, default=WARMUP)
    parser.add_argument("--seconds", type=float, default=20, help="of the timed steps of a row, about")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--device-budget", default="auto")
    parser.add_argument("--weight-slots", type=int, default=2)
    parser.add_argument("--kernels", choices=["auto", "liger", "torch"], default="auto")
    parser.add_argument("--attention", choices=ATTENTION, default="default", help="kernel for whole rows")
    parser.add_argument("--out", type=Path, help="append result rows (JSON lines) here")
    parser.add_argument("--trace", type=Path, help="write the timeline of steady steps here (for Perfetto)")
    args = parser.parse_args()
    attention.WHOLE_ROWS = ATTENTION[args.attention]
    for found in rows(SHAPES[args.shape], args):
        shared = facts()  # once the engine is built: asking for the device takes it into use
        row = {"shape": args.shape, **found, **shared}
        print(json.dumps({k: row[k] for k in row if k not in shared}), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
