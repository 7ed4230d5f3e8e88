"""Runs that were killed end as if they had not been; two processes give what one gives."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import killed
import pytest
import shared_out
import torch
from rich.console import Console

import convkit
from convkit.lab import LabError, experiment, objectives, runs, train

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(convkit.__file__).parents[1])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody killed."""
    return killed.go(tmp_path_factory.mktemp("whole"))


def child(out, folder, where, number):
    command = [sys.executable, killed.__file__, str(out), str(folder), where, str(number)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def bits(value):
    """Of a checkpoint, something that is equal for bitwise equal ones."""
    if isinstance(value, dict):
        return {name: bits(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def same(one, other):
    """Whether two runs ended bitwise alike, but for the seconds they took."""
    for name in ("last.pt", "best.pt"):
        states = [runs.load_checkpoint(run.folder / name) for run in (one, other)]
        for state in states:
            state.pop("seconds", None)
            for row in state.pop("history", []):
                del row["seconds"], row["images_per_second"]
        assert bits(states[0]) == bits(states[1])
    timing = ("seconds", "images_per_second")
    rows = [[{k: v for k, v in row.items() if k not in timing} for row in run.history] for run in (one, other)]
    assert rows[0] == rows[1]
    results = [{k: v for k, v in run.result.items() if k != "seconds"} for run in (one, other)]
    assert results[0] == results[1]


@pytest.mark.parametrize("kills", [[("step", 10), ("write", 9)], [("write", 1)]], ids=["twice", "first checkpoint"])
def test_killed_and_resumed_is_bitwise_the_same(whole, tmp_path, kills):
    """Seven steps an epoch. Killed in a step of epoch 2, then in writing the checkpoint after the second of epoch 3."""
    folder = "new"
    for where, number in kills:
        ended = child(tmp_path, folder, where, number)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        folder = tmp_path / "killed-1"
    assert list(folder.glob(".*.tmp"))  # half a checkpoint
    epoch, batch = 0, 0
    if (folder / "last.pt").exists():
        state = runs.load_checkpoint(folder / "last.pt")
        epoch, batch = state["epoch"], state["batch"]
    assert (epoch, batch) == ((2, 1) if len(kills) == 2 else (0, 0))
    run = killed.go(tmp_path, folder)
    assert run.folder == folder and not list(folder.glob(".*.tmp"))
    same(run, whole)
    assert f"resumed in epoch {epoch + 1}, after {batch} of its batches" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("step", [3, 14], ids=["within an epoch", "its last step"])
def test_interrupted_and_resumed_is_bitwise_the_same(whole, tmp_path, step):
    class CtrlC(objectives.Classify):
        def __call__(self, *batch):
            steps.append(None)
            if len(steps) == step:
                signal.raise_signal(signal.SIGINT)
            return super().__call__(*batch)

    steps = []
    with pytest.raises(train.Interrupted):
        killed.go(tmp_path, objective=CtrlC(), save_seconds=train.SAVE_SECONDS)
    folder = tmp_path / "killed-1"
    assert runs.load_checkpoint(folder / "last.pt")["batch"] == (step - 1) % 7 + 1
    same(killed.go(tmp_path, folder), whole)


def test_what_cannot_be_resumed(whole, tmp_path):
    cpu = torch.device("cpu")
    with pytest.raises(LabError, match="is finished"):
        experiment.resume(whole.folder, cpu)
    with pytest.raises(LabError, match="not a run folder: it has no config.json"):
        experiment.resume(tmp_path, cpu)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LabError, match="config.json: cannot be read as JSON"):
        experiment.resume(tmp_path, cpu)
    (tmp_path / "config.json").write_text('{"recipe": {"name": "x"}}')
    with pytest.raises(LabError, match="another version of convkit"):
        experiment.resume(tmp_path, cpu)


def test_other_data_and_a_second_process_are_refused(tmp_path, monkeypatch):
    ended = child(tmp_path, "new", "step", 10)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    folder = tmp_path / "killed-1"
    with runs.Log(folder / "log.txt", Console(quiet=True)), pytest.raises(LabError, match="another process"):
        killed.go(tmp_path, folder)
    digits = killed.data.load("digits5k")
    monkeypatch.setattr(killed.data, "load", lambda name: digits.take(300, 60, 100))
    with pytest.raises(LabError, match="the data are not those that the run started with"):
        killed.go(tmp_path, folder)


def test_two_processes_give_what_one_gives(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", shared_out.__file__, str(tmp_path / "two")]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["shared-1"]  # the first process's
    two, one = runs.Run.open(tmp_path / "two" / "shared-1"), shared_out.go(tmp_path / "one")
    assert two.result["status"] == "finished"
    assert json.loads((two.folder / "env.json").read_text())["processes"] == 2
    for name in ("last.pt", "best.pt"):  # the averaged weights are in the second
        weights = [runs.load_checkpoint(run.folder / name)["model"] for run in (one, two)]
        torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(one.history, two.history, strict=True):
        for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9)
    with pytest.raises(LabError, match="had 2 processes and cannot go on exactly with 1"):
        (two.folder / "result.json").unlink()
        unfinished = runs.Run.open(two.folder)
        shared_out.train.fit(
            shared_out.nn.Linear(1, 1),
            killed.data.load("digits5k").take(190, 60, 100),
            shared_out.Double(),
            shared_out.RECIPE,
            resume=unfinished,
            console=Console(quiet=True),
        )
