"""Any value of any option: a command works or ends in one line with exit code 2, never in a traceback."""

from __future__ import annotations

import contextlib
import io
import itertools

import pytest

from agrepa_fast.cli import main
from agrepa_fast.training.config import load_config
from agrepa_fast.training.start import start_run

from .conftest import TINY

STRANGE = [
    "",
    " ",
    "-1",
    "0",
    "1e400",
    "nan",
    "inf",
    "0.01",
    "99999999999999999999",
    "../..",
    "/dev/null/x",
    "ä\udcff",  # bytes that are not UTF-8 reach a command like this
    "a\nb",
]
SAMPLE = [
    "--text",
    "--domain",
    "--seconds",
    "--reference",
    "--reference-text",
    "--points",
    "--guidance",
    "--seed",
    "--device",
]
PROBE = ["--data", "--samples", "--t", "--k", "--device", "--imports"]


@pytest.fixture(scope="module")
def trained(manifest, tmp_path_factory):
    small = ["probe.start=1", "train.steps=2", "train.checkpoint_every=2", "train.samples=0"]
    out = tmp_path_factory.mktemp("fuzz")
    return start_run(load_config("demo", [*TINY, *small, f"data.train=[{manifest}]", f"train.out={out}"])).run()


def ends_well(arguments) -> int:
    """Run a command with streams like those of a terminal; returns its exit code."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors) for errors in ("strict", "backslashreplace")]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            code = main(arguments)
        except SystemExit as error:  # argparse: its usage, then one line
            code = error.code
    for stream in streams:
        stream.flush()
    captured = streams[1].buffer.getvalue().decode()
    # Lone surrogates in a failure's message would end pytest-xdist.
    shown = ascii((arguments, captured))
    assert code in (0, 2), shown
    assert "Traceback" not in captured, shown
    if code == 2:
        last = captured.strip().splitlines()[-1]
        assert last.startswith("agrepa"), shown
        assert len(last) < 600, shown
    return code


@pytest.mark.parametrize("option", SAMPLE)
def test_sample(trained, tmp_path, option):
    for value in STRANGE:
        rest = [] if option == "--text" else ["--text", "hi"]
        ends_well(
            ["sample", str(trained), *rest, "--seconds", "0.2", f"{option}={value}", "--out", str(tmp_path / "a.wav")],
        )


@pytest.mark.parametrize("option", PROBE)
def test_probe(trained, tmp_path, option):
    for value in STRANGE:
        lasp = ["--lasp"] if option == "--imports" else []
        ends_well(["probe", str(trained), *lasp, f"{option}={value}", "--out", str(tmp_path / "probe")])


@pytest.mark.parametrize(
    "command", [["train"], ["train", "--resume"], ["probe"], ["sample", "--text=hi"], ["bench", "compare", "x"]]
)
def test_what_a_command_works_on(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("no")
    for value in [
        *STRANGE,
        "folder",
        "file",
        "module:",
        ":f",
        "..:f",
        "json:loads",
        "json:missing",
        "demo=",
        "--",
        "-x",
    ]:
        assert ends_well([*command, value]) == 2, value


def test_where_the_results_go(trained):
    for command, value in itertools.product(
        (["sample", str(trained), "--text=hi", "--seconds=0.2"], ["probe", str(trained)]),
        ("/dev/null/x", "/proc/x/y"),
    ):
        assert ends_well([*command, f"--out={value}"]) == 2, value
    assert ends_well(["sample", str(trained), "--text=hi", f"--out={trained}"]) == 2


def test_result_with_a_name_that_is_not_utf8(trained, tmp_path):
    out = tmp_path / "ä\udcff.wav"
    assert ends_well(["sample", str(trained), "--text=hi", "--seconds=0.2", f"--out={out}"]) == 0
    assert out.exists()
