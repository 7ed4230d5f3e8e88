"""`convkit bench` as a user meets it, on problems of microseconds."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_checks import CEILINGS, results, row
from machines import MACHINE

import convkit
from convkit import cli
from convkit.bench import nets, peers, run
from convkit.bench.results import Results, Timing

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(convkit.__file__).parents[1])}
SMALL = ("--problem", "n1c4h5w4k8r3s3p1", "--problem", "n2c4h3w3+res")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """What takes seconds and has tests of its own, left out."""
    monkeypatch.setattr(run, "BUDGET_S", {"normal": 0.0, "quick": 0.0})
    monkeypatch.setattr(run, "machine", lambda device: dataclasses.replace(MACHINE, threads=torch.get_num_threads()))
    monkeypatch.setattr(run, "ceilings", lambda *_, **__: CEILINGS)
    monkeypatch.setattr(run, "rotation_bytes", lambda device: 1 << 16)


@pytest.fixture
def bench(capsys):
    """(exit status, stdout, stderr) of `convkit bench` with arguments."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def test_problems_of_ones_own(bench):
    status, out, _ = bench(*SMALL)
    assert status == 0
    lines = out.splitlines()
    for name, passes in (("n1c4h5w4k8r3s3p1", ("fprop", "dgrad", "wgrad")), ("n2c4h3w3+res", ("forward", "backward"))):
        for pass_ in passes:
            for layout in ("nchw", "nhwc"):
                (line,) = [line.split() for line in lines if line.split()[:3] == [name, pass_, layout]]
                convkit_ms, torch_nchw, torch_nhwc, best, same = map(float, line[3:8])
                assert best == pytest.approx(min(torch_nchw, torch_nhwc) / convkit_ms, rel=0.1, abs=0.02)
                assert same == pytest.approx({"nchw": torch_nchw, "nhwc": torch_nhwc}[layout] / convkit_ms, rel=0.1)
                assert float(line[-1]) < 1e-5, "the error"
    assert "Geometric mean" in out and "Some CPU, avx2" in out and "GFLOP/s f32 100" in out


def test_tables_are_whole_in_a_pipe(bench):
    _, out, _ = bench(*SMALL, "--peers", "torch,im2col")
    assert "…" not in out
    assert max(map(len, out.splitlines())) > 80


def test_json_has_every_sample(bench, tmp_path):
    path = tmp_path / "r.json"
    assert bench(*SMALL, "--json", path)[0] == 0
    found = Results.load(path)
    assert [r.pass_ for r in found.rows] == ["fprop", "dgrad", "wgrad", "forward", "backward", "evaluation"]
    for one in found.rows:
        assert set(one.times) == {f"{who}/{layout}" for who in ("convkit", "torch") for layout in ("nchw", "nhwc")}
        assert all(len(timing.samples) >= 5 for timing in one.times.values())
        assert one.floor_s == CEILINGS.floor(one.flops, one.bytes, "f32")
        assert set(one.errors) == set(one.times) and one.sets > 1
    assert found.settings.rotation_bytes == 1 << 16


def test_in_cache(bench, tmp_path):
    path = tmp_path / "r.json"
    _, out, _ = bench(*SMALL, "--in-cache", "--json", path)
    found = Results.load(path)
    assert {one.sets for one in found.rows} == {1} and found.settings.in_cache
    assert found.rows[3].floor_s == found.rows[3].bytes / CEILINGS.copy_in_cache_bytes_per_s
    assert "in cache where it fits" in out


