"""The README files of the project and of its benchmarks say what the result files say."""

import json
import sys
from pathlib import Path

import pytest
from result_checks import many, results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

sys.path.insert(0, str(ROOT / "benchmarks"))

import readme_tables  # noqa: E402


@pytest.mark.parametrize("page", readme_tables.PAGES)
def test_pages_are_in_sync_with_the_result_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert readme_tables.MARKED.search(text)
    assert readme_tables.filled(text, RESULTS) == text, "type: make readme-tables"


def test_list_of_results_is_in_sync():
    assert readme_tables.listed(RESULTS) == (RESULTS / "README.md").read_text(encoding="utf-8")


def test_check_says_what_is_stale(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    results(many()).save(folder / "cpu.json")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table: cpu means -->\nold\n<!-- end -->\nafter\n")
    (tmp_path / "benchmarks" / "README.md").write_text("no table\n")
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="not up to date: benchmarks/results/README.md, README.md; type: make readme"):
        readme_tables.main(["--check"])
    readme_tables.main([])
    readme_tables.main(["--check"])
    assert capsys.readouterr().out.splitlines()[-1] == "the tables are up to date"
    text = readme.read_text()
    assert text.startswith("before\n<!-- table: cpu means -->\n| family |") and text.endswith("\n<!-- end -->\nafter\n")
    assert "[cpu.json](cpu.json)" in (folder / "README.md").read_text()


def test_what_has_run_on_a_gpu(tmp_path):
    text = readme_tables.on_gpus(tmp_path)
    assert "Nothing has run on a real GPU yet" in text and "racecheck" in text
    report = {"schema": 1, "gpu": "Some GPU (sm_90)", "date": "2026-01-02", "torch": "2.11.0", "revision": "0123"}
    stages = [{"name": "build", "outcome": "ok", "seconds": 9.0, "detail": "for 9.0a"}]
    stages.append({"name": "memcheck", "outcome": "failed", "seconds": 3.0, "detail": "2 passed | 1 failed"})
    (tmp_path / "some-gpu").mkdir()
    (tmp_path / "some-gpu" / "report.json").write_text(json.dumps(report | {"stages": stages}))
    lines = readme_tables.on_gpus(tmp_path).splitlines()
    assert "|  | [Some GPU (sm_90)](some-gpu/README.md) |" in lines and "| build | ok: for 9.0a |" in lines
    assert "| racecheck | not run |" in lines and any("memcheck | failed: 2 passed" in line for line in lines)
    (tmp_path / "some-gpu" / "report.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit, match="report.json: not a report of `make gpu-report`: KeyError"):
        readme_tables.on_gpus(tmp_path)


@pytest.mark.parametrize("view", ["means", "dense", "depthwise", "batch-norm", "nets", "best"])
def test_views_of_a_run(tmp_path, view):
    results(many()).save(tmp_path / "cpu.json")
    text = readme_tables.filled(f"<!-- table: cpu {view} -->\n<!-- end -->\n", tmp_path)
    assert len(text.splitlines()) > 4 and readme_tables.filled(text, tmp_path) == text


def test_demo_table():
    (path,) = RESULTS.glob("demo-*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    table = readme_tables.demo_table(data)
    for run in data["runs"].values():
        assert (
            f"{run['parameters']:,}" in table and f"{run['training_step']['torch']['images_per_second']:,.0f}" in table
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nothing -->\n<!-- end -->\n", "no file nothing.json in .*; there are: broken, cpu, other"),
        ("<!-- table: cpu -->\n<!-- end -->\n", "got view ''; accepts means, dense, depthwise, batch-norm, nets, best"),
        ("<!-- table: cpu cpu means -->\n<!-- end -->\n", "table of cpu, cpu: view 'means' is of one file"),
        ("<!-- table: cpu other best -->\n<!-- end -->\n", "not a result of `make demo`, `convkit reproduce` or"),
        ("<!-- table: cpu all -->\n<!-- end -->\n", "got view 'all'; accepts means"),
        ("<!-- table: cpu means -->\n", "has no '<!-- end -->'"),
        ("<!-- table: cpu means -->\n<!-- table: cpu means -->\n<!-- end -->\n", "has no '<!-- end -->'"),
        ("<!-- table: broken -->\n<!-- end -->\n", "cannot be read"),
        ("<!-- table: other -->\n<!-- end -->\n", "not a result of `make demo`, `convkit reproduce` or"),
    ],
)
def test_wrong_marks(tmp_path, text, message):
    results(many()).save(tmp_path / "cpu.json")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(SystemExit, match=message):
        readme_tables.filled(text, tmp_path)
