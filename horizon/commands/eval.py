"""`horizon eval`: how well a model, streamed, predicts texts and answers questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horizon.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from horizon.commands.models import UsedModel
    from horizon.config.schema import HorizonConfig
    from horizon.data.rows import Rows
    from horizon.eval.questions import Choice, Exact
    from horizon.eval.scoring import Sizes
    from horizon.inference import InferenceEngine

USAGE = """\
usage: horizon eval model.path=FOLDER [data=text|messages data.path=PATH] [questions=FILE.jsonl[,FILE.jsonl ...]]
                    [--json] [key=value ...]

Loss, perplexity and token accuracy on data, and the share of questions answered rightly.

  model.path      a Hugging Face folder or hub id, a checkpoint, or a run's folder: its last checkpoint
  data.*          as of horizon train; all of it is read, unless data.validation_fraction or data.validation_path is
                  given: then what is held out. Rows are of train.seq_len tokens
  questions       a line {"prompt", "choices", "answer"} (the likeliest choice is the model's answer) or
                  {"prompt", "answer"} (what it writes, greedily, must be the answer); "messages" instead of "prompt"
  max_new_tokens  of such a text (32)
  stop            which ends it, too (a line end); empty: nothing but the model's own end
  batch           of such texts that are written together (32)
  pass_tokens     that go through the model at once (65536): the more, the less often its weights cross the link
  --json          one object and nothing else
  key=value       settings as of horizon train: memory.device_budget=24GiB device=cpu compute_dtype=float32 ...

  horizon eval model.path=runs/first data=text data.path=held-out questions=capitals.jsonl
"""
OWN = {"questions", "max_new_tokens", "stop", "batch", "pass_tokens"}


def run(arguments: list[str]) -> int:
    """The command; gives its exit code.

    Raises:
        HorizonError: arguments, model, data or questions cannot be understood, or there is not enough memory.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    from horizon.commands.models import find_model, refuse_flags, split_arguments
    from horizon.config.compose import compose
    from horizon.eval.questions import read_questions
    from horizon.eval.scoring import Sizes

    refuse_flags(arguments, "eval")
    own, rest = split_arguments(arguments, OWN)
    rest = [argument for argument in rest if argument != "--json"]
    has_data = any(argument.lstrip("+").startswith(("data=", "data.path=", "data.format=")) for argument in rest)
    if not has_data and "questions" not in own:
        raise ConfigError("nothing to evaluate on: give data=... data.path=..., questions=FILE.jsonl, or both")
    config = compose(rest)
    held_out = any(a.partition("=")[0] in ("data.validation_fraction", "data.validation_path") for a in rest)
    if not held_out:
        config.data.validation_fraction = 0.0
    usual = Sizes()
    sizes = replace(
        usual,
        pass_tokens=_number(own, "pass_tokens", usual.pass_tokens),
        prompts=_number(own, "batch", usual.prompts),
    )
    max_new_tokens = _number(own, "max_new_tokens", 32)
    model = find_model(config)
    rows = _rows(model, config, held_out) if has_data else None
    tokenizer = model.tokenizer(config)
    files = [Path(name) for name in own.get("questions", "").split(",") if name]
    questions = {str(path): read_questions(path, tokenizer) for path in files}
    found: dict[str, Any] = {"model": str(model.folder)}
    with model.open(config) as engine:
        if rows is not None:
            found["data"] = _scored(engine, rows, sizes)
        for name, asked in questions.items():
            answered = _answered(engine, tokenizer, asked, sizes, max_new_tokens, own.get("stop", "\n"))
            found.setdefault("questions", {})[name] = answered
    print(json.dumps(found, indent=2) if "--json" in arguments else _table(found))
    return 0


def _number(own: dict[str, str], key: str, default: int) -> int:
    text = own.get(key, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{key}={text}: expected a number, at least 1")
    return int(text)


def _rows(model: UsedModel, config: HorizonConfig, held_out: bool) -> Rows:
    """What is held out, or all there is.

    Raises:
        DataError: nothing is held out.
    """
    from horizon.data import load_data

    data = load_data(
        config.data, seq_len=config.train.seq_len, seed=config.seed, model_folder=model.tokenizer_folder,
        vocab_limit=model.vocab_size(config), trust_remote_code=config.model.trust_remote_code,
    )  # fmt: skip
    if not held_out:
        return data.train
    if data.validation is None:
        raise DataError(f"nothing is held out: {data.summary.splitlines()[-1]}; leave it out to score all of the data")
    return data.validation


def _scored(engine: InferenceEngine, rows: Rows, sizes: Sizes) -> dict[str, Any]:
    from horizon.eval.metrics import total
    from horizon.eval.scoring import score_rows

    step = max(1, sizes.micro_batch_tokens // rows.seq_len)
    batches = (rows.batch(range(start, min(start + step, len(rows)))) for start in range(0, len(rows), step))
    tally = total(score_rows(engine, batches, sizes))
    return {
        "rows": len(rows), "tokens": tally.num_tokens, "loss": tally.loss, "perplexity": tally.perplexity,
        "token_accuracy": tally.accuracy,
    }  # fmt: skip


def _answered(
    engine: InferenceEngine,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Choice | Exact],
    sizes: Sizes,
    max_new_tokens: int,
    stop: str,
) -> dict[str, Any]:
    """What became of the questions of a file, by their kind."""
    from horizon.eval.questions import Choice, Exact
    from horizon.eval.scoring import answer_choices, answer_exactly, is_right

    found: dict[str, Any] = {}
    choices = [question for question in questions if isinstance(question, Choice)]
    if choices:
        results = answer_choices(engine, tokenizer, choices, sizes)
        found["multiple_choice"] = {
            "questions": len(results),
            "accuracy": sum(r.by_sum == r.answer for r in results) / len(results),
            "accuracy_per_byte": sum(r.by_byte == r.answer for r in results) / len(results),
        }
    texts = [question for question in questions if isinstance(question, Exact)]
    if texts:
        written = answer_exactly(engine, tokenizer, texts, sizes, max_new_tokens=max_new_tokens, stop=stop)
        right = sum(is_right(question, text) for question, text in zip(texts, written, strict=True))
        found["exact_match"] = {"questions": len(texts), "accuracy": right / len(texts)}
    return found


def _table(found: dict[str, Any]) -> str:
    lines = [f"model  {found['model']}"]
    if "data" in found:
        data = found["data"]
        lines += [
            f"data   {data['tokens']:,} tokens in {data['rows']:,} rows",
            f"  loss                       {data['loss']:>9.4f}",
            f"  perplexity                 {data['perplexity']:>9.4g}",
            f"  token accuracy             {data['token_accuracy']:>9.2%}",
        ]
    for name, kinds in found.get("questions", {}).items():
        lines.append(f"{name}")
        for kind, numbers in kinds.items():
            what = f"{kind.replace('_', ' ')} of {numbers['questions']:,}"
            lines.append(f"  {what:<26} {numbers['accuracy']:>9.2%}")
            if "accuracy_per_byte" in numbers:
                lines.append(f"  {'by likelihood a byte':<26} {numbers['accuracy_per_byte']:>9.2%}")
    return "\n".join(lines)
