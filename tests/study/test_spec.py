"""What a study file may say, what each arm sets, and the line that refuses anything else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agrepa_fast.cli import main
from agrepa_fast.errors import UserError
from agrepa_fast.study.arms import BUILT_IN
from agrepa_fast.study.generated import EVALUATED
from agrepa_fast.study.plan import FINAL, make_plan
from agrepa_fast.study.spec import read_study
from agrepa_fast.training.config import override_config

ONE = "seeds: [0]\narms: [none, shallowest]\n"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("arms: [none]\n", "seeds: is missing"),
        ("seeds: [0]\n", "arms: is missing"),
        ("seeds: []\narms: [none]\n", "seeds: expected at least one"),
        ("seeds: [1, 1]\narms: [none]\n", "seeds: expected distinct values"),
        ("seeds: [-1]\narms: [none]\n", "seeds: expected at least 0"),
        ("seeds: [0]\narms: []\n", "arms: expected a list of arms"),
        ("seeds: [0]\narms: [fogga]\n", "did you mean 'foga'?"),
        ("seeds: [0]\narms: [none, none]\n", "the name 'none' occurs twice"),
        ("seeds: [0]\narms: [{a b: [0]}]\n", "arms: expected a name of at most 64 letters"),
        ("seeds: [0]\narms: [{mine: {lyers: [0]}}]\n", "did you mean 'layers'?"),
        ("seeds: [0]\narms: [{mine: {arm: fixed}}]\n", "arms.mine.arm: unknown name 'fixed'"),
        ("seeds: [0]\narms: [{mine: []}]\n", "arms.mine.layers: expected at least one layer"),
        ("seeds: [0]\narms: [{mine: [1, 1]}]\n", "arms.mine.layers: expected distinct values"),
        ("seeds: [0]\narms: [{foga: {layers: [1]}}]\n", "the arm foga chooses its layers itself"),
        ("seeds: [0]\narms: [{foga: {draws: 2}}]\n", "only the arm random has draws"),
        ("seeds: [0]\narms: [{random: {draws: 0}}]\n", "arms.random.draws: expected at least 1"),
        ("seeds: [0]\narms: [{foga: {set: {alignment.policy: even}}}]\n", "the arm foga sets it itself"),
        ("seeds: [0]\narms: [{foga: {set: {train.seed: 3}}}]\n", "train.seed: the study sets it itself"),
        (
            "seeds: [0]\narms: [{foga: {set: {alignment.weight}}}]\n",
            "arm foga: alignment.weight: expected float, got null",
        ),
        (ONE + "settings: {train.name: [a]}\n", "train.name: the study sets it itself"),
        (ONE + "settings: {alignment.layers: [[0]]}\n", "alignment.layers: the arms set it"),
        (ONE + "settings: {train.steps: [8, 9]}\n", "set: train.steps: the settings vary it"),
        (ONE + "settings: {alignment.weight: 1}\n", "settings.alignment.weight: expected a list of values"),
        (ONE + "settings: {alignment.weight: [1, 1]}\n", "settings: weight=1 occurs twice"),
        (ONE + "settings: {alignment.wieght: [1]}\n", "did you mean 'weight'?"),
        (ONE + "settings: [{a: {alignment.pool: null}}, {a: {}}]\n", "settings: a occurs twice"),
        (ONE + "comparisons: [[none, foga]]\n", "comparisons.0: unknown name 'foga'"),
        (ONE + "comparisons: [[none, none]]\n", "comparisons.0: expected two different arms, got 'none' twice"),
        (ONE + "comparisons: [[none]]\n", "comparisons: expected 2 values"),
        (ONE + "evaluate: [none]\n", "evaluate: expected options of agrepa evaluate"),
        (ONE + "evaluate: {arms: [shallow]}\n", "evaluate.arms: unknown name 'shallow'; did you mean 'shallowest'?"),
        (ONE + "evaluate: {arms: []}\n", "evaluate.arms: expected at least one"),
        (ONE + "evaluate: {out: x}\n", "evaluate.out: the study sets it itself"),
        (ONE + "evaluate: {fad: [[a]]}\n", "evaluate.fad: expected a value, or a list of values"),
        (ONE + "evaluate: {clips: many}\n", "evaluate: argument --clips: invalid int value: 'many'"),
        (ONE + "evaluate: {clip: 3}\n", "evaluate: unrecognized arguments: --clip 3"),
        (ONE + "comparisons: [[none, shallowest], [none, shallowest]]\n", "comparisons: expected distinct values"),
        (ONE + "evaluate: {clips: 0}\n", "evaluate: --clips: expected at least 1, got 0"),
        (ONE + "evaluate: {prompt: -1}\n", "evaluate: --prompt: expected 0 to 3600 seconds, got -1"),
        (ONE + "evaluate: {help: 1}\n", "evaluate: unrecognized arguments: --help 1"),
        (ONE + "evaluate: {'': 1}\n", "evaluate.: expected an option of agrepa evaluate without its dashes"),
        (
            ONE + "evaluate: {--clips: 1}\n",
            "evaluate.--clips: expected an option of agrepa evaluate without its dashes",
        ),
        (ONE + "targets: [-1]\n", "targets: expected more than 0"),
        (ONE + "sedes: [1]\n", "did you mean 'seeds'?"),
        ("seeds: [0]\narms: [{foga: {set: {probe.start: 8}}}]\n", "arm foga: probe.start: the selection comes at"),
        ("seeds: [0]\narms: [{none: {set: {probe.start: 8}}}]\n", "arm none: probe.start: expected less than train.st"),
        ("seeds: [0]\narms: [{even: {set: {probe.k: 4}}}]\n", "arm even: probe.k: expected 1 to model.depth (3)"),
        ("seeds: [0]\narms: [{deep: [3]}]\n", "arm deep: alignment.layers: expected distinct layers from 0 to 2"),
        (
            "seeds: [0]\narms: [{foga-by-time: {set: {alignment.objective: cka}}}]\n",
            "arm foga-by-time: alignment.weights",
        ),
        ("seeds: [0]\nseeds: [1]\narms: [none]\n", "the key 'seeds' occurs twice"),
    ],
)
def test_a_bad_study_is_one_line(study_file, capsys, lines, message):
    path = study_file(lines)
    code = main(["study", str(path), "--plan"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert str(path) in error
    assert message in error


def test_no_such_file_and_no_such_base(tmp_path, capsys):
    assert main(["study", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml: No such file" in capsys.readouterr().err
    path = tmp_path / "s.yaml"
    path.write_text("base: demmo\n" + ONE)
    assert main(["study", str(path), "--plan"]) == 2
    assert "did you mean 'demo'?" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["train.seed=1", "train.name=x", "alignment.policy=even", "train={seed: 1}"])
def test_the_command_line_cannot_change_what_the_study_sets(study_file, override):
    with pytest.raises(UserError, match=r"command line: (train|alignment)"):
        read_study(study_file(ONE), [override])


def test_every_arm_sets_what_its_name_says(plan_of):
    arms = (
        "[none, shallowest, deepest, even, most-stored, gradient-norm, first-order, foga, foga-per-teacher, foga-soft, "
        "foga-by-time, foga-reselected, {middle: [1]}, {late: {arm: foga, set: {alignment.stop: 1.0}}}]"
    )
    plan = plan_of(f"seeds: [4]\narms: {arms}\n")
    configs = {run.arm.name: run.config for run in plan.runs}
    a = {name: config.alignment for name, config in configs.items()}
    assert {name: x.policy for name, x in a.items()} == {
        "none": "foga",
        "shallowest": "shallowest",
        "deepest": "deepest",
        "even": "even",
        "most-stored": "stored",
        "gradient-norm": "gradient-norm",
        "first-order": "first-order",
        "foga": "foga",
        "foga-per-teacher": "foga",
        "foga-soft": "foga-soft",
        "foga-by-time": "foga",
        "foga-reselected": "foga",
        "middle": "foga",
        "late": "foga",
    }
    assert [name for name, x in a.items() if not x.enabled] == ["none"]
    assert [name for name, x in a.items() if x.selection_per == "teacher"] == ["foga-per-teacher"]
    assert [name for name, x in a.items() if x.weights == "by-time"] == ["foga-by-time"]
    assert [name for name, x in a.items() if x.layers] == ["middle"]
    assert a["middle"].layers == (1,)
    # Probes at 3, 4, ..., until alignment stops at 0.9 x 8 steps, rounded up: (8 - 3) // 6 is below 1.
    assert {name: config.probe.every for name, config in configs.items() if config.probe.every} == {
        "foga-reselected": 1
    }
    assert a["late"].stop == 1.0
    assert all(x.wait for x in a.values())
    assert all(config.alignment_start == 3 for config in configs.values())
    assert {config.train.seed for config in configs.values()} == {4}
    alone = override_config(configs["middle"], ["alignment.wait=false"])
    assert alone.alignment_start == 0  # as in a run outside a study


def test_what_the_base_says_of_the_choice_does_not_reach_the_arms(study_file, tmp_path, plan_of):
    """A base that aligns fixed layers, by another policy, leaves the arms as they are."""
    (tmp_path / "base.yaml").write_text(
        "preset: demo\nalignment: {layers: [5], selection_per: teacher, weight: 0.25}\n"
    )
    path = study_file("seeds: [0]\narms: [foga, {as-it-is: {}}]\n")
    path.write_text(path.read_text().replace("base: demo", "base: base.yaml").replace("depth: 3", "depth: 8"))
    foga, as_it_is = (run.config.alignment for run in make_plan(read_study(path), 1).runs)
    assert (foga.layers, foga.selection_per, foga.weight) == ((), "run", 0.25)
    assert (as_it_is.layers, as_it_is.selection_per, as_it_is.weight) == ((5,), "teacher", 0.25)


def test_random_layers_come_before_the_target_of_a_network_that_is_its_own_teacher(plan_of):
    teacher = "alignment.teachers={me: {source: layersync, target_layer: 2}}"
    plan = plan_of("seeds: [0]\narms: [{random: {draws: 8}}]\n", "probe.k=1", teacher)
    drawn = {run.config.alignment.layers for run in plan.runs}
    assert drawn == {(0,), (1,)}


def test_random_draws_differ_between_draws_and_seeds_and_stay_the_same(plan_of):
    lines = "seeds: [0, 1]\narms: [{random: {draws: 4}}]\n"
    layers = [run.config.alignment.layers for run in plan_of(lines).runs]
    assert len(layers) == 8
    assert len(set(layers)) == 3  # 2 of 3 layers
    assert layers[:4] != layers[4:]
    assert layers == [run.config.alignment.layers for run in plan_of(lines).runs]
    # Of a seed, the same layers drawn twice are trained once.
    assert len(plan_of(lines).jobs) == len(set(layers[:4])) + len(set(layers[4:]))


def test_settings_are_a_grid_or_a_list(plan_of):
    grid = plan_of(ONE + "settings: {alignment.weight: [0.1, 1], alignment.pool: [mean, null]}\n")
    values = [
        (r.setting, r.config.alignment.weight, r.config.alignment.pool) for r in grid.runs if r.arm.name != "none"
    ]
    assert values == [
        ("weight=0.1,pool=mean", 0.1, "mean"),
        ("weight=0.1,pool=null", 0.1, None),
        ("weight=1,pool=mean", 1.0, "mean"),
        ("weight=1,pool=null", 1.0, None),
    ]
    named = plan_of(ONE + "settings:\n  - frames: {alignment: {pool: null, head: conv}}\n  - clips: {}\n")
    values = [(r.setting, r.config.alignment.pool, r.config.alignment.head) for r in named.runs if r.arm.name != "none"]
    assert values == [("frames", None, "conv"), ("clips", "mean", "mlp")]


def test_runs_share_a_warm_up_where_it_is_the_same(plan_of):
    plan = plan_of("seeds: [0, 1]\narms: [none, foga, {slow: {arm: foga, set: {optimizer.lr: 1.0e-4}}}]\n")
    by_arm = {arm: {run.warmup.folder for run in plan.runs if run.arm.name == arm} for arm in ("none", "foga", "slow")}
    assert by_arm["none"] == by_arm["foga"]
    assert len(by_arm["none"]) == 2  # one for each seed
    assert not by_arm["slow"] & by_arm["foga"]
    settings = "settings: {alignment.pool: [mean, null], alignment.weight: [0.1, 1]}\n"
    assert len(plan_of("seeds: [0]\narms: [foga]\n" + settings).warmups) == 1
    # BiT-C trains heads before the probe, and they depend on the kind of teacher's target.
    bitc = "settings: {alignment.pool: [mean, null], alignment.bitc: [true]}\n"
    plan = plan_of("seeds: [0]\narms: [foga]\n" + bitc)
    assert len(plan.warmups) == 2
    assert all(warmup.keeps_heads for warmup in plan.warmups)


def test_a_run_that_settings_do_not_change_is_trained_once(plan_of):
    plan = plan_of(ONE + "settings: {alignment.weight: [0.1, 1]}\n")
    none = [run.folder for run in plan.runs if run.arm.name == "none"]
    assert none[0] == none[1]
    assert len(plan.runs) == 4
    assert len(plan.jobs) == 3


def test_the_plan_is_text(study_file, capsys):
    assert main(["study", str(study_file("seeds: [0, 1]\narms: [none, shallowest]\n")), "--plan"]) == 0
    out = capsys.readouterr().out
    # 2 warm-ups of 3 steps and 4 runs of 5; without sharing 4 x 8.
    assert "1 settings x 2 arms and draws x 2 seeds = 4 runs\n4 to train" in out
    assert "26 steps to train in all, 0 done (without shared warm-ups: 32 in all)" in out
    assert "shallowest           0 of 2 runs finished, 8 steps each" in out


def test_the_plan_says_how_long_it_takes(study_file, plan_of, capsys):
    lines = "seeds: [0, 1]\narms: [none, shallowest]\nevaluate: {arms: [none]}\n"
    assert main(["study", str(study_file(lines)), "--plan"]) == 0
    out = capsys.readouterr().out
    assert "s a step, a rough estimate from the fastest of 5 passes of the network" in out
    assert "agrepa evaluate at the end of each run of none\n" in out
    run = plan_of(lines).jobs[0]
    run.folder.mkdir(parents=True)
    (run.folder / FINAL).write_text('{"seconds": 80.0}')  # 10 s for each of its 8 steps
    (run.folder / EVALUATED).write_text('{"options": [], "numbers": []}')
    assert main(["study", str(study_file(lines)), "--plan", "--workers", "2"]) == 0
    # 26 steps by two at a time; the finished run's own five are done.
    expected = (
        "about 2 min 10 s with --workers 2 on this machine, 1 min 45 s of it left (10 s a step, from 1 finished runs"
    )
    assert expected in capsys.readouterr().out
    assert main(["study", str(study_file(lines)), "--plan", "model.width=4096", "data.frames_per_batch=9999"]) == 0
    assert "time: not estimated" not in capsys.readouterr().out, "a finished run tells the time of any network"
    (run.folder / FINAL).unlink()
    assert main(["study", str(study_file(lines)), "--plan", "model.width=4096", "data.frames_per_batch=9999"]) == 0
    assert "time: not estimated, as the network is too large to be timed here" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seconds": "x"}', '{"seconds": null}'])
def test_the_plan_names_a_broken_final(study_file, plan_of, capsys, text):
    [run] = plan_of("seeds: [0]\narms: [none]\n").jobs
    run.folder.mkdir(parents=True)
    (run.folder / FINAL).write_text(text)
    assert main(["study", str(study_file("seeds: [0]\narms: [none]\n")), "--plan"]) == 2
    error = capsys.readouterr().err
    assert f"{run.folder / FINAL}: not what a run writes" in error
    assert error.count("\n") == 1


def test_a_study_for_another_machine_has_a_plan(study_file, capsys):
    assert main(["study", str(study_file(ONE)), "--plan", "train.device=cuda:99"]) == 0
    assert "time: not estimated (train.device: no cuda:99 here" in capsys.readouterr().out


def test_only_the_arms_that_are_named_are_evaluated(plan_of):
    """Runs of one configuration are one run: it is evaluated where any of its arms is."""
    lines = "seeds: [0]\narms: [none, foga, {same: foga}]\n"
    plan = plan_of(lines + "evaluate: {arms: [same], clips: 3, fad: [spectral, x]}\n")
    assert plan.study.evaluation.options == ("--clips", "3", "--fad", "spectral", "x")
    assert [run.evaluate is not None for run in plan.runs] == [False, True, True]
    assert all(run.evaluate is not None for run in plan_of(lines + "evaluate: {clips: 3}\n").runs)
    assert all(run.evaluate is None for run in plan_of(lines).runs)


def test_the_page_shows_a_file_that_works(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "study.md").read_text(encoding="utf-8")
    path = tmp_path / "study.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1], encoding="utf-8")
    plan = make_plan(read_study(path))
    # 2 settings of 5 seeds: six arms and five draws of the seventh; without alignment the settings make no difference.
    assert len(plan.runs) == 2 * 5 * 11
    assert len(plan.jobs) <= 2 * 5 * 10 + 5
    assert all(f"`{name}`" in page for name in BUILT_IN)
