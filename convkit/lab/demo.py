"""``convkit demo``: three small networks trained on real digits with convkit's kernels, measured against PyTorch's."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from convkit.lab import LabError, data, evaluate, models, recipes, require, train
from convkit.lab.commands import say
from convkit.lab.objectives import Classify
from convkit.lab.recipes import Recipe
from convkit.lab.runs import Run, environment

__all__ = ["DEMO_MODELS", "run_demo", "step_times"]

DEMO_MODELS = ("fc64", "fc256_fc256", "simplenet")
DEMO_DATA = ("digits5k", "mnist")
QUICK_IMAGES = {"train": 400, "val": 100, "test": 200}


def run_demo(
    *,
    quick: bool = False,
    choice: str | None = None,
    out: str | os.PathLike[str] = "runs",
    epochs: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    console: Any = None,
) -> list[Run]:
    """Trains and tests the three networks, times a training step of each, and prints a table.

    ``quick``: one epoch on a few hundred pictures, to see that everything works. ``choice``: digits5k or
    mnist; see :func:`convkit.lab.data.load` for the default. ``epochs``: instead of each recipe's own. ``threads``:
    instead of torch's own number. Returns the runs; their result.json holds all that the table shows.
    """
    require("rich", "matplotlib")
    from rich.console import Console

    console = console or Console()
    _check(epochs=epochs, threads=threads)
    if threads is not None:
        torch.set_num_threads(threads)
    if choice not in (None, *DEMO_DATA):
        raise LabError(f"data {choice!r}: the demo has recipes for {' and '.join(DEMO_DATA)}")
    digits = data.load(choice)
    say(console, digits.summary())
    if quick:
        digits = digits.take(**QUICK_IMAGES)
        say(console, f"Quick: {len(digits.train)}, {len(digits.val)} and {len(digits.test)} of them.")
    env = environment("convkit", torch.device("cpu"))
    say(
        console,
        f"Machine: {env['device']}, {env['threads']} thread{'s' if env['threads'] > 1 else ''}, torch {env['torch']}, "
        f"convkit {env['convkit']} with its {env['kernels']} kernels.",
    )

    runs = []
    for name in DEMO_MODELS:
        recipe = _recipe(name, digits.name, seed, 1 if quick and epochs is None else epochs)
        torch.manual_seed(recipe.seed)
        model = models.build(name, backend=recipe.backend)
        run = train.fit(model, digits, Classify(), recipe, out=out, console=console)
        evaluate.test(run, model, digits, Classify())
        runs.append(run)

    say(console, "Timing a training step of each network …")
    for run in runs:
        _record_speed(run, digits, pairs=5 if quick else 60)
    expected = not quick and epochs is None
    _print_results(console, runs, env["threads"], expected)
    return runs


def _check(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise LabError(f"{name} must be at least 1, got {value}")


def _recipe(model: str, data_set: str, seed: int, epochs: int | None) -> Recipe:
    found = next(r for r in recipes.RECIPES.values() if (r.model, r.data) == (model, data_set))
    changes = {"seed": seed} if epochs is None else {"seed": seed, "epochs": epochs}
    return dataclasses.replace(found, **changes)


def step_times(
    networks: Sequence[nn.Module],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    recipe: Recipe,
    *,
    repeats: int,
    warm_up: int = 5,
) -> list[list[float]]:
    """Seconds of each of ``repeats`` training steps (forward, loss, backward, optimizer), per network.

    The networks take turns, A B A B …, so that whatever else the machine does meanwhile falls on all of them alike.
    ``batches`` should not repeat: a network that knows its one batch by heart has gradients so small that they are
    denormal numbers, with which a CPU counts ten times slower, whatever the kernels.
    """
    optimizers = [train.make_optimizer(network, recipe) for network in networks]
    times: list[list[float]] = [[] for _ in networks]
    for number, (images, labels) in enumerate(itertools.islice(batches, warm_up + repeats)):
        for network, optimizer, mine in zip(networks, optimizers, times, strict=True):
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            Classify()(network, images, labels).loss.backward()
            optimizer.step()
            if number >= warm_up:
                mine.append(time.perf_counter() - started)
    return times


def _full_batches(split: data.Split, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled batches of one size, epoch after epoch without end."""
    for epoch in itertools.count(1):
        order = data.epoch_order(len(split), 0, epoch)
        yield from split.batches(size, order[: len(split) // size * size])


def _record_speed(run: Run, digits: data.Data, pairs: int) -> None:
    """Adds ``training_step`` to the run's result.json: median and quartiles in milliseconds, images/s by the median."""
    recipe = run.recipe
    networks = {}
    for backend in models.BACKENDS:
        torch.manual_seed(recipe.seed)  # the same weights in both
        networks[backend] = models.build(recipe.model, backend=backend)
    if not any(type(module).__module__.startswith("convkit.nn") for module in networks["convkit"].modules()):
        del networks["convkit"]  # nothing in it that convkit has a kernel for: both would be the same code
    size = min(recipe.batch_size, len(digits.train))
    batches = _full_batches(digits.train, size)
    times = step_times(list(networks.values()), batches, recipe, repeats=pairs)
    speed: dict[str, Any] = {"batch_size": size, "repeats": pairs, "threads": torch.get_num_threads()}
    for backend, seconds in zip(networks, times, strict=True):
        low, median, high = statistics.quantiles(seconds, n=4)
        speed[backend] = {
            "images_per_second": round(size / median, 1),
            "median_ms": round(1e3 * median, 4),
            "quartiles_ms": [round(1e3 * low, 4), round(1e3 * high, 4)],
        }
    run.save_result(training_step=speed)


def results_table(results: Sequence[dict[str, Any]], *, expected: bool = True) -> list[list[str]]:
    """The demo's table of the contents of result.json files: heads, then a line a network.

    ``expected``: with the error that the recipe leads to.
    """
    heads = ["Parameters", "Test\nerror %", "Training\nseconds", "convkit\nimages/s", "PyTorch\nimages/s"]
    table = [["Network", *heads[:2], *["Expected\nerror %"] * expected, *heads[2:]]]
    for result in results:
        speed, error, images = result["training_step"], result["test_error_percent"], result["test_images"]
        digits = 1 if images < 5000 else 2
        spread = math.sqrt(error * (100 - error) / images)
        line = [models.entry(result["model"]).title, f"{result['parameters']:,}"]
        line.append(f"{error:.{digits}f} ± {spread:.{digits}f}")
        if expected:
            line.append(f"{result['claimed_error_percent']:g}")
        line.append(f"{result['seconds']:.1f}")
        line += [f"{speed[b]['images_per_second']:,.0f}" if b in speed else "–" for b in ("convkit", "torch")]
        table.append(line)
    return table


def _print_results(console: Any, runs: list[Run], threads: int, expected: bool) -> None:
    from rich import box
    from rich.table import Table

    heads, *lines = results_table([run.result for run in runs], expected=expected)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # at most 80 characters wide
    for column, head in enumerate(heads):
        table.add_column(head, justify="right" if column else "left")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    test_images = runs[0].result["test_images"]
    sizes = ", ".join(str(run.recipe.batch_size) for run in runs)
    notes = [
        f"Test error: of the epoch that was best on the validation pictures, ± the standard error that {test_images:,} "
        "test pictures leave.",
        f"images/s: a whole training step, batches of {sizes}, {threads} thread{'s' if threads > 1 else ''}; "
        "the median of steps that convkit and PyTorch took in turns.",
    ]
    if any("convkit" not in run.result["training_step"] for run in runs):
        notes.append("–: no convolution in the network, so both would run the same code.")
    measured = [
        run.result["training_step"][b] for run in runs for b in models.BACKENDS if b in run.result["training_step"]
    ]
    if any(speed["quartiles_ms"][1] > 1.5 * speed["quartiles_ms"][0] for speed in measured):
        notes.append(
            "The times of a step varied by half and more: the machine was busy with something else, and images/s means "
            "little; result.json has the quartiles."
        )
    for note in notes:
        console.print(note, markup=False, highlight=False, style="dim")
    say(console, "Files of each run (checkpoints, metrics.csv, curves.png, result.json):")
    for run in runs:
        say(console, f"  {run.folder}")
