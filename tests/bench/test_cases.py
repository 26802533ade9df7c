"""Every case at toy size: it builds, passes its gate with every provider that is installed, and counts its work right.

The captured figures mean nothing; that no case rots is the point.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from agrepa_fast.attribution.plan import AblationPlan
from agrepa_fast.bench import cli, results
from agrepa_fast.bench.cases import CASES, find, foga, residual, train_step
from agrepa_fast.bench.headlines import HEADLINES
from agrepa_fast.bench.published import foga_loop, published, random_dit
from agrepa_fast.bench.runner import run_problem
from agrepa_fast.errors import UserError
from agrepa_fast.models.dit import DiTConfig
from agrepa_fast.ops.dispatch import KERNEL_OPS

CPU = torch.device("cpu")
ROOFLINE = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"float32": 1e11}}
PROBLEMS = [(name, problem) for name, module in CASES.items() for problem in module.problems("toy", CPU)]
NEEDS = {"demo": ("torchaudio", "soundfile", "yaml", "tqdm", "matplotlib", "safetensors")}


@pytest.mark.filterwarnings("ignore::UserWarning")  # the demo probes after a step: a velocity of zero
@pytest.mark.parametrize(("case", "problem"), PROBLEMS, ids=[f"{name}-{p.key}" for name, p in PROBLEMS])
def test_smoke(case: str, problem: residual.Problem) -> None:
    entry = run_problem(case, problem, CPU, "toy", ROOFLINE)
    absent = [name for name in NEEDS.get(case, ()) if importlib.util.find_spec(name) is None]
    for row in entry["rows"]:
        if row["provider"] in ("Liger", "nnsight") or absent:
            assert row["status"] in ("ok", "unavailable"), row["reason"]
        else:
            assert row["status"] == "ok", f"{row['provider']}: {row['reason']}"
            assert row["median_us"] > 0
            assert row["error"] is not None or row["role"] == "copy"
    assert entry["gate"]["passed"] or absent


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("scale", ["toy", "quick", "full"])
def test_keys_are_unique(name: str, device: str, scale: str) -> None:
    """Listing the problems needs no device, and `compare` finds a problem by its key."""
    problems = CASES[name].problems(scale, torch.device(device))
    keys = [problem.key for problem in problems]
    assert keys
    assert len(set(keys)) == len(keys)


def test_every_op_with_a_kernel_has_a_problem_on_a_gpu() -> None:
    """The projection's loss is the problem "op" of the case "alignment"."""
    params = [p.params for module in CASES.values() for p in module.problems("full", torch.device("cuda"))]
    named = {each["op"] for each in params if "op" in each}
    named |= {"projection_cosine_loss" for each in params if each.get("part") == "op"}
    assert named == set(KERNEL_OPS)


def test_residual_counts_its_tensors() -> None:
    [problem] = [
        p for p in residual.problems("toy", CPU) if p.params["op"] == "gated_residual" and p.params["mode"] == "forward"
    ]
    x, branch, out = (torch.zeros(2, 8, 24) for _ in range(3))
    gate = torch.zeros(2, 24)
    assert problem.bytes == sum(t.numel() * t.element_size() for t in (x, branch, out, gate))


def test_probe_flops_against_the_counter() -> None:
    """FLOPs counted by torch's counter on the staircase itself."""
    from torch.utils.flop_counter import FlopCounterMode

    from agrepa_fast.attribution.runner import attribute_layers

    config = DiTConfig(depth=4, width=32, heads=2, mels=8, cond=12, dropout=0.0)
    model = random_dit(config)
    inputs = foga.draw_inputs(config, 2, 16, CPU)
    with FlopCounterMode(display=False) as counter:
        attribute_layers(model, inputs)
    assert AblationPlan.build(4).block_evaluations == 10
    # The counter does not know the CPU's fused attention; the linear layers must agree to the operation.
    attention = (10 * 2 + 4) * 4 * 16**2 * 32
    # Beside the least work runs the control of the noise floor: one sample through 4 blocks and the output.
    control = 4 * foga.block_flops(config, 1, 16) + 2 * 16 * 32 * 8
    expected = foga.probe_flops(config, 2, 16) + control
    assert counter.get_total_flops() in (expected, expected - attention)


def test_published_form_is_the_same_function() -> None:
    config = DiTConfig(depth=3, width=32, heads=4, mels=6, cond=10, dropout=0.0)
    model = random_dit(config).double()
    inputs = {k: v.double() for k, v in foga.draw_inputs(config, 2, 11, CPU).items()}
    wanted, hidden = model(**inputs, hidden_layers=(0, 2))
    for keep_weights in (False, True):
        network = published(model, keep_weights)
        velocity, own = network(**inputs, hidden_layers=(0, 2))
        torch.testing.assert_close(velocity, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own[2], hidden[2], rtol=1e-6, atol=1e-6)
    assert wanted.std() > 0.1  # not the zeros of an untrained network


