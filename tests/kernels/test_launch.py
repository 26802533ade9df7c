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
        assert sequences * per_sequence <= max(programs, sequences)


@pytest.mark.parametrize("width", [384, 1024, 1152, 2048])
@pytest.mark.parametrize("sequences, frames", [(64, 512), (32, 256), (16, 938), (100, 938), (4, 938), (2, 300)])
def test_the_backward_is_one_wave_of_nearly_all_programs(width, sequences, frames) -> None:
    """All programs are resident at once, and each has few more tokens than an even share."""
    config = launch.table_entry("sm90", "residual_backward", width)
    per_sequence, tokens = launch.chunks(sequences, frames, config)
    assert sequences * per_sequence <= config.programs
    even = sequences * frames / config.programs
    assert tokens <= even * (1 + sequences / config.programs) + 2 * config.block_t


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


@pytest.fixture
def no_entries_kept():
    launch.table_entry.cache_clear()
    yield
    launch.table_entry.cache_clear()


def test_a_measured_entry_goes_before_the_rule(monkeypatch, no_entries_kept) -> None:
    """An entry serves the widths up to its own, of its kernel and architecture alone; the rule serves all others."""
    unmeasured = LaunchConfig(2, 4, 2112)  # 132 multiprocessors of 64 warps, in programs of 4
    monkeypatch.setitem(tables.TABLES, "sm90", {"residual_forward": {768: (1, 8, 99)}})
    assert launch.table_entry("sm90", "residual_forward", 513) == LaunchConfig(1, 8, 99)
    assert launch.table_entry("sm90", "residual_forward", 768) == LaunchConfig(1, 8, 99)
    assert launch.table_entry("sm90", "residual_forward", 769) == unmeasured
    assert launch.table_entry("sm90", "residual_backward", 768) == LaunchConfig(1, 4, 528)
    assert launch.table_entry("sm80", "residual_forward", 768) == LaunchConfig(2, 4, 1728)


@pytest.mark.parametrize("kernel", ["residual_forward", "residual_backward"])
@pytest.mark.parametrize("architecture", launch.MULTIPROCESSORS)
def test_the_rule_fits_into_a_multiprocessor(kernel, architecture, monkeypatch, no_entries_kept) -> None:
    """64 warps and 65,536 registers; a thread loads one or two 16-byte vectors of half-precision numbers a tensor."""
    monkeypatch.setattr(launch, "TABLES", {})
    for width in launch.WIDTHS[kernel]:
        config = launch.table_entry(architecture, kernel, width)
        warps = config.programs * config.num_warps / launch.MULTIPROCESSORS[architecture]
        registers = 128 if kernel == "residual_backward" else 32
        assert warps <= 64
        assert warps * 32 * registers <= 65_536
        numbers = config.block_t * triton.next_power_of_2(width) / (32 * config.num_warps)
        assert numbers == 8 or (numbers == 16 and (kernel == "residual_forward" or width > 4096)), (width, config)


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


def test_a_tuning_run_that_is_cut_short_keeps_the_kernels_it_has_done(tmp_path, monkeypatch) -> None:
    path = tmp_path / "tables.py"
    first, second, *_ = launch.WIDTHS
    best = LaunchConfig(2, 8, 77)

    def tune_kernel(kernel, width, config, cost):
        if kernel == second:
            raise KeyboardInterrupt
        return best

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake 9000")
    monkeypatch.setattr(tune, "architecture", lambda device: "sm90")
    monkeypatch.setattr(tune, "workload", lambda *_: None)
    monkeypatch.setattr(tune, "tune_kernel", tune_kernel)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(torch.device("cuda"), path)
    found: dict = {}
    exec(path.read_text(), found)
    assert found["TABLES"] == {"sm90": {first: dict.fromkeys(launch.WIDTHS[first], (2, 8, 77))}}
    assert found["MEASURED"]["sm90"].startswith("Fake 9000, torch ")


def test_tuning_without_a_device_says_so() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        tune.tune(torch.device("cpu"))
