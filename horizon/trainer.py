"""What `horizon train` runs: data, engine, schedule, evaluation, metrics and the saved model, one after the other."""

from __future__ import annotations

import dataclasses
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from horizon.building import make_optimizer
from horizon.check import check_model
from horizon.config.schema import Clip, HorizonConfig
from horizon.data import Loader, TextData, load_data
from horizon.errors import BudgetError, ConfigError
from horizon.models.hf_config import load_config
from horizon.models.skeleton import ModelSource, resolve_model
from horizon.optim.clipping import Clipping
from horizon.optim.schedule import learning_rate
from horizon.records import RunSummary, StepRow, StepSplit
from horizon.report.console import StepDisplay
from horizon.report.metrics import MetricsWriter, to_json
from horizon.report.split import describe_split
from horizon.report.trace import require_matplotlib

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from horizon.engine import Engine

LR_RANDOM = 2e-3  # optim.lr=null, random weights
LR_TRAINED = 1e-5  # optim.lr=null, weights that were trained before
LR_ZEROTH_ORDER = 1e-6  # optim.lr=null, optim=mezo
SAMPLE_FROM = 20  # tokens that one of a sample is drawn from
RECORDED = 3, 5  # steps, first and last: past compilation and first allocations, and few enough to be quick
PROMPT_TOKENS = 32  # taken from a row when train.sample_prompt is null


