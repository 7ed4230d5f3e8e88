"""convkit.swap(model, example_input, only_faster=True), and the file in which its measurements are kept."""

import copy
import json
import multiprocessing
import os
import sys

import pytest
import torch
from swap_checks import assert_same_behaviour, build, fused, images, row
from test_explain import Loop, Restless
from test_swap import Bottleneck, ResNet, conv
from torch import nn

import convkit
import convkit.nn as cnn
from convkit import decisions
from convkit.bench.problems import ConvProblem
from convkit.measure import Seconds, Task


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """The file of these tests."""
    torch.set_num_threads(1)
    monkeypatch.setenv("CONVKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decisions.json"


def only_convolutions_of(channels):
    def times(task):
        faster = task.operator == "conv2d" and task.problem.k == channels
        return (1e-3, 1.35e-3) if faster else (1.35e-3, 1.21e-3)

    return times


def a_task(k=1):
    return Task("conv2d", ConvProblem.parse(f"n1c1h3w3k{k}r3s3"), (("bias", False),), (), "cpu")


SECONDS = Seconds({"forward": 1e-3}, {"forward": 2e-3}, {})


# ---------------------------------------------------------------- what is swapped


def test_swaps_what_is_faster(clock):
    clock.times = only_convolutions_of(4)
    model = build(ResNet)
    reference = copy.deepcopy(model)
    report = convkit.swap(model, images(), only_faster=True)
    expected = {name for name, m in reference.named_modules() if isinstance(m, nn.Conv2d) and m.out_channels == 4}
    assert {row.name for row in report.replaced} == expected and type(model.conv1) is cnn.Conv2d
    assert row(report, "bn1").reason == "PyTorch is faster here (2.42 ms against 2.7 ms)"
    assert "PyTorch is faster" in row(report, "layers.2.conv3").reason and not fused(model)
    assert "before a ReLU" in row(report, "layers.1.downsample.1").reason
    assert_same_behaviour(model, reference, images())
    convkit.unswap(model)
    assert repr(model) == repr(reference)


def test_evaluation_compares_the_forward_alone(clock):
    clock.times = lambda task: (1e-3, 1.5e-3) if not task.gradients else (1e-3, 0.5e-3)
    model = build(ResNet)
    assert not convkit.swap(model, images(), only_faster=True).replaced
    assert len(convkit.swap(model.eval(), images(), only_faster=True).replaced) == 18
    assert not convkit.swap(model.train(), images(), only_faster=True).replaced


def test_all_calls_count(clock):
    # `step` is called three times; the one on the small image is faster, and by more than the others are slower.
    clock.times = lambda task: (1e-3, 9e-3) if task.problem.h == 6 else (2e-3, 1e-3)
    report = convkit.swap(build(Loop).eval(), images(), only_faster=True)
    assert row(report, "step = alias").replaced_by and row(report, "other").replaced_by
    assert row(report, "unused").reason == "not called with this example_input, so there is nothing to measure"
    clock.times = lambda task: (2e-3, 1e-3) if task.problem.h == 12 else (1e-3, 1.5e-3)
    os.remove(decisions.folder() / "decisions.json")
    report = convkit.swap(build(Loop).eval(), images(), only_faster=True)
    assert row(report, "step = alias").reason == "PyTorch is faster here (3.5 ms against 5 ms)"


def test_a_batch_norm_that_is_left_gives_way_to_another(clock):
    """bn_skip + bn3 + ReLU: fused is the one or the other. That other is measured too."""
    model = build(lambda: Bottleneck(3, 4, 8))
    reference = copy.deepcopy(model)
    assert row(convkit.swap(model), "bn3").reason.startswith("it is added to a batch norm that is fused")
    first = []

    def times(task):
        if "+res" in str(task.problem):
            first.append(task)
        return (1e-3, 2e-3)

    clock.times = times
    assert row(convkit.swap(model, images(), only_faster=True), "bn_skip").replaced_by
    # The same problem for both, so the second is left by what is known of the first.
    clock.times = lambda task: (2e-3, 1e-3) if "+res" in str(task.problem) else (1e-3, 2e-3)
    os.remove(decisions.folder() / "decisions.json")
    report = convkit.swap(model, images(), only_faster=True)
    assert {row.name for row in report.left} == {"bn_skip", "bn3"} and fused(model) == ["bn1", "bn2"]
    assert all("PyTorch is faster" in row.reason for row in report.left)
    assert_same_behaviour(model, reference, images())


def test_exclude_and_a_swapped_model(clock):
    model = build(ResNet)
    convkit.swap(model)
    report = convkit.swap(model, images(), exclude="layers.*", only_faster=True)
    assert {row.name for row in report.replaced} == {"conv1", "bn1"}
    assert all(not name.startswith("layers") for name in map(str, clock.tasks))
    assert row(report, "layers.0.conv1").reason == "excluded"


def test_what_cannot_be_measured_is_left(clock, monkeypatch):
    report = convkit.swap(conv(3, 4).double(), images()[:0], only_faster=True)
    assert report.rows[0].reason == "it cannot be measured: n must be at least 1, but got 0"
    failed = Seconds({}, {"forward": 1e-3}, {"convkit": "RuntimeError: no"})
    monkeypatch.setattr(convkit.measure, "_measure", lambda *_: failed)
    report = convkit.swap(conv(3, 4).double().eval(), images(), only_faster=True)
    assert report.rows[0].reason == "it could not be measured: RuntimeError: no"
    failed = Seconds({"forward": 1e-3}, {}, {"torch": "RuntimeError: no"})
    assert convkit.swap(conv(3, 5).double().eval(), images(), only_faster=True).replaced


@pytest.mark.parametrize("arguments", [{"only_faster": True}, {"example_input": images()}])
def test_one_without_the_other(arguments):
    model = conv(3, 4)
    with pytest.raises(TypeError, match="swap got .* without .*timed on example_input"):
        convkit.swap(model, **arguments)
    assert type(model) is nn.Conv2d


def test_a_model_that_raises_stays_as_it_was(clock):
    model = build(Restless)
    convkit.swap(model)
    before = repr(model)
    model.fail = True
    with pytest.raises(RuntimeError, match="the model's own"):
        convkit.swap(model, images(), only_faster=True)
    assert repr(model) == before and fused(model.block) and type(model.block.conv1) is cnn.Conv2d
    with pytest.raises(RuntimeError):
        convkit.swap(model, images(channels=5), only_faster=True)
    with pytest.raises(TypeError, match="got list"):
        convkit.swap(model, [images()], only_faster=True)
    assert repr(model) == before


def test_really_timed(place, monkeypatch):
    monkeypatch.setattr(convkit.measure, "rotation_bytes", lambda device: 1 << 20)
    model = build(lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU()), torch.float32)
    values = copy.deepcopy(model.state_dict())
    report = convkit.swap(model, images(torch.float32), only_faster=True)
    assert len(report) == 2 and all(row.replaced_by or "PyTorch is faster here" in row.reason for row in report)
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    (known,) = json.loads(place.read_text())["decisions"].values()
    assert len(known) == 2 and all(one["convkit"]["backward"] > 0 for one in known.values())


