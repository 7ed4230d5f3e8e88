"""The pictures. matplotlib is used without its global state (pyplot), so that nothing needs a display."""

from __future__ import annotations

import io
from typing import Any

__all__ = ["curves"]

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
