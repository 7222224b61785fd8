"""What packing wastes, and how unequal the micro-batches of a step are, for documents of some lengths.

    python profiling/batching.py --seq-len 2048 --batch-size 32 --micro-batch 4

Arithmetic, nothing is trained. `padding` is the share of computed tokens that are none; `unequal` how much more the
heaviest micro-batch of a step has to do than the mean one, as a mean over an epoch's steps: rows `in_order`, and
`divided` as the loader does it; of attention alone, and of all products of the model. Prints a JSON row for each set of
documents.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from step import facts

from horizon.config.compose import compose
from horizon.config.schema import TooLong
from horizon.data import Loader, load_data
from horizon.data.encoding import Tokens
from horizon.data.packing import balanced
from horizon.data.pieces import cut
from horizon.data.rows import Rows, Source, pack, pad
from horizon.models.blocks import BlockModel
from horizon.models.skeleton import build_skeleton
from horizon.models.work import model_work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--model", default="qwen2.5-7b", help="a preset of conf/model")
    args = parser.parse_args()
    for name, lengths in documents():
        print(json.dumps(facts() | {"documents": name} | measured(lengths, args)), flush=True)


def documents() -> Iterator[tuple[str, np.ndarray]]:
    """Real ones, and lengths as conversations and pages of the web have them: many short, a few very long."""
    config = compose([])
    found = load_data(config.data, seq_len=config.train.seq_len, seed=0).reports[0].tokenized.tokens.lengths
    yield "standard library", np.asarray(found)
    draw = np.random.default_rng(0)
    yield "log-normal, median 350", draw.lognormal(np.log(350), 0.9, 50_000).astype(np.int64) + 2
    yield "log-normal, median 700", draw.lognormal(np.log(700), 1.2, 50_000).astype(np.int64) + 2


def measured(lengths: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    num_tokens = int(lengths.sum())
    tokens = Tokens(np.zeros(num_tokens, np.int32), np.ones(num_tokens, bool), lengths, [""] * len(lengths))
    pieces = cut(tokens, np.ones(len(lengths), bool), args.seq_len, TooLong.split)
    packed, padded = (lay(Source("", tokens), pieces, args.seq_len, 0) for lay in (pack, pad))
    return {
        "num_documents": len(lengths), "mean_length": round(float(lengths.mean())), "rows": len(packed),
        "padding_packed": padding(packed), "padding_one_piece_a_row": padding(padded), **unequal(packed, args),
    }  # fmt: skip


def padding(rows: Rows) -> float:
    return round(1 - int(rows.num_tokens.sum()) / (len(rows) * rows.seq_len), 4)


def unequal(rows: Rows, args: argparse.Namespace) -> dict[str, float]:
    work = model_work(BlockModel(build_skeleton(compose([f"model={args.model}"]).model.config)))
    attention = rows.attention_work * sum(layer.attention for layer in work.layers)  # half of all pairs, two products
    products = rows.seq_len * (work.head + sum(layer.products for layer in work.layers))
    loader, found = Loader(rows, args.batch_size, args.micro_batch, seed=0), []
    for _ in range(len(rows) // args.batch_size):
        step = loader.take(args.batch_size)
        ways = ([range(i, i + args.micro_batch) for i in range(0, args.batch_size, args.micro_batch)],
                balanced(rows.attention_work[step], args.micro_batch))  # fmt: skip
        sums = [np.array([attention[step[list(group)]].sum() for group in groups]) for groups in ways]
        found.append([[excess(s), excess(s + args.micro_batch * products)] for s in sums])
    means = np.round(np.mean(found, axis=0), 4).ravel().tolist()
    names = ("in_order_attention", "in_order_all", "divided_attention", "divided_all")
    share = round(float(attention.sum() / (attention.sum() + len(rows) * products)), 4)
    return dict(zip((f"unequal_{name}" for name in names), means, strict=True)) | {"attention_share": share}


def excess(sums: np.ndarray) -> float:
    return float(sums.max() / sums.mean() - 1)


if __name__ == "__main__":
    main()
