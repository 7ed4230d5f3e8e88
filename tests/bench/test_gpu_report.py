"""`make gpu-report` without a GPU: what it would run, that nothing keeps the next stage from running, what is kept."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_report  # noqa: E402
from gpu_report import Outcome, Stage  # noqa: E402

FACTS = {"gpu": "Some GPU (sm_90)", "date": "2026-01-02", "torch": "2.11.0", "convkit": "0.1.0", "revision": "0123"}


def python(code: str, **options) -> Stage:
    return Stage(options.pop("name", "stage"), options.pop("until", 1.0), (sys.executable, "-c", code), **options)


def run(out: Path, *stages: Stage, seconds: float = 60.0) -> list[Outcome]:
    return gpu_report.run(stages, out, seconds, FACTS, say=lambda *_, **__: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_without_a_gpu():
    done = subprocess.run([sys.executable, gpu_report.__file__], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("convkit: gpu-report: torch ")


def test_a_failing_stage_does_not_stop_the_next(tmp_path):
    found = run(
        tmp_path,
        python("print('one PASSED'); print('two FAILED'); raise SystemExit(1)"),
        Stage("missing program", 1.0, ("/no/such/program",)),
        Stage("nothing to run it with", 1.0, missing="no such tool"),
        python("import os; print(os.environ['WORD'], 'PASSED')", environment={"WORD": "well"}),
    )
    assert [one.outcome for one in found] == ["failed", "failed", "not run", "ok"]
    assert [one.detail for one in found] == ["1 passed, 1 failed", "exit status 127", "no such tool", "1 passed"]
    log = (tmp_path / "log.txt").read_text()
    assert log.index("two FAILED") < log.index("/no/such/program: No such file") < log.index("well PASSED")
    report = gpu_report.load(tmp_path / "report.json")
    assert report["gpu"] == "Some GPU (sm_90)" and len(report["stages"]) == 4


def test_a_stage_ends_in_time_and_the_next_has_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "GRACE_S", 1)
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('a PASSED', flush=True)"
    found = run(
        tmp_path,
        python(f"{stubborn}; time.sleep(60)", until=0.3),
        python("print('b PASSED')", until=0.31),
        python("import time; print('c PASSED', flush=True); time.sleep(60)", until=1.0),
        seconds=8.0,
    )
    assert [(one.outcome, one.detail) for one in found] == [
        ("cut off", "1 passed"),
        ("not run", "no time was left"),
        ("cut off", "1 passed"),
    ]


def test_a_measurement_that_dies_goes_on_where_it_was(tmp_path):
    """As after an illegal access: rows are kept one by one, and a process without rows ends it."""
    path = tmp_path / "dense.json"
    code = f"""
import json, pathlib, sys
path = pathlib.Path({str(path)!r})
rows = json.loads(path.read_text())["rows"] if path.exists() else []
print("already:", len(rows)), print("rows: 4", flush=True)
rows.append(1)
path.write_text(json.dumps({{"rows": rows}}))
sys.exit(len(rows) < 3)
"""
    (found,) = run(tmp_path, python(code, results=str(path)))
    assert found.outcome == "ok" and found.detail == "3 of 4 rows"
    (found,) = run(tmp_path, python("print('no', 'rows'); raise SystemExit(1)", results=str(path)))
    assert found.outcome == "failed" and (tmp_path / "log.txt").read_text().count("no rows") == 1


def test_stages(tmp_path):
    found = gpu_report.stages(tmp_path, (9, 0))
    assert [stage.name for stage in found] == list(gpu_report.UNTIL)
    assert found[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert gpu_report.stages(tmp_path, (8, 6))[0].environment["TORCH_CUDA_ARCH_LIST"] == "8.6"
    assert sorted(gpu_report.UNTIL.values()) == list(gpu_report.UNTIL.values())
    for stage in found:
        for word in stage.command:
            assert not word.startswith("tests/") or (ROOT / word).exists(), word


def test_operator_tests_are_those_with_a_backend():
    with_backend = {path for path in (ROOT / "tests/kernels").glob("test_*.py") if "(backend)" in path.read_text()}
    assert {ROOT / name for name in gpu_report.OPERATOR_TESTS} == with_backend


def test_measures_and_sums_up_without_rich_and_matplotlib(tmp_path):
    """The real thing on a CPU: rows of depthwise and batch norm, then the tables."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("rich", "typer", "matplotlib", "hypothesis")))
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu_report
gpu_report.main(sys.argv[1:])
"""
    path = str(tmp_path / "depthwise-batch-norm.json")
    options = ["--device", "cpu", "--dtype", "f32", "--filter", "*_512_4", "--peers", "torch"]
    for suites in ("depthwise", "batch-norm"):
        command = (sys.executable, "-c", code, "--measure", suites, "--json", path, *options)
        (outcome,) = run(tmp_path, Stage(suites, 1.0, command, results=path))
        assert outcome.outcome == "ok" and outcome.detail == "3 of 3 rows", (tmp_path / "log.txt").read_text()
    assert len(json.loads(Path(path).read_text())["rows"]) == 6

    said = []
    gpu_report.summarise(tmp_path, [outcome], FACTS, say=lambda text, **_: said.append(text))
    text = (tmp_path / "README.md").read_text()
    assert "| batch-norm | ok |" in text and "| depthwise | f32 | fprop | nhwc | 1 |" in text
    assert "![roofline](roofline.png)" in text and (tmp_path / "ratios.png").exists()
    assert "of floor" in said[1] and "bn_512_4" in said[1]


def test_says_what_was_reached_where_nothing_was_built(tmp_path, monkeypatch):
    def means(out):
        raise ImportError("convkit's native module has not been built")

    monkeypatch.setattr(gpu_report, "means", means)
    said = []
    outcome = Outcome("build", "failed", 3.2, "for 9.0a")
    gpu_report.summarise(tmp_path, [outcome], FACTS, say=lambda text, **_: said.append(text))
    assert "has not been built" in said[0] and "build  failed   3        for 9.0a" in said[1]
    assert "| build | failed | 3 | for 9.0a |" in (tmp_path / "README.md").read_text()
