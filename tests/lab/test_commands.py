"""`convkit train`, `eval`, `compare`, `sweep` and `reproduce`, as a user meets them."""

import csv
import json

import pytest

from convkit import cli
from convkit.lab import data, experiment, recipes, runs, train


@pytest.fixture
def small(monkeypatch, digits5k):
    monkeypatch.setattr(data, "load", lambda *_: digits5k.take(200, 60, 100))


@pytest.fixture
def convkit(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(line):
        with pytest.raises(SystemExit) as ended:
            cli.main(line.split() if isinstance(line, str) else line)
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_train_eval_compare(convkit, small, tmp_path):
    status, out, err = convkit("train fc64-digits5k epochs=2 learning_rate=0.01 --seeds 2 --device cpu")
    assert status == 0 and err == ""
    assert "runs/fc64-digits5k-1: validation error" in out and "of 2 seeds" in out
    seeds = [runs.Run.open(f"runs/fc64-digits5k-{n}").recipe.seed for n in (1, 2)]
    assert seeds == [0, 1]

    status, out, err = convkit("eval runs/fc64-digits5k-1 fc64-digits5k-2 --device cpu")
    assert status == 0 and "mean ± standard deviation of the 2 runs" in out and "claimed 6.9 %" in out
    folder = tmp_path / "runs" / "fc64-digits5k-1"
    result = json.loads((folder / "result.json").read_text())
    assert 0 < result["top5_error_percent"] < result["test_error_percent"] < 100
    rows = read(folder / "predictions.csv")
    assert [int(row["picture"]) for row in rows] == list(range(100))
    wrong = sum(row["label"] != row["predicted"] for row in rows)
    assert wrong == pytest.approx(result["test_error_percent"])
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")

    assert convkit("train simplenet-digits5k epochs=1 --device cpu")[0] == 0
    status, out, err = convkit("compare fc64-digits5k simplenet-digits5k-1 --to here")
    assert status == 0, err
    rows = read(tmp_path / "here" / "comparison.csv")
    assert [row["Run"] for row in rows] == ["fc64-digits5k-2", "simplenet-digits5k-1"]  # the newest of the first
    assert [row["Parameters"] for row in rows] == ["50890", "233196"]
    assert rows[0]["Test error %"] and not rows[1]["Test error %"] and float(rows[1]["Training images/s"]) > 0
    assert (tmp_path / "here" / "comparison.md").read_text().startswith("| Run | Network |")
    assert (tmp_path / "here" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_rotation_run_is_tested_on_rotations(convkit, small, tmp_path):
    assert convkit("train fc64-digits5k objective=rotate epochs=1 --device cpu")[0] == 0
    assert convkit("eval fc64-digits5k --device cpu")[0] == 0
    rows = read(tmp_path / "runs" / "fc64-digits5k-1" / "predictions.csv")
    assert len(rows) == 400 and {row["label"] for row in rows} == {"0°", "90°", "180°", "270°"}


def test_sweep(convkit, small, tmp_path):
    line = ["sweep", "fc64-digits5k", "optimizer=sgd|adam", "epochs=2", "--seeds", "2", "--device", "cpu"]
    status, out, err = convkit(line)
    assert status == 0, err
    folder = tmp_path / "runs" / "sweep-fc64-digits5k-optimizer"
    rows = read(folder / "sweep.csv")
    assert [row["optimizer"] for row in rows] == ["sgd", "adam"]
    assert [len(row["Runs"].split()) for row in rows] == [2, 2] and float(rows[0]["±"]) >= 0
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG") and (folder / "sweep.md").exists()
    before = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert convkit(line)[0] == 0  # everything is there
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == before


def test_a_sweep_goes_on_where_a_value_diverges(convkit, small, tmp_path):
    status, out, err = convkit(["sweep", "fc64-digits5k", "learning_rate=0.01|1e30", "epochs=2", "--device", "cpu"])
    assert status == 0, err
    rows = read(tmp_path / "runs" / "sweep-fc64-digits5k-learning_rate" / "sweep.csv")
    assert float(rows[0]["Validation error %"]) < 100 and rows[1]["Validation error %"] == "not finite"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train", "train needs either a recipe (convkit train --list) or --resume RUN"),
        ("train fc64-digits", "unknown recipe 'fc64-digits': did you mean fc64-digits5k?"),
        ("train fc64-digits5k epochs=0", "epochs must be at least 1, got 0"),
        ("train fc64-digits5k epoch=1", "no field 'epoch': did you mean epochs?"),
        ("train fc64-digits5k data=nonsense", "data 'nonsense': no such set"),
        ("train fc64-digits5k --seeds 0", "--seeds"),
        ("train fc64-digits5k --device tpu", "--device must be cpu or cuda"),
        ("train fc64-digits5k --resume runs/x-1", "train needs either a recipe"),
        ("train --resume runs/x-1", "runs/x-1: not a run folder: it has no config.json"),
        ("eval runs/nothing", "'runs/nothing' is neither a run folder nor a recipe"),
        ("eval fc64-digits5k", "no finished run of fc64-digits5k in runs: train it first"),
        ("compare fc64-digits5k", "compare needs at least two runs, got 1"),
        ("sweep larning-rate", "did you mean learning-rate?"),
        ("sweep fc64-digits5k epochs=1", "one field is to have several values"),
        ("sweep fc64-digits5k optimizer=sgd|adan", "did you mean adam?"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(convkit, line, message, tmp_path):
    status, _, err = convkit(line)
    assert status == 2
    assert err.startswith("convkit: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "runs").exists()


def test_resuming_from_the_command_line(convkit, small, tmp_path, monkeypatch):
    from convkit.lab import objectives

    asked = iter(range(1000))
    call = objectives.Classify.__call__

    def interrupt(self, *args):
        if next(asked) == 10:
            raise KeyboardInterrupt
        return call(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(objectives.Classify, "__call__", interrupt)
        status, _, err = convkit("train fc64-digits5k epochs=3 --device cpu")
    assert status == 130 and "convkit train --resume runs/fc64-digits5k-1" in err
    status, _, err = convkit("train --resume runs/fc64-digits5k-1 epochs=5")
    assert status == 2
    assert convkit("train --resume runs/fc64-digits5k-1 --device cpu")[0] == 0
    assert convkit("train fc64-digits5k epochs=3 --device cpu")[0] == 0
    one, other = (runs.load_checkpoint(tmp_path / "runs" / f"fc64-digits5k-{n}" / "last.pt")["model"] for n in (1, 2))
    assert all((one[key] == other[key]).all() for key in one)
    status, _, err = convkit("train --resume runs/fc64-digits5k-1")
    assert status == 2 and "that run is finished" in err


def test_list(convkit):
    status, out, _ = convkit("train --list")
    assert status == 0 and all(name in out for name in recipes.RECIPES)
    status, out, _ = convkit("train fc64-digits5k --list")
    assert status == 0 and all(name in out for name in recipes.FIELDS)


def test_keeping_what_is_finished(small, tmp_path):
    import torch
    from rich.console import Console

    cpu, quiet = torch.device("cpu"), Console(quiet=True)
    recipe = recipes.override(recipes.recipe("fc64-digits5k"), ["epochs=1"])
    first = experiment.train_recipe(recipe, cpu, out=tmp_path, keep=True, console=quiet)
    again = experiment.train_recipe(recipe, cpu, out=tmp_path, keep=True, console=quiet)
    other = experiment.train_recipe(recipes.override(recipe, ["seed=1"]), cpu, out=tmp_path, keep=True, console=quiet)
    assert again.folder == first.folder != other.folder


@pytest.fixture
def claims(monkeypatch):
    """Two claims that take a second: one true, one false."""
    from convkit.lab import reproduce

    tiny = "epochs=1", "backend=torch"
    arms = {
        "pretext": reproduce._arm("tiny-pretext", "fc64-digits5k", *tiny, "objective=rotate", measured=False),
        "teacher": reproduce._arm("tiny-teacher", "fc64-digits5k", *tiny, "epochs=2", one_seed=True),
        "taught": reproduce._arm(
            "tiny-taught", "fc64-digits5k", *tiny, "objective=distill", "teacher=@teacher", "init=@pretext", claimed=50
        ),
    }
    true = reproduce.Claim("true", "A network has an error", "arithmetic", arms, lambda e: e["taught"][0] >= 0, seeds=2)
    false = reproduce.Claim("false", "None has", "nobody", arms, reproduce.reaches({"taught": -1}), seeds=1)
    long = reproduce.Claim("long", "It takes long", "experience", {}, lambda e: False, quick=False)
    monkeypatch.setattr(reproduce, "CLAIMS", {claim.name: claim for claim in (true, false, long)})
    return reproduce


def test_reproduce(convkit, small, claims, tmp_path):
    status, out, err = convkit("reproduce true --device cpu")
    assert status == 0, err
    assert "taught, seed 1: test error" in out and "holds" in out
    folder = tmp_path / "runs" / "reproduce"
    report = json.loads((folder / "reproduce.json").read_text())
    assert report["command"] == "convkit reproduce true"
    (claim,) = report["claims"]
    assert [env["backend"] for env in claim["environments"]] == ["torch"]
    assert claim["verdict"] == "holds" and set(claim["arms"]) == {"teacher", "taught"}
    assert len(claim["arms"]["teacher"]["test_errors_percent"]) == 1
    taught = claim["arms"]["taught"]
    assert len(taught["test_errors_percent"]) == 2 and taught["claimed_error_percent"] == 50
    assert taught["recipe"]["teacher"] == "tiny-teacher-1" and taught["recipe"]["init"] == "tiny-pretext-1"
    for seed, name in enumerate(taught["runs"]):
        recipe = runs.Run.open(folder / name).recipe
        assert recipe.seed == seed and recipe.teacher.endswith("tiny-teacher-1")
        assert recipe.init.endswith(f"tiny-pretext-{seed + 1}")
    lines = (folder / "reproduce.md").read_text().splitlines()
    assert lines[2].startswith("| true | teacher |  |") and lines[3].startswith("|  | taught | 50 |")

    before = sorted(path.name for path in folder.iterdir())
    status, out, err = convkit("reproduce --device cpu")  # all quick ones; the first claim's runs are there
    assert status == 1 and "1 of 2 claims did not hold or were not run: false" in err and err.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before
    report = json.loads((folder / "reproduce.json").read_text())
    assert [claim["verdict"] for claim in report["claims"]] == ["holds", "does not hold"]


def test_ctrl_c_ends_reproduce_and_not_one_claim_of_it(convkit, small, claims, monkeypatch):
    asked = []

    def interrupted(recipe, *_, **__):
        asked.append(recipe.name)
        raise train.Interrupted("interrupted in epoch 1 of 1")

    monkeypatch.setattr(experiment, "train_recipe", interrupted)
    status, out, err = convkit("reproduce true false --device cpu")
    assert status == 130 and err == "convkit: interrupted in epoch 1 of 1\n" and len(asked) == 1


def test_reproduce_without_the_data(convkit, claims, monkeypatch):
    def missing(*_):
        raise data.DataError("not there")

    monkeypatch.setattr(data, "load", missing)
    status, out, err = convkit("reproduce true --device cpu")
    assert status == 1 and "not run: not there" in out and "were not run: true" in err


def test_reproduce_names_and_list(convkit, claims):
    status, _, err = convkit("reproduce flase")
    assert status == 2 and "no claim 'flase': did you mean false?" in err
    status, out, _ = convkit("reproduce --list")
    assert status == 0 and "It takes long (experience)" in out


def test_the_claims_can_be_built():
    from convkit.lab import models, reproduce

    for claim in reproduce.CLAIMS.values():
        for name, arm in claim.arms.items():
            assert arm.recipe.model in models.MODELS
            for value in (arm.recipe.init, arm.recipe.teacher):
                assert not value.startswith("@") or list(claim.arms).index(value[1:]) < list(claim.arms).index(name)
        measured = [name for name, arm in claim.arms.items() if arm.measured]
        assert isinstance(claim.check({name: [1.0] for name in measured}), bool)
