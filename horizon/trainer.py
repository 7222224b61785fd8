"""What `horizon train` runs: data, engine, schedule, evaluation, metrics and the saved model, one after the other."""

from __future__ import annotations

import dataclasses
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from horizon.building import make_optimizer
from horizon.check import check_model
from horizon.config.schema import Clip, HorizonConfig
from horizon.data import Loader, TextData, load_data
from horizon.errors import BudgetError, ConfigError
from horizon.interrupts import Interrupts
from horizon.models.hf_config import load_config
from horizon.models.skeleton import ModelSource, resolve_model
from horizon.optim.clipping import Clipping
from horizon.optim.schedule import learning_rate
from horizon.records import RunSummary, StepRow, StepSplit
from horizon.report.console import StepDisplay
from horizon.report.metrics import MetricsWriter, cut_rows, from_row, to_json
from horizon.report.record import RunRecord, keeps_record
from horizon.report.split import describe_split
from horizon.report.trace import require_matplotlib
from horizon.run_checkpoints import RunCheckpoints, Start, check_checkpoint_settings, data_facts
from horizon.sampling import generate, prompt_text, sample_prompt, validation_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from horizon.engine import Engine

LR_RANDOM = 2e-3  # optim.lr=null, random weights
LR_TRAINED = 1e-5  # optim.lr=null, weights that were trained before
LR_ZEROTH_ORDER = 1e-6  # optim.lr=null, optim=mezo
RECORDED = 3, 5  # steps, first and last: past compilation and first allocations, and few enough to be quick