# ---------------------------------------------------------------- what is remembered


def test_measured_once(clock, place):
    convkit.swap(build(ResNet), images(), only_faster=True)
    assert len(clock.tasks) == len(set(clock.tasks)) > 9
    clock.tasks.clear()
    clock.times = lambda task: (2e-3, 1e-3)
    assert len(convkit.swap(build(ResNet), images(), only_faster=True).replaced) == 18 and not clock.tasks
    data = json.loads(place.read_text())
    ((environment, known),) = data["decisions"].items()
    assert data["schema"] == 1 and f"torch {torch.__version__}; convkit {convkit.__version__}" in environment
    assert convkit._C.isa() in environment and "threads=1" in environment
    key = "conv2d n4c4h12w12k4r3s3u1p1d1g1_f64_nchw, bias=False, gradients of input and weight"
    assert known[key] == {
        "convkit": {"forward": 1e-3, "backward": 1e-3},
        "torch": {"forward": 2e-3, "backward": 2e-3},
        "failures": {},
    }


def test_other_threads_and_versions_are_measured_anew(clock, monkeypatch, place):
    layer = conv(3, 4).double()
    for change in (
        lambda: None,
        lambda: torch.set_num_threads(2),
        lambda: monkeypatch.setattr(convkit, "__version__", "9.9"),
        lambda: monkeypatch.setattr(decisions, "cpu_name", lambda: "Another"),
    ):
        change()
        convkit.swap(layer, images(), only_faster=True)
    assert len(clock.tasks) == 4 and len(json.loads(place.read_text())["decisions"]) == 4


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("CONVKIT_CACHE", "~/mine")
    assert decisions.folder() == tmp_path / "mine"
    monkeypatch.delenv("CONVKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert decisions.folder() == tmp_path / "xdg" / "convkit"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert decisions.folder() == tmp_path / ".cache" / "convkit"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert decisions.folder() == tmp_path / "Library" / "Caches" / "convkit"


def test_nothing_is_kept_where_the_variable_is_empty(clock, monkeypatch, tmp_path):
    monkeypatch.setenv("CONVKIT_CACHE", "")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        convkit.swap(conv(3, 4).double(), images(), only_faster=True)
    assert len(clock.tasks) == 2 and not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "content", [b"", b'{"schema": 1, "deci', b"[]", b'{"schema": 2, "decisions": {}}', b'{"decisions": 3}', b"\xff\xfe"]
)
def test_an_unreadable_file_is_a_warning(clock, place, content):
    place.parent.mkdir()
    place.write_bytes(content)
    with pytest.warns(UserWarning, match="decisions.json cannot be read, so layers are measured anew.*CONVKIT_CACHE"):
        report = convkit.swap(conv(3, 4).double(), images(), only_faster=True)
    assert report.replaced and decisions.recall(set(clock.tasks)).keys() == set(clock.tasks)
    assert place.with_name("decisions.json.unreadable").read_bytes() == content


