"""Recipes: everything that a training run depends on, its source and the number to expect, in frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import math

from convkit.lab import LabError

__all__ = ["RECIPES", "Recipe", "recipe"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training run, complete: the same recipe gives the same weights on the same machine and number of threads."""

    name: str
    model: str
    """A name of :data:`convkit.lab.models.MODELS`."""
    data: str
    """The data set that the other values were chosen for."""
    epochs: int
    """Passes over the training pictures."""
    batch_size: int
    learning_rate: float
    optimizer: str = "adam"
    weight_decay: float = 0.0
    seed: int = 0
    """Draws the initial weights and the order of the pictures; at least 0."""
    backend: str = "convkit"
    source: str = ""
    claimed_error: float | None = None
    """Test error in percent to expect, from ``source``."""

    def __post_init__(self) -> None:
        for field in ("epochs", "batch_size"):
            if getattr(self, field) < 1:
                raise LabError(f"{self.name}: {field} must be at least 1, got {getattr(self, field)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise LabError(f"{self.name}: learning_rate must be positive and finite, got {self.learning_rate}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise LabError(f"{self.name}: weight_decay must be zero or positive and finite, got {self.weight_decay}")
        if not 0 <= self.seed < 2**43:  # data.epoch_order packs seed and epoch into 63 bits
            raise LabError(f"{self.name}: seed must be from 0 to 2^43 - 1, got {self.seed}")


_COURSE = "UEA CMP-6035B Computer Vision, lecture slides, 2022"
_COURSE_300 = f"{_COURSE} (300 passes)"
_DIGITS5K = "mean of 3 seeds of Adam on a 4,000/1,000 split of the same digits"

RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("fc64-digits5k", "fc64", "digits5k", 20, 32, 1e-3, source=_DIGITS5K, claimed_error=6.9),
        Recipe("fc256-fc256-digits5k", "fc256_fc256", "digits5k", 15, 16, 1e-3, source=_DIGITS5K, claimed_error=5.1),
        Recipe("simplenet-digits5k", "simplenet", "digits5k", 12, 32, 1e-3, source=_DIGITS5K, claimed_error=2.7),
        Recipe("fc64-mnist", "fc64", "mnist", 10, 64, 1e-3, source=_COURSE, claimed_error=2.85),
        Recipe("fc256-fc256-mnist", "fc256_fc256", "mnist", 20, 128, 5e-4, source=_COURSE, claimed_error=1.83),
        Recipe("simplenet-mnist", "simplenet", "mnist", 6, 64, 1e-3, source=_COURSE_300, claimed_error=0.79),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe called ``name``; LabError with the nearest name if there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LabError(f"unknown recipe {name!r}: {hint}(known: {', '.join(RECIPES)})")
    return RECIPES[name]