class Trainer:
    """One run: `Trainer(config, output_dir).run()`.

    Writes config.yaml, metrics.jsonl (a line a step), summary.json, the folder model, with optim=mezo replay.jsonl and,
    where they are asked for, trace.json and trace.png into `output_dir`.
    """

    def __init__(self, config: HorizonConfig, output_dir: Path | str) -> None:
        """Check the settings that belong to the run; nothing is read or allocated yet.

        Raises:
            ConfigError: a setting has a value that cannot work.
        """
        check_settings(config)
        self.config = config
        self._clipping = Clipping(config.optim.max_grad_norm, config.optim.clip)
        self.output_dir = Path(output_dir)
        self.metrics_path = self.output_dir / "metrics.jsonl"
        self.trace_path = self.output_dir / "trace.json"
        self.replay_path = self.output_dir / "replay.jsonl"  # optim=mezo
        self.rows: list[StepRow] = []  # the steps done so far

    def run(self) -> RunSummary:
        """Train, and print on the way what happens.

        Raises:
            HorizonError: whatever went wrong first; the engine is closed and the metrics so far are on disk.
        """
        model = self.config.model
        source = resolve_model(model.path, model.revision, model.trust_remote_code) if model.path is not None else None
        self.config = with_lr(self.config, source)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_config(self.config, self.output_dir / "config.yaml")
        if model.self_check:  # before anything that takes long
            self._check_architecture()
        data = self._load_data(source)
        print(data.summary, flush=True)
        with self._advising(len(data.tokenizer)):
            engine = build_engine(self.config, source, data.tokenizer)
        with engine:
            if self.config.optim.name == "mezo":
                engine.log_steps(self.replay_path, "" if source is None else str(source.folder))
            summary = self._run(engine, data)
        (self.output_dir / "summary.json").write_text(to_json(summary, indent=2) + "\n", encoding="utf-8")
        self._print_end(summary)
        return summary

    @contextmanager
    def _advising(self, vocab_size: int) -> Iterator[None]:
        """Add to a refusal which settings would fit."""
        try:
            yield
        except BudgetError as error:
            if error.tier is None:
                raise  # the system refused, not the plan: nothing follows from arithmetic
            from horizon.forecast.advise import advise  # here: only a refusal needs it

            model = dataclasses.replace(
                self.config.model, config={"vocab_size": vocab_size, **self.config.model.config}
            )
            config = dataclasses.replace(self.config, model=model)
            raise BudgetError(f"{error}; {advise(config, error)}", error.tier, error.needed, error.limit) from error

    def _check_architecture(self) -> None:
        report = check_model(self.config.model)
        if self.config.data.packing and not report.packs:
            raise ConfigError(f"{report.architecture} cannot keep packed documents apart; set data.packing=false")

    def _load_data(self, source: ModelSource | None) -> TextData:
        trust = self.config.model.trust_remote_code
        vocab_limit = self.config.model.config.get("vocab_size")
        if source is not None:
            vocab_limit = load_config(source.folder, trust).get_text_config().vocab_size
        return load_data(
            self.config.data,
            seq_len=self.config.train.seq_len,
            seed=self.config.seed,
            model_folder=None if source is None else source.folder,
            vocab_limit=vocab_limit,
            trust_remote_code=trust,
        )

    def _run(self, engine: Engine, data: TextData) -> RunSummary:
        train, shuffle = self.config.train, self.config.data.shuffle
        with self._advising(engine.vocab_size):
            micro_batch = engine.plan_micro_batch(train.batch_size, train.seq_len, train.micro_batch)
        loader = Loader(data.train, train.batch_size, micro_batch, self.config.seed, shuffle=shuffle)
        held_out = validation_batches(data, train.eval_rows, micro_batch)
        print(engine.plan.table(), flush=True)
        loss_before, sample_before = self._assess("before", engine, data, held_out)
        split = self._train(engine, loader)
        loss_after, sample_after = self._assess("after", engine, data, held_out)
        model_dir = self.output_dir / "model" if train.save else None
        if model_dir is not None:
            engine.save_pretrained(model_dir, tokenizer=data.tokenizer)
        seconds = sum(row.seconds for row in self.rows)
        return RunSummary(
            steps=len(self.rows),
            num_tokens=sum(row.num_tokens for row in self.rows),
            seconds=seconds,
            tokens_per_s=sum(row.num_tokens for row in self.rows) / seconds,
            loss=self.rows[-1].loss,
            clip=self._clipping.note,
            clipped_steps=sum(row.clip_scale < 1 for row in self.rows),
            corrected_blocks=sum(row.corrected_blocks for row in self.rows),
            simulated=engine.plan.limits.cxl.simulated,
            validation_loss_before=loss_before,
            validation_loss_after=loss_after,
            sample_before=sample_before,
            sample_after=sample_after,
            split=split,
            output_dir=str(self.output_dir),
            model_dir=None if model_dir is None else str(model_dir),
            trace_file=str(self.trace_path) if self.config.trace else None,
        )

    def _train(self, engine: Engine, loader: Loader) -> StepSplit:
        """All steps, a few of which are recorded: where their time went."""
        num_steps = self.config.train.steps
        notes = [self._clipping.note] if self._clipping.mode is Clip.lagged else []
        if engine.plan.limits.cxl.simulated:
            notes.append(f"[{engine.plan.limits.cxl.name}]")
        first, last = recorded_steps(num_steps)
        files = (self.trace_path, self.trace_path.with_suffix(".png")) if self.config.trace else (None, None)
        with MetricsWriter(self.metrics_path) as metrics, StepDisplay(num_steps, note=" ".join(notes)) as display:

            def train_until(step: int) -> None:
                while len(self.rows) < step:
                    row = self._step(engine, loader)
                    self.rows.append(row)
                    metrics.write(row)
                    display.show(row)

            try:
                train_until(first - 1)
                with engine.trace(*files) as recording:
                    train_until(last)
                train_until(num_steps)
            except BaseException:  # Ctrl-C included
                print(
                    f"\nstopped after step {len(self.rows)} of {num_steps}; metrics in {self.metrics_path}", flush=True
                )
                raise
        assert recording.split is not None
        return recording.split

    def _step(self, engine: Engine, loader: Loader) -> StepRow:
        optim, started = self.config.optim, time.perf_counter()
        assert optim.lr is not None
        step, epoch = len(self.rows) + 1, loader.epoch
        batches = loader.next_step()
        engine.lr = learning_rate(
            step, optim.lr, optim.schedule, optim.warmup_steps, self.config.train.steps, optim.min_lr_ratio
        )
        result = engine.step(batches)
        seconds = time.perf_counter() - started
        return StepRow(
            step=step,
            epoch=epoch,
            loss=result.loss,
            lr=engine.lr,
            grad_norm=result.grad_norm,
            num_tokens=loader.step_tokens,
            num_trained_tokens=result.num_tokens,
            seconds=seconds,
            tokens_per_s=loader.step_tokens / seconds,
            host_bytes=engine.host_bytes,
            device_bytes=engine.device_bytes,
            skipped=result.skipped,
            clip_scale=result.clip_scale,
            corrected_blocks=result.corrected_blocks,
            projected_gradients=list(result.projected_gradients),
            simulated=engine.plan.limits.cxl.simulated,
            time=time.time(),
        )

    def _assess(
        self, when: str, engine: Engine, data: TextData, held_out: list[dict[str, torch.Tensor]]
    ) -> tuple[float | None, str | None]:
        """(validation loss, sample), printed; None for what is switched off or has no rows."""
        train = self.config.train
        loss = engine.evaluate(held_out) if held_out else None
        if loss is not None:
            print(f"validation loss {when} training: {loss:.4f}", flush=True)
        if not train.sample_tokens:
            return loss, None
        prompt = sample_prompt(data, train.sample_prompt, train.sample_tokens)
        sample = generate(engine, data.tokenizer, prompt, train.sample_tokens, train.seq_len, self.config.seed)
        text = f"{data.tokenizer.decode(prompt)} >>> {sample}"
        print(f"sample {when} training (the model goes on after >>>):\n{textwrap.indent(text, '    ')}", flush=True)
        return loss, sample

    def _print_end(self, summary: RunSummary) -> None:
        print(f"{summary.steps} steps, {summary.num_tokens:,} tokens, {summary.tokens_per_s:,.0f} tokens/s")
        if self._clipping.mode is not Clip.exact:
            corrected = f", {summary.corrected_blocks} updates of blocks corrected" if summary.corrected_blocks else ""
            print(f"{summary.clip}: {summary.clipped_steps} steps clipped{corrected}")
        if summary.simulated:
            print("the cxl tier was simulated: none of these times is that of a real one")
        print(describe_split(summary.split))
        if self.config.optim.name == "mezo":
            print(f"replay   {self.replay_path} (horizon replay base=FOLDER log={self.replay_path} out=FOLDER)")
        print(f"metrics  {self.metrics_path}\nsettings {self.output_dir / 'config.yaml'}")
        if summary.trace_file is not None:
            print(f"trace    {summary.trace_file} (open it at https://ui.perfetto.dev) and trace.png beside it")
        if summary.model_dir is not None:
            print(f"model    {summary.model_dir}")


