"""A training run that kills itself, for test_resume.py: ``python killed.py OUT RUN_OR_NEW WHERE NUMBER``.

WHERE: ``step`` kills in the middle of the NUMBERth step, ``write`` when half of the NUMBERth checkpoint is written.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from convkit.lab import data, objectives, recipes, runs, train

# Everything that has a state: Adam, a schedule, averaged weights, batch norm, dropout, loss scaling, augmentation.
RECIPE = recipes.Recipe(
    "killed",
    "fc64",
    "digits5k",
    epochs=3,
    batch_size=30,
    learning_rate=1e-2,
    schedule="one_cycle",
    ema=0.9,
    precision="f16",
    clip_norm=1.0,
    augment=("affine:0.1,0.1,10",),
    backend="torch",
)


def go(out, folder=None, objective=None, recipe=RECIPE, save_seconds=0.0):
    """The run in ``out``, or what is left of the one in ``folder``; last.pt is written so often."""
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    layers = nn.Flatten(), nn.Linear(784, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 10)
    resume = None if folder is None else runs.Run.open(folder)
    few = data.load("digits5k").take(200, 60, 100)
    from rich.console import Console

    options = {"out": out, "resume": resume, "save_seconds": save_seconds, "console": Console(quiet=True)}
    return train.fit(nn.Sequential(*layers), few, objective or objectives.Classify(), recipe, **options)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


class _DiesInStep(objectives.Classify):
    def __init__(self, number):
        super().__init__()
        self.__dict__["left"] = number

    def __call__(self, model, images, labels):
        self.__dict__["left"] -= 1
        if self.left == 0:
            _die()
        return super().__call__(model, images, labels)


def _die_while_writing(number):
    save, left = torch.save, number

    def half(value, file):
        nonlocal left
        left -= 1
        save(value, file)
        if left == 0:
            file.truncate(1000)
            file.flush()
            _die()

    torch.save = half


if __name__ == "__main__":
    out, folder, where, number = sys.argv[1:]
    if where == "write":
        _die_while_writing(int(number))
    objective = _DiesInStep(int(number)) if where == "step" else None
    go(out, None if folder == "new" else Path(folder), objective)
