"""Sections `optimizer` and `train`: the optimizer, the length of the run, what it runs on and what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...fields import NOT_EMPTY, Section, between, from_below, inside, matching, more_than, one_of
from .names import FOLDER_NAME, MODULE

Beta = Annotated[float, from_below(0, 1)]
STEPS = between(0, 1_000_000_000)
COUNT = between(1, 1_000_000_000)
ENGINES = ("auto", "eager", "compile", "graph")
DEVICE = matching(r"auto|cpu|cuda(:[0-9]{1,3})?", "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class OptimizerConfig(Section, name="optimizer"):
    """AdamW, one-cycle and clipping, as published."""

    lr: Annotated[float, more_than(0, 1e30), "peak of the learning rate"] = 1e-4
    initial_lr: Annotated[float, between(0, 1e30), "learning rate at the first step"] = 1e-5
    final_lr: Annotated[float, between(0, 1e30), "learning rate at the last step"] = 1e-7
    warmup_share: Annotated[float, inside(0, 1), "share of train.steps up to the peak of the learning rate"] = 0.1
    weight_decay: Annotated[
        float, between(0, 1000), "AdamW's weight decay of matrices; biases, norms and embeddings have none"
    ] = 0.1
    betas: Annotated[tuple[Beta, Beta], "decays of AdamW's two moments"] = (0.9, 0.999)
    clip: Annotated[float, more_than(0, 1e30), "largest norm of the gradient; a larger one is scaled down"] = 1.0
    ema_decay: Annotated[float, from_below(0, 1), "decay of the moving average of the weights"] = 0.9999


@dataclass(frozen=True)
class TrainConfig(Section, name="train"):
    """Length of the run and what it writes."""

    imports: Annotated[
        tuple[Annotated[str, MODULE], ...], "Python modules to import first; they may register teachers"
    ] = ()
    steps: Annotated[int, COUNT, "optimizer steps of the whole run"] = 500_000
    seed: Annotated[int, between(0, 2**32 - 1), "seed of all random numbers"] = 0
    device: Annotated[str, DEVICE, "device of the run; auto: CUDA where there is one"] = "auto"
    precision: Annotated[
        str, one_of(("auto", "fp32", "bf16")), "precision of forward and backward; auto: bf16 on CUDA, fp32 elsewhere"
    ] = "auto"
    engine: Annotated[
        str, one_of(ENGINES), "how a step runs (docs/training.md); auto: the fastest that the device allows"
    ] = "auto"
    accumulate: Annotated[int, between(1, 10_000), "batches for each step; their gradients are averaged"] = 1
    recompute: Annotated[bool, "activation checkpointing: less memory for about a third more work"] = False
    shard: Annotated[
        bool, "with several ranks: each holds a part of parameters, gradients, moments and EMA (FSDP2), not a copy"
    ] = False
    max_skipped: Annotated[
        int, COUNT, "the run stops after so many steps in a row with gradients that are not finite"
    ] = 20
    diagnose_every: Annotated[int, STEPS, "steps between measurements of the losses' gradient cosine; 0: never"] = 0
    threads: Annotated[int, between(0, 512), "number of CPU threads; 0: torch's choice"] = 0
    out: Annotated[str, NOT_EMPTY, "folder that holds the folders of all runs"] = "runs"
    name: Annotated[
        str, FOLDER_NAME, "folder of this run in train.out; empty: the name of the preset or of the file"
    ] = ""
    log_every: Annotated[int, COUNT, "steps between lines of the log"] = 50
    valid_every: Annotated[int, COUNT, "steps between validations"] = 2000
    valid_samples: Annotated[int, between(1, 1_000_000), "number of held-out clips to validate on"] = 64
    checkpoint_every: Annotated[int, COUNT, "steps between checkpoints"] = 5000
    keep: Annotated[int, between(1, 1_000_000), "number of newest checkpoints to keep"] = 3
    sample_every: Annotated[int, STEPS, "steps between generated samples; 0: only at the end"] = 0
    samples: Annotated[int, between(0, 256), "number of clips to generate"] = 4
    vocoder: Annotated[
        str, NOT_EMPTY, "griffin-lim, a Vocos folder or name, or auto: Vocos if it is installed and fits the mel"
    ] = "auto"
    tensorboard: Annotated[bool, "whether to write TensorBoard events"] = False
    wandb: Annotated[str, "project of Weights & Biases to log to; empty: none"] = ""
