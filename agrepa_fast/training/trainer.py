"""The training loop: warm-up, probe, freeze the selection, align, decay. Leaves a run's folder behind.

Everything random comes from the step number or from torch's global generators, whose state is in the
checkpoint: on the CPU an interrupted and resumed run ends with the bits of an unbroken one.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..alignment.policy import choose_layers
from ..alignment.selection import Selection, by_teacher, read_selection, synchronised
from ..alignment.weights import upgrade
from ..attribution.scores import LayerScores
from ..data.batches import Batch
from ..data.buckets import BucketBatches
from ..data.loading import iterate
from ..errors import UserError, writing
from ..imports import import_module
from ..models import packed
from ..teachers.cache import CachedTeacher, FeatureKey
from ..teachers.registry import build_teacher
from . import state
from .checkpoint import (
    Checkpoint,
    begun,
    drop_old,
    find_checkpoint,
    is_checkpoint,
    load_checkpoint,
    restore,
    save_checkpoint,
    write_whole,
)
from .choice import alignment_schedule, check_probed_domains, choose, layer_chooser
from .clips import load_data
from .config import RunConfig, TeacherConfig, dump_config, load_config, override_config
from .distributed import gather, join, rank, ranks
from .ema import Ema
from .environment import pick_device, versions
from .evaluation import validate, write_samples
from .lock import RunLock, hold
from .log import RunLog, average
from .objective import Objective, StepInputs, domain_tables, teacher_targets
from .optimizer import build_optimizer, one_cycle
from .rates import Rates
from .report import write_report
from .step import TrainStep, pick_engine

T = TypeVar("T")
REPORT_SECONDS = 60.0  # report.html is at most this much older than the last validation


class Trainer:
    """One run. `run()` trains to the last step, or until SIGINT, SIGTERM or SIGHUP, and returns the run's folder.

    lock: of the run's folder, released when `run` ends.
    accept_changes: go on with other clips than the checkpoint's."""

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
        self.device = join(pick_device(config.train.device))
        precision = config.train.precision
        self.bf16 = precision == "bf16" or (precision == "auto" and self.device.type == "cuda")
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.data = load_data(config, run_dir, resume.state["clips"] if resume else None, accept_changes)
        self.plan = self._plan()
        for module in config.train.imports:
            import_module(module, "train.imports")
        teachers = {
            name: build_cached(name, t, config, self.data.train.clips[0].path)
            if t.cached
            else build_teacher(t.source, **t.options).to(self.device)
            for name, t in config.alignment.teachers.items()
        }
        self.teachers = teachers
        tables = domain_tables(config, self.data.train.domains)
        self.domain_tables = {name: table.to(self.device) for name, table in tables.items()}
        check_probed_domains(config, self.data.valid)
        torch.manual_seed(config.train.seed)
        widths = {name: teacher.width for name, teacher in teachers.items()}
        generator = torch.Generator(self.device).manual_seed(config.train.seed)
        self.objective = Objective(config, widths, generator, rank(), ranks()).to(self.device)
        self.objective.backbone.network.recompute = config.train.recompute
        if config.model.attention == "xformers":
            if why_not := packed.check(self.device):
                raise UserError(f"model.attention: {why_not}; use sdpa")
            self.objective.backbone.network.packed = True
        # From here on the global generators are for dropout alone, on each rank its own.
        torch.manual_seed(config.train.seed + rank())
        engine = pick_engine(config, self.device, ranks())
        self.optimizer = build_optimizer(self.objective, config, capturable=engine == "graph")
        self.learning_rate = one_cycle(config.optimizer, config.train.steps)
        self.ema = Ema(self.objective.backbone, config.optimizer.ema_decay)
        self.train_step = TrainStep(self.objective, self.optimizer, self.ema, config, self.device, self.bf16, engine)
        self.step = 0
        self.selection: Selection | None = None
        self.scores: LayerScores | None = None
        self.chooser = layer_chooser(config)
        self.probed = -1  # the step of the last probe
        self.applied_weight = 0.0  # what alignment's loss was multiplied by at the last step
        self.unreadable: set[Path] = set()
        self.signalled = False  # a signal came to this rank
        self.stopping = False  # all ranks have agreed to end
        self.seconds_before = 0.0
        self.probe_seconds = 0.0
        self.began = time.perf_counter()
        self.reported = 0.0
        if config.alignment.selection:
            self.select(synchronised(read_selection(config.alignment.selection)))
        if config.alignment.layers:
            self.select(choose_layers("fixed", config.model.depth, layers=config.alignment.layers))
        self.given = self.selection is not None
        if resume is not None:
            self._restore(resume)
        self.schedule = alignment_schedule(config)
        resumed = None if resume is None else (self.step, resume.state["log_bytes"])
        if rank() == 0:
            write_whole(run_dir / "config.yaml", dump_config(config))
        self.log = RunLog(run_dir if rank() == 0 else None, config, resumed)
        for flaw in resume.damaged if resume is not None else ():
            self.log.write("damaged", step=self.step, reason=flaw)
            if rank() == 0:
                print(f"passed over: {flaw}", file=sys.stderr)
        for note in self.data.split.notes if rank() == 0 else ():
            print(f"data: {note}", file=sys.stderr)

    def run(self) -> Path:
        """Train; every exit but a crash leaves a checkpoint, the log with the reason, and report.html.

        Raises:
            UserError: training cannot go on, or something cannot be written (a full disk, say); earlier checkpoints
                are untouched.
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
        """Say in the log and the report why the run ends early, or what went wrong after its last step."""
        # A disk that is full again must not hide the first reason.
        with suppress(UserError, OSError):
            self._log_end("end" if self.step == self.config.train.steps else "stopped", reason=reason)
        if rank() == 0:
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
        with self._signals():
            self._train()
        if self.stopping:
            self.log.write("interrupted", step=self.step)
        else:
            self._samples()
            self._log_end("end")
        if rank() == 0:
            write_report(self.run_dir)

    def _train(self) -> None:
        train = self.config.train
        batches = self._batches()
        progress = _progress(self.step, train.steps)
        self.rates.go_on()
        while self.step < train.steps:
            if self._probe_due():
                with self._paused():
                    choose(self)
            inputs = [self._inputs(batch) for batch in islice(batches, train.accumulate)]
            self.applied_weight = self._align_weight()
            self.train_step(inputs, self.applied_weight, self.learning_rate(self.step))
            for given in inputs:
                self.rates.count(*given.mask.shape)
            self.step += 1
            progress.update()
            if train.diagnose_every and self.step % train.diagnose_every == 0 and self._align_weight():
                with self._paused():
                    self._diagnose(inputs[0])
            at_line = self.step % train.log_every == 0 or self.step == train.steps
            if at_line:
                self._log_train(progress)
            if ranks() == 1 or at_line:
                # Ranks are at different steps when a signal comes; here they are at the same one.
                self.stopping = any(gather(self.signalled))
            with self._paused():
                if self.step % train.valid_every == 0 or self.step == train.steps:
                    self._validate()
                if train.sample_every and self.step % train.sample_every == 0 and self.step < train.steps:
                    self._samples()
                if self.stopping or self.step % train.checkpoint_every == 0 or self.step == train.steps:
                    self.save()
            if self.stopping:
                break
        progress.close()

    def _plan(self) -> BucketBatches:
        clips = self.data.train
        return BucketBatches(
            clips.lengths,
            buckets=self.config.bucket_frames,
            frames_per_batch=self.config.data.frames_per_batch,
            seed=self.config.train.seed,
            domains=[clip.domain for clip in clips.clips],
            balance=self.config.data.balance_domains,
            tokens=clips.token_lengths,
            rank=rank(),
            world_size=ranks(),
        )

    def _batches(self) -> Iterator[Batch]:
        train = self.config.train
        return iterate(
            self.data.train,
            self.plan,
            start=self.step * train.accumulate,
            stop=train.steps * train.accumulate,
            workers=self.config.data.workers,
            pin_memory=self.device.type == "cuda",
            notice=lambda message: self.log.write("worker", step=self.step, reason=message),
        )

    def _inputs(self, batch: Batch) -> StepInputs:
        """What the step takes of a batch, on the device; clips that could not be read go to the log."""
        for item in batch.skipped:
            if item.path not in self.unreadable:
                self.unreadable.add(item.path)
                self.log.write("skipped", path=str(item.path), source=item.source, reason=item.reason)
        share = len(self.unreadable) / len(self.data.train)
        if share > self.config.data.unreadable_share:
            raise UserError(
                f"{len(self.unreadable)} of {len(self.data.train)} clips cannot be read, at most "
                f"{self.config.data.unreadable_share:.0%} may be (data.unreadable_share): {min(self.unreadable)}, ..."
            )
        batch = batch.to(self.device, non_blocking=True)
        targets: dict[str, Tensor] = {}
        target_mask = batch.mask
        if self._align_weight() or self.objective.interface is not None:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                targets, target_mask = teacher_targets(self.teachers, batch, self.config)
        return StepInputs.of(batch, targets, target_mask, self._domains(batch))

    def _align_weight(self) -> float:
        """What alignment's loss is multiplied by at this step; 0 before the selection and after the schedule's end."""
        return self.config.alignment.weight * self.schedule(self.step) if self.selection else 0.0

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """What is not training is not in the rates."""
        self.rates.pause()
        yield
        self.rates.go_on()

    def seconds(self) -> float:
        """Wall time of the run so far, over all its sessions."""
        return self.seconds_before + time.perf_counter() - self.began

    def _domains(self, batch: Batch) -> dict[str, Tensor]:
        return {name: table[batch.domain] for name, table in self.domain_tables.items()}

    def _probe_due(self) -> bool:
        """At probe.start; with probe.every also later, as long as alignment lasts and no selection was given."""
        start, every = self.config.probe.start, self.config.probe.every
        if self.step == self.probed or self.step < start:
            return False
        again = every > 0 and (self.step - start) % every == 0 and self.step < self.schedule.stop
        return self.step == start or (again and not self.given)

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
            UserError: a selection of other layers, teachers or times than the run has."""
        alignment, last = self.objective.alignment, self.config.model.depth - 1
        try:
            for own in by_teacher(selection, self.teachers).values():
                if own.layers[-1] > last:
                    raise UserError(
                        f"selection: layer {own.layers[-1]} does not exist, the model has layers 0 to {last}"
                    )
            alignment.select(selection)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{error} (alignment.teachers, alignment.weights, probe.t_grid)") from error
        self.selection = selection

    def _validate(self) -> None:
        """By rank 0 alone."""
        if rank():
            return
        o, clips = self.objective, self.data.valid
        metrics = validate(o, self.teachers, self.domain_tables, clips, self.config, self.device, self.bf16)
        self.log.write("valid", step=self.step, **self._selected(metrics))
        if time.monotonic() - self.reported > REPORT_SECONDS:
            write_report(self.run_dir)
            self.reported = time.monotonic()

    def _selected(self, metrics: dict[str, T]) -> dict[str, T]:
        """Metrics without those of layers that are not aligned; names end in "<teacher>/<layer>" or in the layer."""
        chosen = by_teacher(self.selection, self.teachers) if self.selection else {}
        aligned = {f"{name}/{layer}" for name, own in chosen.items() for layer in own.layers}
        aligned |= {pair.rpartition("/")[2] for pair in aligned}
        kept = {}
        for name, value in metrics.items():
            _, _, of = name.partition("/")  # "cosine/speech/3" and "gradient_cosine/3"
            if not of.rpartition("/")[2].isdigit() or of in aligned:
                kept[name] = value
        return kept

    def _samples(self) -> None:
        if rank() == 0:
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
            ranks=ranks(),
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

    def _log_train(self, progress: Any) -> None:
        """One line: metrics and rates since the last one, averaged and added up over the ranks.

        Raises:
            UserError: too many steps in a row had gradients that are not finite."""
        own, (_, longest, skipped) = self.train_step.read()
        both = gather((self._selected(own), self.rates.read()))
        names = dict.fromkeys(name for metrics, _ in both for name in metrics)
        found = {name: [metrics[name] for metrics, _ in both if name in metrics] for name in names}
        metrics = {name: sum(values) / len(values) for name, values in found.items()}
        rates = both[0][1]
        for name in ("samples_per_second", "frames_per_second"):
            rates[name] = sum(other[name] for _, other in both)
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
        cosines = [value for name, value in metrics.items() if name.startswith("cosine/")]
        shown = {"loss": f"{metrics.get('loss', math.nan):.3f}"}
        if cosines:
            shown["cos"] = f"{sum(cosines) / len(cosines):.3f}"
        progress.set_postfix(shown | {"samples/s": f"{rates['samples_per_second']:.1f}", "mfu": f"{rates['mfu']:.0%}"})

    def save(self) -> None:
        """Write a checkpoint of the step just done; keep the newest few. Every rank must call it."""
        held = state.capture(self)
        if rank():
            return
        weights = {
            "model": self.objective.backbone.state_dict(),
            "ema": self.ema.module.state_dict(),
            "heads": self.objective.heads().state_dict(),
        }
        folder = self.run_dir / "checkpoints"
        save_checkpoint(folder, self.step, weights, held, self.config)
        drop_old(folder, self.config.train.keep)

    def _restore(self, checkpoint: Checkpoint) -> None:
        path = checkpoint.path
        restore(self.objective.backbone, checkpoint.weights["model"], path / "model.safetensors")
        restore(self.ema.module, checkpoint.weights["ema"], path / "ema.safetensors")
        heads = upgrade(checkpoint.weights["heads"], self.teachers, "alignment.")
        restore(self.objective.heads(), heads, path / "heads.safetensors")
        state.apply(self, checkpoint.state, path / "state.pt")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT, SIGTERM or SIGHUP ends the run after its step; a second SIGINT interrupts at once.

        Under nohup SIGHUP is ignored, and stays so."""

        def stop(number: int, frame: Any) -> None:
            if self.signalled and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signalled = True

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def build_cached(name: str, teacher: TeacherConfig, config: RunConfig, first: Path) -> CachedTeacher:
    """The cached features of a teacher: made with its source and its options, and with nothing else.

    Raises:
        UserError: no features beside the first clip, made otherwise, or pooled where frames are aligned.
    """
    options = dict(teacher.options)
    revision, layer = str(options.pop("revision", "")), str(options.pop("layer", ""))
    preprocessing = json.dumps(options, sort_keys=True) if options else ""
    cached = CachedTeacher(name, FeatureKey(teacher.source, revision, layer, preprocessing), first)
    if config.alignment.pool is None and not cached.rate:
        raise UserError(f"alignment.teachers.{name}: its cached features are pooled; alignment.pool=null needs frames")
    return cached


def _progress(start: int, total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise UserError("tqdm is not installed: pip install 'agrepa-fast[train]'") from error
    return tqdm(
        initial=start,
        total=total,
        unit="step",
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=1.0,
        disable=True if rank() else None,
    )


def start_run(config: RunConfig) -> Trainer:
    """A new run in `train.out/train.name`, which is locked from now on.

    Raises:
        UserError: the folder holds a run already, or another process is about to write one.
    """
    run_dir = Path(config.train.out) / config.train.name
    join(pick_device(config.train.device))
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    with _locked(run_dir) as lock:
        if gather((run_dir / "log.jsonl").exists())[0]:
            raise UserError(
                f"{run_dir}: holds a run already; resume it (--resume {run_dir}) or give train.name=ANOTHER"
            )
        return Trainer(config, run_dir, lock=lock)


def resume_run(path: str | Path, overrides: Sequence[str] = (), accept_data_changes: bool = False) -> Trainer:
    """Go on with a run, from its newest intact checkpoint or from the given one, with its configuration, changed.

    A run that ended before its first checkpoint begins anew. The clips must be those of the checkpoint, unless
    `accept_data_changes`.

    Raises:
        UserError: neither a run nor a checkpoint, nothing intact in it, clips that changed, or another process
            that writes the run.
    """
    path = Path(path)
    run_dir = path
    if is_checkpoint(path):
        run_dir = path.absolute().parent.parent
        if path.absolute().parent.name != "checkpoints":
            raise UserError(f"{path}: not in the folder checkpoints/ of a run; a run is resumed in its own folder")
    if not ((run_dir / "config.yaml").is_file() or (run_dir / "checkpoints").is_dir()):
        load_checkpoint(path)  # which says what is missing
    join(pick_device(_device(path, run_dir, overrides)))
    with _locked(run_dir) as lock:
        if path == run_dir and (run_dir / "config.yaml").is_file() and not begun(run_dir):
            config = load_config(run_dir / "config.yaml", overrides)
            if rank() == 0:
                (run_dir / "log.jsonl").unlink(missing_ok=True)
            return Trainer(config, run_dir, lock=lock)
        checkpoint = load_checkpoint(path)
        config = override_config(checkpoint.config, overrides)
        before, now = checkpoint.config.data, config.data
        if before.valid_share != now.valid_share and not now.valid:
            raise UserError(
                f"data.valid_share: the run has held out its clips with {before.valid_share:g}, and they stay held out"
            )
        return Trainer(config, run_dir, checkpoint, lock=lock, accept_changes=accept_data_changes)


def _device(path: Path, run_dir: Path, overrides: Sequence[str]) -> str:
    """train.device of a run, also where somebody damaged its config.yaml: a checkpoint has its own."""
    try:
        return load_config(run_dir / "config.yaml", overrides).train.device
    except UserError:
        found, _ = find_checkpoint(path)
        return load_config(found / "config.yaml", overrides).train.device


@contextmanager
def _locked(run_dir: Path) -> Iterator[RunLock | None]:
    """The folder's lock, kept by what is made under it, released where that fails."""
    lock = hold(run_dir)
    with ExitStack() as stack:
        if lock is not None:
            stack.callback(lock.release)
        yield lock
        stack.pop_all()
