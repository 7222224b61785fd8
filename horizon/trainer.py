"""What `horizon train` runs: data, engine, schedule, evaluation, metrics and the saved model, one after the other."""

from __future__ import annotations

import dataclasses
import math
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from horizon.check import check_model
from horizon.config.schema import Clip, HorizonConfig
from horizon.config.values import with_batch_size
from horizon.data import Loader, TextData, load_run_data
from horizon.errors import BudgetError, ConfigError
from horizon.evaluation import Evaluation, HeldOut, check_held_out, describe_eval
from horizon.interrupts import Interrupts
from horizon.models.sources import resolve_model
from horizon.optim.clipping import Clipping
from horizon.optim.schedule import learning_rate
from horizon.records import RunSummary, StepRow, StepSplit
from horizon.report.callbacks import Callback, Callbacks
from horizon.report.console import StepDisplay
from horizon.report.ending import describe_end, describe_stop
from horizon.report.metrics import METRICS_FILE, MetricsWriter, cut_rows, from_row, to_json
from horizon.report.record import RunRecord, keeps_record
from horizon.report.trackers import import_trackers, open_trackers
from horizon.run_checkpoints import Note, RunCheckpoints, Start, data_facts
from horizon.run_log import LOG_FILE, RunLog, open_checkpoints
from horizon.run_settings import build_engine, check_settings, with_lr, write_config
from horizon.sampling import generate, prompt_text, sample_prompt

if TYPE_CHECKING:
    from horizon.engine import Engine

RECORDED = 3, 5  # steps, first and last: past compilation and first allocations, and few enough to be quick


class Assessment(NamedTuple):
    """What a model is worth; None for what is switched off or has no rows."""

    loss: float | None  # of held-out rows
    sample: str | None


