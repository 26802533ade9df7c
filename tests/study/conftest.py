"""Studies of seconds: 12 clips of the built-in corpus, a network of 3 x 16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agrepa_fast.data.corpus import write_corpus
from agrepa_fast.study.plan import make_plan
from agrepa_fast.study.spec import read_study

TINY = """\
base: demo
set:
  data.train: ["{manifest}"]
  train.out: "{out}"
  mel.mels: 16
  model: {{depth: 3, width: 16, heads: 2, dropout: 0.1, token_width: 8}}
  data: {{max_seconds: 1.0, buckets: 2, frames_per_batch: 126, valid_share: 0.3}}
  probe: {{start: 3, samples: 2, t_grid: [0.2, 0.7], k: 2}}
  alignment: {{ramp: 2, decay_start: 0.7}}
  train: {{steps: 8, threads: 1, log_every: 2, valid_every: 4, valid_samples: 2, checkpoint_every: 2}}
bootstrap: 200
"""


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("clips") / "corpus", speech=6, audio=6)


@pytest.fixture
def study_file(manifest, tmp_path):
    """study_file(lines) -> the path of a study that has these lines beside the tiny configuration."""

    def write(lines: str, name: str = "tiny") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(TINY.format(manifest=manifest, out=tmp_path / "runs") + lines, encoding="utf-8")
        return path

    return write


@pytest.fixture
def plan_of(study_file):
    """plan_of(lines, *overrides) -> the plan of such a study."""

    def plan(lines: str, *overrides: str):
        return make_plan(read_study(study_file(lines), overrides), 1)

    return plan


@pytest.fixture
def read_results(tmp_path):
    """read_results() -> results.json of the study tiny."""
    return lambda: json.loads((tmp_path / "runs" / "tiny" / "results.json").read_text(encoding="utf-8"))
