"""Compare ways to keep AdamW's moments in fewer bits: how far the update is from the one with float32 moments.

    python profiling/codes.py --steps 300 --out results.jsonl

Gradients are those of the default job (clipped), of some groups of 64 elements of every parameter. Each way keeps its
own moments through all steps; every fifth of the last five sixths of the steps counts. With --outlier X one gradient in
64 is X times as large, and only the others count: codes with one scale for all 64 must tell small ones apart.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from step import facts

import horizon
from horizon.config.compose import compose
from horizon.data import Loader, load_data
from horizon.optim.moments import random_bits, read_m, read_v, write_m, write_v
from horizon.optim.schedule import learning_rate
from horizon.plan.states import GROUP

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
Keep = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (fp32 values, random bits) -> what is read back


def as_bf16(values: np.ndarray, below: np.ndarray | int) -> np.ndarray:
    return ((values.view(np.uint32) + below) & np.uint32(0xFFFF0000)).view(np.float32)


def by_law(values: np.ndarray, random: np.ndarray | None, num_codes: int, power: float | None) -> np.ndarray:
    """Codes c = 0 ... num_codes for (c / num_codes)^power, or for softsign (None), of each group's largest."""

    def expand(code: np.ndarray) -> np.ndarray:
        y = code / num_codes
        return y / (2 - y) if power is None else y**power

    size = np.abs(values).reshape(-1, GROUP).astype(np.float64)
    most = size.max(1, keepdims=True)
    x = np.divide(size, most, out=np.zeros_like(size), where=most > 0)
    y = (2 * x / (1 + x) if power is None else x ** (1 / power)) * num_codes
    if random is None:
        code = np.round(y)
    else:
        code = np.floor(y)
        share = (x - expand(code)) / (expand(code + 1) - expand(code))
        code += (random.reshape(x.shape) + 0.5) / 2**32 < share
    code = np.minimum(code, num_codes)
    return (np.sign(values) * (expand(code) * most).reshape(-1)).astype(np.float32)


def of_v(values: np.ndarray, random: np.ndarray | None, power: float) -> np.ndarray:
    """8-bit codes of v; none of a v > 0 is 0."""
    kept = by_law(values, random, 255, power).reshape(-1, GROUP)
    least = values.reshape(-1, GROUP).max(1, keepdims=True) / 255**power
    return np.where(values.reshape(kept.shape) > 0, np.maximum(kept, least), 0).reshape(-1).astype(np.float32)


WAYS: dict[str, tuple[Keep, Keep]] = {
    "bfloat16": (lambda m, r: as_bf16(m, r & np.uint32(0xFFFF)), lambda v, r: as_bf16(v, r >> np.uint32(16))),
    "bfloat16, to nearest": (lambda m, _: as_bf16(m, np.uint32(0x8000)), lambda v, _: as_bf16(v, np.uint32(0x8000))),
    "int8": (lambda m, r: read_m(*write_m(m, r)), lambda v, r: read_v(*write_v(v, r))),
    "linear m, v": (lambda m, r: by_law(m, r, 127, 1), lambda v, r: of_v(v, r, 1)),
    "linear m, root of v": (lambda m, r: by_law(m, r, 127, 1), lambda v, r: of_v(v, r, 2)),
    "softsign m, root of v": (lambda m, r: by_law(m, r, 127, None), lambda v, r: of_v(v, r, 2)),
    "softsign m, root of v, to nearest": (lambda m, _: by_law(m, None, 127, None), lambda v, _: of_v(v, None, 2)),
    "root of m, fourth root of v": (lambda m, r: by_law(m, r, 127, 2), lambda v, r: of_v(v, r, 4)),
}


def gradients(num_steps: int, every: int) -> np.ndarray:
    """[steps, elements]: clipped gradients of one group of 64 in `every`, in the first steps of the default job."""
    config = compose([])
    train, optim = config.train, config.optim
    data = load_data(config.data, seq_len=train.seq_len, seed=0)
    model = {"vocab_size": len(data.tokenizer), **config.model.config}
    loader, rows = Loader(data.train, train.batch_size, train.batch_size, 0), []
    with horizon.Engine.from_config(model, device="cpu", self_check=False) as engine:
        for step in range(1, num_steps + 1):
            engine.lr = learning_rate(step, 2e-3, optim.schedule, optim.warmup_steps, train.steps, optim.min_lr_ratio)
            scale = min(1.0, 1.0 / (engine.step(loader.next_step()).grad_norm + 1e-6))
            parts = [
                flat[: flat.numel() // GROUP * GROUP].view(-1, GROUP)[::every]
                for flat in (gradient.flatten() for _, gradient in engine.named_gradients())
            ]
            rows.append(np.concatenate([part.reshape(-1).numpy() for part in parts]) * np.float32(scale))
    return np.stack(rows)


def update(m: np.ndarray, v: np.ndarray, step: int) -> np.ndarray:
    return (m / (1 - BETA1**step)) / (np.sqrt(v / (1 - BETA2**step)) + EPS)


def compare(recorded: np.ndarray, outlier: float) -> list[dict]:
    factors = np.ones(recorded.shape[1], np.float32)
    factors[::GROUP] = outlier
    counted = factors == 1
    moments = {way: [np.zeros_like(factors), np.zeros_like(factors)] for way in ("float32", *WAYS)}
    sums = {way: np.zeros(3) for way in WAYS}  # of squared errors, of squared updates, of ln(root of v)
    largest, num = dict.fromkeys(moments, 0.0), 0
    for step, row in enumerate(recorded, start=1):
        g, updates = row * factors, {}
        counts = step > len(recorded) // 6 and step % 5 == 0
        for number, (way, kept) in enumerate(moments.items()):
            m, v = kept[0] + np.float32(1 - BETA1) * (g - kept[0]), np.float32(BETA2) * kept[1]
            v += np.float32(1 - BETA2) * g * g
            updates[way] = update(m, v, step)[counted] if counts else None
            random = random_bits(np.uint32(7919 * step + 104729 * number), g.size)
            moments[way] = (
                [m, v] if way == "float32" else [keep(x, random) for keep, x in zip(WAYS[way], (m, v), strict=True)]
            )
        if counts:
            exact, v = updates["float32"], moments["float32"][1][counted]
            num += int((v > 0).sum())
            for way in WAYS:
                roots = np.log(moments[way][1][counted][v > 0] / v[v > 0]) / 2
                sums[way] += ((updates[way] - exact) ** 2).sum(), (exact**2).sum(), roots.sum()
            largest = {way: max(largest[way], float(np.abs(updates[way]).max())) for way in largest}
    return [
        {"way": way, "outlier": outlier, "update_error": float(np.sqrt(e / u)), "mean_ln_root_v": float(ln / num),
         "largest_update": largest[way], "largest_update_float32": largest["float32"]}
        for way, (e, u, ln) in sums.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=61, help="keep one group of 64 in so many")
    parser.add_argument("--outlier", type=float, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--out", type=Path, help="append result rows (JSON lines) here")
    args = parser.parse_args()
    recorded, shared = gradients(args.steps, args.every), facts()
    for outlier in args.outlier:
        for row in compare(recorded, outlier):
            print(json.dumps(row), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps({**row, "steps": args.steps, "elements": recorded.shape[1], **shared}) + "\n")


if __name__ == "__main__":
    main()