def test_entries_that_make_no_sense_are_measured_anew(place):
    tasks = [a_task(k) for k in range(1, 6)]
    decisions.remember(dict.fromkeys(tasks, SECONDS))
    data = json.loads(place.read_text())
    (known,) = data["decisions"].values()
    bad = [None, {"convkit": {}}, {"convkit": {"forward": "x"}, "torch": {}, "failures": {}}, 3]
    for task, value in zip(tasks, bad, strict=False):
        known[str(task)] = value
    place.write_text(json.dumps(data))
    assert decisions.recall(set(tasks)) == {tasks[4]: SECONDS}


def test_a_place_that_cannot_be_written_is_a_warning(clock, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("CONVKIT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written, so layers will be measured again next time") as warned:
        report = convkit.swap(conv(3, 4).double(), images(), only_faster=True)
    assert [warning.filename for warning in warned] == [__file__]
    assert report.replaced and (tmp_path / "file").read_text() == "mine"


def test_what_others_wrote_stays(place):
    decisions.remember({a_task(1): SECONDS})
    data = json.loads(place.read_text())
    data["decisions"]["another machine"] = {"something": {"convkit": 1}}
    place.write_text(json.dumps(data))
    decisions.remember({a_task(2): SECONDS})
    after = json.loads(place.read_text())["decisions"]
    assert after["another machine"] == {"something": {"convkit": 1}} and sorted(map(len, after.values())) == [1, 2]


def write(number, ready):
    ready.wait()
    for k in range(10):
        decisions.remember({a_task(1 + 10 * number + k): SECONDS})


def test_several_processes_write_at_once(place):
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(3)
    writers = [context.Process(target=write, args=(number, ready)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 3
    tasks = {a_task(k) for k in range(1, 31)}
    assert decisions.recall(tasks).keys() == tasks
    assert sorted(path.name for path in place.parent.iterdir()) == ["decisions.json", "decisions.lock"]
