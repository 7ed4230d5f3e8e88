"""A training run in float64, by one process or by those that torchrun starts, for test_resume.py."""

import sys

import torch
from rich.console import Console
from torch import nn

from convkit.lab import data, distributed, objectives, recipes, train

# 190 pictures: batches of 25 and a last one of 15, in unequal parts.
RECIPE = recipes.Recipe(
    "shared",
    "simple_cnn_bn",
    "digits5k",
    epochs=2,
    batch_size=25,
    learning_rate=0.02,
    optimizer="nesterov",
    weight_decay=1e-3,
    clip_norm=0.5,
    ema=0.9,
    schedule="plateau",
    augment=("affine:0.1,0.1,10",),
    sync_batch_norm=True,
    backend="torch",
)


class Double(objectives.Classify):
    """So that rounding is far below anything that is wrong."""

    def __call__(self, model, images, labels):
        return super().__call__(model, images.double(), labels)

    def evaluate(self, model, images, labels):
        return super().evaluate(model, images.double(), labels)


def go(out):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 5, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 12 * 12, 10)
    few = data.load("digits5k").take(190, 60, 100)
    assert len(few.train) % RECIPE.batch_size == 15
    return train.fit(nn.Sequential(*layers).double(), few, Double(), RECIPE, out=out, console=Console(quiet=True))


if __name__ == "__main__":
    with distributed.process_group(torch.device("cpu")):
        go(sys.argv[1])
