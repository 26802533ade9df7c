"""Do the jobs of a study in several processes, with progress, and without losing the rest where one fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

import torch

from ..errors import writing
from ..report.html import duration
from ..report.log import last_step, read_log
from ..training.signals import StopSignals
from .plan import Plan, Run, Warmup
from .work import Outcome, failure, is_warm, work

Job = Warmup | Run
POLL = 1.0  # seconds between looks at the workers
TELL = 60.0  # seconds between lines about the runs under way


class Worker:
    """A process that does one job after another. device: the only CUDA device that it sees; "": all."""

    def __init__(self, device: str = "") -> None:
        self.device = device
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, device), daemon=False)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        self.job = job
        self.pipe.send(job)

    def take(self) -> Outcome | None:
        """The outcome of its job; None while it works."""
        if self.job is None:
            return None
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
        if self.process.is_alive():
            return None
        code = self.process.exitcode
        reason = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return Outcome(f"its process ended with {reason} (out of memory?)")

    def end(self) -> None:
        """Let the process stop its job after the present step, and wait for it."""
        self.pipe.close()  # which ends an idle process
        if self.job is not None and self.process.is_alive():
            self.process.terminate()
        self.process.join()


def _devices(plan: Plan) -> list[str]:
    """The CUDA devices to share out among the workers; none where there is one, or the configuration names one."""
    count = torch.cuda.device_count()
    if count < 2 or plan.config.train.device not in ("auto", "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def _serve(pipe: Connection, device: str) -> None:
    """A worker's main function. It ends with its study, even if that was killed."""
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before CUDA begins in this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study passes it on as SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a trainer has its own way to stop
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    while True:
        try:
            job = pipe.recv()
            pipe.send(work(job))
        except (EOFError, OSError):
            return


class Progress:
    """How far a study is, in steps. Warm-ups count once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.total = sum(_steps(warmup) for warmup in plan.warmups) + sum(_steps(run) for run in plan.jobs)
        self.first, self.began = self.done(), time.monotonic()

    def done(self) -> float:
        """The steps of everything, as far as the logs show."""
        warm = sum(warmup.step if is_warm(warmup) else _position(warmup) for warmup in self.plan.warmups)
        return warm + sum(_steps(run) if run.finished else _position(run) for run in self.plan.jobs)

    def left(self) -> str:
        """The time left, in words."""
        done = self.done()
        if done <= self.first:
            return "time left unknown"
        pace = (time.monotonic() - self.began) / (done - self.first)
        return f"about {duration((self.total - done) * pace)} left"


def _steps(job: Job) -> int:
    if isinstance(job, Warmup):
        return job.step
    return job.config.train.steps - (job.warmup.step if job.warmup else 0)


def _label(job: Job) -> str:
    return f"warm-up {job.folder.name}" if isinstance(job, Warmup) else job.name


def _position(job: Job) -> float:
    """The steps that an unfinished job has done, as far as its log shows."""
    if not job.folder.is_dir():
        return 0.0
    try:
        step = last_step(read_log(job.folder / "log.jsonl")) or 0.0
    except ValueError:
        return 0.0
    before = job.warmup.step if isinstance(job, Run) and job.warmup else 0
    return max(0.0, min(step - before, float(_steps(job))))


def run_jobs(plan: Plan, workers: int, say: Callable[[str], None]) -> tuple[dict[str, str], bool]:
    """Train what is not finished. Returns {run's name: error}, and whether it was stopped by a signal.

    workers: processes; 0: this one.
    """
    ahead = _Queue(plan)
    progress = Progress(plan)
    devices = _devices(plan)
    crew: list[Worker] = []
    told = time.monotonic()
    with StopSignals() as signals:
        try:
            while not signals.received and (ahead.waiting() or any(worker.job for worker in crew)):
                if workers == 0:
                    job = ahead.take()
                    assert job is not None
                    ahead.finish(job, work(job), progress, say)
                    if ahead.stopped:
                        break
                    continue
                for worker in crew[:]:
                    outcome = worker.take()
                    if outcome is not None:
                        assert worker.job is not None
                        ahead.finish(worker.job, outcome, progress, say)
                        worker.job = None
                    if not worker.process.is_alive():
                        crew.remove(worker)
                while sum(worker.job is not None for worker in crew) < workers and (job := ahead.take()):
                    idle = next((worker for worker in crew if worker.job is None), None)
                    if idle is None:
                        taken = Counter(worker.device for worker in crew)
                        idle = Worker(min(devices, key=lambda name: taken[name], default=""))
                        crew.append(idle)
                    idle.give(job)
                wait([worker.pipe for worker in crew if worker.job], POLL)
                if time.monotonic() - told > TELL:
                    told = time.monotonic()
                    running = [worker.job for worker in crew if worker.job]
                    at = ", ".join(f"{_label(job)} at {_position(job):.0f} of {_steps(job)} steps" for job in running)
                    say(f"[{ahead.finished}/{ahead.total}] {at}; {progress.left()}")
        finally:
            for worker in crew:
                worker.end()
    return ahead.errors, signals.received or ahead.stopped


def _begins_with(run: Run, warmup: Warmup) -> bool:
    """Whether a run has not begun, and waits for this warm-up."""
    return run.warmup is not None and run.warmup.folder == warmup.folder and not run.folder.exists()


class _Queue:
    """The jobs of a plan that are not done, each after its warm-up."""

    def __init__(self, plan: Plan) -> None:
        self.runs = [run for run in plan.jobs if not run.finished]
        self.cold = [
            warmup
            for warmup in plan.warmups
            if not is_warm(warmup) and any(_begins_with(run, warmup) for run in self.runs)
        ]
        self.total = len(plan.jobs)
        self.finished = self.total - len(self.runs)
        self.blocked = {warmup.folder: warmup for warmup in self.cold}  # not trained to their end
        self.errors: dict[str, str] = {}
        self.stopped = False

    def waiting(self) -> bool:
        return bool(self.cold or self._ready())

    def _ready(self) -> list[Run]:
        waiting = {run.folder for run in self.runs for warmup in self.blocked.values() if _begins_with(run, warmup)}
        return [run for run in self.runs if run.folder not in waiting]

    def take(self) -> Job | None:
        """The next job: a run that can begin, so that results come early; else a warm-up."""
        for run in self._ready():
            self.runs.remove(run)
            return run
        return self.cold.pop(0) if self.cold else None

    def _fail(self, run: Run, error: str) -> None:
        self.errors[run.name] = error
        with writing(failure(run)):
            failure(run).parent.mkdir(parents=True, exist_ok=True)
            failure(run).write_text(error, encoding="utf-8")

    def finish(self, job: Job, outcome: Outcome, progress: Progress, say: Callable[[str], None]) -> None:
        """Note how a job ended."""
        if outcome.stopped:
            self.stopped = True
            return
        if isinstance(job, Warmup):
            if outcome.error:
                for run in [run for run in self.runs if _begins_with(run, job)]:
                    self.runs.remove(run)
                    self._fail(run, f"its warm-up failed: {outcome.error}")
                say(f"warm-up {job.folder.name} failed: {outcome.error}")
            else:
                del self.blocked[job.folder]
            return
        if outcome.error:
            self._fail(job, outcome.error)
            say(f"{job.name} failed: {outcome.error}")
            return
        failure(job).unlink(missing_ok=True)
        self.finished += 1
        loss = job.measured("flow_loss")
        say(f"[{self.finished}/{self.total}] {job.name}: {loss:.4f}; {progress.left()}")
