"""Two ranks under torchrun, on the CPU: the weights of one process at the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from agrepa_fast import LayerScores, read_selection
from agrepa_fast.report import read_log
from agrepa_fast.training.checkpoint import load_checkpoint

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def train(arguments: list[str], *, ranks: int) -> None:
    command = [sys.executable, *(TORCHRUN if ranks == 2 else []), "-m", "agrepa_fast", "train", *arguments]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_are_one_process_at_the_same_global_batch(tiny, tmp_path):
    changes = ["model.dropout=0", "train.samples=0", "train.log_every=1", "train.steps=12"]
    # Adam turns a gradient that is nothing but rounding into a step of the size of the learning rate.
    changes += ["optimizer.lr=1e-4", "optimizer.initial_lr=1e-5"]
    # Probes while training; domains that are absent from some batches of some ranks.
    changes += ["probe.start=4", "probe.every=4", "train.checkpoint_every=6"]
    # The network itself is a teacher as well, with a target layer that is given and one that is measured.
    own = "sync: {source: layersync, target_layer: 2}, flow: {source: self-flow}"
    changes += [f"alignment.teachers={{voice: {{domains: [speech]}}, sound: {{domains: [audio]}}, {own}}}"]
    changes += ["alignment.selection_per=teacher", "alignment.weights=by-time"]
    # Samples whose tokens were dropped count for nothing there, and are not as many on both ranks.
    changes += ["alignment.bitc=true", "flow.token_dropout=0.4"]
    train(["demo", *tiny(*changes, "data.frames_per_batch=252", "train.name=one")], ranks=1)
    train(["demo", *tiny(*changes, "data.frames_per_batch=126", "train.name=two")], ranks=2)
    runs = tmp_path / "runs"
    one, two = load_checkpoint(runs / "one"), load_checkpoint(runs / "two")
    for part, weights in one.weights.items():
        for name, value in weights.items():
            torch.testing.assert_close(
                two.weights[part][name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    logs = [[e for e in read_log(runs / name / "log.jsonl") if e["event"] == "train"] for name in ("one", "two")]
    assert [e["step"] for e in logs[0]] == [e["step"] for e in logs[1]] == list(range(1, 13))
    for a, b in zip(*logs):
        assert abs(a["flow_loss"] - b["flow_loss"]) < 1e-5  # the mean over ranks
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-5
    chosen = [read_selection(runs / name / "selection.json") for name in ("one", "two")]
    assert [part["flow"].target for part in chosen] == [2, 2]
    for name in ("voice", "sound", "sync", "flow"):
        assert chosen[0][name].layers == chosen[1][name].layers
        assert torch.tensor(chosen[0][name].scores).allclose(torch.tensor(chosen[1][name].scores), rtol=1e-3)
    scores = [LayerScores.from_state(checkpoint.state["scores"]) for checkpoint in (one, two)]
    for name in ("clips", "t", "domains"):
        assert list(getattr(scores[0], name)) == list(getattr(scores[1], name)), name
    torch.testing.assert_close(scores[0].by_sample, scores[1].by_sample, rtol=1e-3, atol=1e-6)
    # From the middle again: the same ranks end where they did.
    newest = runs / "two" / "checkpoints" / "step_00000012"
    newest.rename(runs / "two" / "held")
    train(["--resume", str(runs / "two")], ranks=2)
    again = load_checkpoint(runs / "two")
    for part, weights in two.weights.items():
        assert all(torch.equal(again.weights[part][name], value) for name, value in weights.items()), part


def test_shards_train_as_ddp_does(tiny, tmp_path):
    script = Path(__file__).with_name("sharded.py")
    changes = ["train.device=cpu", "train.log_every=1", "probe.start=3", "train.diagnose_every=5"]
    changes += ["optimizer.lr=1e-4", "optimizer.initial_lr=1e-5", "alignment.bitc=true", "flow.token_dropout=0.4"]
    changes += ["alignment.teachers={voice: {domains: [speech]}, sound: {domains: [audio]}}"]
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(script), *tiny(*changes)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    for scenario in ("as_ddp", "ddp_goes_on_sharded", "resumed", "in_bfloat16"):
        assert f"passed {scenario}\n" in done.stdout, done.stderr[-3000:]
