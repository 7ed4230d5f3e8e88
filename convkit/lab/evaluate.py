"""What finished runs reach: on the test pictures, and beside each other.

:func:`test` is the one place where ``data.test`` is read.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convkit.lab import LabError, plots
from convkit.lab.data import Data
from convkit.lab.models import Network
from convkit.lab.objectives import Objective, Rotate, rotations, topk_errors
from convkit.lab.runs import Run, load_checkpoint, write_atomically

__all__ = ["compare", "test", "write_table"]

TURNS = ("0°", "90°", "180°", "270°")


@torch.no_grad()
def test(run: Run, model: Network, data: Data, objective: Objective, batch_size: int = 250) -> float:
    """Test error in percent of the run's best weights, which are loaded into ``model``.

    Adds top-1 and top-5 error and the loss to result.json and curves.png, and writes into the run's folder
    confusion.png (which class is taken for which) and predictions.csv (a row a test picture, in the order of the set).
    """
    if objective.metric != "accuracy":
        raise LabError(f"{run.folder}: a test error is for classification, this run has {objective.metric}")
    model.load_state_dict(load_checkpoint(run.folder / "best.pt")["model"])
    model.eval()
    classes = TURNS if isinstance(objective, Rotate) else data.classes
    all_logits, all_labels = [], []
    for images, labels in data.test.batches(batch_size):
        if isinstance(objective, Rotate):
            images, labels = rotations(images)
        all_logits.append(model(images).float().cpu())
        all_labels.append(labels.cpu())
    logits, labels = torch.cat(all_logits), torch.cat(all_labels)
    errors = topk_errors(logits, labels, min(5, len(classes)))
    error = round(100 * errors[0], 4)
    more = {"top5_error_percent": round(100 * errors[4], 4)} if len(classes) > 5 else {}
    run.save_test(error, F.cross_entropy(logits, labels).item(), len(labels), **more)
    _write_predictions(run.folder / "predictions.csv", logits, labels, classes)
    matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    matrix.index_put_((labels, logits.argmax(1)), torch.ones_like(labels), accumulate=True)
    png = plots.confusion(matrix.tolist(), classes, f"{run.folder.name}: {error:.2f} % of {len(labels):,} wrong")
    write_atomically(run.folder / "confusion.png", lambda file: file.write(png))
    return error


def _write_predictions(path: Path, logits: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    probabilities, predicted = logits.softmax(1).max(1)
    rows = [
        [number, classes[label], classes[guess], f"{probability:.6f}"]
        for number, (label, guess, probability) in enumerate(
            zip(labels.tolist(), predicted.tolist(), probabilities.tolist(), strict=True)
        )
    ]
    write_table(path, ["picture", "label", "predicted", "probability"], rows)


def compare(found: Sequence[Run], folder: Path) -> list[list[str]]:
    """Runs side by side: comparison.png (curves, errors, speed), comparison.csv and comparison.md in ``folder``.

    Returns the table: heads, then a row a run. LabError if the runs have nothing in common that can be compared.
    """
    if len({run.metric for run in found}) > 1:
        raise LabError(f"runs with different metrics cannot be compared: {', '.join({run.metric for run in found})}")
    for run in found:
        if not run.history:
            raise LabError(f"{run.folder}: no epoch of that run is finished; there is nothing to compare")
    metric = found[0].metric
    score = "Validation error %" if metric == "accuracy" else f"Validation {metric}"
    heads = ["Run", "Network", "Parameters", "Epochs", score, "Test error %", "Seconds", "Training images/s"]
    names = _names(found)
    rows, values = [], []
    for name, run in zip(names, found, strict=True):
        best = run.best()[f"val_{metric}"]
        value = {
            "validation": 100 * (1 - best) if metric == "accuracy" else best,
            "test": run.result.get("test_error_percent"),
            "images_per_second": statistics.median(row["images_per_second"] for row in run.history),
        }
        values.append(value)
        test_error = "" if value["test"] is None else f"{value['test']:.2f}"
        row = [name, run.recipe.model, f"{run.parameters}", f"{len(run.history)}", f"{value['validation']:.2f}"]
        rows.append([*row, test_error, f"{run.seconds:.1f}", f"{value['images_per_second']:.0f}"])
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "comparison.csv", heads, rows)
    write_table(folder / "comparison.md", heads, rows)
    png = plots.comparison(
        [run.history for run in found], names, values, metric=metric, parameters=[run.parameters for run in found]
    )
    write_atomically(folder / "comparison.png", lambda file: file.write(png))
    return [heads, *rows]


def _names(found: Sequence[Run]) -> list[str]:
    """The folders' names; with the folder above where two are alike."""
    names = [run.folder.resolve().name for run in found]
    if len(set(names)) == len(names):
        return names
    return [f"{run.folder.resolve().parent.name}/{run.folder.resolve().name}" for run in found]


def write_table(path: Path, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes a table atomically, as markdown if the path ends in .md, else as CSV."""
    if path.suffix == ".md":
        lines = [heads, ["---"] * len(heads), *rows]
        text = "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    else:
        buffer = io.StringIO(newline="")
        csv.writer(buffer, lineterminator="\n").writerows([heads, *rows])
        text = buffer.getvalue()
    write_atomically(path, lambda file: file.write(text.encode()))
