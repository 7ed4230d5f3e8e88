"""The file format, and what is read off a row."""

import dataclasses
import json
import os

import pytest
from bench_checks import CEILINGS, SETTINGS, results, row
from machines import MACHINE

from convkit.bench import BenchError
from convkit.bench.results import Failure, Results, Timing


def test_json_round_trip(tmp_path):
    one = row(convkit_nhwc=2e-3, torch_nchw=1e-3)
    failing = dataclasses.replace(one, times={**one.times, "compile/nhwc": Failure("no compiler")}, name="b")
    net = dataclasses.replace(one, flops=None, bytes=None, floor_s=None, images=32, memory={"convkit/nhwc": 10})
    before = results(one, failing, net)
    path = tmp_path / "r.json"
    before.save(path)
    assert Results.load(path) == before
    assert json.loads(path.read_text())["rows"][1]["times"]["compile/nhwc"] == {"failed": "no compiler"}
    assert json.loads(path.read_text())["rows"][0]["pass"] == "fprop"
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.json"
    results().save(path)
    before = path.read_text()
    with pytest.raises(ValueError):
        results(dataclasses.replace(row(), floor_s=float("nan"))).save(path)
    assert path.read_text() == before and os.listdir(tmp_path) == ["r.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "schema is 'list'"),
        ('{"schema": 2}', "schema is 2, this version reads 1"),
        ('{"schema": 1}', "no 'settings'"),
        ("half a file {", "Expecting value"),
        ("\x00\x01", "Expecting value"),
    ],
)
def test_a_file_that_is_none_of_ours(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(BenchError, match="r.json: not a result of") as raised:
        Results.load(path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_times_must_be_times(tmp_path):
    plain = results(row(convkit_nhwc=1e-3)).to_json()
    for samples in ([], [0], [-1.0], ["fast"], [None]):
        plain["rows"][0]["times"]["convkit/nhwc"]["samples"] = samples
        with pytest.raises((ValueError, TypeError)):
            Results.from_json(plain)


def test_no_file():
    with pytest.raises(BenchError, match="no such file.json: cannot be read: No such file"):
        Results.load("no such file.json")


def test_ratios_and_floor():
    one = row(convkit_nhwc=2e-3, convkit_nchw=8e-3, torch_nhwc=4e-3, torch_nchw=3e-3)
    assert one.layouts == ["nhwc", "nchw"]
    assert one.best_peer() == "torch/nchw" and one.best_peer("nhwc") == "torch/nhwc"
    assert one.ratio("nhwc") == 1.5 and one.ratio("nhwc", same_layout=True) == 2
    assert one.ratio("nchw") == one.ratio("nchw", same_layout=True) == 0.375
    assert one.floor_fraction("nhwc") == 0.5


def test_who_failed_is_no_best_peer():
    one = row(convkit_nhwc=2e-3, torch_nhwc=1e-3)
    assert dataclasses.replace(one, times={**one.times, "torch/nhwc": Failure("x")}).best_peer() is None
    lone = dataclasses.replace(one, times={**one.times, "convkit/nhwc": Failure("x")})
    assert lone.ratio("nhwc") is None and lone.floor_fraction("nhwc") is None
    assert not results(lone).summaries()


def test_summaries():
    rows = [
        row("a", convkit_nhwc=1e-3, torch_nhwc=4e-3),
        row("b", convkit_nhwc=2e-3, torch_nhwc=2e-3),
        row("c", "dgrad", convkit_nhwc=1e-3, torch_nchw=3e-3),
    ]
    first, second = results(*rows).summaries()
    assert (first.family, first.dtype, first.pass_, first.layout, first.rows) == ("dense", "f32", "fprop", "nhwc", 2)
    assert first.any_layout == pytest.approx(2) and first.same_layout == pytest.approx(2)
    assert (first.worst, first.worst_name) == (1, "b")
    assert second.pass_ == "dgrad" and second.same_layout is None


def test_median_spread_and_jumps():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 5.0, 20.0, 3.0, 3.0))
    assert timing.median == 3 and timing.iqr == 1.5 and timing.jumps == 0.25
    assert Timing((1.0,)).iqr == 0


def test_floor():
    assert CEILINGS.floor(10**11, 10**9, "f32") == 1.0
    assert CEILINGS.floor(10**9, 10**11, "f32") == 10.0
    assert CEILINGS.floor(10**9, 10**11, "f32", in_cache=True) == 1.0
    assert CEILINGS.floor(1, 1, "bf16") is None


def test_differences():
    assert MACHINE.differences(dataclasses.replace(MACHINE, date="x", others=1.0, clock_mhz=1.0)) == []
    assert MACHINE.differences(dataclasses.replace(MACHINE, isa="avx512")) == ["isa: avx2, avx512"]
    assert SETTINGS.differences(dataclasses.replace(SETTINGS, threads=1)) == ["threads: 2, 1"]


def test_a_busy_machine_is_named():
    calm, busy = row("a", convkit_nhwc=1e-3), dataclasses.replace(row("b"), others=0.9)
    stolen = dataclasses.replace(row("c"), steal=0.2)
    jumping = dataclasses.replace(row("d"), times={"torch/nhwc": Timing((1.0, 2.0, 1.0, 1.0, 2.0))})
    once = dataclasses.replace(row("f"), times={"torch/nhwc": Timing((1.0, 1.0, 2.0))})
    unknown = dataclasses.replace(row("e"), others=None, steal=None)
    run = results(calm, busy, stolen, jumping, once, unknown)
    assert run.disturbances() == [
        "b fprop: other programs kept 0.9 of 2 cores busy",
        "c fprop: the host took 0.2 of 2 cores away",
        "d fprop: times of torch/nhwc jump",
    ]
    run.machine = dataclasses.replace(MACHINE, others=1.5)
    assert run.disturbances()[0] == "before the run: other programs kept 1.5 of 2 cores busy"
    run.machine = dataclasses.replace(MACHINE, cores=16)  # 14 are left to others
    assert [line[0] for line in run.disturbances()] == ["d"]