class Trainer:
    """One run: `Trainer(config, output_dir).run()`.

    Writes config.yaml, metrics.jsonl (a line a step), summary.json, run.json, the report, the folder model, with
    optim=mezo replay.jsonl and, where they are asked for, checkpoints, trace.json and trace.png into `output_dir`. With
    checkpoints, the first SIGTERM or Ctrl-C while it trains has it save and stop.
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
        self.record = RunRecord(self.output_dir)  # run.json and the report
        self.metrics_path = self.output_dir / "metrics.jsonl"
        self.trace_path = self.output_dir / "trace.json"
        self.start = Start()
        self.replay_path = self.output_dir / "replay.jsonl"  # optim=mezo
        self.rows: list[StepRow] = []  # the steps done so far, as far as this output_dir knows of them

    @keeps_record
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
        with RunCheckpoints(self.config, self.output_dir) as checkpoints:
            self.start = checkpoints.find_start()
            write_config(self.config, self.output_dir / "config.yaml")
            if model.self_check:  # before anything that takes long
                self._check_architecture()
            data = self._load_data(source)
            print(data.summary, flush=True)
            self.start.check_data(data_facts(self.config, data.train))
            kept = self.start.step if checkpoints.holds(self.start) else 0
            self.rows = [from_row(StepRow, row) for row in cut_rows(self.metrics_path, kept)]
            if self.step >= self.config.train.steps and not self.rows:
                raise ConfigError(f"train.steps={self.config.train.steps}, but {self.start.folder} is at {self.step}")
            with self._advising(len(data.tokenizer)):
                engine = build_engine(self.config, source, data.tokenizer, self.start.folder)
            with engine:
                if self.config.optim.name == "mezo":
                    engine.log_steps(self.replay_path, "" if source is None else str(source.folder))
                if checkpoints.is_on:
                    engine.plan_checkpoints(self.config.checkpoint.staging)
                summary = self._run(engine, data, checkpoints)
        (self.output_dir / "summary.json").write_text(to_json(summary, indent=2) + "\n", encoding="utf-8")
        self._print_end(summary)
        return summary

    @property
    def step(self) -> int:
        """Steps done so far, those before a checkpoint included."""
        return self.rows[-1].step if self.rows else self.start.step

    @property
    def tokens(self) -> int:
        """Tokens of all these steps."""
        return self.start.tokens + sum(row.num_tokens for row in self.rows if row.step > self.start.step)

    @contextmanager
    def _advising(self, vocab_size: int) -> Iterator[None]:
        """Add to a refusal which settings would fit."""
        try:
            yield
        except BudgetError as error:
            if error.tier is None or self.config.optim.name != "adamw":
                raise  # the system refused, not a plan; or the plan is of steps that nothing forecasts
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

    def _run(self, engine: Engine, data: TextData, checkpoints: RunCheckpoints) -> RunSummary:
        train, start = self.config.train, self.start.run
        with self._advising(engine.vocab_size):
            micro_batch = engine.plan_micro_batch(train.batch_size, train.seq_len, train.micro_batch)
        place = {"epoch": start.get("epoch", 0), "position": start.get("position", 0)}
        loader = Loader(
            data.train, train.batch_size, micro_batch, self.config.seed, shuffle=self.config.data.shuffle, **place
        )
        held_out = validation_batches(data, train.eval_rows, micro_batch)
        print(engine.plan.table(), flush=True)
        if start:
            loss_before, sample_before = start["validation_loss_before"], start["sample_before"]
        else:
            loss_before, sample_before = self._assess("before", engine, data, held_out)
        self.record.began(engine, self.start.step, loss_before, sample_before, prompt_text(data, train))
        facts = data_facts(self.config, data.train)

        def note() -> dict[str, Any]:
            return {
                "step": self.step,
                "tokens": self.tokens,
                "epoch": loader.epoch,
                "position": loader.position,
                "data": facts,
                "validation_loss": engine.evaluate(held_out) if self.config.checkpoint.keep_best and held_out else None,
                "validation_loss_before": loss_before,
                "sample_before": sample_before,
                "tokenizer": data.tokenizer,
            }

        checkpoints.begin(self.start, engine)
        split = self._train(engine, loader, checkpoints, note) if self.step < train.steps else None
        checkpoints.begin_last(self.step, note)
        loss_after, sample_after = self._assess("after", engine, data, held_out)
        model_dir = self.output_dir / "model" if train.save else None
        if model_dir is not None:
            engine.save_pretrained(model_dir, tokenizer=data.tokenizer)
        checkpoints.finish(self.step, note)
        seconds = sum(row.seconds for row in self.rows)
        return RunSummary(
            steps=self.step,
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
            checkpoint=None if checkpoints.last is None else str(checkpoints.last),
            resumed_from=None if self.start.folder is None else str(self.start.folder),
            trace_file=str(self.trace_path) if self.config.trace else None,
        )

    def _train(
        self, engine: Engine, loader: Loader, checkpoints: RunCheckpoints, note_run: Callable[[], dict[str, Any]]
    ) -> StepSplit:
        """All steps that are left, a few of which are recorded: where their time went."""
        num_steps, done = self.config.train.steps, self.step
        notes = [self._clipping.note] if self._clipping.mode is Clip.lagged else []
        if engine.plan.limits.cxl.simulated:
            notes.append(f"[{engine.plan.limits.cxl.name}]")
        first, last = (done + step for step in recorded_steps(num_steps - done))
        files = (self.trace_path, self.trace_path.with_suffix(".png")) if self.config.trace else (None, None)
        interrupts = Interrupts()
        with (
            MetricsWriter(self.metrics_path, append=True) as metrics,
            StepDisplay(num_steps, note=" ".join(notes), done=done) as display,
            interrupts if checkpoints.is_on else nullcontext(),
        ):

            def note_when_on_disk() -> dict[str, Any]:
                metrics.sync()  # a checkpoint whose rows are lost would leave a gap
                return note_run()

            def train_until(step: int) -> None:
                while self.step < step:
                    row = self._step(engine, loader)
                    self.rows.append(row)
                    metrics.write(row)
                    display.show(row)
                    checkpoints.after_step(row.step, self.tokens, interrupts, note_when_on_disk)

            try:
                train_until(first - 1)
                with engine.trace(*files) as recording:
                    train_until(last)
                self.record.recorded(recording.split)
                train_until(num_steps)
            except BaseException:  # Ctrl-C included
                print(f"\nstopped after step {self.step} of {num_steps}; metrics in {self.metrics_path}", flush=True)
                raise
        assert recording.split is not None
        return recording.split

    def _step(self, engine: Engine, loader: Loader) -> StepRow:
        optim, started = self.config.optim, time.perf_counter()
        assert optim.lr is not None
        step, epoch = self.step + 1, loader.epoch
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
        if summary.split is not None:
            print(describe_split(summary.split))
        if self.config.optim.name == "mezo":
            print(f"replay   {self.replay_path} (horizon replay base=FOLDER log={self.replay_path} out=FOLDER)")
        print(f"metrics  {self.metrics_path}\nsettings {self.output_dir / 'config.yaml'}")
        if summary.checkpoint is not None:
            print(f"saved    {summary.checkpoint}")
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
    check_checkpoint_settings(config)
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


def build_engine(
    config: HorizonConfig,
    source: ModelSource | None,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None = None,
) -> Engine:
    """The engine that the settings describe, with the states of `checkpoint` if there is one.

    A model made from `model.config` gets the tokenizer's vocabulary.
    """
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
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    made = {"vocab_size": len(tokenizer), **special, **model.config}
    what = made if source is None else str(source.folder)
    if checkpoint is None:
        return Engine.from_pretrained(what, **settings)
    return Engine.load_checkpoint(checkpoint, model=what, weights_only=config.resume_weights_only, **settings)


def write_config(config: HorizonConfig, path: Path) -> None:
    """Write every setting as YAML."""
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
