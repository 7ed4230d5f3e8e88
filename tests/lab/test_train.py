"""The training loop and its run folder."""

import csv
import dataclasses
import json
import math
import os
import signal

import pytest
import torch
from rich.console import Console

from convkit.lab import LabError, augment, data, evaluate, models, objectives, plots, recipes, runs, train

RECIPE = recipes.Recipe("tiny", "fc64", "digits5k", epochs=3, batch_size=30, learning_rate=1e-3, backend="torch")
CLASSIFY = objectives.Classify()
QUIET = Console(quiet=True)
FILES = {"config.json", "env.json", "metrics.csv", "log.txt", "best.pt", "last.pt", "curves.png", "result.json"}


def fit(pictures, out, recipe=RECIPE, objective=CLASSIFY, console=QUIET):
    torch.manual_seed(recipe.seed)
    model = models.build(recipe.model, backend=recipe.backend)
    return model, train.fit(model, pictures, objective, recipe, out=out, console=console)


def read_json(path):
    return json.loads(path.read_text())


def test_run_folder(few, tmp_path):
    model, run = fit(few, tmp_path)
    assert {path.name for path in run.folder.iterdir()} == FILES
    error = evaluate.test(run, model, few, CLASSIFY)
    assert run.folder == tmp_path / "tiny-1"
    assert {path.name for path in run.folder.iterdir()} == FILES | {"confusion.png", "predictions.csv"}

    config = read_json(run.folder / "config.json")
    assert recipes.from_json(config["recipe"]) == RECIPE
    assert config["network"] == {"name": "fc64", "class": "MLP", "parameters": 50_890}
    assert (config["data"]["train"], config["data"]["val"], config["data"]["test"]) == (200, 60, 100)

    env = read_json(run.folder / "env.json")
    assert env["torch"] == torch.__version__ and env["threads"] == torch.get_num_threads() and env["backend"] == "torch"

    with open(run.folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [int(row["step"]) for row in rows] == [7, 14, 21]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert float(rows[2]["train_loss"]) < float(rows[0]["train_loss"])

    log = (run.folder / "log.txt").read_text().splitlines()
    assert len(log) == 3 and log[2].startswith("tiny: epoch  3/3  train loss")

    result = read_json(run.folder / "result.json")
    assert result == run.result
    assert result["status"] == "finished" and result["epochs"] == 3 and result["parameters"] == 50_890
    best = min(rows, key=lambda row: (-float(row["val_accuracy"]), float(row["val_loss"])))
    assert result["best_epoch"] == int(best["epoch"])
    assert result["test_error_percent"] == error and result["test_images"] == 100

    checkpoint = runs.load_checkpoint(run.folder / "best.pt")
    assert checkpoint["epoch"] == result["best_epoch"]
    model.load_state_dict(checkpoint["model"])
    _, accuracy = train.evaluate(model, few.test, CLASSIFY)
    assert error == pytest.approx(100 * (1 - accuracy))


def test_runs_are_numbered(few, tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    (tmp_path / "tiny-7").mkdir()
    (tmp_path / "tiny-notes").mkdir()
    assert [fit(few, tmp_path, recipe)[1].folder.name for _ in range(2)] == ["tiny-8", "tiny-9"]


def test_fit_never_reads_the_test_pictures(few, tmp_path):
    blind = dataclasses.replace(few, test=dataclasses.replace(few.test, images=None, labels=few.test.labels))
    fit(blind, tmp_path, dataclasses.replace(RECIPE, epochs=1))


@pytest.mark.parametrize(("model", "backend"), [("fc64", "torch"), ("simplenet", "convkit")])
def test_the_seed_decides_everything(few, tmp_path, model, backend):
    recipe = dataclasses.replace(RECIPE, model=model, backend=backend, epochs=2)
    first, again = (fit(few, tmp_path, recipe)[0].state_dict() for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    other = fit(few, tmp_path, dataclasses.replace(recipe, seed=1))[0].state_dict()
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_epochs_do_not_depend_on_what_else_drew_random_numbers(few, tmp_path):
    class Drawing(objectives.Classify):
        def __call__(self, model, images, labels):
            torch.rand(3)
            return super().__call__(model, images, labels)

    plain, disturbed = fit(few, tmp_path)[0], fit(few, tmp_path, objective=Drawing())[0]
    torch.testing.assert_close(plain.state_dict(), disturbed.state_dict(), rtol=0, atol=0)


def test_checkpoint_errors(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(LabError, match="no such checkpoint"):
        runs.load_checkpoint(path)
    runs.save_checkpoint(path, {"format": runs.CHECKPOINT_FORMAT, "values": torch.arange(1000)})
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a checkpoint at all"):
        path.write_bytes(broken)
        with pytest.raises(LabError, match="damaged or not a checkpoint") as error:
            runs.load_checkpoint(path)
        assert "\n" not in str(error.value)
    runs.save_checkpoint(path, {"format": 0})
    with pytest.raises(LabError, match="not a convkit checkpoint of format 2"):
        runs.load_checkpoint(path)


def test_checkpoint_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"format": 1, "x": Harmful()}, tmp_path / "x.pt")
    with pytest.raises(LabError, match="damaged or not a checkpoint"):
        runs.load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_writing_is_atomic(tmp_path, failure):
    path = tmp_path / "last.pt"
    runs.write_atomically(path, lambda file: file.write(b"whole"))

    def half(file):
        file.write(b"ha")
        file.flush()
        assert path.read_bytes() == b"whole"  # whoever reads meanwhile
        raise failure

    with pytest.raises(failure):
        runs.write_atomically(path, half)
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


class Failing(objectives.Classify):
    """Classification, until it has been asked in training ``good`` times; then ``fail`` decides."""

    def __init__(self, good, fail):
        super().__init__()
        self.__dict__.update(left=good, fail=fail)

    def __call__(self, model, images, labels):
        self.__dict__["left"] -= 1
        outcome = super().__call__(model, images, labels)
        return self.fail(outcome) if self.left < 0 else outcome


def nan(outcome):
    return outcome._replace(loss=outcome.loss * math.nan)


def interrupt(outcome):
    raise KeyboardInterrupt


class SignalsWhenDropped:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def ctrl_c_in_a_destructor(outcome):
    """Python discards what a destructor raises."""
    SignalsWhenDropped()
    return outcome


def test_non_finite_loss_stops_and_keeps_the_state_from_before(few, tmp_path):
    message = r"the loss became nan at step 17 with learning rate 0.001; .*last.pt holds the state after epoch 2"
    with pytest.raises(train.NonFiniteLoss, match=message) as error:
        fit(few, tmp_path, objective=Failing(16, nan))
    assert error.value.exit_code == 1
    folder = tmp_path / "tiny-1"
    assert {path.name for path in folder.iterdir()} == FILES
    state = runs.load_checkpoint(folder / "last.pt")
    assert state["epoch"] == 2 and all(value.isfinite().all() for value in state["model"].values())
    result = read_json(folder / "result.json")
    assert result["status"] == "non-finite loss" and "step 17" in result["message"] and result["epochs"] == 2
    assert "step 17" in (folder / "log.txt").read_text()


def test_non_finite_loss_in_the_first_epoch_keeps_the_initial_weights(few, tmp_path):
    with pytest.raises(train.NonFiniteLoss, match="step 1 .*after epoch 0"):
        fit(few, tmp_path, objective=Failing(0, nan))
    torch.manual_seed(RECIPE.seed)
    initial = models.build("fc64", backend="torch").state_dict()
    state = runs.load_checkpoint(tmp_path / "tiny-1" / "last.pt")
    torch.testing.assert_close(state["model"], initial, rtol=0, atol=0)
    assert read_json(tmp_path / "tiny-1" / "result.json")["epochs"] == 0


def test_weights_that_blow_up_in_the_last_step_are_found_by_validation(few, tmp_path):
    class BlowingUp(objectives.Classify):
        def evaluate(self, model, images, labels):
            return nan(super().evaluate(model, images, labels))

    with pytest.raises(train.NonFiniteLoss, match="the validation loss became nan at step 7"):
        fit(few, tmp_path, objective=BlowingUp())
    assert runs.load_checkpoint(tmp_path / "tiny-1" / "last.pt")["epoch"] == 0
    assert not (tmp_path / "tiny-1" / "best.pt").exists()


def test_a_learning_rate_that_really_diverges(few, tmp_path):
    recipe = dataclasses.replace(RECIPE, learning_rate=1e30, epochs=5)
    with pytest.raises(train.NonFiniteLoss, match=r"learning rate 1e\+30"):
        fit(few, tmp_path, recipe)


@pytest.mark.parametrize("how, batches", [(interrupt, 0), (ctrl_c_in_a_destructor, 4)])
def test_interruption_leaves_a_usable_folder(few, tmp_path, how, batches):
    with pytest.raises(
        train.Interrupted,
        match=f"interrupted in epoch 2 of 3; .*tiny-1 holds the 1 whole epochs before it and {batches} of its 7 batch",
    ) as error:
        fit(few, tmp_path, objective=Failing(10, how))
    assert error.value.exit_code == 130
    folder = tmp_path / "tiny-1"
    assert {path.name for path in folder.iterdir()} == FILES
    assert read_json(folder / "result.json")["status"] == "interrupted"
    state = runs.load_checkpoint(folder / "last.pt")
    assert (state["epoch"], state["batch"]) == (1, batches)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait(few, tmp_path):
    def twice(outcome):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("still going")

    with pytest.raises(train.Interrupted):
        fit(few, tmp_path, objective=Failing(10, twice))


def test_a_terminal_gets_a_bar_and_the_log_its_lines(few, tmp_path):
    console = Console(force_terminal=True, width=120)
    with console.capture() as capture:
        _, run = fit(few, tmp_path, console=console)
    assert "epoch 3/3" in capture.get() and "validation" in capture.get()
    assert len((run.folder / "log.txt").read_text().splitlines()) == 3


def test_evaluate_restores_the_mode(few):
    model = models.build("fc64", backend="torch")
    model.train()
    whole = train.evaluate(model, few.test, CLASSIFY)
    assert model.training
    parts = train.evaluate(model.eval(), few.test, CLASSIFY, batch_size=7)
    assert not model.training
    assert whole == pytest.approx(parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive and finite, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be zero or positive"),
        ({"seed": -1}, "seed must be from 0 to"),
    ],
)
def test_wrong_recipes(change, message):
    with pytest.raises(LabError, match=f"tiny: {message}"):
        dataclasses.replace(RECIPE, **change)


def test_recipes_name_what_exists():
    for recipe in recipes.RECIPES.values():
        assert set(recipe.options) <= set(models.entry(recipe.model).options)
        assert recipe.data in data.NAMES and recipe.source
        augment.parse(recipe.augment)
        for other in (recipe.init, recipe.teacher):
            assert not other or other.endswith(".pth") or other in recipes.RECIPES
    with pytest.raises(LabError, match="did you mean simplenet-mnist"):
        recipes.recipe("simplenet-mnits")
    with pytest.raises(LabError, match="tiny: optimizer must be one of .*adam, .*, got 'adamm'; did you mean adam"):
        dataclasses.replace(RECIPE, optimizer="adamm")


def test_out_that_cannot_be_written(few, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot make a run folder in .*file"):
        fit(few, tmp_path / "file")


@pytest.mark.parametrize("epochs", [1, 60])
def test_curves_are_a_picture(epochs):
    history = [
        {"epoch": e, "train_loss": 1 / e, "val_loss": 1.2 / e, "train_accuracy": 0.9, "val_accuracy": 0.8}
        for e in range(1, epochs + 1)
    ]
    png = plots.curves(history, "title", best_epoch=epochs, test_error=12.5)
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


# ------------------------------------------------------------------------------- optimisers, schedules, and the rest


STEPS = 7  # of an epoch of 200 pictures


def rates(few, tmp_path, monkeypatch, **changes):
    """The learning rate of every step of a run, and its validation accuracies."""
    recipe = dataclasses.replace(RECIPE, optimizer="sgd", learning_rate=0.1, **changes)
    noted = []
    make = train.make_optimizer

    def noting(model, recipe):
        optimizer = make(model, recipe)
        optimizer.register_step_pre_hook(lambda optimizer, *_: noted.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", noting)
    _, run = fit(few, tmp_path, recipe)
    assert [row["learning_rate"] for row in run.history] == noted[STEPS - 1 :: STEPS]
    return noted, [row["val_accuracy"] for row in run.history]


SCHEDULES = {
    "constant": ({}, lambda t: 0.1),
    "step": ({"milestones": (1.0, 2.5), "gamma": 0.5}, lambda t: 0.1 * 0.5 ** ((t >= 7) + (t >= round(2.5 * 7)))),
    "inverse_time": ({"decay": 0.05}, lambda t: 0.1 / (1 + 0.05 * t)),
    "cosine": ({}, lambda t: 0.05 * (1 + math.cos(math.pi * t / (3 * STEPS)))),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_follow_their_formulas(few, tmp_path, monkeypatch, schedule):
    changes, formula = SCHEDULES[schedule]
    noted, _ = rates(few, tmp_path, monkeypatch, schedule=schedule, **changes)
    assert noted == pytest.approx([formula(t) for t in range(3 * STEPS)])


TORCH = {
    "step": ({"milestones": (1.0, 2.5)}, lambda o, n: torch.optim.lr_scheduler.MultiStepLR(o, [7, 18], 0.1)),
    "cosine": ({}, lambda o, n: torch.optim.lr_scheduler.CosineAnnealingLR(o, n)),
    "one_cycle": (
        {"warm_up": 0.4},
        lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, n, pct_start=0.4, cycle_momentum=False),
    ),
}


@pytest.mark.parametrize("schedule", TORCH)
def test_schedules_are_torchs_own(few, tmp_path, monkeypatch, schedule):
    changes, make = TORCH[schedule]
    noted, _ = rates(few, tmp_path, monkeypatch, schedule=schedule, **changes)
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    scheduler, expected = make(optimizer, 3 * STEPS), []
    for _ in range(3 * STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert noted == expected


def test_plateau_looks_at_the_validation_metric(few, tmp_path, monkeypatch):
    scores = [0.5, 0.6, 0.6, 0.55, 0.7, 0.7, 0.7, 0.7]
    given = iter(scores)
    monkeypatch.setattr(train, "evaluate", lambda *args, **options: (1.0, next(given)))
    changes = {"schedule": "plateau", "gamma": 0.5, "plateau_patience": 1, "epochs": len(scores)}
    noted, _ = rates(few, tmp_path, monkeypatch, **changes)
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    scheduler, expected = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=1), []
    for score in scores:
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(score)
    assert noted[::STEPS] == expected == [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.8, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.01, momentum=0.8, nesterov=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.01, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, (0.8, 0.999), weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, (0.8, 0.999), weight_decay=0.1),
}


def test_every_optimizer_is_tried():
    assert set(OPTIMIZERS) == set(recipes.CHOICES["optimizer"])
    assert {*SCHEDULES, *TORCH, "plateau"} == set(recipes.CHOICES["schedule"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_against_torch_by_hand(few, tmp_path, optimizer):
    """In float64, where fused and plain steps agree to rounding that does not matter."""
    recipe = dataclasses.replace(
        RECIPE, optimizer=optimizer, momentum=0.8, weight_decay=0.1, learning_rate=0.01, epochs=2, clip_norm=0.5
    )

    class Double(objectives.Classify):
        def __call__(self, model, images, labels):
            return super().__call__(model, images.double(), labels)

        def evaluate(self, model, images, labels):
            return super().evaluate(model, images.double(), labels)

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)).double()

    mine, expected = model(), model()
    train.fit(mine, few, Double(), recipe, out=tmp_path, console=QUIET)
    by_hand = OPTIMIZERS[optimizer](expected.parameters())
    for epoch in (1, 2):
        for images, labels in few.train.batches(RECIPE.batch_size, train.epoch_order(len(few.train), 0, epoch)):
            by_hand.zero_grad()
            torch.nn.functional.cross_entropy(expected(images.double()), labels).backward()
            norm = torch.cat([p.grad.flatten() for p in expected.parameters()]).norm()
            for p in expected.parameters():
                p.grad *= min(1.0, 0.5 / norm.item())
            by_hand.step()
    torch.testing.assert_close(mine.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


def test_ema_is_the_average_of_the_weights_and_is_what_is_kept(few, tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPE, ema=0.9, epochs=2, optimizer="sgd", learning_rate=0.1)
    steps = []
    make = train.make_optimizer

    def noting(model, recipe):
        optimizer = make(model, recipe)
        optimizer.register_step_post_hook(lambda *_: steps.append(model.fc1.weight.detach().double().clone()))
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", noting)
    model, run = fit(few, tmp_path, recipe)
    assert run.result["best_epoch"] == 2
    average = steps[0]
    for number, weight in enumerate(steps[1:], start=1):
        keep = min(0.9, (1 + number) / (10 + number))
        average = keep * average + (1 - keep) * weight
    best = runs.load_checkpoint(run.folder / "best.pt")["model"]
    torch.testing.assert_close(best["fc1.weight"].double(), average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(best["fc1.weight"], model.fc1.weight)
    model.load_state_dict(best)
    assert train.evaluate(model, few.val, CLASSIFY) == (run.history[1]["val_loss"], run.history[1]["val_accuracy"])


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_mixed_precision(few, tmp_path, precision):
    seen = set()

    class Seeing(objectives.Classify):
        def __call__(self, model, images, labels):
            seen.add(model(images).dtype)
            return super().__call__(model, images, labels)

    recipe = dataclasses.replace(RECIPE, precision=precision)
    model, run = fit(few, tmp_path, recipe, objective=Seeing())
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    full = fit(few, tmp_path)[1]
    assert run.history[2]["train_loss"] == pytest.approx(full.history[2]["train_loss"], rel=0.02)


def test_channels_last_gives_the_same_to_rounding(few, tmp_path):
    recipe = dataclasses.replace(RECIPE, model="simplenet", backend="convkit", optimizer="sgd", epochs=1)
    formats = []

    class Seeing(objectives.Classify):
        def __call__(self, model, images, labels):
            formats.append(model.conv2.weight.is_contiguous(memory_format=torch.channels_last))
            return super().__call__(model, images, labels)

    states = [
        fit(few, tmp_path, dataclasses.replace(recipe, channels_last=last), objective=Seeing())[0].state_dict()
        for last in (False, True)
    ]
    assert formats == [False] * STEPS + [True] * STEPS
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-6)


def test_early_stopping(few, tmp_path, monkeypatch):
    scores = iter([0.5, 0.6, 0.6, 0.55, 0.7])
    monkeypatch.setattr(train, "evaluate", lambda *args, **options: (1.0, next(scores)))
    _, run = fit(few, tmp_path, dataclasses.replace(RECIPE, epochs=20, patience=2))
    assert len(run.history) == 4 and run.result["best_epoch"] == 2
    assert run.result["status"] == "finished" and run.result["stopped_early"]


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(30, [30] * 6 + [20]), (32, [32] * 6), (80, [80, 80]), (199, [199]), (1000, [200])]
)
def test_up_to_half_a_batch_at_the_end_of_an_epoch_is_left_out(few, tmp_path, batch_size, sizes):
    class Noting(objectives.Classify):
        def __call__(self, model, images, labels):
            seen.append(images)
            return super().__call__(model, images, labels)

    seen = []
    recipe = dataclasses.replace(RECIPE, batch_size=batch_size, epochs=2)
    _, run = fit(few, tmp_path, recipe, Noting())
    assert [len(images) for images in seen] == 2 * sizes
    assert [row["step"] for row in run.history] == [len(sizes), 2 * len(sizes)]
    epochs = [torch.cat(part).flatten(1).unique(dim=0) for part in (seen[: len(sizes)], seen[len(sizes) :])]
    assert len(epochs[0]) == len(epochs[1]) == sum(sizes)  # different pictures within an epoch,
    assert torch.equal(*epochs) == (sum(sizes) == 200)  # and others are left out of the next


def test_batches_of_one_that_batch_norm_cannot_take(few, tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10), torch.nn.BatchNorm1d(10))
    recipe = dataclasses.replace(RECIPE, batch_size=1)
    with pytest.raises(LabError, match="one picture a process: choose a larger batch_size than 1"):
        train.fit(model, few, CLASSIFY, recipe, out=tmp_path, console=QUIET)


