"""Objectives against plain formulas in float64, and what is done with frozen features."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from convkit.lab import LabError, data, experiment, models, objectives, probe, recipes, runs, train

CPU = torch.device("cpu")
QUIET = Console(quiet=True)


@pytest.fixture
def small(monkeypatch, digits5k):
    """experiment.prepare finds few digits."""
    monkeypatch.setattr(data, "load", lambda *_: digits5k.take(200, 60, 100))


def recipe(*changes, name="simplenet-digits5k"):
    return recipes.override(recipes.recipe(name), ["backend=torch", "epochs=1", *changes])


def net(classes=10, **options):
    return models.build("simplenet", backend="torch", num_classes=classes, **options).double()


def batch(count=6):
    return torch.rand(count, 1, 28, 28, dtype=torch.float64), torch.arange(count) % 10


def log_softmax(logits):
    return logits - logits.exp().sum(1, keepdim=True).log()


def test_classify():
    model, (images, labels) = net(), batch()
    logits = model(images)
    p = log_softmax(logits)
    nll = -p[range(6), labels]
    outcome = objectives.Classify()(model, images, labels)
    torch.testing.assert_close(outcome.loss, nll.mean())
    assert outcome.score == (logits.argmax(1) == labels).sum() and outcome.count == 6
    smooth = objectives.Classify(label_smoothing=0.1)
    torch.testing.assert_close(smooth(model, images, labels).loss, (0.9 * nll - 0.1 * p.mean(1)).mean())
    torch.testing.assert_close(smooth.evaluate(model, images, labels).loss, nll.mean())


def test_auxiliary_heads_are_in_the_training_loss_alone():
    class WithAuxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.other = net(), net()

        def forward(self, x):
            return self.net(x)

        def training_logits(self, x):
            return [(self.net(x), 1.0), (self.other(x), 0.3)]

    model, (images, labels) = WithAuxiliary(), batch()
    main, other = (F.cross_entropy(part(images), labels) for part in (model.net, model.other))
    outcome = objectives.Classify()(model, images, labels)
    torch.testing.assert_close(outcome.loss, main + 0.3 * other)
    torch.testing.assert_close(objectives.Classify().evaluate(model, images, labels).loss, main)


@pytest.mark.parametrize("same_crops", [True, False])
def test_distill(same_crops):
    model, teacher, (images, labels), (other, _) = net(), net(), batch(), batch()
    objective = objectives.Distill(teacher, temperature=3.0, same_crops=same_crops)
    assert objective.views == (1 if same_crops else 2) and not teacher.training
    outcome = objective(model, images, labels, *(() if same_crops else (other,)))
    s, t = model(images), teacher(images if same_crops else other).detach()
    soft = -((t / 3).softmax(1) * log_softmax(s / 3)).sum(1).mean()
    expected = -log_softmax(s)[range(6), labels].mean() + 9 * soft
    torch.testing.assert_close(outcome.loss, expected)
    outcome.loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not list(objective.teacher.parameters())[0].requires_grad
    torch.testing.assert_close(objective.evaluate(model, images, labels).loss, F.cross_entropy(s, labels))


def test_rotations_are_all_four():
    picture = torch.arange(9.0).view(1, 1, 3, 3)
    turned, turns = objectives.rotations(torch.cat([picture, picture + 10]))
    assert turns.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert turned[2, 0].tolist() == [[2, 5, 8], [1, 4, 7], [0, 3, 6]]  # a quarter turn, counter-clockwise
    assert torch.equal(turned[4, 0], picture[0, 0].flip(0, 1)) and torch.equal(turned[7], turned[6] + 10)
    with pytest.raises(ValueError, match="square"):
        objectives.rotations(torch.zeros(1, 1, 3, 4))


def test_rotate_and_joint():
    model, (images, labels) = net(4), batch()
    turned = torch.cat([images.rot90(k, (2, 3)) for k in range(4)])
    turns = torch.arange(4).repeat_interleave(6)
    outcome = objectives.Rotate()(model, images, labels)
    torch.testing.assert_close(outcome.loss, F.cross_entropy(model(turned), turns))
    assert outcome.count == 24 and outcome.score == (model(turned).argmax(1) == turns).sum()

    model = net()
    model.rotation_head = nn.Linear(256, 4).double()
    outcome = objectives.Joint(weight=0.5)(model, images, labels)
    rotation = F.cross_entropy(model.rotation_head(model.embed(turned)), turns)
    torch.testing.assert_close(outcome.loss, F.cross_entropy(model(images), labels) + 0.5 * rotation)
    assert outcome.count == 6 and outcome.score == (model(images).argmax(1) == labels).sum()


def test_regression_targets_are_standardised_and_inverted():
    targets = torch.tensor([[1e3, 5.0], [3e3, 5.0], [8e3, 5.0]], dtype=torch.float64)  # the second does not vary
    objective = objectives.Regress.of(targets)
    standard = objective.standardize(targets)
    torch.testing.assert_close(standard.mean(0), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(standard[:, 0].std(correction=0), torch.tensor(1.0))
    torch.testing.assert_close(objective.invert(standard), targets.float())
    outcome = objective.evaluate(nn.Identity(), standard, targets)
    assert outcome.loss < 1e-12 and outcome.score / outcome.count == pytest.approx(1)
    mean = objective.evaluate(nn.Identity(), torch.zeros(3, 2), targets[:, 0].expand(2, 3).T)
    assert mean.loss > 0
    single = objectives.Regress.of(targets[:, 0])
    nothing = single.evaluate(nn.Identity(), torch.zeros(3, 1), targets[:, 0])
    assert nothing.loss.item() == pytest.approx(1) and nothing.score.item() == pytest.approx(0, abs=1e-6)


def test_regression_through_the_loop(few, tmp_path):
    """How much ink a digit takes, learnt by a linear network; predictions are in pixels."""
    ink = [data.Split(s.images, s.images.flatten(1).float().sum(1) / 255) for s in (few.train, few.val, few.test)]
    inked = dataclasses.replace(few, train=ink[0], val=ink[1], test=ink[2])
    objective = objectives.Regress.of(inked.train.labels)
    model = nn.Sequential(nn.AvgPool2d(14), nn.Flatten(), nn.Linear(4, 1))
    run = train.fit(model, inked, objective, recipe("epochs=15", "learning_rate=0.3"), out=tmp_path, console=QUIET)
    assert run.history[-1]["val_r2"] > 0.9 and run.result["val_r2"] == max(row["val_r2"] for row in run.history)
    images, labels = next(inked.test.batches(100))
    assert (objective.predict(model, images)[:, 0] - labels).abs().mean() < 0.3 * labels.std()


def test_topk_fixture():
    """The true label ranked 4th gives error 1, 1, 1, 0, 0 for k = 1 … 5."""
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    assert objectives.topk_errors(logits, torch.tensor([3])) == [1, 1, 1, 0, 0]
    two = objectives.topk_errors(logits.repeat(2, 1), torch.tensor([3, 0]))
    assert two == [0.5, 0.5, 0.5, 0, 0]
    assert objectives.topk_errors(torch.zeros(1, 6), torch.tensor([1])) == [1, 0, 0, 0, 0]


# ------------------------------------------------------------------------------------------ through recipes and runs


def test_distilling_and_joint_by_recipe(small, tmp_path):
    with pytest.raises(LabError, match="no finished run of simplenet-digits5k .*convkit train simplenet-digits5k"):
        experiment.train_recipe(recipe("objective=distill", "teacher=simplenet-digits5k"), CPU, out=tmp_path)
    with pytest.raises(LabError, match="objective=distill needs teacher=RUN"):
        experiment.train_recipe(recipe("objective=distill"), CPU, out=tmp_path)
    teacher = experiment.train_recipe(recipe(), CPU, out=tmp_path, console=QUIET)
    for changes in (["same_crops=no", "augment=affine:0.1,0,0"], []):
        student = recipe("objective=distill", "teacher=simplenet-digits5k", *changes, name="fc64-digits5k")
        run = experiment.train_recipe(student, CPU, out=tmp_path, console=QUIET)
        assert run.recipe.teacher == str(teacher.folder)  # the folder that it was, not the newest one
    joint = experiment.train_recipe(recipe("objective=joint"), CPU, out=tmp_path, console=QUIET)
    assert "rotation_head.weight" in runs.load_checkpoint(joint.folder / "best.pt")["model"]
    assert not experiment.trained(joint, CPU).model.training


def test_probing_a_rotation_trunk(small, tmp_path):
    trunk = experiment.train_recipe(recipe("objective=rotate"), CPU, out=tmp_path, console=QUIET)
    assert trunk.history[0]["val_accuracy"] > 0.25
    name = str(trunk.folder)
    run = experiment.train_recipe(
        recipe(f"init={name}", "freeze=yes", "epochs=5", "head=mlp", "layer=conv2"), CPU, out=tmp_path, console=QUIET
    )
    before = runs.load_checkpoint(trunk.folder / "best.pt")["model"]
    setup = experiment.trained(run, CPU)
    for key, value in setup.model.trunk.state_dict().items():
        assert key.startswith("output.") or torch.equal(value, before[key])
    assert setup.model.features(torch.zeros(1, 1, 28, 28)).shape == (1, 50, 8, 8)
    # what was trained on vectors gives the same from pictures
    _, accuracy = train.evaluate(setup.model, setup.data.val, setup.objective)
    assert accuracy == pytest.approx(run.result["val_error_percent"] / -100 + 1)
    with pytest.raises(LabError, match="layer 'conv9': no such module; did you mean conv"):
        experiment.train_recipe(recipe("freeze=yes", "layer=conv9"), CPU, out=tmp_path)
    with pytest.raises(LabError, match="freeze trains a head for objective=classify"):
        experiment.train_recipe(recipe("freeze=yes", "objective=rotate"), CPU, out=tmp_path)


def test_frozen_batch_norms(small, tmp_path):
    """In evaluation mode nothing of the trunk moves; the flag shows that its statistics otherwise do."""
    base = recipe("model=cifar_mobilenet", "freeze=yes", "images=40", "validation_images=20", "augment=affine:0,0,5")
    states = {}
    for mode in ("eval", "train"):
        setup = experiment.prepare(dataclasses.replace(base, trunk_batch_norm=mode), CPU)
        before = {key: value.clone() for key, value in setup.model.trunk.state_dict().items()}
        train.fit(setup.model, setup.data, setup.objective, setup.recipe, out=tmp_path, console=QUIET)
        after = setup.model.trunk.state_dict()
        states[mode] = {key for key in before if not torch.equal(before[key], after[key])}
    assert states["eval"] == set()
    assert states["train"] and all("running" in key or "num_batches" in key for key in states["train"])


def test_features_in_the_place_of_pictures(few):
    trunk = models.build("simplenet", backend="torch")
    model = probe.Frozen(trunk, 10, (1, 28, 28))
    features = probe.with_features(model, few)
    assert features.train.shape == (256,) and torch.equal(features.test.images, few.test.images)
    torch.testing.assert_close(features.train.images.mean(0), torch.zeros(256), rtol=0, atol=1e-5)
    order = torch.randperm(200)
    for shard in ((0, 1), (1, 3)):
        vectors = list(features.train.batches(64, order, start=1, shard=shard))
        pictures = list(few.train.batches(64, order, start=1, shard=shard))
        assert len(vectors) == len(pictures) == 3
        for (vector, label), (picture, other) in zip(vectors, pictures, strict=True):
            assert torch.equal(label, other)
            torch.testing.assert_close(vector, model.embed(picture), rtol=1e-4, atol=1e-4)


def test_weights_from_files(tmp_path):
    """Such as torchvision's: a state_dict of 1000 classes."""
    torch.manual_seed(1)
    published = models.build("resnet18", backend="torch")
    torch.save(published.state_dict(), tmp_path / "resnet18.pth")
    network = models.build("resnet18", backend="torch", num_classes=10)
    probe.load_trunk(network, str(tmp_path / "resnet18.pth"))
    assert torch.equal(network.layer4[1].conv2.weight, published.layer4[1].conv2.weight)
    assert network.fc.weight.shape == (10, 512)
    torch.save({"epoch": 3, "state_dict": published.state_dict()}, tmp_path / "wrapped.pth")
    probe.load_trunk(network, str(tmp_path / "wrapped.pth"))

    with pytest.raises(LabError, match="weights of another network"):
        probe.load_trunk(models.build("simplenet", backend="torch"), str(tmp_path / "resnet18.pth"))
    state = published.state_dict()
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    torch.save(state, tmp_path / "grey.pth")
    with pytest.raises(LabError, match="weights of another network: size mismatch for conv1.weight"):
        probe.load_trunk(network, str(tmp_path / "grey.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(LabError, match="damaged, or not a file of weights"):
        probe.load_trunk(network, str(tmp_path / "text.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(LabError, match="not a state_dict: a list"):
        probe.load_trunk(network, str(tmp_path / "list.pth"))
    with pytest.raises(LabError, match="neither a run folder nor a recipe"):
        probe.load_trunk(network, "no-such-run", tmp_path)


def test_fine_tuning_starts_from_the_weights(small, tmp_path):
    source = experiment.train_recipe(recipe("objective=rotate"), CPU, out=tmp_path, console=QUIET)
    setup = experiment.prepare(experiment.resolve(recipe(f"init={source.folder.name}"), tmp_path), CPU)
    best = runs.load_checkpoint(source.folder / "best.pt")["model"]
    assert torch.equal(setup.model.conv1.weight, best["conv1.weight"]) and setup.model.output.out_features == 10
    assert math.prod(p.requires_grad for p in setup.model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model=simplenett"], "unknown network 'simplenett': did you mean simplenet"),
        (["model.width=3"], "simplenet has no option 'width'"),
        (["model.activation=relux"], "activation must be one of"),
        (["model.size=20"], "network simplenet does not take pictures of 1x28x28"),
    ],
)
def test_networks_that_do_not_fit(small, changes, message):
    with pytest.raises(LabError, match=message):
        experiment.prepare(recipe(*changes), CPU)


def test_some_of_the_classes(small, digits5k):
    setup = experiment.prepare(recipe("classes=7,3"), CPU)
    assert setup.data.classes == ("7", "3") and setup.model.output.out_features == 2
    everything = digits5k.take(200, 60, 100).train
    for number, label in enumerate((7, 3)):
        mine = setup.data.train.images[setup.data.train.labels == number]
        assert len(mine) == 20 and torch.equal(mine, everything.images[everything.labels == label])
    with pytest.raises(LabError, match="classes must be from 0 to 9 in digits5k"):
        experiment.prepare(recipe("classes=7,10"), CPU)


def test_the_share_held_out_is_the_recipes(digits5k):
    setup = experiment.prepare(recipe("validation_share=0.05", "images=100"), CPU)
    assert len(setup.data.val) == 200
    with pytest.raises(LabError, match="validation_share must be between 0 and 1"):
        recipe("validation_share=0")


def test_dropout_is_on_the_embedding_in_training_alone(small):
    model = experiment.prepare(recipe("dropout=0.5"), CPU).model
    seen = []
    model.head.register_forward_pre_hook(lambda head, x: seen.append(x[0]))
    images = torch.rand(4, 1, 28, 28)
    model.eval()(images)
    torch.testing.assert_close(seen[0], model.embed(images))
    model.train()(images)
    kept = seen[1] != 0
    torch.testing.assert_close(seen[1][kept], 2 * seen[0][kept])
    assert 0.3 < kept.sum() / (seen[0] != 0).sum() < 0.7


def test_devices():
    assert experiment.pick_device("cpu") == CPU
    with pytest.raises(LabError, match="--device must be cpu or cuda, got 'tpux'"):
        experiment.pick_device("tpux")
    if not torch.cuda.is_available():
        with pytest.raises(LabError, match="sees no GPU"):
            experiment.pick_device("cuda")