def test_an_interrupted_run_is_kept_and_goes_on(bench, tmp_path, monkeypatch):
    path, measure, measured = tmp_path / "r.json", run.measure, []

    def until_ctrl_c(case, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case.pass_)
        return measure(case, *rest)

    monkeypatch.setattr(run, "measure", until_ctrl_c)
    status, out, err = bench(*SMALL, "--json", path)
    assert status == 130
    assert err == f"convkit: interrupted: 2 of 6 rows are in {path}; the same command goes on from there\n"
    assert "n1c4h5w4k8r3s3p1" in out, "what was measured is shown"
    before = Results.load(path).rows
    assert [one.pass_ for one in before] == ["fprop", "dgrad"]

    monkeypatch.setattr(run, "measure", lambda case, *rest: measured.append(case.pass_) or measure(case, *rest))
    status, out, _ = bench(*SMALL, "--json", path)
    assert status == 0 and f"2 rows are in {path} already; the other 4 are measured now" in " ".join(out.split())
    after = Results.load(path).rows
    assert after[:2] == before and len(after) == 6
    assert measured == ["fprop", "dgrad", "wgrad", "forward", "backward", "evaluation"]

    text = path.read_text()
    status, out, _ = bench(*SMALL, "--json", path)
    assert status == 0 and "delete it, or name another, to measure again" in out
    assert len(measured) == 6 and path.read_text() == text


def test_interrupted_without_a_file(bench, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", stop)
    status, _, err = bench(*SMALL)
    assert status == 130 and "0 of 6 rows were measured; with --json FILE they would be kept" in err


def test_a_crash_keeps_what_is_done(bench, tmp_path, monkeypatch):
    path, measure = tmp_path / "r.json", run.measure

    def once(case, *rest):
        if case.pass_ == "wgrad":
            raise RuntimeError("the machine is on fire")
        return measure(case, *rest)

    monkeypatch.setattr(run, "measure", once)
    with pytest.raises(RuntimeError, match="on fire"):
        cli.main(["bench", *SMALL, "--json", str(path)])
    assert len(Results.load(path).rows) == 2


def test_a_file_holds_the_rows_of_several_commands(bench, tmp_path):
    path = tmp_path / "r.json"
    bench(*SMALL[:2], "--json", path)
    _, out, _ = bench(*SMALL[2:], "--json", path)
    assert len(Results.load(path).rows) == 6
    assert "n1c4h5w4k8r3s3p1" not in out, "only what this command asks for is shown"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "1"], "threads: 2, 1"),
        (["--in-cache"], "in_cache: False, True"),
        (["--peers", "im2col"], "peers: ('torch',), ('im2col',)"),
    ],
)
def test_other_settings_do_not_go_into_the_same_file(bench, tmp_path, options, message):
    path = tmp_path / "r.json"
    bench(*SMALL, "--json", path, "--threads", 2)
    text = path.read_text()
    status, _, err = bench(*SMALL, "--json", path, "--threads", 2, *options)
    assert status == 2 and err.count("\n") == 1
    assert message in err and "name another file" in err and path.read_text() == text


