"""What ``convkit train``, ``sweep``, ``eval`` and ``compare`` do with their options and print."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from convkit.lab import LabError, evaluate, experiment, recipes, require, runs, sweeps
from convkit.lab.distributed import process_group, processes

__all__ = ["print_table", "run_compare", "run_eval", "run_sweep", "run_train", "say"]


def run_train(
    name: str | None,
    changes: Sequence[str],
    *,
    show: bool = False,
    resume: str | None = None,
    seeds: int = 1,
    out: str | os.PathLike[str] = "runs",
    device: str | None = None,
    threads: int | None = None,
    tensorboard: bool = False,
    console: Any = None,
) -> list[runs.Run]:
    """Trains a recipe with ``changes`` (see :func:`convkit.lab.recipes.override`), or goes on with a run."""
    require("rich", "matplotlib")
    console = console or _console()
    if show:
        _list_recipes(console) if name is None else _list_fields(console, recipes.recipe(name))
        return []
    if threads is not None:
        torch.set_num_threads(threads)
    if (name is None) == (resume is None):
        raise LabError("train needs either a recipe (convkit train --list) or --resume RUN")
    options = {"console": console, "tensorboard": tensorboard}
    with process_group(experiment.pick_device(device)) as place:
        if resume is not None:
            if changes or seeds > 1:
                raise LabError("--resume goes on exactly as the run began: it takes neither FIELD=VALUE nor --seeds")
            done = [experiment.resume(resume, place, **options)]
        else:
            recipe = recipes.override(recipes.recipe(name), changes)
            done = [
                experiment.train_recipe(dataclasses.replace(recipe, seed=recipe.seed + n), place, out=out, **options)
                for n in range(seeds)
            ]
        if processes()[0] == 0:
            _print_runs(console, done)
    return done


def run_eval(
    names: Sequence[str],
    *,
    out: str | os.PathLike[str] = "runs",
    device: str | None = None,
    threads: int | None = None,
    console: Any = None,
) -> list[float]:
    """Tests runs with their best weights, see :func:`convkit.lab.evaluate.test`; the errors in percent."""
    require("rich", "matplotlib")
    console = console or _console()
    if threads is not None:
        torch.set_num_threads(threads)
    errors = []
    place = experiment.pick_device(device)
    for run in [runs.find(name, out) for name in names]:
        error = experiment.test_error(run, place)
        errors.append(error)
        images = run.result["test_images"]
        spread = math.sqrt(error * (100 - error) / images)
        text = f"{run.folder}: test error {error:.2f} ± {spread:.2f} % of {images:,}"
        if "top5_error_percent" in run.result:
            text += f", top-5 error {run.result['top5_error_percent']:.2f} %"
        if run.recipe.claimed_error is not None:
            text += f"; claimed {run.recipe.claimed_error:g} %"
        say(console, text)
        say(console, f"  {run.folder / 'confusion.png'}, {run.folder / 'predictions.csv'}")
    if len(errors) > 1:
        mean, std = experiment.mean_and_std(errors)
        say(console, f"mean ± standard deviation of the {len(errors)} runs: {mean:.2f} ± {std:.2f} %")
    return errors


def run_compare(
    names: Sequence[str],
    *,
    out: str | os.PathLike[str] = "runs",
    to: str | os.PathLike[str] = "comparison",
    console: Any = None,
) -> list[list[str]]:
    """Puts runs side by side, see :func:`convkit.lab.evaluate.compare`; prints the table."""
    require("rich", "matplotlib")
    console = console or _console()
    if len(names) < 2:
        raise LabError(f"compare needs at least two runs, got {len(names)}")
    heads, *rows = evaluate.compare([runs.find(name, out) for name in names], Path(to))
    print_table(console, [head.replace(" ", "\n") for head in heads], rows, right=range(2, len(heads)))
    say(console, f"{Path(to) / 'comparison.png'}, comparison.csv, comparison.md")
    return [heads, *rows]


def run_sweep(
    name: str,
    changes: Sequence[str],
    *,
    seeds: int = 1,
    out: str | os.PathLike[str] = "runs",
    device: str | None = None,
    threads: int | None = None,
    console: Any = None,
) -> Path:
    """Trains a recipe with each value of one field; the folder with sweep.png, sweep.csv and sweep.md.

    ``name``: a sweep of :data:`convkit.lab.sweeps.SWEEPS`, or a recipe, with one of ``changes`` as
    ``field=value|value|...``. Runs that are finished already are not trained again.
    """
    require("rich", "matplotlib")
    console = console or _console()
    if threads is not None:
        torch.set_num_threads(threads)
    plan = sweeps.plan(name, changes)
    place = experiment.pick_device(device)
    folder, table = sweeps.run(plan, seeds, place, out=out, console=console)
    print_table(console, table[0], table[1:], right=(1, 2, 3))
    say(console, f"{folder / 'sweep.png'}, sweep.csv, sweep.md")
    return folder


def _console() -> Any:
    from rich.console import Console

    return Console()


def say(console: Any, text: str) -> None:
    """Prints text as it is, on one line."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_runs(console: Any, done: Sequence[runs.Run]) -> None:
    for run in done:
        best = run.best()
        score = best[f"val_{run.metric}"]
        value = f"error {100 * (1 - score):.2f} %" if run.metric == "accuracy" else f"{run.metric} {score:.4f}"
        early = ", stopped early" if run.result.get("stopped_early") else ""
        say(console, f"{run.folder}: validation {value} in epoch {best['epoch']} of {len(run.history)}{early}")
    if len(done) > 1 and done[0].metric == "accuracy":
        mean, std = experiment.mean_and_std([run.result["val_error_percent"] for run in done])
        say(console, f"validation error {mean:.2f} ± {std:.2f} % (mean ± standard deviation of {len(done)} seeds)")
    say(console, f"Test error: convkit eval {' '.join(str(run.folder) for run in done)}")


def print_table(console: Any, heads: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Prints a table; ``right``: the columns that are set flush right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, head in enumerate(heads):
        justify = "right" if column in right else "left"
        table.add_column(head, justify=justify, overflow="fold", no_wrap=column == 0)
    for line in lines:
        table.add_row(*line)
    console.print(table, markup=False, highlight=False)


def _list_recipes(console: Any) -> None:
    lines = []
    for recipe in recipes.RECIPES.values():
        claimed = "" if recipe.claimed_error is None else f"{recipe.claimed_error:g}"
        lines.append([recipe.name, f"{recipe.model}, {recipe.data}", str(recipe.epochs), claimed])
    print_table(console, ["Recipe", "Network, data", "Epochs", "Claimed\nerror %"], lines, right=(2, 3))


def _list_fields(console: Any, recipe: recipes.Recipe) -> None:
    lines = []
    for field, value in dataclasses.asdict(recipe).items():
        accepted = ", ".join(recipes.CHOICES.get(field, ()))
        if isinstance(value, tuple):
            value = ("+" if field == "augment" else ",").join(map(str, value))
        lines.append([field, str(value), accepted])
    print_table(console, ["Field", "Value", "One of"], lines)
