"""`make gpu` without a card: its steps are stand-ins in processes of their own, each cut short in its turn."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from agrepa_fast.bench import cli, gpu, results

ROOT = Path(__file__).parents[2]
STEPS = ("doctor", "headlines", "tests", "others")

# Stands for every module that a step runs. It says its name and its arguments, and hangs where it is told to.
STAND_IN = """
import json, os, pathlib, shutil, signal, sys, time
arguments = sys.argv[1:]
name = {"doctor": "doctor"}.get(arguments[0] if arguments else "", "tests")
if "run" in arguments:
    name = "headlines" if "--headlines" in arguments else "others"
    out = pathlib.Path(arguments[arguments.index("--out") + 1])
    shutil.copy(os.environ["FAKE_RESULT"], out)
print(name, "began", json.dumps(arguments), flush=True)
if os.environ["CUT"] == name:
    time.sleep(60)
if os.environ.get("CRASHES") == name:
    os.kill(os.getpid(), signal.SIGSEGV)
if os.environ.get("RAISES") == name:
    raise RuntimeError("CUDA error: no kernel image is available")
if os.environ.get("FAILS") == name == "tests":
    print("FAILED tests/gpu/test_step.py::test_it - assert 1 == 2", flush=True)
print(name, "ended", flush=True)
sys.exit(name == os.environ.get("FAILS"))
"""


@pytest.fixture
def checkout(tmp_path: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose modules are stand-ins, and a device; the limits are a few seconds."""
    for module in ("agrepa_fast/__main__.py", "agrepa_fast/bench/__main__.py", "pytest/__main__.py"):
        path = tmp_path / "root" / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN, encoding="utf-8")
        (path.parent / "__init__.py").touch()
    for name in ("tests/gpu/test_step.py", "tests/kernels/values/test_residual.py", "tests/gpu/test_other.py"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    result = make.result(make.problem("foga", {"scale": "paper"}, 0.02, make.row("ours", "ours", 9.0)))
    (tmp_path / "result.json").write_text(json.dumps(result | {"complete": False}), encoding="utf-8")
    monkeypatch.setenv("FAKE_RESULT", str(tmp_path / "result.json"))
    monkeypatch.setattr(gpu, "checkout", lambda: tmp_path / "root")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Fake 9000")
    limits = {"DOCTOR": 1.5, "TESTS": 2.0, "HEADLINES_BY": 4.0, "LIMIT": 8.0, "HEADLINE_RESERVE": 0.5, "RESERVE": 0.5}
    for name, seconds in limits.items():
        monkeypatch.setattr(gpu, name, seconds)
    return tmp_path / "root"


@pytest.mark.parametrize("cut", ["nothing", *STEPS])
def test_a_step_cut_short_costs_no_other(
    cut: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUT", cut)
    began = time.monotonic()
    code = gpu.main([str(tmp_path / "deep" / "out")])
    assert time.monotonic() - began < gpu.LIMIT + 4
    assert code == (cut in STEPS[1:])  # doctor informs; the others decide
    files = sorted((tmp_path / "deep" / "out").iterdir())
    assert [path.suffix for path in files] == [".json", ".log"]
    assert files[0].name.startswith("gpu-fake-9000-")
    assert len(results.read(files[0])["problems"]) == 1
    log = files[1].read_text(encoding="utf-8")
    # The tests are in three parts, which share their time.
    parts = {name: 3 if name == "tests" else 1 for name in STEPS}
    assert [log.count(f"{name} began") for name in STEPS] == [1 if name == cut else parts[name] for name in STEPS]
    assert [log.count(f"{name} ended") for name in STEPS] == [0 if name == cut else parts[name] for name in STEPS]
    assert log.count("KeyboardInterrupt") == (cut in STEPS)
    assert log.partition("how it ended")[0].count("; what it had written is kept") == (cut in STEPS)
    assert list((checkout).rglob("*.json")) == []  # nothing is written into the checkout


def test_the_order_and_what_each_step_is_given(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUT", "nothing")
    assert gpu.main([str(tmp_path / "out")]) == 0
    log = next((tmp_path / "out").glob("*.log")).read_text(encoding="utf-8")
    began = [line for line in log.splitlines() if " began " in line]
    assert [line.split()[0] for line in began] == ["doctor", "headlines", "tests", "tests", "tests", "others"]
    given = [json.loads(line.partition(" began ")[2]) for line in began]
    paths = [[argument for argument in arguments if argument.startswith("tests/")] for arguments in given[2:5]]
    assert paths == [["tests/gpu/test_step.py"], ["tests/kernels/values"], ["tests/gpu/test_other.py"]]
    out = str(next((tmp_path / "out").glob("*.json")))
    assert given[1][given[1].index("--out") + 1] == given[-1][given[-1].index("--resume") + 1] == out
    # The last rival of the headlines is built some time before their end.
    assert float(given[1][given[1].index("--budget") + 1]) <= gpu.HEADLINES_BY - gpu.HEADLINE_RESERVE
    # The first part's seconds are in the file, and count against the budget of the whole.
    assert 3.0 < float(given[-1][-1]) < 3.0 + gpu.LIMIT


def test_failing_tests_are_the_exit_code_and_do_not_stop_the_rest(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUT", "nothing")
    monkeypatch.setenv("FAILS", "tests")
    assert gpu.main([str(tmp_path / "out")]) == 1
    assert "others ended" in next((tmp_path / "out").glob("*.log")).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("how", "name", "ended", "cause"),
    [
        ("CRASHES", "headlines", "headlines             killed by SIGSEGV after", None),
        ("RAISES", "headlines", "failed (exit code 1)", "RuntimeError: CUDA error: no kernel image is available"),
        ("FAILS", "tests", "tests, part 1         failed", "FAILED tests/gpu/test_step.py::test_it - assert 1 == 2"),
        ("CRASHES", "others", "other problems        killed by SIGSEGV after", None),
        ("CUT", "tests", "tests, part 2         not begun, the time was over: tests/kernels/values", None),
    ],
)
def test_the_last_lines_say_how_each_step_ended_and_why(
    how: str,
    name: str,
    ended: str,
    cause: str | None,
    checkout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUT", "nothing")
    monkeypatch.setenv(how, name)
    assert gpu.main([str(tmp_path / "out")]) == 1
    log = next((tmp_path / "out").glob("*.log")).read_text(encoding="utf-8")
    end = log.partition("\nhow it ended\n")[2].splitlines()
    assert end == capsys.readouterr().out.partition("\nhow it ended\n")[2].splitlines()[:-1]
    steps = [line for line in end if re.match(r"  (doctor|headlines|tests|other)", line)]
    assert sum(ended in line for line in steps) == 1
    assert sum("passed in" in line for line in steps) == len(steps) - (1 if name != "tests" else 3)
    assert "  1 problems measured, 0 skipped" in end
    assert cause is None or end.count(f"  {cause}") == 1
    if how == "CRASHES":
        assert "Fatal Python error: Segmentation fault" in log


def test_the_summary_names_what_failed_in_the_figures(tmp_path: Path, make: SimpleNamespace) -> None:
    """Refused problems, failed providers and what was skipped, each in a line; a shared reason is there once."""
    fine = make.row("ours", "ours", 9.0)
    bad = make.row("compiled", "rival", None) | {"status": "failed", "reason": "RuntimeError: nvrtc"}
    absent = make.row("Liger", "rival", None) | {"status": "unavailable", "reason": "liger_kernel is not installed"}
    refused = make.problem("residual", {"rows": 4}, 0.02, fine) | {
        "gate": {"passed": False, "reason": "h: relative error 3.00e-01, allowed 5e-03"}
    }
    skipped = [{"case": "foga", "key": f"batch={size}", "reason": "the budget of 9 s was spent"} for size in (2, 4, 8)]
    result = make.result(make.problem("foga", {"batch": 1}, 0.02, fine, bad, absent), refused) | {"skipped": skipped}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    assert gpu.summary([gpu.Step("headlines", 0, "passed in 3 s")], path) == [
        "",
        "how it ended",
        "  headlines             passed in 3 s",
        "  2 problems measured, 3 skipped",
        "what failed or was left out",
        "  foga batch=1: compiled failed, RuntimeError: nvrtc",
        "  residual rows=4: ours is not compared, h: relative error 3.00e-01, allowed 5e-03",
        "  foga batch=2 and 2 more: the budget of 9 s was spent",
    ]
    assert (
        gpu.summary([], tmp_path / "none.json")[2]
        == f"  no figures: {tmp_path / 'none.json'}: No such file or directory"
    )


def test_without_pytest_the_tests_are_left_out(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUT", "nothing")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.main([str(tmp_path / "out")]) == 0
    log = next((tmp_path / "out").glob("*.log")).read_text(encoding="utf-8")
    assert "the tests are left out: pytest is not installed" in log
    assert "tests began" not in log


def test_the_headlines_end_within_four_minutes_and_all_within_nine() -> None:
    assert gpu.HEADLINES_BY <= 240
    assert gpu.LIMIT + gpu.GRACE <= 540


def test_the_tests_of_this_checkout_by_risk() -> None:
    groups = gpu.tests_of(ROOT)
    assert groups[0] == ["tests/gpu/test_step.py"]  # it cannot take the others down with it
    paths = [path for group in groups for path in group]
    assert paths[:2] == ["tests/gpu/test_step.py", "tests/kernels/values"]
    assert {path for path in paths if "/gpu/" in path} == {
        f"tests/gpu/{p.name}" for p in ROOT.glob("tests/gpu/test_*.py")
    }


def test_nothing_of_a_cut_step_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a process that does not listen to SIGINT nor its children, which would disturb what is timed next."""
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    (tmp_path / "deaf.py").write_text(
        """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
time.sleep(60)
""",
        encoding="utf-8",
    )
    log = _logged(["deaf"], tmp_path)
    [child] = [int(line.split()[1]) for line in log.splitlines() if line.startswith("child")]
    assert _gone(child)


def test_a_child_left_behind_does_not_hold_the_step_up(tmp_path: Path) -> None:
    """It has the step's output open, too."""
    (tmp_path / "parent.py").write_text(
        """
import subprocess, sys
print("child", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
""",
        encoding="utf-8",
    )
    began = time.monotonic()
    log = _logged(["parent"], tmp_path, 20.0)
    assert time.monotonic() - began < 10
    assert _gone(int(log.split("child ")[1].split()[0]))
    assert "ended after" not in log


def _logged(module: list[str], root: Path, seconds: float = 1.5) -> str:
    with open(root / "log", "w", encoding="utf-8") as log:
        gpu.run_step("step", module, seconds, root, log)
    return (root / "log").read_text(encoding="utf-8")


def _gone(process: int) -> bool:
    """Dead, or dead and not yet collected by the parent of orphans."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_what_is_on_pythonpath_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that were carried to a machine are found by it; the checkout comes first."""
    carried = tmp_path / "carried"
    carried.mkdir()
    (carried / "brought.py").write_text("print('brought along')", encoding="utf-8")
    (carried / "shadowed.py").write_text("print('the wrong one')", encoding="utf-8")
    (tmp_path / "shadowed.py").write_text("print('of the checkout')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(carried))
    assert "brought along" in _logged(["brought"], tmp_path)
    assert "of the checkout" in _logged(["shadowed"], tmp_path)


def test_make_keeps_pythonpath_and_takes_a_folder(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$PYTHONPATH|$*"\n', encoding="utf-8")
    script.chmod(0o755)

    def said(*arguments: str, **environment: str) -> str:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OUT", "MAKEFLAGS")}
        command = ["make", "-s", "gpu", f"PYTHON={script}", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert said() == f"{ROOT}|-m agrepa_fast.bench.gpu bench/results"
    assert said("OUT=/a b", PYTHONPATH="/carried") == f"{ROOT}:/carried|-m agrepa_fast.bench.gpu /a b"


def test_mistakes_are_one_line(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for arguments, said in (
        ([str(tmp_path / "file" / "out")], "Not a directory; name a folder that can be written"),
        (["--help"], "expected one folder for the results, got --help"),
        (["a", "b"], "expected one folder for the results, got a b"),
    ):
        assert gpu.main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_gpu_run_is_named_after_the_card() -> None:
    day = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    assert gpu.name_of("NVIDIA H200 (80GB)", day) == "gpu-nvidia-h200-80gb-20260102"


def test_gpu_step_keeps_what_a_cut_command_wrote(tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time\nprint('kept', flush=True)\ntime.sleep(60)\n", encoding="utf-8")
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        assert gpu.run_step("slow", ["slow"], 3.0, tmp_path, log).code != 0
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert "kept\n" in said
    assert "ended after 3 s; what it had written is kept" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU would run everything")
def test_gpu_run_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_tune_writes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agrepa_fast.kernels import tune

    monkeypatch.setattr(cli, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(tune, "tune", lambda device, path: path.write_text("table", encoding="utf-8"))
    assert cli.main(["tune", "--out", str(tmp_path / "deep" / "tables.py")]) == 0
    assert (tmp_path / "deep" / "tables.py").read_text(encoding="utf-8") == "table"
