"""The tables of an evaluation as a page: every number that exists, none that does not, and a broken file."""

from __future__ import annotations

import json

import pytest

from agrepa_fast.report import write_evaluation_page, write_report

ROW = {"name": "<run>", "kind": "run", "domain": "speech", "clips": 3, "of": 4, "note": "left out 1: silent & short"}
ROW |= {
    "values": {"WER": {"value": 0.25, "low": 0.125, "high": 0.5}, "CER": {"value": 0.75, "low": None, "high": None}}
}
ROW |= {"differences": {"WER": {"value": -0.125, "low": -0.25, "high": 0.0625}}}
METRIC = {"key": "wer", "title": "Word error rate", "tool": "some tool", "note": "Read this.", "problem": ""}
METRIC |= {"columns": {"WER": "lower", "CER": "lower", "other": "higher"}, "rows": [ROW]}
MISSING = {"key": "mos", "title": "Opinion", "tool": "", "note": "", "columns": {}, "rows": []}
MISSING |= {"problem": "it needs x: pip install 'agrepa-fast[mos]'"}
RESULT = {"method": {"seed": 7, "confidence": 0.95, "resamples": 1000}, "notes": ["2 of 9 clips are left out"]}
RESULT |= {"targets": [{"kind": "folder", "path": "some/folder"}], "metrics": [METRIC, MISSING]}


def test_the_page_holds_every_number(tmp_path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(RESULT))
    page = write_evaluation_page(tmp_path).read_text()
    for words in (
        "&lt;run&gt;",
        "3 of 4",
        '0.25 <span class="quiet">0.125 to 0.5</span>',
        '<td class="number">0.75</td>',
        '-0.125 <span class="quiet">-0.25 to +0.0625</span>',
        '<td class="number">&ndash;</td>',
        "left out 1: silent &amp; short",
        "some tool. Read this.",
        "not measured: it needs x: pip install &#x27;agrepa-fast[mos]&#x27;",
        "2 of 9 clips are left out",
        "some/folder",
    ):
        assert words in page
    assert "<run>" not in page


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"metrics": 3}', json.dumps(RESULT | {"metrics": [{"title": "x"}]}), "[" * 100_000],
)
def test_a_broken_file_costs_its_section_alone(tmp_path, content) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(content)
    (tmp_path / "log.jsonl").write_text("")
    page = write_report(tmp_path).read_text()
    assert "evaluation.json cannot be shown" in page
    assert "</html>" in page
