"""From a recipe to a run: the data, the network and the objective that a recipe names, put together and trained."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from convkit.lab import LabError, data, evaluate, models, runs, train
from convkit.lab.distributed import processes
from convkit.lab.objectives import Classify, Distill, Joint, Objective, Rotate
from convkit.lab.probe import Frozen, load_trunk, with_features
from convkit.lab.recipes import Recipe
from convkit.lab.runs import Run

__all__ = [
    "Setup",
    "mean_and_std",
    "pick_device",
    "prepare",
    "resolve",
    "resume",
    "test_error",
    "train_recipe",
    "trained",
]


@dataclasses.dataclass
class Setup:
    """Everything that :func:`convkit.lab.train.fit` takes."""

    recipe: Recipe
    """With the runs that it builds on by their folders."""
    model: models.Network
    data: data.Data
    objective: Objective


def pick_device(name: str | None) -> torch.device:
    """The device called ``name``; cuda if there is one and none is named. LabError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LabError(f"--device must be cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise LabError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LabError("--device cuda: PyTorch sees no GPU here; leave it out, or take cpu")
    return device


def resolve(recipe: Recipe, out: str | os.PathLike[str] = "runs") -> Recipe:
    """The recipe with the runs that it builds on as absolute paths: config.json shall say which they were."""
    changes = {}
    if recipe.init:
        changes["init"] = recipe.init
    if recipe.objective == "distill":
        if not recipe.teacher:
            raise LabError(f"{recipe.name}: objective=distill needs teacher=RUN, a run folder or a recipe")
        changes["teacher"] = recipe.teacher
    for field, value in changes.items():
        path = Path(value) if Path(value).is_file() else runs.find(value, out).folder
        changes[field] = str(path.resolve())
    return dataclasses.replace(recipe, **changes)


def prepare(recipe: Recipe, device: torch.device, *, weights: bool = True) -> Setup:
    """Loads the data, draws the network and makes the objective of a recipe that :func:`resolve` gave.

    ``weights=False``: the network will be overwritten from a checkpoint and only evaluated, so that the runs that it
    was built on need not be there any more.
    """
    everything = _of_classes(_load_data(recipe), recipe)
    everything = everything.take(
        recipe.images or len(everything.train), recipe.validation_images or len(everything.val), len(everything.test)
    ).to(device)
    classes = 4 if recipe.objective == "rotate" else len(everything.classes)
    torch.manual_seed(recipe.seed)
    model = _build(recipe, classes, everything.shape).to(device)
    if recipe.objective == "joint":
        with torch.no_grad():
            width = model.eval().embed(torch.zeros(1, *everything.shape, device=device)).shape[1]
        model.train().add_module("rotation_head", nn.Linear(width, 4, device=device))
    if recipe.init and weights:
        load_trunk(model, recipe.init)
    if recipe.freeze:
        if recipe.objective != "classify":
            raise LabError(f"{recipe.name}: freeze trains a head for objective=classify, got {recipe.objective}")
        model = Frozen(
            model,
            classes,
            everything.shape,
            head=recipe.head,
            layer=recipe.layer,
            batch_norm=recipe.trunk_batch_norm,
        ).to(device)
    if recipe.dropout:
        model.head.register_forward_pre_hook(lambda head, x: nn.functional.dropout(x[0], recipe.dropout, head.training))
    return Setup(recipe, model, everything, _objective(recipe, device, teach=weights))


def _load_data(recipe: Recipe) -> data.Data:
    """The first process goes first: it may have to fetch the files."""
    rank, world = processes()
    if rank:
        dist.barrier()
    found = data.load(recipe.data, recipe.validation_share)
    if world > 1 and not rank:
        dist.barrier()
    return found


def _of_classes(everything: data.Data, recipe: Recipe) -> data.Data:
    """The pictures of the recipe's classes alone, with their numbers in its order."""
    if not recipe.classes:
        return everything
    if max(recipe.classes) >= len(everything.classes):
        last = len(everything.classes) - 1
        raise LabError(f"{recipe.name}: classes must be from 0 to {last} in {everything.name}, got {recipe.classes}")

    def only(split: data.Split) -> data.Split:
        wanted = torch.tensor(recipe.classes)
        index = torch.isin(split.labels, wanted).nonzero().flatten()
        chosen = split.select(index)
        return dataclasses.replace(chosen, labels=(chosen.labels[:, None] == wanted).int().argmax(1))

    names = tuple(everything.classes[number] for number in recipe.classes)
    parts = {name: only(getattr(everything, name)) for name in ("train", "val", "test")}
    return dataclasses.replace(everything, classes=names, **parts)


def _build(recipe: Recipe, classes: int, shape: tuple[int, int, int]) -> models.Network:
    """The network for as many classes and such pictures; LabError if it does not take its options or the pictures."""
    takes = models.entry(recipe.model).options
    fitting = {"num_classes": classes, "channels": shape[0], "size": shape[1]}
    options = {name: value for name, value in fitting.items() if name in takes} | dict(recipe.options)
    try:
        model = models.build(recipe.model, backend=recipe.backend, **options)
    except LabError as error:
        raise LabError(f"{recipe.name}: {error}") from None
    except (TypeError, ValueError) as error:
        raise LabError(f"{recipe.name}: network {recipe.model}: {error}") from None
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *shape))
    except (RuntimeError, ValueError) as error:
        sizes = "x".join(map(str, shape))
        reason = str(error).split("\n")[0]
        raise LabError(f"{recipe.name}: network {recipe.model} does not take pictures of {sizes}: {reason}") from None
    return model.train()


