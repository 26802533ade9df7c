"""Launch configurations: which tile, how many programs, and that tables and rule agree."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from agrepa_fast.kernels import launch, tables, tune
from agrepa_fast.kernels.launch import LaunchConfig
from agrepa_fast.ops import dispatch


@pytest.mark.parametrize(
    "width, block_t, warps, split, tiles",
    [
        (1024, 4, 4, True, (1024, 0)),  # a power of two needs no tail
        (1152, 8, 4, True, (1024, 128)),
        (1152, 2, 4, True, (1024, 512)),  # 128 columns would be 2 numbers a thread: no 16-byte vector
        (1152, 1, 4, True, (2048, 0)),
        (1152, 8, 4, False, (2048, 0)),
        (760, 4, 4, True, (512, 256)),
        (1500, 2, 4, True, (1024, 512)),
        (1000, 8, 4, True, (1024, 0)),  # a tail of 512 would save nothing
        (1025, 64, 4, True, (1024, 16)),
        (72, 16, 1, True, (64, 16)),
        (1, 16, 4, True, (1, 0)),
    ],
)
def test_column_tiles(width, block_t, warps, split, tiles) -> None:
    assert launch.column_tiles(width, LaunchConfig(block_t, warps, 1, split)) == tiles


def test_chunks_cover_every_frame_once_with_a_bounded_number_of_programs() -> None:
    for sequences, frames, block_t, programs in itertools.product((1, 3, 64), (1, 5, 938), (1, 4, 16), (1, 100, 4000)):
        per_sequence, tokens = launch.chunks(sequences, frames, LaunchConfig(block_t, 4, programs, False))
        assert tokens % block_t == 0
        assert (per_sequence - 1) * tokens < frames <= per_sequence * tokens
        assert sequences * per_sequence <= programs + sequences


@pytest.mark.parametrize(
    "strides, unit", [((1024, 4096), 16), ((1500, 3000), 4), ((7,), 1), ((0, 0), 16), ((24, 40), 8)]
)
def test_alignment_divides_every_stride(strides, unit) -> None:
    assert launch.alignment(*strides) == unit


def test_only_a_strided_last_dimension_is_copied() -> None:
    x = torch.randn(4, 6, 8)
    for view in (x, x[:, ::2], x.transpose(0, 1), x[..., 2:5], x[:, :, :1], x[:1].expand(4, 6, 8)):
        assert launch.row_contiguous(view) is view
    assert launch.row_contiguous(x.transpose(1, 2)).stride(-1) == 1


def test_every_width_has_a_configuration_up_to_the_limit_the_ops_promise() -> None:
    assert launch.MAX_WIDTH == dispatch.MAX_WIDTH
    for name, kernel in itertools.product(tables.TABLES, tune.WIDTHS):
        assert max(tables.TABLES[name][kernel]) == launch.MAX_WIDTH
        with launch.record(name):
            device = torch.device("meta")
            assert launch.configuration(kernel, 129, device) != launch.configuration(kernel, 128, device) or (
                kernel == "masked_mean"
            )
            with pytest.raises(ValueError, match="8193"):
                launch.configuration(kernel, launch.MAX_WIDTH + 1, device)


def test_a_cpu_tensor_does_not_reach_a_compiled_kernel() -> None:
    from agrepa_fast.kernels import pooling

    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        pooling.masked_mean(torch.randn(2, 3, 4), None)


def test_tables_that_no_device_has_confirmed_hold_the_rule() -> None:
    text = Path(tables.__file__).read_text()
    assert text == tune.render(tables.TABLES, tables.MEASURED)
    for name, table in tune.start_tables().items():
        if name not in tables.MEASURED:
            assert tables.TABLES[name] == table, name


def test_tuning_finds_the_fastest_and_keeps_it_on_ties() -> None:
    config = tune.start("residual_forward", 1152, 132)

    def cost(c: LaunchConfig) -> float:
        return abs(c.num_warps - 8) + abs(c.block_t - 2) + abs(c.programs - config.programs / 2) / 1000 + c.split

    best = tune.tune_kernel("residual_forward", 1152, config, cost)
    assert (best.num_warps, best.split, best.programs) == (8, False, config.programs // 2)
    assert tune.tune_kernel("residual_forward", 1152, config, lambda c: 1.0) == config
    # A kernel with one tile per program has no number of programs to try.
    seen = []
    tune.tune_kernel("cosine_rows", 256, tune.start("cosine_rows", 256, 132), lambda c: seen.append(c) or 1.0)
    assert {c.programs for c in seen} == {0}
    assert len({c.num_warps for c in seen}) > 2


@pytest.mark.parametrize("kernel", tune.WIDTHS)
def test_the_tuner_runs_the_kernel_with_the_configuration_it_tries(kernel) -> None:
    """On meta tensors: what is launched is the kernel that reads this table, in the tile of the candidate."""
    config = LaunchConfig(block_t=2, num_warps=8, programs=7, split=False)
    with launch.record("sm90") as recording:
        run = tune.workload(kernel, 256, torch.device("meta"))
        recording.launches.clear()
        run(config)
    first = recording.launches[0]
    assert (first.num_warps, first.constants["BLOCK_T"]) == (8, 2)
    names = {"residual_forward": "_forward_kernel", "residual_backward": "_backward_kernel"}
    names |= {"masked_mean": "_mean_kernel", "velocity_delta": "_delta_kernel", "cosine_rows": "_cosine_kernel"}
    assert first.kernel.__name__ == names[kernel]


def test_candidates_fill_every_thread_with_whole_vectors() -> None:
    for kernel, widths in tune.WIDTHS.items():
        for width in widths:
            found = list(tune.candidates(kernel, width, tune.start(kernel, width, 132)))
            assert len(found) == len(set(found)) >= 3
            for c in found:
                main, tail = (64, 0) if kernel == "masked_mean" else launch.column_tiles(width, c)
                assert c.block_t & (c.block_t - 1) == 0
                assert c.block_t * main % (c.num_warps * 256) == c.block_t * tail % (c.num_warps * 256) == 0
                assert c.split == bool(tail)


def test_a_rewritten_table_reads_back(tmp_path) -> None:
    changed = {**tables.TABLES, "sm90": {"masked_mean": {8192: LaunchConfig(8, 2, 99, False)}}}
    measured = {"sm90": "a device"}
    path = tmp_path / "tables.py"
    path.write_text(tune.render(changed, measured).replace("from .launch", "from agrepa_fast.kernels.launch"))
    found: dict = {}
    exec(path.read_text(), found)
    assert found["TABLES"] == changed
    assert found["MEASURED"] == measured


def test_tuning_without_a_device_says_so() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        tune.tune(torch.device("cpu"))
