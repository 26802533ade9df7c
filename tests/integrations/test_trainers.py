"""`Aligner` in transformers' Trainer, Lightning and accelerate: the programs of examples/, saved and resumed."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import agrepa_fast as ag

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CHECKPOINT = {"hf_trainer": "checkpoint-6", "lightning_module": "*step=6*.ckpt", "accelerate_loop": "."}


def program(name, tmp_path, framewise=False):
    """The example as a module's globals, frame by frame if asked; a step's noise follows from its batch alone."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    if framewise:
        for old, new in (("k=2, probe", "k=2, pool=None, probe"), ("randn(count, 12", "randn(count, 16, 12")):
            assert old in source
            source = source.replace(old, new)
    (tmp_path / "program.py").write_text(source, encoding="utf-8")
    found = runpy.run_path(str(tmp_path / "program.py"))
    flow_loss = found["flow_loss"]

    def seeded(network, mel):
        torch.manual_seed(int(1000 * mel.abs().sum()))
        return flow_loss(network, mel)

    found["main"].__globals__["flow_loss"] = seeded
    return found


@pytest.mark.parametrize("framewise", [False, True], ids=["pooled", "frame-wise"])
@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_resumed_run_goes_on_with_the_same_bits(name, framewise, tmp_path, monkeypatch):
    """From the checkpoint of step 6, after the probes of steps 2, 4 and 6."""
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(ag, "Aligner", lambda *a, **k: made.append(ag.alignment.aligner.Aligner(*a, **k)) or made[-1])
    main = program(name, tmp_path, framewise)["main"]
    whole = main(steps=9, folder=tmp_path / "run")
    [checkpoint] = (tmp_path / "run").glob(CHECKPOINT[name]) if name != "accelerate_loop" else [tmp_path / "run"]
    torch.manual_seed(5)
    resumed = main(steps=9, folder=tmp_path / "again", resume=str(checkpoint))
    assert len(resumed) == 3
    assert resumed == whole[6:]
    first, second = made
    assert second.choice.state_dict() == first.choice.state_dict()
    for one, other in zip(first.loss_fn.parameters(), second.loss_fn.parameters(), strict=True):
        assert torch.equal(one, other)
    # A run whose heads start anew goes another way.
    assert program(name, tmp_path, framewise)["main"](steps=9)[7:] == whole[7:] != whole[:2]


def test_two_ranks_resume_with_the_same_bits(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("ranks.py")), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "passed pooled\npassed frame-wise\n", done.stderr[-3000:]


def test_transformers_optimizer_log_and_mistakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = program("hf_trainer", tmp_path)
    network = found["Network"]()
    arguments = found["TrainingArguments"](
        "out", max_steps=4, logging_steps=1, weight_decay=0.3, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", disable_tqdm=True, remove_unused_columns=False, save_strategy="no",
    )  # fmt: skip
    trainer = found["FlowTrainer"](network, arguments, train_dataset=found["clips"](16))
    trainer.losses = []
    trainer.aligner = ag.Aligner(network, {"hubert": 12}, selection=[1])
    ag.integrations.hf.align(trainer, trainer.aligner, lr=7e-4)
    trainer.train()
    heads = {id(p): p for p in trainer.aligner.loss_fn.parameters()}
    groups = [g for g in trainer.optimizer.param_groups if id(g["params"][0]) in heads]
    assert [(g["weight_decay"], {p.dim() for p in g["params"]}, g["initial_lr"]) for g in groups] == [
        (0.3, {2}, 7e-4),
        (0.0, {1}, 7e-4),
    ]
    assert sum(len(g["params"]) for g in groups) == len(heads)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all({"cosine/hubert/1", "align_loss", "align_weight"} <= set(line) for line in lines)
    assert not any("forward" in vars(module) for module in network.modules())
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ag.errors.UserError, match=r"aligner.pt: missing; the checkpoint was written without"):
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    other = ag.Aligner(network, {"hubert": 12}, selection=[2])
    with pytest.raises(ag.errors.UserError, match=r"the trainer's optimizer leaves the heads out"):
        ag.integrations.hf.align(trainer, other)


def test_lightning_optimizer_log_and_mistakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = program("lightning_module", tmp_path)
    lightning = found["lightning"]

    def fit(configure=None, scheduled=False):
        module = found["Flow"]()
        module.aligner = ag.Aligner(module.network, {"hubert": 12}, selection=[1])
        if configure is not None:
            module.__class__ = type("Own", (found["Flow"],), {"configure_optimizers": configure})
        callback = ag.integrations.lightning.AlignerCallback(module.aligner, weight_decay=0.3)
        trainer = lightning.Trainer(
            max_steps=4, accelerator="cpu", devices=1, callbacks=[callback], logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(module, found["DataLoader"](found["clips"](16), batch_size=4))
        return module, trainer

    module, trainer = fit()
    groups = trainer.optimizers[0].param_groups
    assert [(g["weight_decay"], {p.dim() for p in g["params"]}) for g in groups[1:]] == [(0.3, {2}), (0.0, {1})]
    assert "align/cosine/hubert/1" in trainer.callback_metrics
    assert "configure_optimizers" not in vars(module)
    assert not any("forward" in vars(part) for part in module.modules())

    def with_schedule(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    with pytest.raises(ag.errors.UserError, match=r"make the optimizer with \*aligner.param_groups"):
        fit(with_schedule)

    def with_heads(self):
        optimizer = torch.optim.SGD([{"params": self.parameters()}, *self.aligner.param_groups()], lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    _, trainer = fit(with_heads)
    assert len(trainer.optimizers[0].param_groups) == 3


def test_rooms_are_imported_when_used():
    with pytest.raises(AttributeError, match="no attribute 'ray'"):
        _ = ag.integrations.ray
