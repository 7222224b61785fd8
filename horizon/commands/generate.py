"""`horizon generate`: what a model, streamed, writes after prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horizon.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from horizon.generation.prompts import Prompt
    from horizon.inference import InferenceEngine

USAGE = """\
usage: horizon generate model.path=FOLDER prompt=TEXT | prompts=FILE [batch=16] [--json] [argument=value ...]
                        [key=value ...]

Go on with prompts. The model may be larger than the device, its blocks are streamed.

  model.path      a Hugging Face folder or hub id, a checkpoint, or a run's folder: its last checkpoint
  prompt          one prompt
  prompts         a file: a prompt a line, or .jsonl: {"prompt": TEXT} or {"messages": [...]} a line
  batch           prompts that are gone on with together: more of them cost hardly more time, but keys and values
  --json          an object a line and nothing else: prompt, text, num_tokens
  argument=value  of transformers' GenerationConfig: max_new_tokens=64 do_sample=true temperature=0.7 top_p=0.9
                  repetition_penalty=1.1 num_return_sequences=2 stop_strings=["###"] ...
  key=value       settings as of horizon train: memory.device_budget=24GiB device=cpu compute_dtype=float32 seed=1 ...

  horizon generate model.path=my-model prompt="Once upon a time" max_new_tokens=64 memory.device_budget=16GiB
"""
OWN = {"prompt", "prompts", "batch"}


def run(arguments: list[str]) -> int:
    """The command; gives its exit code.

    Raises:
        HorizonError: arguments, model or prompts cannot be understood, or there is not enough memory.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    from horizon.commands.models import find_model, refuse_flags, split_arguments
    from horizon.config.compose import compose

    refuse_flags(arguments, "generate")
    own, rest = split_arguments(arguments, OWN)
    if ("prompt" in own) == ("prompts" in own):
        raise ConfigError("horizon generate takes either prompt=TEXT or prompts=FILE (horizon generate --help)")
    batch = own.get("batch", "16")
    if not batch.isdecimal() or int(batch) < 1:
        raise ConfigError(f"batch={batch}: expected how many prompts are gone on with together, at least 1")
    given, rest = split_arguments(rest, generation_keys())
    config = compose([argument for argument in rest if argument != "--json"])
    model = find_model(config)
    tokenizer = model.tokenizer(config)
    prompts = _prompts(own, tokenizer)
    with model.open(config) as engine:
        for prompt, text, num_tokens in _written(engine, tokenizer, prompts, int(batch), _values(given), config.seed):
            if "--json" in arguments:
                print(json.dumps({"prompt": prompt.text, "text": text, "num_tokens": num_tokens}), flush=True)
            else:
                print(f"{prompt.text} >>> {text}", flush=True)
    return 0


def generation_keys() -> set[str]:
    """The attributes of transformers' GenerationConfig."""
    from transformers import GenerationConfig

    return {name for name in vars(GenerationConfig()) if not name.startswith("_")}  # type: ignore[no-untyped-call]


def _values(given: dict[str, str]) -> dict[str, Any]:
    from yaml import YAMLError, safe_load

    try:
        return {name: safe_load(text) for name, text in given.items()}
    except YAMLError as error:
        raise ConfigError(f"an argument is not YAML: {' '.join(str(error).split())}") from error


def _prompts(own: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    from horizon.generation.prompts import Prompt, read_prompts

    if "prompts" in own:
        return read_prompts(Path(own["prompts"]), tokenizer)
    if not own["prompt"]:
        raise ConfigError("prompt= is empty; expected a text")
    return [Prompt(own["prompt"])]


def _written(
    engine: InferenceEngine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    batch: int,
    arguments: dict[str, Any],
    seed: int,
) -> Iterator[tuple[Prompt, str, int]]:
    """(prompt, text, tokens) of every sequence, in the order of the prompts."""
    from horizon.generation.prompts import end_ids, new_texts, pad_left, padding_id

    ends = end_ids(tokenizer, engine.generation_config)
    settings = {"eos_token_id": ends or None, "pad_token_id": padding_id(tokenizer), **arguments}
    if settings.get("stop_strings"):
        settings["tokenizer"] = tokenizer
    wanted = settings["eos_token_id"]
    ends = wanted if isinstance(wanted, list) else [] if wanted is None else [wanted]
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        ids, mask = pad_left([prompt.encode(tokenizer) for prompt in some], padding_id(tokenizer))
        if start == 0:
            print(engine.plan_generation(*ids.shape, **settings).table(), file=sys.stderr)
        sequences = engine.generate(ids, mask, seed=seed + start, **settings)
        times = len(sequences) // len(some)
        for i, (text, num_tokens) in enumerate(new_texts(tokenizer, sequences, ids.shape[1], ends)):
            yield some[i // times], text, num_tokens
