"""The training loop: warm-up, probe, freeze the selection, align, decay. Leaves a run's folder behind.

Everything random comes from the step number or from torch's global generators, whose state is in the
checkpoint: on the CPU an interrupted and resumed run ends with the bits of an unbroken one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..alignment.policy import POLICIES, LayerSelection, choose_layers
from ..alignment.schedule import AlignmentSchedule
from ..attribution.scd import write_scd
from ..attribution.scores import LayerScores
from ..data.audio import write_audio
from ..data.batches import Batch, BucketBatches, iterate
from ..data.mel import LogMel
from ..errors import UserError
from ..models.flow import SIGMA
from ..teachers.cache import CachedTeacher, FeatureKey
from ..teachers.registry import build_teacher
from .checkpoint import Checkpoint, drop_old, restore, save_checkpoint
from .clips import fixed_batches, load_data, spread
from .config import RunConfig, TeacherConfig, dump_config
from .dissociation import stored_by_layer
from .environment import pick_device, versions
from .inference import generate, score_layers
from .log import RunLog, average
from .objective import Backbone, Objective, domain_tables, teacher_targets
from .optimizer import build_optimizer, one_cycle
from .report import write_report
from .vocoder import build_vocoder

VALID_TIMES = (0.125, 0.375, 0.625, 0.875)


class Trainer:
    """One run. `run()` trains to the last step, or until SIGINT or SIGTERM, and returns the run's folder."""

    def __init__(self, config: RunConfig, run_dir: Path, resume: Checkpoint | None = None) -> None:
        self.config = config
        self.run_dir = run_dir
        self.device = pick_device(config.train.device)
        precision = config.train.precision
        self.bf16 = precision == "bf16" or (precision == "auto" and self.device.type == "cuda")
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.data = load_data(config, run_dir)
        teachers = {
            name: build_cached(name, t, config, self.data.train.clips[0].path)
            if t.cached
            else build_teacher(t.source, **t.options).to(self.device)
            for name, t in config.alignment.teachers.items()
        }
        self.teachers = teachers
        tables = domain_tables(config, self.data.train.domains)
        self.domain_tables = {name: table.to(self.device) for name, table in tables.items()}
        torch.manual_seed(config.train.seed)
        widths = {name: teacher.width for name, teacher in teachers.items()}
        self.objective = Objective(config, widths).to(self.device)
        self.optimizer = build_optimizer(self.objective, config)
        o = config.optimizer
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, one_cycle(o, config.train.steps))
        self.ema = AveragedModel(
            self.objective.backbone, multi_avg_fn=get_ema_multi_avg_fn(o.ema_decay), use_buffers=False
        )
        self.step = 0
        self.selection: LayerSelection | None = None
        self.scores: LayerScores | None = None
        self.stopping = False
        self.seconds_before = 0.0
        self.began = time.perf_counter()
        if config.alignment.selection:
            self._select(LayerSelection.from_json(config.alignment.selection))
        if resume is not None:
            self._restore(resume)
        if POLICIES.get(config.alignment.policy) not in ("", "scores"):
            usable = [name for name, needs in POLICIES.items() if needs in ("", "scores")]
            raise UserError(f"alignment.policy: expected {', '.join(usable)}, got {config.alignment.policy!r}")
        self.schedule = self._schedule()
        self.log = RunLog(run_dir, config)

    def run(self) -> Path:
        """Train; every exit but a crash leaves a checkpoint, the log and report.html.

        Raises:
            UserError: something cannot be written (a full disk, say); earlier checkpoints are untouched.
        """
        try:
            return self._run()
        except OSError as error:
            raise UserError(f"{error.filename or self.run_dir}: {error.strerror or error}") from error

    def _run(self) -> Path:
        (self.run_dir / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")
        self.began = time.perf_counter()
        if self.step == 0:
            self._log_start()
            self._validate()
        else:
            self.log.write("resume", step=self.step)
        with self._signals():
            self._train()
        if self.stopping:
            self.log.write("interrupted", step=self.step)
        else:
            self._samples()
            self.log.write("end", step=self.step, seconds=self._seconds())
        self.log.close()
        write_report(self.run_dir)
        return self.run_dir

    def _train(self) -> None:
        train = self.config.train
        domains = [clip.domain for clip in self.data.train.clips]
        batches = BucketBatches(
            self.data.train.lengths,
            buckets=self.config.bucket_frames,
            frames_per_batch=self.config.data.frames_per_batch,
            seed=train.seed,
            domains=domains,
            balance=self.config.data.balance_domains,
        )
        workers = self.config.data.workers
        self.steps_per_epoch = batches.steps_per_epoch
        stream = iterate(self.data.train, batches, start=self.step, stop=train.steps, workers=workers)
        progress = _progress(self.step, train.steps)
        records: list[dict[str, Tensor]] = []
        samples = frames = 0
        since = time.perf_counter()
        for batch in stream:
            if self.step == self.config.probe.start and self.scores is None:
                self._probe()
                since = time.perf_counter()
                records, samples, frames = [], 0, 0
            records.append(self._step(batch))
            samples += batch.mel.shape[0]
            frames += batch.mel.shape[0] * batch.mel.shape[1]
            self.step += 1
            progress.update()
            if self.step % train.log_every == 0 or self.step == train.steps:
                seconds = time.perf_counter() - since
                self._log_train(records, samples / seconds, frames / seconds, progress)
                records, samples, frames = [], 0, 0
            paused = time.perf_counter()
            if self.step % train.valid_every == 0 or self.step == train.steps:
                self._validate()
            if train.sample_every and self.step % train.sample_every == 0 and self.step < train.steps:
                self._samples()
            if self.stopping or self.step % train.checkpoint_every == 0 or self.step == train.steps:
                self.save()
            if self.stopping:
                break
            since = time.perf_counter() if not records else since + time.perf_counter() - paused
        progress.close()

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step; metrics stay on the device."""
        self.objective.train()
        batch = batch.to(self.device, non_blocking=True)
        weight = self.config.alignment.weight * self.schedule(self.step) if self.selection else 0.0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            targets, mask = (
                teacher_targets(self.teachers, batch, self.config) if self._uses_teachers(weight) else ({}, batch.mask)
            )
            loss, metrics = self.objective(batch, targets, mask, self._domains(batch), weight)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.optimizer.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.ema.update_parameters(self.objective.backbone)
        return metrics

    def _seconds(self) -> float:
        """Wall time of the run so far, over all its sessions."""
        return self.seconds_before + time.perf_counter() - self.began

    def _uses_teachers(self, weight: float) -> bool:
        return weight > 0 or self.objective.interface is not None

    def _domains(self, batch: Batch) -> dict[str, Tensor]:
        return {name: table[batch.domain] for name, table in self.domain_tables.items()}

    def _probe(self) -> None:
        """Score every layer on held-out clips over the grid of t; freeze the selection."""
        probe = self.config.probe
        began = time.perf_counter()
        self.scores = score_layers(self.objective.backbone, self.data.valid, self.config, self.device, self.bf16)
        policy, depth = self.config.alignment.policy, self.config.model.depth
        chosen = choose_layers(policy, depth, probe.k, scores=self.scores, seed=self.config.train.seed).synchronised()
        if self.selection is None:
            self._select(chosen)
        self.scores.to_csv(self.run_dir / "foga.csv")
        backbone, valid = self.objective.backbone, self.data.valid
        stored = stored_by_layer(backbone, self.teachers, valid, self.config, self.device, self.bf16)
        write_scd(self.run_dir, self.scores, stored, probe.k, self.step, self.step / self.steps_per_epoch)
        facts = {**chosen.state(), "metric": probe.metric, "step": self.step}
        (self.run_dir / "selection.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        self.log.write(
            "probe",
            step=self.step,
            seconds=time.perf_counter() - began,
            block_evaluations=self.scores.block_evaluations,
            selection=chosen.state(),
            scores=self.scores.mean.tolist(),
        )

    def _select(self, selection: LayerSelection) -> None:
        deep = [layer for layer in selection.layers if layer >= self.config.model.depth]
        if deep:
            raise UserError(
                f"selection: layer {deep[0]} does not exist, the model has layers 0 to {self.config.model.depth - 1}"
            )
        self.selection = selection
        self.objective.alignment.select(selection)

    def _schedule(self) -> AlignmentSchedule:
        """Alignment starts after the probe, or at once when the selection is given."""
        a, steps = self.config.alignment, self.config.train.steps
        start = 0 if a.selection else self.config.probe.start
        if not a.enabled:
            return AlignmentSchedule(0, 0, 0, 0)
        stop = math.ceil(a.stop * steps)
        if start >= stop:
            raise UserError(
                f"probe.start: the selection comes at step {start}, but alignment stops at {stop} "
                f"(alignment.stop {a.stop:g} of train.steps {steps}): probe earlier or train longer"
            )
        return AlignmentSchedule(start, a.ramp, max(start, math.ceil(a.decay_start * steps)), stop, a.decay)

    @torch.no_grad()
    def _validate(self) -> None:
        """Flow loss on fixed clips, noise and t; the same numbers for any run on the same clips."""
        self.objective.eval()
        losses: list[Tensor] = []
        records: list[dict[str, Tensor]] = []
        domains: list[str] = []
        indices = spread(self.data.valid, self.config.train.valid_samples)
        for number, batch in enumerate(fixed_batches(self.data.valid, indices, self.config)):
            generator = torch.Generator().manual_seed(number)
            noise = SIGMA * torch.randn(batch.mel.shape, generator=generator)
            batch, noise = batch.to(self.device), noise.to(self.device)
            domains += [batch.domains[i] for i in batch.domain.tolist()]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                targets, mask = teacher_targets(self.teachers, batch, self.config)
                at_times = []
                for time_ in VALID_TIMES:
                    t = torch.full((batch.mel.shape[0],), time_, device=self.device)
                    loss, cosines = self.objective.validate(batch, targets, mask, self._domains(batch), t, noise)
                    at_times.append(loss)
                    records.append(self._selected(cosines))
            losses.append(torch.stack(at_times).mean(0))
        loss = torch.cat(losses).cpu()
        by_domain = {
            f"flow_loss/{name}": loss[[i for i, d in enumerate(domains) if d == name]].mean().item()
            for name in sorted(set(domains))
        }
        self.log.write("valid", step=self.step, flow_loss=loss.mean().item(), **by_domain, **average(records))

    def _selected(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metrics without the cosines of layers that are not aligned."""
        layers = {str(layer) for layer in self.selection.layers} if self.selection else set()
        return {
            name: value
            for name, value in metrics.items()
            if not name.startswith("cosine/") or name.rsplit("/", 1)[1] in layers | {"tokens"}
        }

    def _samples(self) -> None:
        """Generate a few held-out clips from their text and reference with the EMA weights, as WAV files."""
        indices = spread(self.data.valid, self.config.train.samples)
        if not indices:
            return
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        vocoder = build_vocoder(self.config.train.vocoder, LogMel(self.config.mel))
        [batch] = fixed_batches(self.data.valid, indices, self.config, one_shape=True)
        model = self.ema.module.eval()
        assert isinstance(model, Backbone)
        mel = generate(model, batch.to(self.device), self.config).cpu()
        for row, clip in enumerate(batch.clips):
            frames = int(batch.mask[row].sum())
            if not mel[row].isfinite().all():
                raise UserError(f"step {self.step}: the generated mel is not finite; lower optimizer.lr")
            generated = folder / f"step_{self.step:08d}_{row}.wav"
            reference = folder / f"reference_{row}.wav"
            write_audio(generated, vocoder(mel[row, :frames]), self.config.mel.sample_rate)
            audio = batch.audio[row, : int(batch.audio_lengths[row])]
            write_audio(reference, audio, self.config.mel.sample_rate)
            self.log.write(
                "sample",
                step=self.step,
                path=f"samples/{generated.name}",
                reference=f"samples/{reference.name}",
                text=clip.text,
                domain=clip.domain,
            )

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
            parameters={name: sum(p.numel() for p in m.parameters()) for name, m in parts.items()},
            clips={name: len(listed) for name, listed in clips.items()},
            domains={
                domain: sum(clip.domain == domain for clip in self.data.train.clips)
                for domain in self.data.train.domains
            },
        )
        for item in self.data.skipped:
            self.log.write("skipped", path=str(item.path), source=item.source, reason=item.reason)

    def _log_train(
        self,
        records: list[dict[str, Tensor]],
        samples_per_second: float,
        frames_per_second: float,
        progress: Any,
    ) -> None:
        metrics = average([self._selected(record) for record in records])
        if not math.isfinite(float(torch.stack([record["loss"] for record in records]).sum())):
            raise UserError(
                f"the loss is not finite by step {self.step}: lower optimizer.lr, or train.precision=fp32; "
                f"the last checkpoint is in {self.run_dir / 'checkpoints'}"
            )
        self.log.write(
            "train",
            step=self.step,
            **metrics,
            align_weight=self.schedule(self.step - 1) if self.selection else 0.0,
            lr=self.optimizer.param_groups[0]["lr"],
            samples_per_second=samples_per_second,
            frames_per_second=frames_per_second,
        )
        cosines = [value for name, value in metrics.items() if name.startswith("cosine/")]
        shown = {"loss": f"{metrics['loss']:.3f}"}
        if cosines:
            shown["cos"] = f"{sum(cosines) / len(cosines):.3f}"
        progress.set_postfix(shown | {"samples/s": f"{samples_per_second:.1f}"})

    def save(self) -> Path:
        """Write a checkpoint of the step just done; keep the newest few."""
        weights = {
            "model": self.objective.backbone.state_dict(),
            "ema": self.ema.module.state_dict(),
            "heads": self.objective.heads().state_dict(),
        }
        state = {
            "step": self.step,
            "steps": self.config.train.steps,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "seconds": self._seconds(),
            "ema_updates": int(self.ema.n_averaged),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "selection": None if self.selection is None else self.selection.state(),
            "scores": None if self.scores is None else self.scores.state(),
        }
        folder = self.run_dir / "checkpoints"
        path = save_checkpoint(folder, self.step, weights, state, self.config)
        drop_old(folder, self.config.train.keep)
        return path

    def _restore(self, checkpoint: Checkpoint) -> None:
        path, state = checkpoint.path, checkpoint.state
        restore(self.objective.backbone, checkpoint.weights["model"], path / "model.safetensors")
        restore(self.ema.module, checkpoint.weights["ema"], path / "ema.safetensors")
        restore(self.objective.heads(), checkpoint.weights["heads"], path / "heads.safetensors")
        if state["steps"] != self.config.train.steps:
            raise UserError(
                f"train.steps: {path} belongs to a run of {state['steps']} steps, "
                f"its learning rate schedule does not fit {self.config.train.steps}"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.ema.n_averaged.fill_(state["ema_updates"])
        self.step = state["step"]
        self.seconds_before = state["seconds"]
        if state["scores"] is not None:
            self.scores = LayerScores.from_state(state["scores"])
        if state["selection"] is not None:
            self._select(LayerSelection.from_state(state["selection"]))
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the run after its step; a second SIGINT interrupts at once."""

        def stop(number: int, frame: Any) -> None:
            if self.stopping and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stopping = True

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
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
    return tqdm(initial=start, total=total, unit="step", file=sys.stderr, dynamic_ncols=True, mininterval=1.0)


def start_run(config: RunConfig) -> Trainer:
    """A new run in `train.out/train.name`.

    Raises:
        UserError: the folder holds a run already.
    """
    run_dir = Path(config.train.out) / config.train.name
    if (run_dir / "log.jsonl").exists():
        raise UserError(f"{run_dir}: holds a run already; resume it (--resume {run_dir}) or give train.name=ANOTHER")
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(config, run_dir)


def resume_run(checkpoint: Checkpoint, config: RunConfig | None = None) -> Trainer:
    """Go on with a run from a checkpoint, by default with the checkpoint's own configuration."""
    run_dir = checkpoint.path.parent.parent
    return Trainer(config or dataclasses.replace(checkpoint.config), run_dir, checkpoint)
