"""Two ranks under accelerate and gloo: examples/accelerate_loop.py, saved after step 6 and resumed.

Usage: torchrun ranks.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_trainers import program  # beside this script
from torch import distributed

import agrepa_fast as ag

STEPS = 9


def resumed(folder: Path, framewise: bool) -> None:
    """The losses, the heads and the state after a resume are those of the whole run, bit for bit."""
    made: list[ag.Aligner] = []
    kind = ag.alignment.aligner.Aligner
    ag.Aligner = lambda *a, **k: made.append(kind(*a, **k)) or made[-1]
    main = program("accelerate_loop", folder / str(distributed.get_rank()), framewise)["main"]
    # A batch is four clips for each of the two ranks.
    whole = main(steps=2 * STEPS, folder=folder)
    torch.manual_seed(5 + distributed.get_rank())
    again = main(steps=2 * STEPS, resume=str(folder))
    assert len(whole) == STEPS
    assert again == whole[6:]
    first, second = made
    assert first.choice.probed == second.choice.probed == 8
    assert first.choice.state_dict() == second.choice.state_dict()
    for one, other in zip(first.loss_fn.parameters(), second.loss_fn.parameters(), strict=True):
        assert torch.equal(one, other)
    # Each rank has losses of its own, and all have one aligner.
    found: list = [None, None]
    heads = [parameter.tolist() for parameter in first.loss_fn.parameters()]
    distributed.all_gather_object(found, (whole, heads, first.choice.state_dict()))
    assert found[0][0] != found[1][0]
    assert found[0][1:] == found[1][1:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for framewise in (False, True):
        folder = Path(sys.argv[1]) / ("frame-wise" if framewise else "pooled")
        (folder / str(distributed.get_rank())).mkdir(parents=True)
        resumed(folder, framewise)
        distributed.barrier()
        if distributed.get_rank() == 0:
            print("passed", folder.name, flush=True)
    distributed.destroy_process_group()
