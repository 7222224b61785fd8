"""How fast a text file becomes tokens in the cache, beside the tokenizer library alone.

    python profiling/tokenizing.py --make 1000 --dir /tmp/tokenizing
    python profiling/tokenizing.py --file FILE --tokenizer FOLDER --dir /tmp/tokenizing

The first makes a file of 1 GB of Python sources and trains a tokenizer on its beginning. Alone means
`encode_batch_fast` over the same pieces of text, which lie in memory, and nothing done with what it gives; Horizon
reads and hashes the file, encodes it and writes the cache's entry. Both run in turn, because other load on a machine
comes and goes; seconds of processor time tell how much it was. Prints a JSON row a run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from step import facts
from transformers import AutoTokenizer

from horizon.config.schema import DataConfig, DataFormat
from horizon.data.documents import Document
from horizon.data.encoding import _batches, _piece_chars, _pieces
from horizon.data.reading import Reader
from horizon.data.sources import open_sources
from horizon.data.tokenizer import train_tokenizer

MB = 10**6
SAMPLE_CHARS = 8 * MB  # that a tokenizer is trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--file", type=Path)
    source.add_argument("--make", type=int, metavar="MB", help="make a file so large, and delete it afterwards")
    parser.add_argument("--tokenizer", help="folder of a fast tokenizer (default: train one of 32,000 entries)")
    parser.add_argument("--dir", type=Path, required=True, help="folder for the file and the cache")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    file = args.file or args.dir / "sources.txt"
    try:
        if args.make:
            make_file(file, args.make * MB)
        compare(file, tokenizer_for(file, args.tokenizer), args.dir / "cache", args.rounds)
    finally:
        if args.make:
            file.unlink(missing_ok=True)


def make_file(file: Path, num_bytes: int) -> None:
    """Sources of this Python and its packages, again and again, each time in another order and with other digits."""
    roots = (sysconfig.get_path(name) for name in ("stdlib", "purelib"))
    sources = sorted({path for root in roots for path in Path(root).rglob("*.py") if path.is_file()})
    order, size, turn = random.Random(0), 0, 0
    with file.open("w", encoding="utf-8") as out:
        while True:
            order.shuffle(sources)
            digits = str.maketrans("0123456789", "".join(str((digit + turn) % 10) for digit in range(10)))
            for path in sources:
                text = path.read_text(encoding="utf-8", errors="ignore").replace("\0", "").translate(digits)
                out.write(text)
                size += len(text.encode())
                if size >= num_bytes:
                    return
            turn += 1


def tokenizer_for(file: Path, folder: str | None) -> Any:
    if folder is not None:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with file.open(encoding="utf-8") as opened:
        return train_tokenizer([opened.read(SAMPLE_CHARS)], 32_000, seed=0)


def compare(file: Path, tokenizer: Any, cache: Path, rounds: int) -> None:
    document = Document(str(file), file.read_text(encoding="utf-8"))
    texts = [[p.text for p in batch] for batch in _batches(_pieces([document], _piece_chars(tokenizer)))]
    del document
    data = DataConfig(format=DataFormat.text, path=str(file), cache=str(cache))

    def library() -> int:
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        return sum(len(encode(batch, add_special_tokens=False)) for batch in texts)

    def horizon() -> int:
        shutil.rmtree(cache, ignore_errors=True)
        return len(Reader(data, seed=0).tokenized(open_sources(data)[0], tokenizer).tokens.ids)

    try:
        for number in range(rounds):
            for name, work in (("library", library), ("horizon", horizon)):
                print(json.dumps(facts() | {"round": number, "what": name, **timed(work, file)}), flush=True)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def timed(work: Callable[[], int], file: Path) -> dict[str, Any]:
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    counted = work()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    num_bytes = file.stat().st_size
    return {
        "tokenizers": tokenizers.__version__,
        "mb": round(num_bytes / MB, 1),
        "pieces_or_tokens": counted,
        "seconds": round(seconds, 2),
        "cpu_s": round(cpu_s, 2),
        "mb_per_s": round(num_bytes / seconds / MB, 2),
        "mb_per_cpu_s": round(num_bytes / cpu_s / MB, 2),
        "load": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    main()