def test_released_loop_skips_the_block_it_is_asked_to() -> None:
    config = DiTConfig(depth=2, width=16, heads=2, mels=4, cond=4, dropout=0.0)
    network = published(random_dit(config).double(), keep_weights=False)
    inputs = {k: v.double() for k, v in foga.draw_inputs(config, 1, 5, CPU).items()}
    scores = foga_loop(network, inputs)
    base, _ = network(**inputs)
    network.blocks = network.blocks[:1]  # without block 1
    without, _ = network(**inputs)
    wanted = (((without - base) ** 2).mean() + 1e-8) ** 0.5 / (((base**2).mean() + 1e-8) ** 0.5 + 1e-8)
    assert scores[1, 0].item() == pytest.approx(wanted.item(), rel=1e-9)
    assert scores[0, 0] != scores[1, 0]


def test_training_losses_agree_and_learn() -> None:
    problem = train_step.problems("toy", CPU)[0]
    setup = problem.build(CPU)
    steps = {p.name: p.make() for p in setup.providers if p.name in ("ours", "released form")}
    for _ in range(3):
        ours, released = steps["ours"](), steps["released form"]()
        torch.testing.assert_close(ours[0], released[0], rtol=1e-4, atol=1e-5)
    first, _ = setup.reference()
    assert ours[0] < first


def test_find_names_the_cases() -> None:
    assert list(find(["all"])) == list(CASES)
    assert list(find(["sampler", "foga"])) == ["foga", "sampler"]
    with pytest.raises(UserError, match="'fogga': no such case; expected all or some of residual"):
        find(["fogga"])


def test_run_writes_a_valid_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "r.json"
    arguments = ["run", "sampler", "alignment", "--toy", "--device", "cpu", "--only", "mode=forward", "--out", str(out)]
    assert cli.main(arguments) == 0
    result = results.read(out)
    assert result["complete"]
    assert [p["key"].split()[0] for p in result["problems"]] == ["part=op", "part=head"]
    assert result["roofline"]["copy_bytes_per_s"] > 0
    assert f"{result['noise_floor']:.1%}" in capsys.readouterr().out


def test_what_is_cut_short_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(*arguments: object) -> dict:
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return run_problem(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("agrepa_fast.bench.cli.run_problem", interrupted)
    problems = [p for p in residual.problems("toy", CPU) if p.params["mode"] == "forward"]
    with pytest.raises(KeyboardInterrupt):
        cli.run({"residual": problems}, CPU, "toy", tmp_path / "r.json")
    result = results.read(tmp_path / "r.json")
    assert not result["complete"]
    assert [p["key"] for p in result["problems"]] == [problems[0].key]


def test_a_spent_budget_lists_what_it_left_out(tmp_path: Path) -> None:
    problems = residual.problems("toy", CPU)[:2]
    result = cli.run({"residual": problems}, CPU, "toy", tmp_path / "r.json", budget=0.0)
    assert result["problems"] == []
    assert [item["key"] for item in result["skipped"]] == [p.key for p in problems]
    assert results.read(tmp_path / "r.json")["skipped"][0]["reason"] == "the budget of 0 s was spent"


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["run", "nosuch", "--toy"]) == 2
    assert "'nosuch': no such case" in capsys.readouterr().err
    assert cli.main(["run", "foga", "--toy", "--device", "cpu", "--only", "nothing"]) == 2
    assert "has 'nothing' in its key" in capsys.readouterr().err
    assert cli.main(["run", "foga", "--toy", "--device", "tpu"]) == 2
    assert "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "a.json: No such file" in capsys.readouterr().err


def _named(**params: Any) -> residual.Problem:
    return residual.Problem(params, "float32", None, None, build=lambda device: pytest.fail("only listed"))


def test_cases_take_turns() -> None:
    chosen = {"a": [_named(n=n) for n in (1, 2, 3)], "b": [_named(n=4)], "c": [], "d": [_named(n=n) for n in (5, 6)]}
    wanted = [("a", 1), ("b", 4), ("d", 5), ("a", 2), ("d", 6), ("a", 3)]
    assert [(case, problem.params["n"]) for case, problem in cli.in_turn(chosen)] == wanted


def test_the_headlines_come_first_and_only_once() -> None:
    cuda = torch.device("cuda")
    chosen = {name: case.problems("full", cuda) for name, case in CASES.items()}
    turns = [(case, problem.key) for case, problem in cli.in_turn(chosen)]
    assert len(set(turns)) == len(turns) == sum(map(len, chosen.values()))
    first = [case for case, _ in turns[: len(HEADLINES)]]
    assert first == ["foga", "residual", "residual", "alignment", "train_step"]
    assert "scale=paper" in turns[0][1]
    assert "mode=forward" in turns[1][1]
    assert "mode=backward" in turns[2][1]
    assert "preset=paper align=on" in turns[4][1]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--quick", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in CASES)
    assert "op=gated_residual_norm mode=backward rows=1024 width=384" in said
