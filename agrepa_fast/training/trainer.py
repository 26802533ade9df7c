"""The training loop: warm up, probe, choose layers, align, let the alignment decay. It fills a run's folder.

Random numbers depend on the step number or on torch's global generators, whose state is in the checkpoint. So on the
CPU a run that was interrupted and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..alignment.policy import choose_layers
from ..alignment.selection import Selection, read_selection, synchronised
from ..alignment.weights import upgrade
from ..errors import UserError
from ..imports import import_module
from ..models import packed
from ..report import write_report
from . import distributed, progress, state
from .checkpoint import (
    Checkpoint,
    begun,
    drop_old,
    restore,
    save_checkpoint,
    write_whole,
)
from .choice import aligned_metrics, alignment_schedule, apply_selection, check_probed_domains, choose, layer_choice
from .clips import load_data
from .config import RunConfig, dump_config
from .ema import Ema
from .environment import pick_device, versions
from .evaluation import validate, write_samples
from .feed import Feed
from .lock import RunLock
from .log import RunLog, average
from .objective import Objective, StepInputs, domain_tables
from .optimizer import build_optimizer, one_cycle
from .rates import Rates
from .signals import StopSignals
from .step import TrainStep, pick_engine
from .teachers import build_teachers

T = TypeVar("T")
REPORT_SECONDS = 60.0  # report.html is at most this much older than the last validation


class Trainer:
    """One run. `run()` trains to the last step, or until SIGINT, SIGTERM or SIGHUP, and returns the run's folder.

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
        for module in config.train.imports:
            import_module(module, "train.imports")
        teachers = build_teachers(config, self.data.train.clips[0].path, self.device)
        self.teachers = teachers
        tables = domain_tables(config, self.data.train.domains)
        self.domain_tables = {name: table.to(self.device) for name, table in tables.items()}
        check_probed_domains(config, self.data.valid)
        torch.manual_seed(config.train.seed)
        widths = {name: teacher.width for name, teacher in teachers.items()}
        generator = torch.Generator(self.device).manual_seed(config.train.seed)
        objective = Objective(config, widths, generator, distributed.rank(), distributed.world_size())
        self.objective = objective.to(self.device)
        self.objective.backbone.network.recompute = config.train.recompute
        if config.model.attention == "xformers":
            if why_not := packed.check(self.device):
                raise UserError(f"model.attention: {why_not}; use sdpa")
            self.objective.backbone.network.packed = True
        # From here on only dropout uses the global generators, which differ from rank to rank.
        torch.manual_seed(config.train.seed + distributed.rank())
        engine = pick_engine(config, self.device, distributed.world_size())
        self.optimizer = build_optimizer(self.objective, config, capturable=engine == "graph")
        self.learning_rate = one_cycle(config.optimizer, config.train.steps)
        self.ema = Ema(self.objective.backbone, config.optimizer.ema_decay)
        self.train_step = TrainStep(self.objective, self.optimizer, self.ema, config, self.device, self.bf16, engine)
        self.step = 0
        self.choice = layer_choice(config)
        self.applied_weight = 0.0  # the factor of the alignment loss at the last step
        self.signals = StopSignals()  # those that this rank's process gets
        self.stopping = False  # all ranks have agreed to end
        self.seconds_before = 0.0
        self.probe_seconds = 0.0
        self.began = time.perf_counter()
        self.reported = 0.0
        if config.alignment.selection:
            self.select(synchronised(read_selection(config.alignment.selection)))
        if config.alignment.layers:
            self.select(choose_layers("fixed", config.model.depth, layers=config.alignment.layers))
        self.choice.given = self.selection is not None  # the configuration has chosen; probes do not
        if resume is not None:
            self._restore(resume)
        self.schedule = alignment_schedule(config)
        resumed = None if resume is None else (self.step, resume.state["log_bytes"])
        if distributed.rank() == 0:
            write_whole(run_dir / "config.yaml", dump_config(config))
        self.log = RunLog(run_dir if distributed.rank() == 0 else None, config, resumed)
        self.feed = Feed(config, self.data, teachers, self.domain_tables, self.device, self.bf16, self.log)
        for flaw in resume.damaged if resume is not None else ():
            self.log.write("damaged", step=self.step, reason=flaw)
            if distributed.rank() == 0:
                print(f"passed over: {flaw}", file=sys.stderr)
        for note in self.data.split.notes if distributed.rank() == 0 else ():
            print(f"data: {note}", file=sys.stderr)

    def run(self) -> Path:
        """Train. Every exit but a crash leaves a checkpoint, the log with the reason, and report.html.

        Raises:
            UserError: training cannot go on, or something cannot be written (a full disk, say). Earlier checkpoints are
                untouched.
        """
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
        if distributed.rank() == 0:
            with suppress(UserError, OSError):
                write_report(self.run_dir)

    def _log_end(self, event: str, **facts: Any) -> None:
        seconds = self.seconds()
        self.log.write(event, step=self.step, seconds=seconds, probe_share=self.probe_seconds / seconds, **facts)

    def _run(self) -> None:
        self.began = time.perf_counter()
        self.rates = Rates(self.config.dit, self.device, self.bf16)
        if self.step == 0:
            self._log_start()
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
        if distributed.rank() == 0:
            write_report(self.run_dir)

    def _train(self) -> None:
        train = self.config.train
        batches = self.feed.batches(self.step, lambda message: self.log.write("worker", step=self.step, reason=message))
        bar = progress.progress_bar(self.step, train.steps)
        self.rates.go_on()
        while self.step < train.steps:
            if self.choice.due(self.step, self.schedule.stop):
                with self._paused():
                    choose(self)
            self.applied_weight = self._align_weight()
            with_targets = self.applied_weight > 0 or self.objective.interface is not None
            inputs = [self.feed.inputs(batch, with_targets) for batch in islice(batches, train.accumulate)]
            self.train_step(inputs, self.applied_weight, self.learning_rate(self.step))
            for batch in inputs:
                self.rates.count(*batch.mask.shape)
            self.step += 1
            bar.update()
            if train.diagnose_every and self.step % train.diagnose_every == 0 and self._align_weight():
                with self._paused():
                    self._diagnose(inputs[0])
            at_line = self.step % train.log_every == 0 or self.step == train.steps
            if at_line:
                self._log_train(bar)
            if distributed.world_size() == 1 or at_line:
                # Ranks are at different steps when a signal comes; here they are at the same one.
                self.stopping = any(distributed.gather(self.signals.received))
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

    def _align_weight(self) -> float:
        """The factor of the alignment loss at this step; 0 before the selection and after the schedule's end."""
        return self.config.alignment.weight * self.schedule(self.step) if self.selection else 0.0

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
        self.log.write("gradients", step=self.step, **average([self._selected(cosines)]))

    def select(self, selection: Selection) -> None:
        """Align these layers from now on.

        Raises:
            UserError: a selection of other layers, teachers or times than the run has.
        """
        apply_selection(self.objective.alignment, selection, self.config.model.depth)
        self.choice.selection = selection

    @property
    def selection(self) -> Selection | None:
        """The aligned layers, None before the probe that chooses them."""
        return self.choice.selection

    def _validate(self) -> None:
        """Log the metrics of the held-out clips, and renew the report. Only rank 0 does it."""
        if distributed.rank():
            return
        metrics = validate(
            self.objective, self.teachers, self.domain_tables, self.data.valid, self.config, self.device, self.bf16
        )
        self.log.write("valid", step=self.step, **self._selected(metrics))
        if time.monotonic() - self.reported > REPORT_SECONDS:
            write_report(self.run_dir)
            self.reported = time.monotonic()

    def _selected(self, metrics: dict[str, T]) -> dict[str, T]:
        """The metrics without those of layers that are not aligned."""
        return aligned_metrics(metrics, self.selection, self.teachers)

    def _samples(self) -> None:
        if distributed.rank() == 0:
            for facts in write_samples(self.ema.module, self.data.valid, self.config, self.run_dir, self.step):
                self.log.write("sample", step=self.step, **facts)

    def _log_start(self) -> None:
        parts = {
            "model": self.objective.backbone.network,
            "conditioner": self.objective.backbone.conditioner,
            "heads": self.objective.heads(),
        }
        clips = {"train": self.data.train.clips, "valid": self.data.valid.clips}
        self.log.write(
            "start",
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            versions=versions(),
            device=str(self.device),
            precision="bf16" if self.bf16 else "fp32",
            engine=self.train_step.engine,
            ranks=distributed.world_size(),
            matmul_flops=self.rates.matmul,
            parameters={name: sum(p.numel() for p in m.parameters()) for name, m in parts.items()},
            clips={name: len(listed) for name, listed in clips.items()} | {"duplicates": self.data.split.duplicates},
            data=self.data.digest,
            domains={
                domain: sum(clip.domain == domain for clip in self.data.train.clips)
                for domain in self.data.train.domains
            },
        )
        for item in self.data.skipped:
            self.log.write("skipped", path=str(item.path), source=item.source, reason=item.reason)

    def _log_train(self, bar: Any) -> None:
        """Log the metrics since the last line (their mean over the ranks) and the rates (their sum over the ranks).

        Raises:
            UserError: too many steps in a row had gradients that are not finite.
        """
        rank_metrics, (_, longest, skipped) = self.train_step.read()
        gathered = distributed.gather((self._selected(rank_metrics), self.rates.read()))
        names = dict.fromkeys(name for metrics, _ in gathered for name in metrics)
        by_rank = {name: [metrics[name] for metrics, _ in gathered if name in metrics] for name in names}
        metrics = {name: sum(values) / len(values) for name, values in by_rank.items()}
        rates = gathered[0][1]
        for name in ("samples_per_second", "frames_per_second"):
            rates[name] = sum(other[name] for _, other in gathered)
        self.log.write(
            "train",
            step=self.step,
            **metrics,
            align_weight=self.applied_weight,
            lr=self.learning_rate(self.step - 1),
            skipped_steps=int(skipped),
            captures=self.train_step.captures,
            **rates,
        )
        if longest >= self.config.train.max_skipped:
            reason = f"{int(longest)} steps in a row by step {self.step} had gradients that are not finite"
            kept = f"; the last checkpoint is in {self.run_dir / 'checkpoints'}" if begun(self.run_dir) else ""
            raise UserError(f"{reason}: lower optimizer.lr, or train.precision=fp32{kept}")
        progress.show(bar, metrics, rates)

    def save(self) -> None:
        """Write a checkpoint of this step, and delete all but the newest `train.keep`. Every rank must call it."""
        captured = state.capture(self)
        if distributed.rank():
            return
        weights = {
            "model": self.objective.backbone.state_dict(),
            "ema": self.ema.module.state_dict(),
            "heads": self.objective.heads().state_dict(),
        }
        folder = self.run_dir / "checkpoints"
        save_checkpoint(folder, self.step, weights, captured, self.config)
        drop_old(folder, self.config.train.keep)

    def _restore(self, checkpoint: Checkpoint) -> None:
        path = checkpoint.path
        restore(self.objective.backbone, checkpoint.weights["model"], path / "model.safetensors")
        restore(self.ema.module, checkpoint.weights["ema"], path / "ema.safetensors")
        heads = upgrade(checkpoint.weights["heads"], self.teachers, "alignment.")
        restore(self.objective.heads(), heads, path / "heads.safetensors")
        state.apply(self, checkpoint.state, path / "state.pt")
