"""Start a run in a new folder, or resume one. Both lock the folder first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import UserError, writing
from . import distributed
from .checkpoint import begun, find_checkpoint, is_checkpoint, load_checkpoint
from .config import RunConfig, load_config, override_config
from .environment import pick_device
from .lock import RunLock, hold
from .trainer import Trainer


def start_run(config: RunConfig) -> Trainer:
    """A new run in `train.out/train.name`, whose folder is locked from now on.

    Raises:
        UserError: the folder holds a run already, or another process is about to write one.
    """
    run_dir = Path(config.train.out) / config.train.name
    distributed.init(pick_device(config.train.device))
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    with _locked(run_dir) as lock:
        check_new(config)
        return Trainer(config, run_dir, lock=lock)


def check_new(config: RunConfig) -> None:
    """UserError where the run's folder holds a run already. Every rank must call it."""
    run_dir = Path(config.train.out) / config.train.name
    if distributed.gather((run_dir / "log.jsonl").exists())[0]:
        raise UserError(f"{run_dir}: holds a run already; resume it (--resume {run_dir}) or give train.name=ANOTHER")


def resume_run(path: str | Path, overrides: Sequence[str] = (), accept_data_changes: bool = False) -> Trainer:
    """Resume a run from its newest intact checkpoint, or from the given one, with `overrides` of its configuration.

    A run without a checkpoint begins anew. The clips must be those of the checkpoint, unless `accept_data_changes`.

    Raises:
        UserError: neither a run nor a checkpoint, no intact checkpoint, other clips, or another process that writes the
            run.
    """
    path = Path(path)
    run_dir = path
    if is_checkpoint(path):
        run_dir = path.absolute().parent.parent
        if path.absolute().parent.name != "checkpoints":
            raise UserError(f"{path}: not in the folder checkpoints/ of a run; a run is resumed in its own folder")
    if not ((run_dir / "config.yaml").is_file() or (run_dir / "checkpoints").is_dir()):
        load_checkpoint(path)  # raises, and says what is missing
    distributed.init(pick_device(_device(path, run_dir, overrides)))
    with _locked(run_dir) as lock:
        if path == run_dir and (run_dir / "config.yaml").is_file() and not begun(run_dir):
            config = load_config(run_dir / "config.yaml", overrides)
            if distributed.rank() == 0:
                (run_dir / "log.jsonl").unlink(missing_ok=True)
            return Trainer(config, run_dir, lock=lock)
        checkpoint = load_checkpoint(path)
        config = override_config(checkpoint.config, overrides)
        _check_same_process(checkpoint.config, config)
        before, now = checkpoint.config.data, config.data
        if before.valid_share != now.valid_share and not now.valid:
            raise UserError(
                f"data.valid_share: the run has held out its clips with {before.valid_share:g}, and they stay held out"
            )
        return Trainer(config, run_dir, checkpoint, lock=lock, accept_changes=accept_data_changes)


def _check_same_process(before: RunConfig, now: RunConfig) -> None:
    """Refuse to resume with another meaning of the network's output.

    Raises:
        UserError: names the field and both values.
    """
    for name in ("path", "parametrisation"):
        old, new = getattr(before.flow, name), getattr(now.flow, name)
        if old != new:
            raise UserError(f"flow.{name}: the run was trained with {old}, and goes on with it; got {new}: train anew")
    if bool(before.data.latents) != bool(now.data.latents):
        raise UserError("data.latents: the run models mels or latents, and goes on with the same: train anew")
    for name in ("rate", "channels", "mean", "std"):
        if getattr(before.latents, name) != getattr(now.latents, name):
            raise UserError(f"latents.{name}: the run was trained with another value, and goes on with it: train anew")


def _device(path: Path, run_dir: Path, overrides: Sequence[str]) -> str:
    """The train.device of a run. If its config.yaml is damaged, that of a checkpoint."""
    try:
        return load_config(run_dir / "config.yaml", overrides).train.device
    except UserError:
        checkpoint, _ = find_checkpoint(path)
        return load_config(checkpoint / "config.yaml", overrides).train.device


@contextmanager
def _locked(run_dir: Path) -> Iterator[RunLock | None]:
    """The lock of a folder. It is released if the block raises, and kept by what the block makes otherwise."""
    lock = hold(run_dir)
    with ExitStack() as stack:
        if lock is not None:
            stack.callback(lock.release)
        yield lock
        stack.pop_all()
