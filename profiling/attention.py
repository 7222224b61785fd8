"""Time attention kernels, forward and backward, on the shapes that training gives them, on one GPU in under a minute.

    python profiling/attention.py --out results.jsonl

Whole rows: what `WHOLE_ROWS` in horizon/models/attention.py can choose among, and what torch chooses. Packed rows:
the kernel for documents against a mask over all pairs of tokens. TFLOP/s count pairs of tokens that see each other
(2 products forward, 5 backward, 2 FLOPs a multiplication); times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from step import facts
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from horizon.models.attention import LazyMask, attend_inside_documents
from horizon.models.documents import find_documents
from horizon.units import GIB

CUDA = torch.device("cuda")
SHAPES = [(8, 1024), (1, 32768), (1, 131072)]
DOCUMENT, WINDOW = 256, 4096  # tokens
LONGEST_DENSE = 32768  # a mask of 131072 tokens would take 16 GiB, and 32 as numbers to add

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend | None = None, repeat: bool = False) -> Tensor:
    """Causal attention over whole rows, by torch's choice or by one backend."""
    if repeat:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    with sdpa_kernel(backend) if backend else sdpa_kernel(list(_ALL)):
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=not repeat)
    return output.transpose(1, 2)


_ALL = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention under a mask over all pairs, as transformers computes it."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def by_documents(query: Tensor, key: Tensor, value: Tensor, mask: LazyMask) -> Tensor:
    """Attention inside documents, as Horizon computes it on packed rows."""
    return attend_inside_documents(query, key, value, mask, None)


def mask_of(rows: int, tokens: int, document: int, window: int | None) -> LazyMask:
    positions = torch.arange(document).repeat(tokens // document).expand(rows, -1)
    documents = find_documents({"input_ids": positions, "position_ids": positions}, CUDA)

    def build() -> Tensor:
        number = torch.arange(tokens, device=CUDA) // document
        mask = number[:, None] == number[None, :]
        mask &= torch.ones_like(mask).tril_()
        return mask.expand(rows, 1, tokens, tokens)

    return LazyMask(documents, window, (rows, 1, tokens, tokens), CUDA, build)


def pairs(tokens: int, document: int, window: int | None) -> int:
    """How many (token, seen token) pairs a row has."""
    window = min(window or document, document)
    return (tokens // document) * (window * (window + 1) // 2 + (document - window) * window)


def cases(rows: int, tokens: int) -> Iterator[tuple[str, int, int | None, Attention]]:
    """(name, tokens of a document, window, attention)."""
    yield "whole rows: torch's choice", tokens, None, sdpa
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        yield f"whole rows: {name}", tokens, None, partial(sdpa, backend=backend)
    yield (
        "whole rows: flash, keys repeated",
        tokens,
        None,
        partial(sdpa, backend=SDPBackend.FLASH_ATTENTION, repeat=True),
    )
    whole = mask_of(rows, tokens, tokens, None)
    yield "whole rows: documents", tokens, None, partial(by_documents, mask=whole)
    packed = mask_of(rows, tokens, DOCUMENT, None)
    yield "packed: documents", DOCUMENT, None, partial(by_documents, mask=packed)
    if tokens <= LONGEST_DENSE:
        yield "packed: dense mask", DOCUMENT, None, partial(dense, mask=packed.dense)
    if tokens > WINDOW:
        windowed = mask_of(rows, tokens, tokens, WINDOW)
        yield f"window of {WINDOW}: documents", tokens, WINDOW, partial(by_documents, mask=windowed)


def measure(attention: Attention, rows: int, tokens: int, args: argparse.Namespace) -> dict:
    """Median milliseconds forward and backward, and the memory taken beyond inputs and their gradients."""
    shapes = [(rows, tokens, heads, args.dim) for heads in (args.heads, args.key_heads, args.key_heads)]
    inputs = [torch.randn(shape, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    coming = torch.randn(shapes[0], device=CUDA, dtype=torch.bfloat16)
    forward, backward, repetitions = [], [], 3 if tokens > LONGEST_DENSE else 8
    for _ in range(repetitions + 1):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, turn, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        output = attention(*(x.transpose(1, 2) for x in inputs))
        turn.record()
        grads = torch.autograd.grad(output, inputs, coming)
        end.record()
        torch.cuda.synchronize()
        forward.append(start.elapsed_time(turn))
        backward.append(turn.elapsed_time(end))
        peak = torch.cuda.max_memory_allocated() - before
        del output, grads
    return {
        "forward_ms": statistics.median(forward[1:]), "backward_ms": statistics.median(backward[1:]),
        "peak_gib": peak / GIB,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--out", type=Path, help="append result rows (JSON lines) here")
    args = parser.parse_args()
    shared = facts()
    query, key = (
        torch.empty(1, n, 1024, args.dim, device=CUDA, dtype=torch.bfloat16) for n in (args.heads, args.key_heads)
    )
    choice = SDPBackend(torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=True)).name
    for rows, tokens in SHAPES:
        for name, document, window, attention in cases(rows, tokens):
            row = {"case": name, "rows": rows, "tokens": tokens}
            try:
                row |= measure(attention, rows, tokens, args)
            except RuntimeError as error:  # a backend that does not take this, or a mask that does not fit
                row["failed"] = str(error).splitlines()[0]
            else:
                flops = 14 * rows * pairs(tokens, document, window) * args.heads * args.dim
                row["tflops"] = flops / (row["forward_ms"] + row["backward_ms"]) / 1e9
            print(json.dumps(row), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps({**row, "torch_chooses": choice, **shared}) + "\n")
        torch.cuda.empty_cache()
    print(f"torch chooses {choice}")


if __name__ == "__main__":
    main()
