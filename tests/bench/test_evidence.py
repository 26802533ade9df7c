"""What the docs say about alignment follows the stored study, whichever way it came out."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from agrepa_fast.bench import evidence, report
from agrepa_fast.errors import UserError
from agrepa_fast.study.outline import outline
from agrepa_fast.study.plan import make_plan
from agrepa_fast.study.spec import read_study

ROOT = Path(__file__).resolve().parents[2]
CPU, RECORDINGS = evidence.STUDIES["study"], evidence.STUDIES["recordings"]


def difference(value: float, low: float | None, high: float | None, lower: int) -> dict:
    by_seed = {"7": value - 0.001, "8": value + 0.001}
    return {"value": value, "low": low, "high": high, "by_seed": by_seed, "lower": lower, "seeds": 2}


def arm(name: str, loss: float, steps: float | None, **differences: dict) -> dict:
    selections = [None if name == "none" else {"layers": [1, 4], "method": name} for _ in range(2)]
    target = {"target": "final loss of none", "reached": 2 if steps else 1, "of": 2, "step": steps}
    return {
        "arm": name,
        "loss": {"value": loss, "low": loss - 0.1, "high": loss + 0.1},
        "differences": differences,
        "targets": [target],
        "runs": [
            {"seed": seed, "selection": each, "seconds": 100.0, "warmup": f"seed-{seed}", "folder": f"{name}/{seed}"}
            for seed, each in zip((7, 8), selections)
        ],
    }


@pytest.fixture
def study() -> dict:
    arms = [
        arm("none", 0.4, 500.0),
        arm(
            "even",
            0.39,
            410.4,
            none=difference(-0.01, -0.014, -0.006, 2),
            shallowest=difference(-0.001, -0.01, 0.01, 1),
        ),
        arm("foga", 0.41, None, none=difference(0.01, 0.004, 0.018, 0), shallowest=difference(0.02, -0.01, 0.03, 0)),
        arm("shallowest", 0.39, 420.0, none=difference(-0.01, None, None, 2)),
    ]
    config = {"train": {"steps": 500}, "probe": {"start": 100}, "model": {"depth": 6, "width": 64}}
    return {"config": config, "confidence": 0.95, "settings": [{"setting": "base", "arms": arms}]}


def test_the_sentences_follow_the_intervals(study: dict) -> None:
    assert evidence.verdict(study, CPU) == (
        "In runs of 500 steps (6 blocks of width 64, the built-in corpus, the spectral teacher), alignment of evenly "
        "spaced layers, frame by frame, lowered the validation loss compared with no alignment (-2.50 %, 95% interval "
        "-3.50 % to -1.50 %; lower for 2 of 2 seeds). There, alignment of the layers that FoG-A chose did not "
        "measurably change the validation loss compared with alignment of the shallowest layers (+5.13 %, 95% interval "
        "-2.56 % to +7.69 %; lower for 0 of 2 seeds)."
    )
    worse = copy.deepcopy(study)
    worse["settings"][0]["arms"][1]["differences"]["none"] = difference(0.01, 0.006, 0.014, 0)
    assert "frame by frame, raised the validation loss compared with no alignment (+2.50 %," in evidence.verdict(
        worse, CPU
    )


def test_the_other_arms_are_named_only_where_their_interval_leaves_out_zero(study: dict) -> None:
    assert evidence.others(study, CPU) == (
        "Of the other arms, these differ from `none` by more than their interval: `foga` (+2.50 %, 95% interval "
        "+1.00 % to +4.50 %; lower for 0 of 2 seeds). FoG-A chose the shallowest layers themselves for 2 of 2 seeds."
    )
    arms = study["settings"][0]["arms"]
    arms[2]["differences"]["none"] = difference(0.01, -0.004, 0.018, 1)
    arms[2]["runs"][0]["selection"]["layers"] = [0, 4]
    assert evidence.others(study, CPU) == (
        "Of the other arms, none differs from `none` by more than its interval. FoG-A chose the shallowest layers "
        "themselves for 1 of 2 seeds."
    )


def test_every_arm_is_shown_and_unfinished_targets_are_said(study: dict) -> None:
    lines = evidence.arms(study, CPU).splitlines()
    assert lines[2:] == [
        "| none | 0.4000 | – | – | – | 500 |",
        "| even | 0.3900 | **-0.01000 [-0.01400, -0.00600]** | -0.00100 [-0.01000, +0.01000] | 2 of 2 | 410 |",
        "| foga | 0.4100 | **+0.01000 [+0.00400, +0.01800]** | +0.02000 [-0.01000, +0.03000] | 0 of 2 | "
        "reached in 1 of 2 |",
        "| shallowest | 0.3900 | -0.01000 | – | 2 of 2 | 420 |",
    ]
    assert evidence.seeds(study, CPU).splitlines()[2] == "| even | -0.01100 (layers 1, 4) | -0.00900 (layers 1, 4) |"


def test_a_comparison_of_the_file_goes_before_that_of_the_arms(study: dict) -> None:
    study["settings"][0]["comparisons"] = [
        {"arm": "foga", "other": "shallowest", "difference": difference(-0.039, -0.05, -0.02, 2)}
    ]
    assert evidence.comparisons(study, CPU).splitlines()[2:] == [
        "| `even` less `none` | **-0.01000 [-0.01400, -0.00600]** | -2.50 % | 2 of 2 |",
        "| `foga` less `shallowest` | **-0.03900 [-0.05000, -0.02000]** | -10.00 % | 2 of 2 |",
    ]
    assert "FoG-A chose lowered the validation loss" in evidence.verdict(study, CPU)


def test_a_target_that_was_measured_is_shown(study: dict) -> None:
    study["settings"][0]["arms"][2]["runs"][1]["selection"]["target"] = 5
    assert (
        evidence.seeds(study, CPU)
        .splitlines()[3]
        .endswith("| +0.00900 (layers 1, 4) | +0.01100 (layers 1, 4 toward 5) |")
    )


def test_the_cost_counts_a_shared_warm_up_once(study: dict) -> None:
    """Eight runs of 100 s; a fifth of each is the warm-up that the four runs of a seed share: 8 x 80 + 2 x 20 s."""
    assert evidence.cost(study, CPU).startswith("The training of its 8 runs and 2 warm-ups took 11 min 20 s in all")
    assert "two workers need about 5 min 40 s" in evidence.cost(study, CPU)


def test_generated_audio_is_told_with_what_the_recordings_give(study: dict) -> None:
    assert evidence.generated(study, RECORDINGS) == "Nothing that the runs generate was measured."
    [setting] = study["settings"]
    setting["arms"].append(arm("deepest", 0.4, None, none=difference(0.0, -0.1, 0.1, 1)))
    setting["comparisons"] = [
        {"arm": "foga", "other": "deepest", "difference": difference(0.01, -0.1, 0.1, 1)},
    ]
    mean = {"value": 0.5, "low": 0.4, "high": 0.6, "by_seed": {}, "seeds": 2}
    setting["generated"] = [
        {
            "metric": "Word and character error rate",
            "column": "WER",
            "domain": "speech",
            "better": "lower",
            "clips": [20],
            "recordings": {"reference": {**mean, "value": 0.25}, "resynthesised": None},
            "arms": [
                {"arm": "none", "mean": mean, "less_none": None},
                {"arm": "foga", "mean": {**mean, "value": 0.45}, "less_none": difference(-0.05, -0.06, -0.04, 2)},
            ],
        }
    ]
    assert evidence.verdict(study, RECORDINGS).endswith(
        "Alignment of FoG-A's layers lowered the word error rate of what a run generates (-10.00 %, 95% interval "
        "-12.00 % to -8.00 %; lower for 2 of 2 seeds; 0.5 without alignment; 0.25 for recordings)."
    )
    assert evidence.summary({"study": study, "recordings": study}) == (
        "2 studies at the scale of two CPU cores compare alignment with no alignment 2 times: it lowered the "
        "validation loss in 1, raised it in 1, and did not measurably change it in 0. They compare the layers "
        "that FoG-A chose with the shallowest layers 2 times: FoG-A's lowered the validation loss in 0, "
        "raised it in 0, and did not measurably change it in 2. Alignment of FoG-A's layers with the spectral "
        "teacher lowered the word error rate of what a run generates (-10.00 %, 95% interval -12.00 % to "
        "-8.00 %; lower for 2 of 2 seeds; 0.5 without alignment; 0.25 for recordings)."
    )
    assert evidence.generated(study, RECORDINGS).splitlines()[2:] == [
        "| WER, speech (lower is better) | reference | 0.2500 | – | – |",
        "| WER, speech (lower is better) | none | 0.5000 | – | – |",
        "| WER, speech (lower is better) | foga | 0.4500 | **-0.05000 [-0.06000, -0.04000]** | 2 of 2 |",
    ]


def test_without_a_study_nothing_is_claimed_and_a_broken_one_is_named(tmp_path: Path, study: dict) -> None:
    none = dict.fromkeys(evidence.STUDIES)
    assert evidence.load(tmp_path) == none
    assert set(evidence.blocks(none).values()) == {"not yet measured."}
    path = tmp_path / "bench" / "results" / "study-cpu.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(study), encoding="utf-8")
    assert evidence.load(tmp_path) == none | {"study": study}
    assert report.load(tmp_path) == {}, "a study is no benchmark"
    del study["settings"][0]["arms"][0]
    path.write_text(json.dumps(study), encoding="utf-8")
    with pytest.raises(UserError, match=r"study-cpu\.json: not what agrepa study writes"):
        evidence.load(tmp_path)


@pytest.mark.parametrize("prefix", evidence.STUDIES)
def test_the_stored_study_is_that_of_the_file_and_complete(prefix: str) -> None:
    shown = evidence.STUDIES[prefix]
    stored = evidence.load(ROOT)[prefix]
    assert stored is not None
    file = ROOT / "bench" / "studies" / f"{shown.file.removeprefix('study-')}.yaml"
    assert stored["file"] == file.read_text(encoding="utf-8")
    assert len(stored["seeds"]) >= 5
    assert stored["runs"]["finished"] == stored["runs"]["planned"]
    asked = read_study(file)
    [setting] = stored["settings"]
    assert [each["arm"] for each in setting["arms"]] == [each.name for each in asked.arms]
    if asked.comparisons:
        assert list(asked.comparisons) == [comparison[:2] for comparison in shown.comparisons]
    measured = {each["arm"] for number in setting.get("generated", ()) for each in number["arms"]}
    assert measured == set(asked.evaluation.arms if asked.evaluation else ())


def test_no_two_studies_share_a_seed() -> None:
    """Seeds that served to choose a setting, 1 to 5, judge none; and no seed judges twice."""
    files = [
        ROOT / "bench" / "studies" / f"{each.file.removeprefix('study-')}.yaml" for each in evidence.STUDIES.values()
    ]
    seeds = [seed for file in files for seed in read_study(file).seeds]
    assert len(seeds) == len(set(seeds))
    assert min(seeds) > 5


# At the paper's scale: steps in all, by hand (runs x steps after the probe, and the warm-ups of 5,000 steps).
PAPER = {"paper": 50 * 495_000 + 10 * 5_000, "paper-self": 50 * 495_000 + 5 * 5_000}


@pytest.mark.parametrize("name", PAPER)
def test_the_studies_at_the_papers_scale_fit_the_trainer(name: str) -> None:
    plan = make_plan(read_study(ROOT / "bench" / "studies" / f"{name}.yaml"))
    assert {run.config.model.depth for run in plan.runs} == {24}
    assert len(plan.study.seeds) >= 5
    # By hand: 17 clips of 938 frames in a batch of 16,384, three forwards' work for each of about 24.8 million steps.
    block = 24 * 938 * 1024**2 + 4 * 938**2 * 1024
    ends = 2 * 938 * 1024 * (1224 + 100) + 2 * (8 + 24 * 6) * 1024**2
    expected = f"{PAPER[name] * 3 * 17 * (24 * block + ends):.1e}"
    text = outline(plan)
    assert f"about {expected} floating point operations" in text
    assert f"{PAPER[name]:,} steps to train in all" in text
    docs = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    said = docs[docs.index(f"bench/studies/{name}.yaml") :].partition("\n\n")[0]
    assert expected.replace("e+", "e") in said