def test_batches_that_are_too_small_to_be_shared(few, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "processes", lambda: (0, 21))
    with pytest.raises(LabError, match="21 processes cannot share a batch of 20, .*batch_size=30 makes of 200"):
        fit(few, tmp_path)


def test_tensorboard_that_is_not_there_is_said_before_training(few, tmp_path, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LabError, match="type  pip install tensorboard"):
        torch.manual_seed(0)
        train.fit(
            models.build("fc64", backend="torch"),
            few,
            CLASSIFY,
            RECIPE,
            out=tmp_path,
            console=QUIET,
            tensorboard=True,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        (["epochs=5", "learning-rate=0.5"], {"epochs": 5, "learning_rate": 0.5}),
        (["milestones=1,2.5", "schedule=step"], {"milestones": (1.0, 2.5), "schedule": "step"}),
        (["augment=pad_crop:2+affine:0.1,0.1,5"], {"augment": ("pad_crop:2", "affine:0.1,0.1,5")}),
        (["augment="], {"augment": ()}),
        (["channels_last=yes", "claimed_error=none"], {"channels_last": True, "claimed_error": None}),
        (["model.norm=group", "model.blocks=1,1,1"], {"options": {"norm": "group", "blocks": (1, 1, 1)}}),
    ],
)
def test_overrides(changes, fields):
    changed = recipes.override(RECIPE, changes)
    assert changed == dataclasses.replace(RECIPE, **fields)
    assert recipes.from_json(json.loads(json.dumps(dataclasses.asdict(changed)))).epochs == changed.epochs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epochs", "'epochs' is not of the form field=value"),
        ("epochs=2.5", "epochs must be a whole number, got '2.5'"),
        ("learning_rate=fast", "learning_rate must be a number, got 'fast'"),
        ("lerning_rate=1", "no field 'lerning_rate': did you mean learning_rate"),
        ("name=x", "no field 'name'"),
        ("channels_last=perhaps", "channels_last must be true or false, got 'perhaps'"),
        ("schedule=cosin", "schedule must be one of .* got 'cosin'; did you mean cosine"),
        ("schedule=step", "milestones must be given for schedule=step"),
        ("milestones=3,2", "milestones must be positive numbers of epochs in ascending order"),
        ("ema=1", "ema must be from 0 to below 1"),
        ("classes=1", "classes must be several different classes"),
    ],
)
def test_overrides_that_are_wrong(change, message):
    with pytest.raises(LabError, match=message):
        recipes.override(RECIPE, [change])
