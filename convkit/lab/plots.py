"""The pictures. matplotlib is used without its global state (pyplot), so that nothing needs a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["curves", "gallery"]

TRAIN, VALIDATION, TEST = "#0072b2", "#d55e00", "#000000"  # Okabe and Ito's colours, told apart by every eye


def curves(
    history: list[dict[str, float]],
    title: str,
    *,
    best_epoch: int,
    metric: str = "accuracy",
    test_error: float | None = None,
) -> bytes:
    """A PNG of loss and metric over the epochs, for training and validation.

    ``history`` has one dict an epoch with epoch, train_loss, val_loss, train_<metric> and val_<metric>; accuracy is in
    0…1. The best epoch is marked; so is the test error in percent of its weights, if given.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    panels = figure.subplots(1, 2)
    marker = "o" if len(epochs) <= 40 else None
    for axes, key, scale, label in (
        (panels[0], "loss", 1, "loss (nats)" if metric == "accuracy" else "loss"),
        (panels[1], metric, 100 if metric == "accuracy" else 1, "accuracy (%)" if metric == "accuracy" else metric),
    ):
        for split, name, colour in (("train", "training", TRAIN), ("val", "validation", VALIDATION)):
            values = [scale * row[f"{split}_{key}"] for row in history]
            axes.plot(epochs, values, color=colour, marker=marker, markersize=4, linewidth=1.8, label=name)
        label_best = f"best epoch ({best_epoch})"
        axes.axvline(best_epoch, color="0.55", linestyle=":", linewidth=1.4, zorder=0, label=label_best)
        _dress(axes, label, MaxNLocator(integer=True, min_n_ticks=1))
    loss, accuracy = panels
    loss.set_ylim(bottom=0)
    if test_error is not None:
        label = f"test error {test_error:.2f} %"
        accuracy.plot(
            [best_epoch], [100 - test_error], color=TEST, marker="*", markersize=13, linestyle="none", label=label
        )
    for axes, place in ((loss, "upper right"), (accuracy, "lower right")):
        axes.legend(loc=place, facecolor="white", edgecolor="none", framealpha=0.9)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _dress(axes: Any, ylabel: str, whole_numbers: Any) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(whole_numbers)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def gallery(
    rows: Sequence[Sequence[Tensor]],
    title: str,
    *,
    row_titles: Sequence[str] = (),
    titles: Sequence[str] = (),
    apart: int = 0,
) -> bytes:
    """A PNG of rows of pictures, (1 or 3, H, W) in [0, 1], every pixel a square of whole screen pixels.

    ``row_titles``: text to the left of each row. ``titles``: text above each picture, row by row. ``apart``: that many
    columns on the left are set off from the rest. A picture smaller than the largest is shown smaller.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi, gap, text = 120, 6, 14
    largest = max(size for row in rows for picture in row for size in picture.shape[1:])
    cell = largest * (100 // largest) if largest <= 100 else 112
    top = gap + (text if titles else 0)
    pitch = cell + top
    left = 12 + max((int(7.4 * len(name)) for name in row_titles), default=0)
    break_ = 3 * gap if apart else 0
    columns = max(map(len, rows))
    width, head = left + columns * (cell + gap) + break_ + gap, 40
    canvas = np.full((head + len(rows) * pitch + gap, width, 3), 255, np.uint8)
    figure = Figure(figsize=(width / dpi, len(canvas) / dpi), dpi=dpi)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    style = {"fontsize": 8, "parse_math": False}
    names = iter(titles)
    for i, row in enumerate(rows):
        y = head + i * pitch + top
        if row_titles:
            axes.text(left - gap, y + cell / 2, row_titles[i], ha="right", va="center", **style)
        for j, picture in enumerate(row):
            x = left + j * (cell + gap) + (break_ if j >= apart else 0)
            pixels = _to_cell(picture, largest, cell)
            height, length = pixels.shape[:2]
            down, right = y + (cell - height) // 2, x + (cell - length) // 2
            canvas[down : down + height, right : right + length] = pixels
            if titles:
                axes.text(x + cell / 2, y - 3, _shortened(next(names), 13), ha="center", va="bottom", **style)
    axes.text(left, head / 2, title, ha="left", va="center", fontsize=11, fontweight="bold", parse_math=False)
    axes.imshow(canvas, extent=(0, width, len(canvas), 0), interpolation="nearest", aspect="auto")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _to_cell(picture: Tensor, largest: int, cell: int) -> np.ndarray:
    """uint8 (H, W, 3): repeated pixels where ``largest`` fits into the cell, averaged ones where it does not."""
    picture = picture.detach().cpu().float().expand(3, -1, -1)
    if largest <= cell:
        picture = picture.repeat_interleave(cell // largest, 1).repeat_interleave(cell // largest, 2)
    else:
        size = [max(1, side * cell // largest) for side in picture.shape[1:]]
        picture = interpolate(picture.unsqueeze(0), size=size, mode="area")[0]
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
