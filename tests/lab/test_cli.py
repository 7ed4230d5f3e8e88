"""The `convkit` command as a user meets it."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_checks import run

import convkit
from convkit.lab import demo, recipes

# For commands that start elsewhere: the convkit of this process, installed or not.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(convkit.__file__).parents[1])}


def test_demo_quick(capsys, tmp_path):
    status, out, err = run(capsys, "demo", "--quick", "--out", str(tmp_path), "--threads", "1")
    assert status == 0 and err == ""
    assert "digits5k" in out and "1 thread" in out and "kernels" in out
    for name, count in (("FC64", "50,890"), ("FC256-FC256", "269,322"), ("SimpLeNet", "233,196")):
        assert any(name in line and count in line for line in out.splitlines())
    assert "no convolution in the network" in out
    assert max(len(line) for line in out.split("Timing")[1].split("Test error")[0].splitlines()) <= 80
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["fc256-fc256-digits5k-1", "fc64-digits5k-1", "simplenet-digits5k-1"]
    for name in folders:
        assert str(tmp_path / name) in out
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["status"] == "finished" and 0 <= result["test_error_percent"] < 90
        speed = result["training_step"]
        assert speed["torch"]["images_per_second"] > 0
        assert ("convkit" in speed) == name.startswith("simplenet")
        assert (tmp_path / name / "best.pt").exists() and (tmp_path / name / "curves.png").exists()
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["recipe"]["backend"] == "convkit" and config["recipe"]["epochs"] == 1


def test_the_networks_take_turns():
    order = []

    class Noting(torch.nn.Linear):
        def forward(self, x):
            order.append(self.out_features)
            return super().forward(x)

    networks = [Noting(4, 3), Noting(4, 5)]
    recipe = recipes.recipe("fc64-digits5k")
    batches = itertools.repeat((torch.rand(2, 4), torch.tensor([0, 1])))
    times = demo.step_times(networks, batches, recipe, repeats=4, warm_up=2)
    assert order == [3, 5] * 6
    assert [len(mine) for mine in times] == [4, 4] and min(map(min, times)) > 0


def test_timing_sees_full_batches_that_do_not_repeat(few):
    batches = itertools.islice(demo._full_batches(few.train, 64), 5)  # three an epoch
    images = [images for images, _ in batches]
    assert {len(batch) for batch in images} == {64}
    assert len({row.numpy().tobytes() for batch in images[:3] for row in batch}) == 192
    assert not torch.equal(images[0], images[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--epochs", "0"], "--epochs"),
        (["demo", "--epochs", "many"], "--epochs"),
        (["demo", "--threads", "-2"], "--threads"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--bogus"], "--bogus"),
        (["demo", "--data", "no such place"], "no such place"),
        (["demo", "--data", "mnist"], "could not be fetched"),
        (["demo", "--quick", "--out", os.devnull], "cannot make a run folder"),
        (["dmeo"], "dmeo"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert err.startswith("convkit: ") and err.count("\n") == 1 and message in err


def test_broken_data_is_one_line_and_status_2(capsys, tmp_path, monkeypatch):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte").write_bytes(b"\0\0\x08")
    monkeypatch.setenv("CONVKIT_DATA", str(tmp_path))
    status, _, err = run(capsys, "demo")
    assert status == 2 and err.count("\n") == 1 and "train-images-idx3-ubyte: 3 bytes, too short" in err


def test_a_run_that_fails_is_one_line_and_status_1(capsys, tmp_path, monkeypatch):
    hot = {name: recipes.dataclasses.replace(r, learning_rate=1e30) for name, r in recipes.RECIPES.items()}
    monkeypatch.setattr(recipes, "RECIPES", hot)
    status, _, err = run(capsys, "demo", "--quick", "--epochs", "5", "--out", str(tmp_path))
    assert status == 1 and err.count("\n") == 1 and "learning rate 1e+30" in err


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0 and torch.__version__ in out


def test_help(capsys):
    status, out, err = run(capsys)
    assert status == 2 and "demo" in out + err
    assert run(capsys, "demo", "--help")[0] == 0


@pytest.mark.parametrize("package", ["typer", "rich", "matplotlib", "mlxtend"])
def test_a_missing_package_is_one_line(package, tmp_path):
    code = f"import sys; sys.modules[{package!r}] = None; from convkit.cli import main; main(['demo', '--quick'])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert package in ended.stderr and "pip install --no-build-isolation 'convkit[lab]'" in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_says_where_the_files_are(tmp_path):
    command = [sys.executable, "-u", "-m", "convkit.cli", "demo", "--quick", "--epochs", "100000", "--out", "here"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, cwd=tmp_path, env=ENVIRONMENT, **pipes)
    try:
        for line in process.stdout:
            if "epoch  2/" in line:
                break
        time.sleep(0.05)  # into the third epoch
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.count("\n") == 1 and "whole epochs" in err and "here" in err
    folder = tmp_path / "here" / "fc64-digits5k-1"
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    assert (folder / "last.pt").exists() and (folder / "best.pt").exists() and (folder / "curves.png").exists()