def _objective(recipe: Recipe, device: torch.device, *, teach: bool) -> Objective:
    if recipe.objective == "distill" and teach:
        teacher = trained(Run.open(recipe.teacher), device).model
        if recipe.channels_last:
            teacher.to(memory_format=torch.channels_last)
        return Distill(teacher, recipe.temperature, recipe.same_crops)
    if recipe.objective in ("classify", "distill"):
        return Classify(recipe.label_smoothing)
    return Rotate() if recipe.objective == "rotate" else Joint(recipe.rotation_weight)


def trained(run: Run, device: torch.device) -> Setup:
    """The setup of a run with its best weights in the network, in evaluation mode."""
    setup = prepare(run.recipe, device, weights=False)
    setup.model.load_state_dict(runs.load_checkpoint(run.folder / "best.pt")["model"])
    setup.model.eval()
    return setup


def train_recipe(
    recipe: Recipe, device: torch.device, *, out: str | os.PathLike[str] = "runs", keep: bool = False, **options: Any
) -> Run:
    """A new run of a recipe. ``options`` go to :func:`convkit.lab.train.fit`.

    ``keep``: where ``out`` has a finished run of the very same recipe, that one; where it has one that was stopped, the
    rest of it.
    """
    recipe = resolve(recipe, out)
    for run in _same(recipe, out) if keep else ():
        return run if run.result.get("status") == "finished" else resume(run.folder, device, **options)
    return _fit(prepare(recipe, device), out=out, **options)


def _same(recipe: Recipe, out: str | os.PathLike[str]) -> Iterator[Run]:
    """The runs in ``out`` of that very recipe that did not fail, the finished ones first."""
    found = []
    for folder in Path(out).glob(f"{recipe.name}-*"):
        with contextlib.suppress(LabError):  # of another version, or no run at all
            run = Run.open(folder)
            if run.recipe == recipe and run.result.get("status") in (None, "interrupted", "finished"):
                found.append(run)
    yield from sorted(found, key=lambda run: run.result.get("status") != "finished")


def resume(folder: str | os.PathLike[str], device: torch.device, **options: Any) -> Run:
    """Goes on with a run that was killed or interrupted, to where it would have ended. LabError if it is finished."""
    run = Run.open(folder)
    if run.result.get("status") == "finished":
        raise LabError(f"{run.folder}: that run is finished; there is nothing to go on with")
    return _fit(prepare(run.recipe, device), resume=run, **options)


def _fit(setup: Setup, **options: Any) -> Run:
    recipe = setup.recipe
    if recipe.freeze:
        frozen = with_features(setup.model, setup.data)
        if not recipe.augment and recipe.trunk_batch_norm == "eval":
            setup.data = frozen
    return train.fit(setup.model, setup.data, setup.objective, recipe, **options)


def test_error(run: Run, device: torch.device, *, again: bool = True) -> float:
    """Test error of a run in percent, see :func:`convkit.lab.evaluate.test`; ``again=False``: measured unless known."""
    if not again and "test_error_percent" in run.result:
        return run.result["test_error_percent"]
    setup = prepare(run.recipe, device, weights=False)
    return evaluate.test(run, setup.model, setup.data, setup.objective)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample; the latter is NaN of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan
