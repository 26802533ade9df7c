"""`Aligner` in transformers' `Trainer`: `align(trainer, aligner)`, and `aligner.loss` in your `compute_loss`."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..alignment.aligner import Aligner
from ..errors import UserError

FILE = "aligner.pt"  # in each checkpoint-<step>


def align(trainer: Any, aligner: Aligner, **options: Any) -> None:
    """Let a `transformers.Trainer` train the heads of `aligner`, probe on time, save and load it, and log its metrics.

    The loss is yours to add: `return loss + aligner.loss(...)` in `compute_loss`.

    Args:
        trainer: with its optimizer not yet made (before `train`), or made with the groups of the aligner.
        options: for the heads' parameter groups, lr say; weight_decay is that of the training arguments.

    Raises:
        UserError: the trainer runs on `nn.DataParallel`, or its optimizer is made and leaves the heads out.
    """
    if trainer.args.n_gpu > 1:
        raise UserError(f"{trainer.args.n_gpu} GPUs in one process (nn.DataParallel): start with torchrun")
    if trainer.optimizer is not None and not _holds(trainer.optimizer, aligner):
        raise UserError("the trainer's optimizer leaves the heads out: make it with *aligner.param_groups(...)")
    create, load, log = trainer.create_optimizer, trainer._load_from_checkpoint, trainer.log

    @wraps(create)
    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = create(*args, **kwargs)
        if not _holds(optimizer, aligner):
            for group in aligner.param_groups(**{"weight_decay": trainer.args.weight_decay, **options}):
                optimizer.add_param_group(group)
        return optimizer

    @wraps(load)
    def load_from_checkpoint(checkpoint: str, *args: Any, **kwargs: Any) -> Any:
        file = Path(checkpoint) / FILE
        if not file.is_file():
            raise UserError(f"{file}: missing; the checkpoint was written without the aligner")
        aligner.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return load(checkpoint, *args, **kwargs)

    @wraps(log)
    def log_with_metrics(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if "loss" in logs:
            logs = logs | aligner.metrics()
        return log(logs, *args, **kwargs)

    trainer.create_optimizer = create_optimizer
    trainer._load_from_checkpoint = load_from_checkpoint
    trainer.log = log_with_metrics
    trainer.add_callback(AlignerCallback(aligner))


class AlignerCallback(TrainerCallback):
    """What `align` adds to the trainer: attached while it trains, a step after each of its steps, saved with it."""

    def __init__(self, aligner: Aligner) -> None:
        self.aligner = aligner

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.aligner.attach()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.aligner.loss_fn.zero_grad()  # the trainer clears the model's gradients, not the optimizer's
        self.aligner.step(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.aligner.state_dict(), folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.aligner.detach()


def _holds(optimizer: Any, aligner: Aligner) -> bool:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return all(id(p) in held for p in aligner.loss_fn.parameters())