def test_another_machine_does_not_go_into_the_same_file(bench, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    bench(*SMALL, "--json", path)
    monkeypatch.setattr(run, "machine", lambda device: dataclasses.replace(MACHINE, cpu="Other CPU"))
    status, _, err = bench(*SMALL, "--json", path)
    assert status == 2 and "cpu: Some CPU, Other CPU" in err


def test_a_peer_that_fails_is_shown_and_the_run_goes_on(bench, tmp_path, monkeypatch):
    prepare = peers.prepare

    def broken(who, problem, pass_, tensors):
        if who == "torch" and problem.layout == "nhwc":
            raise RuntimeError("could not create a primitive descriptor\nwith a long explanation")
        if who == "convkit" and pass_ == "wgrad":
            return lambda *tensors: tensors[0] / 0
        return prepare(who, problem, pass_, tensors)

    monkeypatch.setattr(peers, "prepare", broken)
    path = tmp_path / "r.json"
    status, out, _ = bench(*SMALL[:2], "--json", path)
    assert status == 0
    assert "fprop f32: torch/nhwc failed: RuntimeError: could not create a primitive descriptor" in out
    assert "wgrad f32: convkit/nchw failed: ArithmeticError: the result has values that are not finite" in out
    fprop, _, wgrad = json.loads(path.read_text())["rows"]
    assert fprop["times"]["torch/nhwc"] == {"failed": "RuntimeError: could not create a primitive descriptor"}
    assert fprop["times"]["torch/nchw"]["median"] > 0
    assert "convkit/nchw" not in wgrad["errors"]
    assert "failed" in next(line for line in out.splitlines() if " fprop " in line)


def test_compare(bench, tmp_path):
    path = tmp_path / "old.json"
    bench(*SMALL[:2], "--json", path)
    old = Results.load(path)
    rows = [
        dataclasses.replace(
            one,
            times={
                who: Timing(tuple(s * (1000 if who == "convkit/nhwc" else 1) for s in timing.samples))
                for who, timing in one.times.items()
            },
        )
        for one in old.rows
    ]
    Results(dataclasses.replace(old.machine, isa="avx512"), old.settings, old.ceilings, rows).save(path)
    status, out, _ = bench(*SMALL[:2], "--compare", path)
    assert status == 0 and "old /" in out
    lines = [line.split() for line in out.splitlines() if line.split()[1:3] == ["fprop", "nhwc"]]
    assert float(lines[0][-1].replace(",", "")) > 20
    assert "Old and new were not measured alike: isa: avx512, avx2" in out


def test_compare_with_what_has_none_of_the_rows(bench, tmp_path):
    path = tmp_path / "old.json"
    results(row(convkit_nhwc=1e-3, torch_nhwc=1e-3)).save(path)
    status, out, _ = bench(*SMALL[:2], "--compare", path)
    assert status == 0 and "–" in out


def test_a_busy_machine_is_told(bench, monkeypatch):
    monkeypatch.setattr(run, "machine", lambda device: dataclasses.replace(MACHINE, others=1.3))
    _, out, _ = bench(*SMALL)
    assert "This machine is busy: just now other programs kept 1.3 of 2 cores busy" in out
    assert "The machine was busy: before the run" in out


def test_report(bench, tmp_path):
    pytest.importorskip("convkit.bench.report")
    status, out, _ = bench(*SMALL, "--report", tmp_path / "a" / "b")
    assert status == 0 and list((tmp_path / "a" / "b").glob("*.html"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "sparse"], "--suite: got 'sparse'; accepts dense, depthwise, batch-norm, nets, all"),
        (["--device", "tpu"], "--device: got 'tpu'; accepts cpu, cuda"),
        (["--dtype", "int8"], "--dtype: got 'int8'; accepts f32, bf16"),
        (["--dtype", "tf32"], "--dtype: got 'tf32', which is a way of GPUs"),
        (["--layout", "nchw,chwn"], "--layout: got 'chwn'; accepts nchw, nhwc"),
        (["--passes", "forwards"], "--passes: got 'forwards'; accepts fprop"),
        (["--peers", "mkl"], "--peers: got 'mkl'; accepts torch, native, compile, im2col, all"),
        (["--problem", "n1c4h5w4k8r3s3p1_f32_nhcw"], "layout 'nhcw' is not known; accepted: nchw, nhwc"),
        (["--suite", "dense", "--filter", "resnet*"], "nothing to measure"),
        (["--threads", "0"], "--threads"),
        (["--model", "no_such_module:net"], "network no_such_module:net: cannot be imported: ModuleNotFoundError"),
        (["--model", "math:pie"], "cannot be imported: AttributeError"),
        (["--model", "math:pi"], "is no function but float"),
        (["--json", "no/such/folder/r.json"], "in a folder that does not exist"),
        (["--compare", "no such.json"], "no such.json: cannot be read"),
        (["--report", os.devnull], "cannot make the folder"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(bench, arguments, message):
    status, _, err = bench(*arguments)
    assert status == 2
    assert err.startswith("convkit: ") and err.count("\n") == 1 and message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(bench):
    status, _, err = bench("--device", "cuda")
    assert status == 2 and err.count("\n") == 1 and "--device: got 'cuda', but" in err and "accepts cpu here" in err


@pytest.mark.parametrize("text", ["{}", "not json", '{"schema": 1, "rows": 3}'])
def test_a_file_that_is_something_else_is_left_alone(bench, tmp_path, text):
    path = tmp_path / "notes.json"
    path.write_text(text)
    status, _, err = bench(*SMALL, "--json", path)
    assert status == 2 and err.count("\n") == 1 and "not a result of `convkit bench --json`" in err
    assert path.read_text() == text


def test_threads_are_put_back(bench):
    before = torch.get_num_threads()
    bench(*SMALL, "--threads", before + 1)
    assert torch.get_num_threads() == before


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_a_network_of_ones_own(bench, tmp_path):
    path = tmp_path / "r.json"
    status, out, _ = bench("--model", f"{__name__}:Small@4x3x9x8", "--json", path)
    assert status == 0
    training, inference = Results.load(path).rows
    assert (training.pass_, training.images, training.problem) == ("training", 4, "4x3x9x8")
    assert set(training.times) == {f"{who}/{layout}" for who in ("convkit", "torch") for layout in ("nchw", "nhwc")}
    conv, linear = 4 * 7 * 6 * 8 * 27 * 2, 4 * 8 * 5 * 2
    assert inference.flops == conv + linear
    assert training.flops == 2 * conv + 3 * linear, "the pictures need no gradient"
    assert max(inference.errors.values()) < 1e-5
    assert "images/s" in out and inference.images_per_s("convkit/nhwc") > 0
    if sys.platform == "linux":
        assert set(training.memory) == set(training.times)


def test_a_network_that_fails_is_shown(bench):
    status, out, _ = bench("--model", f"{__name__}:Small@4x2x9x8")
    assert status == 0 and "training f32: torch/nchw failed: RuntimeError: Given groups=1" in out
    status, out, _ = bench("--model", "builtins:dict@4x2x9x8")
    assert status == 0 and "convkit/nhwc failed: AttributeError" in out


def test_the_lab_networks_are_resolved_by_name():
    built = nets.build(nets.Net("simplenet", "convkit.lab.models:simplenet", (1, 1, 28, 28)), "cpu")
    assert isinstance(built["convkit"].conv1, convkit.nn.Conv2d)
    assert not isinstance(built["torch"].conv1, convkit.nn.Conv2d)
    torch.testing.assert_close(built["torch"].state_dict(), built["convkit"].state_dict(), rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_peak_memory():
    peaks = [nets.peak_bytes(lambda size=size: torch.ones(size << 20, dtype=torch.uint8), "cpu") for size in (64, 128)]
    assert peaks[0] == pytest.approx(64 << 20, rel=0.1) and peaks[1] == pytest.approx(128 << 20, rel=0.1)


def test_the_kernel_floor_needs_nothing_of_the_lab():
    code = (
        "import sys, convkit.bench.run; bad = [n for n in sys.modules if n.split('.')[0] in "
        "('matplotlib', 'rich', 'typer', 'sklearn') or n.startswith('convkit.lab')]; sys.exit(str(bad) if bad else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("conv", "products"),
    (
        (torch.nn.Conv2d(6, 12, 3, stride=2, groups=3), 2 * 12 * 3 * 4 * (2 * 9)),
        (torch.nn.Conv2d(6, 6, 3, padding=1, groups=6), 2 * 6 * 7 * 9 * 9),
        (torch.nn.Conv2d(6, 5, 1), 2 * 5 * 7 * 9 * 6),
        (torch.nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), 2 * 6 * 7 * 9 * (2 * 4)),
    ),
)
def test_operations_of_a_step(conv, products):
    """A multiplication and an addition for each product; a training step has three times a pass's."""
    x = torch.ones(2, 6, 7, 9, requires_grad=True)
    assert nets.count_flops(lambda: conv(x)) == 2 * products
    assert nets.count_flops(lambda: conv(x).sum().backward()) == 3 * 2 * products
