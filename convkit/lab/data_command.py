"""``convkit data NAME``: what is in a data set, and pictures of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convkit.lab import LabError, augment, data, plots, require

__all__ = ["run_data"]

COLUMNS = 10


def run_data(
    name: str | None, *, augmentation: str | None = None, out: str | os.PathLike[str] = "gallery", console: Any = None
) -> list[Path]:
    """Prints pictures a class and split, mean and standard deviation, and draws two galleries of training pictures.

    ``name``: see :func:`convkit.lab.data.load`. ``augmentation``: as :func:`convkit.lab.augment.parse` reads it; its
    gallery shows several pictures changed by it, or, if absent, each known step alone. Test pictures are counted and
    not looked at. Returns the files in the folder ``out``.
    """
    require("rich", "matplotlib")
    from rich import box
    from rich.console import Console
    from rich.table import Table

    steps = None if augmentation is None else augment.parse(augmentation)
    found = data.load(name)
    galleries = {"samples": _samples(found), "augmented": _augmented(found, steps)}

    console = console or Console()
    splits = {"Train": found.train, "Validation": found.val, "Test": found.test}
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("Class", "All")
    for title, split in splits.items():
        table.add_column(title, f"{len(split):,}", justify="right")
    counts = [split.labels.bincount(minlength=len(found.classes)).tolist() for split in splits.values()]
    for label, *numbers in zip(found.classes, *counts, strict=True):
        table.add_row(label, *(f"{number:,}" for number in numbers))
    console.print(f"{found.name}: {found.source}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    shape = "x".join(map(str, found.shape))
    mean, deviation = (", ".join(f"{value:.4f}" for value in values) for values in (found.mean, found.std))
    text = f"Pictures {shape}. Training pixels in [0, 1]: mean {mean}; standard deviation {deviation}."
    console.print(text, markup=False, highlight=False, soft_wrap=True)

    paths = []
    for kind, png in galleries.items():
        paths.append(_write(Path(out), f"{_file_name(found.name)}-{kind}.png", png))
        console.print(f"{kind}: {paths[-1]}", markup=False, highlight=False, soft_wrap=True)
    return paths


def _file_name(name: str) -> str:
    kind, colon, place = name.partition(":")
    return f"{kind}-{Path(place).resolve().name}" if colon else name


def _write(folder: Path, name: str, content: bytes) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    except OSError as error:
        reason = error.strerror or error
        raise LabError(f"cannot write {folder / name}: {reason}; choose another folder with --out") from error
    return folder / name


def _pictures(split: data.Split, index: Tensor, steps: augment.Augment | None = None, seed: int = 0) -> Tensor:
    """The pictures at ``index``, changed or not, float32 (N, C, H, W)."""
    return next(split.batches(len(index), index, augment=steps, seed=seed))[0]


def _samples(found: data.Data) -> bytes:
    """Ten training pictures of each class, a row a class; of more than ten classes one each."""
    labels = found.train.labels
    several = COLUMNS if len(found.classes) <= COLUMNS else 1
    members = [(labels == label).nonzero().flatten()[:several] for label in range(len(found.classes))]
    if several > 1:
        rows = [list(_pictures(found.train, index)) for index in members]
        return plots.gallery(rows, f"{found.name}: training pictures", row_titles=found.classes)
    pictures = list(_pictures(found.train, torch.cat(members)[: COLUMNS**2]))
    rows = [pictures[first : first + COLUMNS] for first in range(0, len(pictures), COLUMNS)]
    title = f"{found.name}: a training picture of each of {len(pictures)} classes"
    return plots.gallery(rows, title, titles=found.classes)


def _augmented(found: data.Data, steps: augment.Augment | None) -> bytes:
    """Pictures on the left, and on the right what becomes of them: by each step alone, or by ``steps``."""
    shown = _one_a_class(found.train)
    if steps is not None:
        kinds, titles = [steps] * min(8, len(shown)), ()
        title = f"{found.name}: {' '.join(steps.specs)}"
    else:
        kinds = [augment.parse([spec]) for spec in _examples(min(found.shape[1:]))]
        titles = tuple(kind.specs[0] for kind in kinds)
        title = f"{found.name}: each augmentation alone"
    rows = []
    for number, kind in enumerate(kinds):
        index = shown[number % len(shown)].repeat(COLUMNS - 1)
        rows.append([_pictures(found.train, index[:1])[0], *_pictures(found.train, index, kind, seed=number)])
    return plots.gallery(rows, title, row_titles=titles, apart=1)


def _one_a_class(split: data.Split) -> Tensor:
    return torch.stack([(split.labels == label).nonzero()[0, 0] for label in split.labels.unique()])


def _examples(size: int) -> tuple[str, ...]:
    """Each known step, about as strong as it is used on pictures of that size."""
    return (
        f"pad_crop:{max(size // 8, 1)}",
        f"crop:{max(size * 3 // 4, 1)}",
        "flip",
        "rotate90",
        "affine:0.1,0.1,15,reflect",
        f"cutout:{max(size // 4, 1)}",
        "jitter:0.4,0.4,0.4,0.1",
    )
