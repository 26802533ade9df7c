"""`Aligner` in Lightning: `AlignerCallback(aligner)`, and `aligner.loss` in your `training_step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..alignment.aligner import Aligner
from ..errors import UserError


class AlignerCallback(Callback):
    """Train the heads of `aligner`, probe on time, keep it in the trainer's checkpoints, and log its metrics.

    The loss is yours to add: `return loss + aligner.loss(...)` in `training_step`. The heads join the optimizer that
    `configure_optimizers` returns, unless it holds them already. With a learning rate schedule it must: give the
    optimizer `*aligner.param_groups(...)` there.

    Steps are Lightning's `global_step`, which counts the steps of all optimizers: it grows by two a batch where two
    optimizers step in each batch.

    Args:
        options: for the heads' parameter groups, weight_decay and lr say.
    """

    def __init__(self, aligner: Aligner, **options: Any) -> None:
        self.aligner = aligner
        self.options = options
        self.done = -1  # optimizer steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or "configure_optimizers" in vars(pl_module):
            return
        configure: Callable[[], Any] = pl_module.configure_optimizers

        def configure_optimizers() -> Any:
            configured = configure()
            held = {id(p) for o in _optimizers(configured) for group in o.param_groups for p in group["params"]}
            if any(id(p) not in held for p in self.aligner.loss_fn.parameters()):
                if not hasattr(configured, "add_param_group"):
                    raise UserError(
                        "configure_optimizers returns more than an optimizer and leaves the heads out: make the "
                        "optimizer with *aligner.param_groups(...)"
                    )
                for group in self.aligner.param_groups(**self.options):
                    configured.add_param_group(group)
            return configured

        vars(pl_module)["configure_optimizers"] = configure_optimizers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.aligner.attach()
        self.done = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.done:  # gradients are still being accumulated
            return
        self.done = trainer.global_step
        self.aligner.step(self.done)
        if self.done % trainer.log_every_n_steps == 0:
            pl_module.log_dict({f"align/{name}": value for name, value in self.aligner.metrics().items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return self.aligner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.aligner.load_state_dict(state_dict)

    def _leave(self, pl_module: LightningModule) -> None:
        self.aligner.detach()
        vars(pl_module).pop("configure_optimizers", None)


def _optimizers(configured: Any) -> list[Any]:
    """All optimizers in what `configure_optimizers` returns."""
    if hasattr(configured, "param_groups"):
        return [configured]
    if isinstance(configured, dict):
        return _optimizers(configured.get("optimizer"))
    if isinstance(configured, list | tuple):
        return [optimizer for part in configured for optimizer in _optimizers(part)]
    return []
