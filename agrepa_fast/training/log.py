"""The log of a run: log.jsonl always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, writing
from .config import RunConfig, dump_config


class RunLog:
    """Appends one JSON object per event to `run_dir/log.jsonl`; numbers go to the other writers too."""

    def __init__(self, run_dir: Path | None, config: RunConfig, resume: tuple[int, int] | None = None) -> None:
        """Open the log.

        Args:
            run_dir: None writes nothing.
            resume: step and `position` of the checkpoint that the run resumes from. What was logged after it is
                dropped, because those steps come again.
        """
        self.position = 0  # bytes written so far
        self._file: Any = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if run_dir is None:
            return
        path = run_dir / "log.jsonl"
        with writing(path):
            if resume is not None and path.exists() and path.stat().st_size > resume[1]:
                os.truncate(path, resume[1])
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close())
        self.position = self._file.tell()
        if config.train.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError(
                    "train.tensorboard: TensorBoard is not installed: pip install 'agrepa-fast[tensorboard]'"
                ) from error
            purge = None if resume is None else resume[0] + 1
            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        if config.train.wandb:
            try:
                import wandb
            except ImportError as error:
                raise UserError("train.wandb: pip install wandb") from error
            import yaml

            self._wandb = wandb.init(
                project=config.train.wandb,
                name=config.train.name,
                dir=str(run_dir),
                config=yaml.safe_load(dump_config(config)),
                resume="allow",
            )

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. A power cut loses at most the line that is being written."""
        if self._file is None:
            return
        try:
            with writing(self._file.name):
                self._file.write(json.dumps({"event": event, **fields}) + "\n")
                self._file.flush()
                self.position = self._file.tell()
        except UserError:
            # The rest of the buffer must not fail a second time when the log is closed.
            with suppress(OSError):
                self._file.close()
            self._file = None
            raise
        numbers = {
            f"{event}/{key}": value for key, value in fields.items() if isinstance(value, int | float) and key != "step"
        }
        if "step" in fields and self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, fields["step"])
        if "step" in fields and self._wandb is not None:
            self._wandb.log(numbers, step=fields["step"])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def average(records: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Mean of each metric over the records in which it is finite, read from the device in one copy."""
    names = list(dict.fromkeys(name for record in records for name in record))
    if not names:
        return {}
    columns = [torch.stack([record[name].float() for record in records if name in record]).nanmean() for name in names]
    values = torch.stack(columns).tolist()
    return {name: value for name, value in zip(names, values) if value == value}