def check_settings(config: HorizonConfig) -> None:
    """Refuse what no later part of a run looks at.

    Raises:
        ConfigError: naming the setting.
    """
    train = config.train
    for key, value, least in (
        ("steps", train.steps, 1),
        ("batch_size", train.batch_size, 1),
        ("micro_batch", 1 if train.micro_batch is None else train.micro_batch, 1),
        ("eval_rows", train.eval_rows, 0),
        ("sample_tokens", train.sample_tokens, 0),
    ):
        if value < least:
            raise ConfigError(f"train.{key}={value} must be at least {least}")
    make_optimizer(with_lr(config, None))
    if config.trace:
        require_matplotlib()
    if config.model.path is None and not config.model.config:
        raise ConfigError("no model: set model.path to a folder or hub id, or choose model=tiny_llama")


def recorded_steps(num_steps: int) -> tuple[int, int]:
    """The first and the last step whose timeline is recorded: `RECORDED`, or the last ones of a shorter run."""
    first, last = RECORDED
    return min(first, num_steps), min(last, num_steps)


def with_lr(config: HorizonConfig, source: ModelSource | None) -> HorizonConfig:
    """The settings with `optim.lr`, when it is null, replaced by a rate that suits trained or random weights."""
    if config.optim.lr is not None:
        return config
    if config.optim.name == "mezo":
        lr = LR_ZEROTH_ORDER
    else:
        lr = LR_TRAINED if source is not None and source.has_weights else LR_RANDOM
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr))


def build_engine(config: HorizonConfig, source: ModelSource | None, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """The engine that the settings describe; a model made from `model.config` gets the tokenizer's vocabulary."""
    from horizon.engine import Engine

    model, optim = config.model, config.optim
    settings: dict[str, Any] = {
        "optimizer": make_optimizer(config),
        "memory": config.memory,
        "max_grad_norm": optim.max_grad_norm,
        "clip": optim.clip,
        "device": config.device,
        "compute_dtype": config.compute_dtype,
        "kernels": config.kernels,
        "seed": config.seed,
        "freeze": model.freeze,
        "on_nonfinite": config.train.on_nonfinite,
        "trust_remote_code": model.trust_remote_code,
        "self_check": model.self_check,
    }
    if source is not None:
        return Engine.from_pretrained(str(source.folder), **settings)
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    return Engine.from_config({"vocab_size": len(tokenizer), **special, **model.config}, **settings)


def validation_batches(data: TextData, num_rows: int, micro_batch: int) -> list[dict[str, torch.Tensor]]:
    """The first `num_rows` held-out rows in micro-batches; empty when there are none."""
    if data.validation is None:
        return []
    rows = np.arange(min(num_rows, len(data.validation)))
    return [data.validation.batch(rows[start : start + micro_batch]) for start in range(0, len(rows), micro_batch)]


def sample_prompt(data: TextData, text: str | None, num_tokens: int) -> list[int]:
    """Token ids of `text`, or of the beginning of a held-out row (of a trained one when none was held out)."""
    if text is not None:
        ids: list[int] = data.tokenizer.encode(text)
        if not ids:
            raise ConfigError(f"train.sample_prompt={text!r} holds no token")
        return ids
    rows = data.train if data.validation is None else data.validation
    return [int(token) for token in rows.input_ids[0, : min(PROMPT_TOKENS, int(rows.num_tokens[0]))]]


def generate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    num_tokens: int,
    max_context: int,
    seed: int,
) -> str:
    """Text of `num_tokens` tokens after `prompt`, or fewer if it ends before, each drawn from the likeliest few.

    The likeliest token alone would repeat itself for ever after a short training.
    """
    ids, dice = list(prompt), torch.Generator().manual_seed(seed)
    for _ in range(num_tokens):
        logits = engine.next_token_logits({"input_ids": torch.tensor([ids[-max_context:]])})[0]
        likeliest = logits.topk(min(SAMPLE_FROM, len(logits)))
        drawn = torch.multinomial(likeliest.values.softmax(-1), 1, generator=dice)
        ids.append(int(likeliest.indices[drawn]))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[len(prompt) :]))


def write_config(config: HorizonConfig, path: Path) -> None:
    """Write every setting as YAML."""
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
