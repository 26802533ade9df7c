"""A backbone and its alignment heads under DistributedDataParallel, two processes: what absent domains leave behind.

DDP is built without `find_unused_parameters`: a parameter without a gradient would end the second step.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RANK = """
import sys
import torch
import torch.distributed as distributed
from torch.nn.parallel import DistributedDataParallel
import agrepa_fast as ag

rank, file, B, T = int(sys.argv[1]), sys.argv[2], 4, 6
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)


class Step(torch.nn.Module):
    def __init__(self, pool, objective):
        super().__init__()
        self.model = ag.DiT(ag.DiTConfig(depth=2, width=8, heads=2, mels=3, cond=0, dropout=0.0, max_frames=8))
        [torch.nn.init.normal_(p, std=0.2) for p in self.model.parameters()]
        self.align = ag.AlignmentLoss(
            8, {"speech": 5, "audio": 4}, ag.LayerSelection.uniform([0, 1]), pool, objective=objective
        )
        self.align.select(ag.LayerSelection((1,), (1.0,)))

    def forward(self, x_t, t, targets, domains):
        velocity, hidden = self.model(x_t, t, hidden_layers=self.align.active)
        return velocity.square().mean() + self.align(hidden, targets, None, domains)[0]


def batch(step, rank, pool, names):
    torch.manual_seed(10 * step + rank)
    shape = (B,) if pool else (B, T)
    targets = {"speech": torch.randn(*shape, 5), "audio": torch.randn(*shape, 4)}
    domains = {name: torch.tensor([n == name for n in names]) for name in targets}
    return torch.randn(B, T, 3), torch.rand(B), targets, domains


MIXED, SPEECH = ["speech", "audio", "audio", "speech"], ["speech"] * B
for pool, objective in (("mean", "cosine"), (None, "cosine"), (None, "cka")):
    torch.manual_seed(0)
    plain = Step(pool, objective)
    parallel = DistributedDataParallel(Step(pool, objective))
    parallel.module.load_state_dict(plain.state_dict())
    for step, here in enumerate([(SPEECH, SPEECH), (MIXED, SPEECH), (SPEECH, MIXED)]):
        parallel.zero_grad()
        parallel(*batch(step, rank, pool, here[rank])).backward()
        plain.zero_grad()
        sum(plain(*batch(step, r, pool, here[r])) / 2 for r in (0, 1)).backward()
        for (name, mine), alone in zip(parallel.module.named_parameters(), plain.parameters()):
            if not mine.requires_grad:
                assert pool is None and ".0." in name, name  # a frame-wise head that is not selected
                continue
            torch.testing.assert_close(mine.grad, alone.grad, rtol=1e-4, atol=1e-6, msg=name)
            if "heads.audio" in name:
                absent = here == (SPEECH, SPEECH) or (pool is not None and ".0." in name)
                assert absent == (mine.grad.count_nonzero() == 0), (name, here)
print("done", rank)
distributed.destroy_process_group()
"""


def test_absent_domains_under_ddp(tmp_path: Path):
    """Gradients are the mean of the ranks' own; of a domain that no rank has they are there, and exactly zero."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=environment, stdout=-1, stderr=-2, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    for rank, (process, output) in enumerate(zip(ranks, outputs)):
        assert process.returncode == 0, output
        assert f"done {rank}" in output
