"""How fast a text file becomes tokens, beside the tokenizer library alone.

    python profiling/tokenizing.py FILE TOKENIZER_FOLDER

Alone means `encode_batch_fast` over the same pieces of text and nothing done with what it gives. Both run several times
in turn, because other load on a machine comes and goes; seconds of processor time tell how much it was. Prints a JSON
row a run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from horizon.data.documents import Document
from horizon.data.encoding import _batches, _piece_chars, _pieces, encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("tokenizer", help="folder of a fast tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, local_files_only=True)
    document = Document(str(args.file), args.file.read_text(encoding="utf-8"))
    texts = [[p.text for p in batch] for batch in _batches(_pieces([document], _piece_chars(tokenizer)))]

    def library() -> int:
        return sum(
            len(tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)) for batch in texts
        )

    def horizon() -> int:
        return len(encode(tokenizer, [document], len(document.text)).ids)

    for number in range(args.rounds):
        for name, work in (("library", library), ("horizon", horizon)):
            print(json.dumps({"round": number, "what": name, **timed(work, args.file.stat().st_size)}), flush=True)


def timed(work: Callable[[], int], num_bytes: int) -> dict[str, Any]:
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(seconds, 2),
        "cpu_s": round(cpu_s, 2),
        "mb_per_s": round(num_bytes / seconds / 1e6, 2),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    main()
