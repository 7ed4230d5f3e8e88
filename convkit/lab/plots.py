"""The pictures. matplotlib is used without its global state (pyplot), so that nothing needs a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["comparison", "confusion", "curves", "gallery", "sweep"]

TRAIN, VALIDATION, TEST = "#0072b2", "#d55e00", "#000000"  # Okabe and Ito's colours, told apart by every eye
COLOURS = (TRAIN, VALIDATION, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", TEST, "#b5a900")


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
    epochs = [row["epoch"] for row in history]
    figure = _figure(10, 4.2)
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
        _dress(axes, "epoch", label)
    loss, accuracy = panels
    loss.set_ylim(bottom=0)
    if test_error is not None:
        label = f"test error {test_error:.2f} %"
        accuracy.plot(
            [best_epoch], [100 - test_error], color=TEST, marker="*", markersize=13, linestyle="none", label=label
        )
    for axes, place in ((loss, "upper right"), (accuracy, "lower right")):
        axes.legend(loc=place, facecolor="white", edgecolor="none", framealpha=0.9)
    return _png(figure)


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> bytes:
    """A PNG of a confusion matrix: ``matrix[label][prediction]`` pictures, shaded by their part of the label's.

    Up to 20 classes the counts are written into it.
    """
    counts = np.asarray(matrix, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3.2 + 0.42 * len(classes), 14)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(title, fontsize=11, fontweight="bold", parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if len(classes) <= 40:
        ticks = range(len(classes))
        upright = max(map(len, classes)) <= 3
        axes.set_xticks(ticks, classes, rotation=0 if upright else 60, ha="center" if upright else "right")
        axes.set_yticks(ticks, classes)
        if not upright:
            for label in axes.get_xticklabels():
                label.set_rotation_mode("anchor")
    if len(classes) <= 20:
        for i, j in np.argwhere(counts > 0):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(image, ax=axes, shrink=0.75)
    bar.set_label("part of the label's pictures")
    return _png(figure)


def comparison(
    histories: Sequence[Sequence[dict[str, float]]],
    names: Sequence[str],
    values: Sequence[dict[str, float | None]],
    *,
    metric: str,
    parameters: Sequence[int],
) -> bytes:
    """A PNG of several runs: validation loss and metric over the epochs, final errors, and speed.

    ``values``: of each run ``validation`` and ``test`` (error in percent, or the metric) and ``images_per_second``.
    """
    count = len(names)
    figure = _figure(12, 7.2 + 0.28 * max(count - 4, 0))
    figure.get_layout_engine().set(hspace=0.06, wspace=0.06)
    (loss, score), (error, speed) = figure.subplots(2, 2, height_ratios=[1, 0.35 + 0.1 * count])
    for axes, key in ((loss, "val_loss"), (score, f"val_{metric}")):  # training losses are of different objectives
        scale = 100 if key == "val_accuracy" else 1
        for number, (name, history) in enumerate(zip(names, histories, strict=True)):
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3]}
            marker = "o" if len(history) <= 3 else None
            epochs, line = [row["epoch"] for row in history], [scale * row[key] for row in history]
            axes.plot(epochs, line, label=name, linewidth=1.6, marker=marker, markersize=4, **style)
    _dress(loss, "epoch", "validation loss")
    loss.set_ylim(bottom=0)
    _dress(score, "epoch", "validation accuracy (%)" if metric == "accuracy" else f"validation {metric}")
    loss.legend(loc="upper right", fontsize=8, facecolor="white", edgecolor="none", framealpha=0.9)

    rows = np.arange(count)
    colours = [COLOURS[number % len(COLOURS)] for number in rows]
    shown = [value["validation"] if value["test"] is None else value["test"] for value in values]
    labels = [f"{name}  ({_thousands(n)})" for name, n in zip(names, parameters, strict=True)]
    what = "error (%)" if metric == "accuracy" else metric
    tested = [value["test"] is not None for value in values]
    xlabel = f"test {what}" if all(tested) else f"validation {what}" if not any(tested) else f"{what}, * on validation"
    texts = [f"{x:.2f}{'' if t or not any(tested) else ' *'}" for x, t in zip(shown, tested, strict=True)]
    rates = [value["images_per_second"] for value in values]
    for axes, numbers, label, writing in (
        (error, shown, xlabel, texts),
        (speed, rates, "training images/s", [f"{rate:,.0f}" for rate in rates]),
    ):
        bars = axes.barh(rows, numbers, color=colours, height=0.62)
        axes.bar_label(bars, writing, padding=3, fontsize=8)
        axes.margins(x=0.16)
        _dress(axes, label, "", whole=False)
        axes.grid(False, axis="y")
        axes.invert_yaxis()
    error.set_yticks(rows, labels, fontsize=8)
    speed.set_yticks(rows, [""] * count)
    return _png(figure)


def sweep(field: str, values: Sequence[str], errors: Sequence[Sequence[float]], curves: Sequence[Any], title: str):
    """A PNG of what one field of a recipe does: the error of every run by the field's value, and the mean curves.

    ``errors``: of each value, the validation errors in percent of its seeds. ``curves``: of each value, the mean
    validation error over the epochs (percent).
    """
    figure = _figure(11, 4.4)
    figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    left, right = figure.subplots(1, 2)
    try:
        places = [float(value) for value in values]
    except ValueError:
        places = []
    numeric = bool(places) and len(places) == len(set(places)) and min(places) > 0
    places = places if numeric else list(range(len(values)))
    means = [float(np.mean(group)) for group in errors]
    left.plot(places, means, color="0.6", linewidth=1.2, zorder=1, linestyle="-" if numeric else "none")
    for number, (place, group, mean) in enumerate(zip(places, errors, means, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        left.plot([place] * len(group), group, "o", color=colour, markersize=5, alpha=0.6, zorder=2)
        spread = float(np.std(group, ddof=1)) if len(group) > 1 else None
        left.errorbar([place], [mean], spread, fmt="_", color=colour, markersize=16, capsize=4, zorder=3)
    _dress(left, field, "validation error (%)", whole=False)
    if numeric:
        left.set_xscale("log")
        left.set_xticks(places, values)
        left.minorticks_off()
    else:
        slanted = max(map(len, values)) > 10
        left.set_xticks(places, values, rotation=25 if slanted else 0, ha="right" if slanted else "center")
        left.set_xlim(-0.6, len(values) - 0.4)
    left.set_ylim(bottom=0)
    for number, (value, curve) in enumerate(zip(values, curves, strict=True)):
        epochs = range(1, len(curve) + 1)
        marker = "o" if len(curve) <= 20 else None
        right.plot(epochs, curve, color=COLOURS[number % len(COLOURS)], label=value, marker=marker, markersize=3.5)
    _dress(right, "epoch", "validation error (%), mean")
    right.set_ylim(bottom=0)
    right.legend(title=field, fontsize=8, title_fontsize=8, facecolor="white", edgecolor="none", framealpha=0.9)
    return _png(figure)


def _thousands(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.1f} k" if count >= 1e3 else str(count)


def _figure(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _dress(axes: Any, xlabel: str, ylabel: str, *, whole: bool = True) -> None:
    """Labels and a quiet grid; ``whole``: ticks at whole numbers, as of epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
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
