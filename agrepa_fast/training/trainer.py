"""The training loop: warm up, probe, choose layers, align, let the alignment decay. It fills a run's folder.

Random numbers depend on the step number or on torch's global generators, whose state is in the checkpoint. So on the
CPU a run that was interrupted and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..alignment.selection import Selection, read_selection, synchronised
from ..alignment.weights import upgrade
from ..errors import UserError
from ..imports import import_module
from ..models import packed
from ..report import write_report
from . import distributed, progress, state
from .checkpoint import (
    Checkpoint,
    drop_old,
    restore,
    save_checkpoint,
    write_whole,
)
from .choice import check_probed_domains, choose
from .clips import check_ranks, load_data
from .config import RunConfig, dump_config
from .ema import Ema
from .entries import log_start, log_train
from .environment import pick_device
from .evaluation import validate, write_samples
from .feed import Feed
from .latents import with_statistics
from .lock import RunLock
from .log import RunLog, average
from .objective import Objective, StepInputs
from .optimizer import build_optimizer, one_cycle
from .rates import Rates
from .sharding import gathered, shard
from .signals import StopSignals
from .step import TrainStep, pick_engine
from .targets import domain_tables
from .teachers import build_teachers

T = TypeVar("T")
BEGINS = {"interface": "alignment.bitc", "stop": "alignment.stop_similarity"}  # parts that a later phase may add
REPORT_SECONDS = 60.0  # report.html is at most this much older than the last validation


class Trainer:
    """One run. `run()` trains to the last step, or until SIGINT, SIGTERM or SIGHUP, and returns the run's folder.

    Attributes:
        reports: whether to write report.html; set it before `run`.

    Args:
        lock: the lock of the run's folder; `run` releases it at its end.
        accept_changes: go on although the clips are not those of the checkpoint `resume`.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        resume: Checkpoint | None = None,
        *,
        lock: RunLock | None = None,
        accept_changes: bool = False,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.lock = lock
        self.device = distributed.init(pick_device(config.train.device))
        precision = config.train.precision
        self.bf16 = precision == "bf16" or (precision == "auto" and self.device.type == "cuda")
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.data = load_data(config, run_dir, resume.state["clips"] if resume else None, accept_changes)
        config = self.config = with_statistics(config, self.data)
        for module in config.train.imports:
            import_module(module, "train.imports")
        teachers, without = build_teachers(config, [self.data.train, self.data.valid], self.device)
        self.data.skipped.extend(without)
        check_ranks(self.data)
        self.teachers = teachers
        tables = domain_tables(config, self.data.train.domains)
        self.domain_tables = {name: table.to(self.device) for name, table in tables.items()}
        check_probed_domains(config, self.data.valid)
        torch.manual_seed(config.train.seed)
        widths = {name: teacher.width for name, teacher in teachers.items()}
        generator = torch.Generator(self.device).manual_seed(config.train.seed)
        objective = Objective(config, widths, generator, distributed.rank(), distributed.world_size())
        objective.backbone.network.recompute = config.train.recompute
        if config.model.attention == "xformers":
            if why_not := packed.check(self.device):
                raise UserError(f"model.attention: {why_not}; use sdpa")
            objective.backbone.network.packed = True
        average = copy.deepcopy(objective.backbone)  # before anything is sharded: shards cannot be copied
        self.sharded = config.train.shard and distributed.world_size() > 1
        if self.sharded:
            shard(objective, average, self.device, self.bf16)
        self.objective = objective.to(self.device)
        self.aligner = objective.aligner
        self.ema = Ema(objective.backbone, config.optimizer.ema_decay, average.to(self.device))
        # From here on only dropout uses the global generators, which differ from rank to rank.
        torch.manual_seed(config.train.seed + distributed.rank())
        engine = pick_engine(config, self.device, distributed.world_size())
        self.optimizer = build_optimizer(self.objective, config, capturable=engine == "graph")
        self.learning_rate = one_cycle(config.optimizer, config.train.steps)
        self.objective.follow(self.ema.module)
        self.train_step = TrainStep(self.objective, self.optimizer, self.ema, config, self.device, self.bf16, engine)
        self.step = 0
        self.applied_weight = 0.0  # the factor of the alignment loss at the last step
        self.signals = StopSignals()  # those that this rank's process gets
        self.stopping = False  # all ranks have agreed to end
        self.until: int | None = None  # `run` stops after this step
        self.notes: list[str] = []  # what a resumed run does otherwise than its checkpoint
        self.seconds_before = 0.0
        self.probe_seconds = 0.0
        self.began = time.perf_counter()
        self.reports = True
        self.reported = 0.0
        if config.alignment.selection:
            self.select(synchronised(read_selection(config.alignment.selection)))
            self.aligner.choice.given = True  # probes do not choose
        if resume is not None:
            self._restore(resume)
        resumed = None if resume is None else (self.step, resume.state["log_bytes"])
        if distributed.rank() == 0:
            write_whole(run_dir / "config.yaml", dump_config(config))
        self.log = RunLog(run_dir if distributed.rank() == 0 else None, config, resumed)
        self.feed = Feed(config, self.data, teachers, self.domain_tables, self.device, self.bf16, self.log)
        for flaw in resume.damaged if resume is not None else ():
            self.log.write("damaged", step=self.step, reason=flaw)
            if distributed.rank() == 0:
                print(f"passed over: {flaw}", file=sys.stderr)
        for note in self.notes:
            self.log.write("note", step=self.step, note=note)
        for note in (*self.notes, *(f"data: {n}" for n in self.data.split.notes)) if distributed.rank() == 0 else ():
            print(note, file=sys.stderr)

    def run(self, until: int | None = None) -> Path:
        """Train. Every exit but a crash leaves a checkpoint, the log with the reason, and report.html.

        until: stop after this step, as if the run had been interrupted there; None: train to the last step.

        Raises:
            UserError: training cannot go on, or something cannot be written (a full disk, say). Earlier checkpoints are
                untouched.
        """
        self.until = until
        try:
            self._run()
        except UserError as error:
            self._stop(str(error))
            raise
        except OSError as error:
            reason = f"{error.filename or self.run_dir}: {error.strerror or error}"
            self._stop(reason)
            raise UserError(reason) from error
        finally:
            self.log.close()
            if self.lock is not None:
                self.lock.release()
        return self.run_dir

    def _stop(self, reason: str) -> None:
        """Write into the log and the report why the run ends early, or what went wrong after its last step."""
        # If the disk is full again, keep the first reason.
        with suppress(UserError, OSError):
            self._log_end("end" if self.step == self.config.train.steps else "stopped", reason=reason)
        with suppress(UserError, OSError):
            self._report()

    def _report(self) -> None:
        if distributed.rank() == 0 and self.reports:
            write_report(self.run_dir)
            self.reported = time.monotonic()

    def _log_end(self, event: str, **facts: Any) -> None:
        seconds = self.seconds()
        self.log.write(event, step=self.step, seconds=seconds, probe_share=self.probe_seconds / seconds, **facts)

    def _run(self) -> None:
        self.began = time.perf_counter()
        self.rates = Rates(self.config.dit, self.device, self.bf16)
        if self.step == 0:
            log_start(self)
            self._validate()
        else:
            self.log.write("resume", step=self.step)
        for note in self.data.split.notes:
            self.log.write("data", step=self.step, note=note)
        with self.signals:
            self._train()
        if self.stopping:
            self.log.write("interrupted", step=self.step)
        else:
            self._samples()
            self._log_end("end")
        self._report()

    def _train(self) -> None:
        train = self.config.train
        batches = self.rates.timed(
            self.feed.batches(self.step, lambda message: self.log.write("worker", step=self.step, reason=message))
        )
        bar = progress.progress_bar(self.step, train.steps)
        self.rates.go_on()
        while self.step < train.steps:
            if self.aligner.due(self.step):
                with self._paused():
                    choose(self)
            else:
                self.aligner.step(self.step)
            self.applied_weight = self.aligner.strength_at(self.step)
            with_targets = self.aligner.on or self.objective.interface is not None
            inputs = [self.feed.inputs(batch, with_targets) for batch in islice(batches, train.accumulate)]
            self.train_step(inputs, self.learning_rate(self.step))
            for batch in inputs:
                self.rates.count(*batch.mask.shape)
            self.step += 1
            bar.update()
            if train.diagnose_every and self.step % train.diagnose_every == 0 and self.aligner.strength_at(self.step):
                with self._paused():
                    self._diagnose(inputs[0])
            at_line = self.step % train.log_every == 0 or self.step == train.steps
            if at_line:
                log_train(self, bar)
            if distributed.world_size() == 1 or at_line:
                # Ranks are at different steps when a signal comes; here they are at the same one.
                self.stopping = any(distributed.gather(self.signals.received))
            self.stopping = self.stopping or self.step == self.until
            with self._paused():
                if self.step % train.valid_every == 0 or self.step == train.steps:
                    self._validate()
                if train.sample_every and self.step % train.sample_every == 0 and self.step < train.steps:
                    self._samples()
                if self.stopping or self.step % train.checkpoint_every == 0 or self.step == train.steps:
                    self.save()
            if self.stopping:
                break
        bar.close()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Leave the time of a block out of the rates: it is not training."""
        self.rates.pause()
        yield
        self.rates.go_on()

    def seconds(self) -> float:
        """Wall time of the run so far, all sessions together."""
        return self.seconds_before + time.perf_counter() - self.began

    def _diagnose(self, inputs: StepInputs) -> None:
        """Log whether the gradients of the two losses agree at the aligned layers."""
        self.objective.eval()
        draws = self.objective.draw(inputs, torch.Generator(self.device).manual_seed(self.step))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            cosines = self.objective.gradient_cosines(inputs, draws)
        self.log.write("gradients", step=self.step, **average([self.selected(cosines)]))

    def select(self, selection: Selection) -> None:
        """Align these layers from now on.

        Raises:
            UserError: a selection of other layers, teachers or times than the run has.
        """
        try:
            self.aligner.select(selection)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{error} (alignment.teachers, alignment.weights, probe.t_grid)") from error

    @property
    def selection(self) -> Selection | None:
        """The aligned layers, None before the probe that chooses them."""
        return self.aligner.selection

    def _validate(self) -> None:
        """Log the metrics of the held-out clips, and renew the report. With shards all ranks compute; rank 0 writes."""
        if distributed.rank() and not self.sharded:
            return
        metrics = validate(
            self.objective, self.teachers, self.domain_tables, self.data.valid, self.config, self.device, self.bf16
        )
        self.log.write("valid", step=self.step, **self.selected(metrics))
        if time.monotonic() - self.reported > REPORT_SECONDS:
            self._report()

    def selected(self, metrics: dict[str, T]) -> dict[str, T]:
        """The metrics without those of layers that are not aligned."""
        return self.aligner.selected(metrics)

    def _samples(self) -> None:
        if distributed.rank() == 0 or self.sharded:
            for facts in write_samples(self.ema.module, self.data.valid, self.config, self.run_dir, self.step):
                self.log.write("sample", step=self.step, **facts)

    def save(self) -> None:
        """Write a checkpoint of this step, and delete all but the newest `train.keep`. Every rank must call it."""
        captured = state.capture(self)
        parts = {"model": self.objective.backbone, "ema": self.ema.module, "heads": self.objective.heads()}
        weights = {name: gathered(module.state_dict()) for name, module in parts.items()}
        if distributed.rank() == 0:
            folder = self.run_dir / "checkpoints"
            save_checkpoint(folder, self.step, weights, captured, self.config)
            drop_old(folder, self.config.train.keep)
        distributed.gather(None)  # any rank may read the checkpoint after this

    def _restore(self, checkpoint: Checkpoint) -> None:
        path = checkpoint.path
        restore(self.objective.backbone, checkpoint.weights["model"], path / "model.safetensors")
        restore(self.ema.module, checkpoint.weights["ema"], path / "ema.safetensors")
        # What a checkpoint has no heads for begins here, with its first values: all of alignment after the shared
        # warm-up of a study, BiT-C or the stop by similarity where an earlier phase went without.
        heads, parts = checkpoint.weights["heads"], self.objective.heads()
        heads = upgrade(heads, self.aligner.loss_fn.teachers, "alignment.")
        fresh = [n for n in parts if not heads or (n in BEGINS and not any(key.startswith(f"{n}.") for key in heads))]
        known = nn.ModuleDict({name: part for name, part in parts.items() if name not in fresh})
        state.check_alignment(checkpoint, self.config, self.aligner.choice.given)
        restore(known, heads, path / "heads.safetensors")
        self.notes += [f"{BEGINS[name]} begins here: the checkpoint was made without it" for name in fresh if heads]
        self.notes += state.apply(self, checkpoint.state, path / "state.pt", fresh)
