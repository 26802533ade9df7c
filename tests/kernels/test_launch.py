"""Launch configurations: which tile, how many programs, and that tables and rule agree."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton

from agrepa_fast.kernels import launch, tables, tune
from agrepa_fast.kernels.launch import LaunchConfig
from agrepa_fast.ops import dispatch


def test_chunks_cover_every_frame_once_with_a_bounded_number_of_programs() -> None:
    for sequences, frames, block_t, programs in itertools.product((1, 3, 64), (1, 5, 938), (1, 4, 16), (1, 100, 4000)):
        per_sequence, tokens = launch.chunks(sequences, frames, LaunchConfig(block_t, 4, programs))
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
    for name, kernel in itertools.product(launch.MULTIPROCESSORS, launch.WIDTHS):
        assert max(launch.WIDTHS[kernel]) == launch.MAX_WIDTH
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


def test_a_measured_entry_goes_before_the_rule(monkeypatch) -> None:
    launch.table_entry.cache_clear()
    rule = launch.rule("residual_forward", 768, launch.MULTIPROCESSORS["sm90"])
    assert launch.table_entry("sm90", "residual_forward", 700) == rule
    monkeypatch.setitem(tables.TABLES, "sm90", {"residual_forward": {768: (1, 8, 99)}})
    launch.table_entry.cache_clear()
    assert launch.table_entry("sm90", "residual_forward", 700) == LaunchConfig(1, 8, 99) != rule
    assert launch.table_entry("sm80", "residual_forward", 700) != LaunchConfig(1, 8, 99)
    assert launch.table_entry("sm90", "residual_forward", 800) == launch.rule("residual_forward", 1024, 132)
    launch.table_entry.cache_clear()


def test_tuning_finds_the_fastest_and_keeps_it_on_ties() -> None:
    config = launch.rule("residual_forward", 1152, 132)

    def cost(c: LaunchConfig) -> float:
        return abs(c.num_warps - 8) + abs(c.block_t - 2) + abs(c.programs - config.programs / 2) / 1000

    best = tune.tune_kernel("residual_forward", 1152, config, cost)
    assert (best.num_warps, best.programs) == (8, config.programs // 2)
    assert tune.tune_kernel("residual_forward", 1152, config, lambda c: 1.0) == config
    # A kernel with one tile per program has no number of programs to try.
    seen = []
    tune.tune_kernel("cosine_rows", 256, launch.rule("cosine_rows", 256, 132), lambda c: seen.append(c) or 1.0)
    assert {c.programs for c in seen} == {0}
    assert len({c.num_warps for c in seen}) > 2


@pytest.mark.parametrize("kernel", launch.WIDTHS)
def test_the_tuner_runs_the_kernel_with_the_configuration_it_tries(kernel) -> None:
    """On meta tensors: what is launched is the kernel that reads this table, in the tile of the candidate."""
    config = LaunchConfig(block_t=2, num_warps=8, programs=7)
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
    for kernel, widths in launch.WIDTHS.items():
        for width in widths:
            found = list(tune.candidates(kernel, width, launch.rule(kernel, width, 132)))
            assert len(found) == len(set(found)) >= 3
            for c in found:
                columns = 64 if kernel == "masked_mean" else triton.next_power_of_2(width)
                assert c.block_t & (c.block_t - 1) == 0
                assert c.block_t * columns % (c.num_warps * 256) == 0


def test_a_rewritten_table_reads_back(tmp_path) -> None:
    config = LaunchConfig(8, 2, 99)
    path = tmp_path / "tables.py"
    path.write_text(tune.render({"sm90": {"masked_mean": {8192: config}}}, {"sm90": "a device"}))
    found: dict = {}
    exec(path.read_text(), found)
    assert found["TABLES"] == {"sm90": {"masked_mean": {8192: (8, 2, 99)}}}
    assert LaunchConfig(*found["TABLES"]["sm90"]["masked_mean"][8192]) == config
    assert found["MEASURED"] == {"sm90": "a device"}
    assert found["__doc__"] == tables.__doc__


def test_tuning_without_a_device_says_so() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        tune.tune(torch.device("cpu"))
