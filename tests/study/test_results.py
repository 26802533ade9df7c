"""The numbers of a study against values worked out by hand, and the reports that show them."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.bootstrap import nested_mean
from agrepa_fast.study.generated import EVALUATED, read_numbers
from agrepa_fast.study.page import write_study_page
from agrepa_fast.study.plan import FINAL
from agrepa_fast.study.results import as_json, reached, read_run, results
from agrepa_fast.study.tables import comparisons_table, layers_table, markdown, speed_table, table

LINES = "seeds: [0, 1]\narms: [none, shallowest, foga, random]\n"
# {arm: {seed: (losses of the clips a and b, validation losses at steps 0, 4 and 8)}}
CLIPS = {
    "none": {0: ([1.0, 3.0], [4.0, 3.0, 2.0]), 1: ([2.0, 2.0], [5.0, 3.0, 2.0])},
    "shallowest": {0: ([0.9, 3.0], [4.0, 2.0, 1.9]), 1: ([1.9, 1.8], [5.0, 1.0, 1.9])},
    "foga": {0: ([1.5, 3.5], [4.0, 3.5, 2.5]), 1: ([2.5, 2.5], [5.0, 2.0, 2.5])},
    "random~1": {0: ([1.0, 3.0], [4.0, 3.0, 2.0]), 1: ([1.0, 3.0], [5.0, 3.0, 2.0])},
    "random~2": {0: ([2.0, 5.0], [4.0, 3.0, 3.0]), 1: ([3.0, 1.0], [5.0, 3.0, 3.0])},
    "random~3": {0: ([3.0, 1.0], [4.0, 3.0, 2.0]), 1: ([2.0, 2.0], [5.0, 3.0, 2.0])},
}


def finish(run, clips, losses, selection=None) -> None:
    """Write what a finished run leaves."""
    run.folder.mkdir(parents=True)
    facts = {
        "flow_loss": sum(clips) / len(clips),
        "clips": [{"clip": name, "domain": "speech", "loss": loss} for name, loss in zip("ab", clips)],
        "selection": selection,
        "probe_seconds": 7.0,
        "needs_probe": run.arm.name == "foga",
        "device": "cpu",
    }
    (run.folder / FINAL).write_text(json.dumps(facts))
    events = [{"event": "valid", "step": 0, "flow_loss": losses[0]}]
    for step, loss, seconds in ((4, losses[1], 0.5), (8, losses[2], 1.5)):
        if step == 8:
            events.append({"event": "probe", "step": 4, "seconds": 7.0})
        events.append({"event": "train", "step": step, "batch_seconds": seconds})
        events.append({"event": "valid", "step": step, "flow_loss": loss})
    (run.folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.fixture
def written(plan_of):
    """The plan of a study whose runs are all finished, with the numbers of CLIPS."""

    def write(lines: str = LINES):
        plan = plan_of(lines)
        for run in plan.runs:
            if not run.trained:  # two draws of the same layers are one run
                chosen = None if run.arm.name == "none" else {"layers": [0, 2], "weights": [0.5, 0.5]}
                finish(run, *CLIPS[run.folder.parent.name][run.seed], chosen)
        return plan

    return write


def by_arm(result):
    return {arm["arm"]: arm for arm in result["settings"][0]["arms"]}


def test_differences_are_paired_by_seed_and_clip(written):
    arms = by_arm(results(written(), ["agrepa"]))
    assert arms["none"]["loss"]["value"] == pytest.approx(2.0)
    less = arms["shallowest"]["differences"]["none"]
    # Seed 0: -0.1 and 0; seed 1: -0.1 and -0.2.
    assert less["by_seed"] == pytest.approx({"0": -0.05, "1": -0.15})
    assert less["value"] == pytest.approx(-0.1)
    assert (less["lower"], less["seeds"]) == (2, 2)
    # All resamples lie between the lowest and the highest clip.
    assert -0.2 <= less["low"] < less["value"] < less["high"] <= 0.0
    # Every clip of every seed is 0.5 higher: paired, there is nothing left to vary.
    foga = arms["foga"]["differences"]["none"]
    assert [foga[key] for key in ("value", "low", "high")] == pytest.approx([0.5, 0.5, 0.5])
    assert foga["lower"] == 0
    assert arms["none"]["differences"]["shallowest"]["value"] == pytest.approx(0.1)
    assert "none" not in arms["none"]["differences"]


def test_draws_of_a_seed_are_averaged_first(written):
    plan = written()
    arms = by_arm(results(plan, ["agrepa"]))
    # Draws with the same layers are one run, so what each draw shows is what its folder holds.
    shown = {(run.seed, run.draw): CLIPS[run.folder.parent.name][run.seed][0] for run in plan.runs if run.arm.draws > 1}
    by_seed = {
        seed: sum(sum(shown[seed, draw]) / 2 for draw in range(3)) / 3 - sum(CLIPS["none"][seed][0]) / 2
        for seed in (0, 1)
    }
    less = arms["random"]["differences"]["none"]
    assert less["by_seed"] == pytest.approx({str(seed): value for seed, value in by_seed.items()})
    assert less["value"] == pytest.approx(sum(by_seed.values()) / 2)
    assert len(arms["random"]["runs"]) == 6


def test_steps_and_seconds_to_the_final_loss_of_none(written):
    arms = by_arm(results(written(), ["agrepa"]))
    [none], [shallow], [foga] = (arms[name]["targets"] for name in ("none", "shallowest", "foga"))
    assert (none["reached"], none["step"]) == (2, 8)
    assert none["seconds"] == pytest.approx(4 * 0.5 + 4 * 1.5)  # no probe: it would do without
    # Seed 0 is at 2.0 in step 4; seed 1 goes from 5 to 1 in steps 0 to 4 and passes 2 at 3/4 of the way.
    assert [point["step"] for point in shallow["by_run"]] == pytest.approx([4, 3])
    assert shallow["step"] == pytest.approx(3.5)
    assert shallow["seconds"] == pytest.approx((2.0 + 1.5) / 2)
    # Seed 0 never gets to 2.0, so there is no mean.
    assert (foga["reached"], foga["of"], foga["step"]) == (1, 2, None)
    assert foga["by_run"][0] is None
    assert foga["by_run"][1]["step"] == pytest.approx(4)
    # Training with the probe.
    assert arms["foga"]["seconds"] == pytest.approx(8.0 + 7.0)
    assert arms["foga"]["runs"][0]["curve"]["seconds"] == pytest.approx([0.0, 2.0, 15.0])


def test_given_targets(written):
    arms = by_arm(results(written(LINES + "targets: [2.5, 0.5]\n"), ["agrepa"]))
    first, second = arms["none"]["targets"]
    assert [point["step"] for point in first["by_run"]] == pytest.approx([6, 6])
    assert (first["target"], second["target"]) == ("2.5", "0.5")
    assert (second["reached"], second["step"]) == (0, None)


def test_a_target_that_holds_at_once(written):
    run = read_run(written().runs[0])
    assert reached(run, 4.0) == (0.0, 0.0)
    assert reached(run, 1.9) is None


def test_unfinished_runs_are_counted_and_left_out(written):
    plan = written()
    (plan.runs[1].folder / FINAL).unlink()  # shallowest, seed 0
    result = results(plan, ["agrepa"])
    arms = by_arm(result)
    assert arms["shallowest"]["missing"] == 1
    assert arms["shallowest"]["differences"]["none"]["by_seed"] == pytest.approx({"1": -0.15})
    assert arms["foga"]["differences"]["shallowest"]["seeds"] == 1
    assert result["runs"]["finished"] == result["runs"]["planned"] - 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"clips": [], "needs_probe": true}', "null"])
def test_a_broken_final_is_named(written, text):
    plan = written()
    (plan.runs[0].folder / FINAL).write_text(text)
    with pytest.raises(UserError, match=r"none/seed-0/final.json: not what a run writes .*; delete its folder"):
        results(plan, ["agrepa"])


def test_a_log_that_was_changed_is_named(written):
    plan = written()
    log = plan.runs[0].folder / "log.jsonl"
    log.write_bytes(b'{"event": \xff')
    with pytest.raises(UserError, match=r"none/seed-0/log.jsonl: holds no validation; delete its folder"):
        results(plan, ["agrepa"])
    log.unlink()
    with pytest.raises(UserError, match=r"^[^ ]*none/seed-0/log.jsonl: cannot read the log"):
        results(plan, ["agrepa"])


def test_the_json_is_compact_and_the_same(written):
    result = results(written(), ["agrepa", "study", "[ a,\n b ]"])
    text = as_json(result)
    assert json.loads(text) == json.loads(json.dumps(result))
    assert '"by_seed"' in text
    assert '"clip_losses": [1.0, 3.0]' in text


def test_the_tables_show_every_arm(written):
    result = results(written(), ["agrepa", "study", "tiny.yaml"])
    header, rows = table(result["settings"][0])
    assert header == ["arm", "loss", "less none (seeds lower)", "less shallowest (seeds lower)"]
    assert [row[0] for row in rows] == ["none", "shallowest", "foga", "random"]
    assert rows[2][2] == "**+0.50000 [+0.50000, +0.50000]** (0 of 2)"
    assert rows[0][2] == "–"
    speed_header, speed = speed_table(result["settings"][0])
    assert speed_header == ["arm", "steps to final loss of none", "time to it", "training time"]
    assert speed[:3] == [
        ["none", "8", "8.0 s", "8.0 s"],
        ["shallowest", "4", "1.8 s", "8.0 s"],
        ["foga", "reached in 1 of 2", "–", "15.0 s"],
    ]
    assert layers_table(result["settings"][0])[1][:2] == [["none", "none", "none"], ["shallowest", "0 2", "0 2"]]
    text = markdown(result)
    assert "| foga | 2.5000" in text
    assert "`agrepa study tiny.yaml`" in text
    assert all(line.count("|") == len(header) + 1 for line in text.splitlines() if line.startswith("| foga | 2."))


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href"} & {name for name, _ in attrs} or all(
            value.startswith(("#", "data:")) for name, value in attrs if name in ("src", "href", "xlink:href")
        )
        if tag not in ("meta", "path", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_everything_and_loads_nothing(written, tmp_path):
    result = results(written(LINES + "targets: [2.5]\n"), ["agrepa", "study", "<b>.yaml"])
    result["runs"]["failed"] = {"base/x/seed-0": "<script>"}
    page = write_study_page(tmp_path, result).read_text()
    assert "<script" not in page
    assert "<b>.yaml" not in page
    reader = Page()
    reader.feed(page)
    for arm in ("none", "shallowest", "foga", "random"):
        assert re.search(rf"<td><span [^>]*>{arm}</span></td>", page)
    assert page.count("<figure") == 3
    assert "<strong>+0.50000 [+0.50000, +0.50000]</strong>" in page
    assert "steps to 2.5" in reader.text
    assert {file.name for file in tmp_path.glob("*.png")} == {"losses-0.png", "curves-0.png", "differences-0.png"}


def test_a_study_of_one_unfinished_arm_has_a_page(written, tmp_path):
    plan = written("seeds: [0]\narms: [none, foga]\n")
    (plan.runs[1].folder / FINAL).unlink()
    result = results(plan, ["agrepa"])
    assert "There is one seed" in write_study_page(tmp_path, result).read_text()
    assert "| foga | – | – | 1 |" in markdown(result)


def test_the_comparisons_of_the_file_come_first(written, tmp_path):
    result = results(written(LINES + "comparisons: [[foga, shallowest], [random, foga]]\n"), ["agrepa"])
    first, second = result["settings"][0]["comparisons"]
    assert (first["arm"], first["other"]) == ("foga", "shallowest")
    # Seed 0: 0.6 and 0.5; seed 1: 0.6 and 0.7.
    assert first["difference"]["by_seed"] == pytest.approx({"0": 0.55, "1": 0.65})
    assert first["difference"] == by_arm(result)["foga"]["differences"]["shallowest"]
    assert second["difference"]["seeds"] == 2
    _, rows = comparisons_table(result["settings"][0])
    assert [row[0] for row in rows] == ["foga less shallowest", "random less foga"]
    assert "(0 of 2)" in rows[0][1]
    assert markdown(result).index("| foga less shallowest |") < markdown(result).index("| foga | 2.5000")
    assert "Asked first" in write_study_page(tmp_path, result).read_text()


def test_what_the_runs_generate_is_reported(written, tmp_path):
    plan = written(LINES + "evaluate: {arms: [none, foga], clips: 2}\n")
    for run in plan.jobs:
        if run.evaluate is not None:
            value = 0.5 + 0.25 * (run.arm.name == "foga") + 0.125 * run.seed
            number = {"metric": "FAD", "column": "FAD", "domain": "all", "of": "run", "better": "lower", "clips": 2}
            facts = {"options": list(run.evaluate), "numbers": [{**number, "value": value}]}
            (run.folder / EVALUATED).write_text(json.dumps(facts))
    result = results(plan, ["agrepa"])
    text = markdown(result)
    assert "| FAD (all, lower is better) | none | 0.5625 [0.5000, 0.6250] (2 seeds) | – |" in text
    assert "| foga | 0.8125 [0.7500, 0.8750] (2 seeds) | **+0.25000 [+0.25000, +0.25000]** (0 of 2) |" in text
    assert "Generated audio" in write_study_page(tmp_path, result).read_text()
    changed = results(written(LINES + "evaluate: {arms: [none, foga], clips: 3}\n"), ["agrepa"])
    assert changed["settings"][0]["generated"] == [], "evaluated with other options"
    assert "Generated audio" not in write_study_page(tmp_path, changed).read_text()
    assert changed["runs"]["finished"] < result["runs"]["finished"] == result["runs"]["planned"]


@pytest.mark.parametrize("text", ['{"numbers": [{}]}', '{"numbers": 3}', "{}"])
def test_a_broken_evaluation_is_named(tmp_path, text):
    (tmp_path / EVALUATED).write_text(text)
    with pytest.raises(
        UserError, match=r"evaluated.json: not what a study writes .*; delete it to evaluate the run again"
    ):
        read_numbers(tmp_path)


# --- the interval -------------------------------------------------------------------------------------------


def test_nested_mean_weighs_groups_alike():
    groups = [torch.tensor([1.0, 3.0]), torch.tensor([10.0, 10.0, 10.0, 10.0])]
    assert nested_mean(groups).value == pytest.approx(6.0)


def test_nested_mean_is_the_clips_interval_with_one_group():
    clips = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = nested_mean([clips], resamples=20_000)
    error = clips.std(correction=0).item() / math.sqrt(200)
    assert estimate.low == pytest.approx(clips.mean().item() - 1.96 * error, abs=0.1 * error)
    assert estimate.high == pytest.approx(clips.mean().item() + 1.96 * error, abs=0.1 * error)


def test_nested_mean_has_the_variance_of_both_levels():
    """The variance of a resample is that of drawn group means plus that of drawn clips: of s groups of n clips,
    Var(means)/s + mean of the groups' Var(clips)/(n s)."""
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    groups = list(means + 2 * torch.randn(6, 12, generator=generator, dtype=torch.float64))
    estimate = nested_mean(groups, resamples=40_000)
    stacked = torch.stack(groups)
    variance = stacked.mean(1).var(correction=0) / 6 + stacked.var(1, correction=0).mean() / (12 * 6)
    half = 1.96 * variance.sqrt().item()
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.05)


def test_nested_mean_without_anything_to_draw():
    estimate = nested_mean([torch.tensor([2.0])])
    assert (estimate.value, estimate.low, estimate.high) == (2.0, None, None)
