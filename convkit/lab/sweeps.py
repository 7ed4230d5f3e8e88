"""Sweeps: one recipe trained with several values of one field, in one picture and one table."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from convkit.lab import LabError, evaluate, experiment, plots, recipes, runs, train

__all__ = ["SWEEPS", "Sweep", "plan", "run"]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What to train: ``recipe`` with ``field`` as each of ``values``, texts as :func:`recipes.override` reads them."""

    name: str
    recipe: str
    field: str
    values: tuple[str, ...]
    changes: tuple[str, ...] = ()
    """Further overrides, the same for all."""


SWEEPS: dict[str, Sweep] = {
    sweep.name: sweep
    for sweep in (
        Sweep("learning-rate", "simplenet-digits5k", "learning_rate", ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")),
        Sweep("batch-size", "simplenet-digits5k", "batch_size", ("8", "32", "128", "512")),
        Sweep("optimizer", "simplenet-digits5k", "optimizer", recipes.CHOICES["optimizer"]),
        Sweep("norm", "small-resnet-digits5k", "model.norm", ("batch", "instance", "group", "none")),
        Sweep("dropout", "simplenet-digits5k", "dropout", ("0", "0.2", "0.4", "0.6", "0.8")),
        Sweep(
            "augmentation",
            "simplenet-digits5k",
            "augment",
            ("", "pad_crop:2", "affine:0.1,0.1,10", "affine:0.1,0.1,10+cutout:8"),
        ),
    )
}


def plan(name: str, changes: Sequence[str]) -> Sweep:
    """The sweep called ``name``, or that of the recipe of this name over the one of ``changes`` with several values.

    Values are separated by |. LabError if there is not exactly one field with several values.
    """
    if name in SWEEPS:
        return dataclasses.replace(SWEEPS[name], changes=(*SWEEPS[name].changes, *changes))
    if name not in recipes.RECIPES:
        hint = recipes.nearest(name, [*SWEEPS, *recipes.RECIPES])
        raise LabError(f"{name!r} is neither a sweep nor a recipe: {hint or 'there are ' + ', '.join(SWEEPS)}")
    several = [change for change in changes if "|" in change]
    if len(several) != 1:
        raise LabError(f"{name}: one field is to have several values, such as 'learning_rate=0.1|0.01'")
    field, _, values = several[0].partition("=")
    others = tuple(change for change in changes if change not in several)
    return Sweep(f"{name}-{field.strip()}", name, field.strip(), tuple(values.split("|")), others)


def run(
    sweep: Sweep,
    seeds: int,
    device: torch.device,
    *,
    out: str | os.PathLike[str] = "runs",
    console: Any = None,
) -> tuple[Path, list[list[str]]]:
    """Trains what is not trained yet; (the folder ``out/sweep-<name>`` with its files, the table: heads, rows).

    A value with which the loss stops being finite is reported, and the others go on.
    """
    base = recipes.override(recipes.recipe(sweep.recipe), sweep.changes)
    # All are looked at before the first is trained.
    arms = [(value or "none", recipes.override(base, [f"{sweep.field}={value}"])) for value in sweep.values]
    heads = [sweep.field, "Validation error %", "±", "Seconds", "Runs"]
    rows, shown = [], []
    for value, recipe in arms:
        done = []
        for seed in range(recipe.seed, recipe.seed + seeds):
            try:
                seeded = dataclasses.replace(recipe, seed=seed)
                done.append(experiment.train_recipe(seeded, device, out=out, keep=True, console=console))
            except train.NonFiniteLoss as error:
                console.print(f"{sweep.field}={value}: {error}", markup=False, highlight=False, soft_wrap=True)
        if not done:
            rows.append([value, "not finite", "", "", ""])
            continue
        errors = [done_.result["val_error_percent"] for done_ in done]
        mean, std = experiment.mean_and_std(errors)
        seconds = statistics.fmean(run.seconds for run in done)
        spread = "" if math.isnan(std) else f"{std:.2f}"
        rows.append([value, f"{mean:.2f}", spread, f"{seconds:.1f}", " ".join(run.folder.name for run in done)])
        shown.append((value, errors, _mean_curve(done)))
    folder = Path(out) / f"sweep-{sweep.name}"
    folder.mkdir(parents=True, exist_ok=True)
    evaluate.write_table(folder / "sweep.csv", heads, rows)
    evaluate.write_table(folder / "sweep.md", heads, rows)
    if shown:
        title = f"{sweep.recipe}: {sweep.field}, {seeds} seed{'s' if seeds > 1 else ''}"
        png = plots.sweep(sweep.field, *map(list, zip(*shown, strict=True)), title)
        runs.write_atomically(folder / "sweep.png", lambda file: file.write(png))
    return folder, [heads, *rows]


def _mean_curve(done: Sequence[runs.Run]) -> list[float]:
    """Validation error in percent over the epochs that all runs have, the mean of them."""
    histories = zip(*(run.history for run in done), strict=False)
    return [statistics.fmean(100 * (1 - row["val_accuracy"]) for row in rows) for rows in histories]