class Trainer:
    """One run: `Trainer(config, output_dir).run()`.

    Writes config.yaml, metrics.jsonl (a line a step), evaluations.jsonl, summary.json, run.json, the report, the folder
    model, with optim=mezo replay.jsonl and, where they are asked for, checkpoints, trace.json and trace.png into
    `output_dir`.
    With checkpoints or optim=mezo, the first SIGTERM or Ctrl-C while it trains has it save and stop.
    """

    def __init__(
        self,
        config: HorizonConfig,
        output_dir: Path | str,
        callbacks: Iterable[Callback] = (),
        command: str | None = None,
    ) -> None:
        """Check the settings that belong to the run; nothing is read or allocated yet.

        Args:
            callbacks: told of steps, evaluations, checkpoints and the end; see `horizon.Callback`.
            command: what goes on with the run, for the message of a failure; None: how a script does.

        Raises:
            ConfigError: a setting has a value that cannot work, or a callback is none.
        """
        check_settings(config)
        self.config = with_batch_size(config)
        self._own, self._command = tuple(callbacks), command
        self._callbacks = Callbacks(self._own)
        self._clipping = Clipping(config.optim.max_grad_norm, config.optim.clip)
        self.output_dir = Path(output_dir)
        self.record = RunRecord(self.output_dir)  # run.json and the report
        self.metrics_path = self.output_dir / METRICS_FILE
        self.trace_path = self.output_dir / "trace.json"
        self.start = Start()
        self.replay_path = self.output_dir / LOG_FILE  # optim=mezo
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
        with open_checkpoints(self.config, self.output_dir) as checkpoints:
            self.start = checkpoints.find_start()
            write_config(self.config, self.output_dir / "config.yaml")
            if model.self_check:  # before anything that takes long
                self._check_architecture()
            data = load_run_data(self.config, source)
            print(data.summary, flush=True)
            self.start.check_data(data_facts(self.config, data.train))
            kept = self.start.step if checkpoints.holds(self.start) else 0
            self.rows = [from_row(StepRow, row) for row in cut_rows(self.metrics_path, kept)]
            if self.step >= self.config.train.steps and not self.rows:
                raise ConfigError(f"train.steps={self.config.train.steps}, but {self.start.folder} is at {self.step}")
            with self._telling_failures(checkpoints):
                import_trackers(self.config.trackers)
                with self._advising(len(data.tokenizer)):
                    engine = build_engine(self.config, source, data.tokenizer, self.start.folder)
                with engine:
                    checkpoints.plan(engine)
                    summary = self._run(engine, data, checkpoints, kept)
                (self.output_dir / "summary.json").write_text(to_json(summary, indent=2) + "\n", encoding="utf-8")
                self._callbacks.tell(summary)
        print(describe_end(summary, self.config, self._clipping.mode), flush=True)
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
    def _telling_failures(self, checkpoints: RunCheckpoints | RunLog) -> Iterator[None]:
        """Say where a run that fails can go on, once all that it holds is released."""
        try:
            yield
        except BaseException as error:  # Ctrl-C included
            self._callbacks.tell_failure(error)
            if self.step:
                newest = checkpoints.newest or self.start.folder
                print(describe_stop(self.output_dir, self.step, self.config, newest, self._command), flush=True)
            raise

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

    def _run(self, engine: Engine, data: TextData, checkpoints: RunCheckpoints | RunLog, kept: int) -> RunSummary:
        """Train on the engine; `kept` steps of this folder's earlier run are gone on from."""
        train, start = self.config.train, self.start.run
        with self._advising(engine.vocab_size):
            micro_batch = engine.plan_micro_batch(train.batch_size, train.seq_len, train.micro_batch)
        place = {"epoch": start.get("epoch", 0), "position": start.get("position", 0)}
        loader = Loader(
            data.train, train.batch_size, micro_batch, self.config.seed, shuffle=self.config.data.shuffle, **place
        )
        held_out = HeldOut.of(data.validation, self.config.eval.rows, train.batch_size, micro_batch)
        check_held_out(self.config, held_out)
        print(engine.plan.table(), flush=True)
        self._callbacks = Callbacks([*open_trackers(self.config, self.output_dir, kept), *self._own])
        with Evaluation(self.config.eval, engine, held_out, self.output_dir, kept, self._callbacks.tell) as evaluation:
            before = self._begin(engine, data, evaluation)
            self.record.began(engine, self.start.step, before.loss, before.sample, prompt_text(data, train))
            note = self._make_note(loader, data, evaluation, before)
            checkpoints.begin(self.start, engine, note, self._callbacks.tell)
            split = self._train(engine, loader, checkpoints, evaluation)
            checkpoints.begin_last(self.step)
            after = self._assess("after", engine, data, evaluation)
            if train.save:
                engine.save_pretrained(self.output_dir / "model", tokenizer=data.tokenizer)
            checkpoints.finish(self.step)
        last = None if checkpoints.last is None else str(checkpoints.last)
        verdict = evaluation.patience.verdict if self.step < train.steps else None
        simulated = engine.plan.limits.cxl.simulated
        return self._summary(before, after, split=split, checkpoint=last, stopped_early=verdict, simulated=simulated)

    def _begin(self, engine: Engine, data: TextData, evaluation: Evaluation) -> Assessment:
        """What the model is worth before training, as noted by a checkpoint or found out now."""
        start = self.start.run
        if not start:
            before = self._assess("before", engine, data, evaluation)
            if before.loss is not None:
                evaluation.patience.see(0, before.loss)
            return before
        evaluation.patience.restore(start["patience"])
        if evaluation.patience.verdict is not None and not self.rows:
            raise ConfigError(f"{self.start.folder} had stopped early: {evaluation.patience.verdict}")
        return Assessment(start["validation_loss_before"], start["sample_before"])

    def _make_note(self, loader: Loader, data: TextData, evaluation: Evaluation, before: Assessment) -> Note:
        """What gives all that a checkpoint has to remember of the run."""
        facts = data_facts(self.config, data.train)

        def note() -> dict[str, Any]:
            best = evaluation.at(self.step) if self.config.checkpoint.keep_best else None
            if self.config.checkpoint.save_every is not None:  # a checkpoint whose rows are lost would leave a gap
                evaluation.sync()
            return {
                "step": self.step,
                "tokens": self.tokens,
                "epoch": loader.epoch,
                "position": loader.position,
                "data": facts,
                "validation_loss": None if best is None else best.loss,
                "validation_loss_before": before.loss,
                "patience": evaluation.patience.state,
                "sample_before": before.sample,
                "tokenizer": data.tokenizer,
            }

        return note

    def _train(
        self, engine: Engine, loader: Loader, checkpoints: RunCheckpoints | RunLog, evaluation: Evaluation
    ) -> StepSplit | None:
        """All steps that are left, a few of which are recorded: where their time went; None: no step was left."""
        num_steps, done, recording = self.config.train.steps, self.step, None
        if done >= num_steps or evaluation.patience.verdict is not None:
            return None
        first, last = (done + step for step in recorded_steps(num_steps - done))
        files = (self.trace_path, self.trace_path.with_suffix(".png")) if self.config.trace else (None, None)
        interrupts = Interrupts()
        evaluation.begin(done, self.tokens)
        with (
            MetricsWriter(self.metrics_path, append=True) as metrics,
            StepDisplay(num_steps, note=self._note_on_steps(engine), done=done) as display,
            interrupts if checkpoints.is_on else nullcontext(),
            ExitStack() as recorded,
        ):
            while self.step < num_steps and evaluation.patience.verdict is None:
                if self.step + 1 == first:
                    recording = recorded.enter_context(engine.trace(*files))
                row = self._step(engine, loader)
                self.rows.append(row)
                metrics.write(row)
                display.show(row)
                self._callbacks.tell(row)
                is_due = evaluation.is_due(row.step, self.tokens)
                if row.step == last or is_due:
                    recorded.close()  # an evaluation is no part of a step
                    self.record.recorded(None if recording is None else recording.split)
                if is_due:
                    found = evaluation.when_due(row.step, self.tokens)
                    display.say(f"validation loss at step {row.step}: {describe_eval(found)}")
                checkpoints.after_step(row.step, self.tokens, interrupts)
        return None if recording is None else recording.split

    def _note_on_steps(self, engine: Engine) -> str:
        """What is to be said of every step."""
        notes = [self._clipping.note] if self._clipping.mode is Clip.lagged else []
        if engine.plan.limits.cxl.simulated:
            notes.append(f"[{engine.plan.limits.cxl.name}]")
        return " ".join(notes)

    def _step(self, engine: Engine, loader: Loader) -> StepRow:
        optim, started = self.config.optim, time.perf_counter()
        assert optim.lr is not None
        step, epoch = self.step + 1, loader.epoch
        batches = loader.next_step()
        engine.lr = learning_rate(
            step, optim.lr, optim.schedule, optim.warmup_steps, self.config.train.steps, optim.min_lr_ratio
        )
        result = engine.step(batches)
        seconds, predicted = time.perf_counter() - started, engine.plan.prediction
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
            resident_share=math.nan if predicted is None else predicted.arithmetic_s / seconds,
            projected_gradients=list(result.projected_gradients),
            simulated=engine.plan.limits.cxl.simulated,
            time=time.time(),
        )

    def _assess(self, when: str, engine: Engine, data: TextData, evaluation: Evaluation) -> Assessment:
        """Score held-out rows and write a sample, both printed."""
        train, row = self.config.train, evaluation.at(self.step)
        if row is not None:
            print(f"validation loss {when} training: {describe_eval(row)}", flush=True)
        loss = None if row is None else row.loss
        if not train.sample_tokens:
            return Assessment(loss, None)
        prompt = sample_prompt(data, train.sample_prompt, train.sample_tokens)
        sample = generate(engine, data.tokenizer, prompt, train.sample_tokens, train.seq_len, self.config.seed)
        text = f"{data.tokenizer.decode(prompt)} >>> {sample}"
        print(f"sample {when} training (the model goes on after >>>):\n{textwrap.indent(text, '    ')}", flush=True)
        return Assessment(loss, sample)

    def _summary(self, before: Assessment, after: Assessment, **others: Any) -> RunSummary:
        seconds, num_tokens = sum(row.seconds for row in self.rows), sum(row.num_tokens for row in self.rows)
        return RunSummary(
            steps=self.step,
            num_tokens=num_tokens,
            seconds=seconds,
            tokens_per_s=num_tokens / seconds,
            loss=self.rows[-1].loss,
            clip=self._clipping.note,
            clipped_steps=sum(row.clip_scale < 1 for row in self.rows),
            corrected_blocks=sum(row.corrected_blocks for row in self.rows),
            validation_loss_before=before.loss,
            validation_loss_after=after.loss,
            sample_before=before.sample,
            sample_after=after.sample,
            output_dir=str(self.output_dir),
            model_dir=str(self.output_dir / "model") if self.config.train.save else None,
            resumed_from=None if self.start.folder is None else str(self.start.folder),
            trace_file=str(self.trace_path) if self.config.trace else None,
            **others,
        )


def recorded_steps(num_steps: int) -> tuple[int, int]:
    """The first and the last step whose timeline is recorded: `RECORDED`, or the last ones of a shorter run."""
    first, last = RECORDED
    return min(first, num_steps), min(last, num_steps)
