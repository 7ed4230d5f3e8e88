"""The two pictures of a run, drawn without pyplot, and so without global state or a display."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convkit.bench.report_tables import FAMILIES, NETS, best_own, quantity
from convkit.bench.results import Ceilings, Results, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "GRID", "INK", "PAPER", "bandwidth", "ratios", "rate", "roofline"]

# On paper; the page has others in a dark colour scheme. The families' are Okabe and Ito's, told apart by every eye.
INK, GRID, PAPER = "#1a1a1a", "#dddddd", "#ffffff"
COLOURS = {"dense": "#0072b2", "depthwise": "#d55e00", "batch-norm": "#009e73", NETS: "#a0568a"}
TITLES = {**FAMILIES, NETS: "Networks"}
MARKERS = {"f32": "o", "f64": "D", "bf16": "s", "f16": "^", "tf32": "v"}
STYLES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
WIDTH = 4.8  # inches: no wider, so that a telephone shows the text at its size
LEGEND = {"labelcolor": INK, "loc": "outside upper left", "ncols": 2, "frameon": False, "fontsize": 7.5}


def roofline(results: Results) -> Figure | None:
    """Each pass of each layer, by operations a byte: convkit's best layout and the best peer, under the ceilings.

    None where no row has operations and bytes. Williams, Waterman and Patterson, "Roofline", 2009.
    """
    rows = [row for row in results.rows if row.flops and row.bytes and best_own(row) is not None]
    if not rows:
        return None
    figure, axes = _figure(4.4)
    points = [(row.flops / row.bytes, _speed(row, best_own(row)), _speed(row, row.best_peer())) for row in rows]
    left, right, bottom = _limits(points, results.ceilings)
    _draw_roofs(axes, results.ceilings, left, right)
    for row, (x, own, peer) in zip(rows, points, strict=True):
        style = {"color": COLOURS.get(row.family, INK), "markersize": 4, "markeredgewidth": 0.8}
        marker = MARKERS.get(row.dtype, "o")
        if peer is not None:
            axes.plot([x, x], [own, peer], color=style["color"], linewidth=0.6, alpha=0.5, zorder=2)
            axes.plot([x], [peer], marker, markerfacecolor="none", zorder=3, **style)
        axes.plot([x], [own], marker, label=f"{TITLES.get(row.family, row.family)}, {row.dtype}", zorder=4, **style)
    axes.plot([], [], "o", color=INK, markerfacecolor="none", markersize=4, label="hollow: the best peer")
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, None))
    axes.set_xlabel("operations a byte moved at least")
    axes.set_ylabel("Gflop/s")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), handlelength=2, columnspacing=1, **LEGEND)
    return figure


def _limits(points: list[tuple[float, float, float | None]], ceilings: Ceilings) -> tuple[float, float, float]:
    """Left, right and bottom, so that every point and the knees of the roofs are inside."""
    knees = [flops / ceilings.copy_bytes_per_s for flops in ceilings.flops_per_s.values()]
    left = min([x / 2 for x, _, _ in points] + [knee / 8 for knee in knees])
    right = max([2 * x for x, _, _ in points] + [4 * knee for knee in knees])
    reached = [y for _, *both in points for y in both if y is not None]
    return left, right, min(*reached, ceilings.copy_bytes_per_s * left / 1e9) / 1.5


def _draw_roofs(axes: Any, ceilings: Ceilings, left: float, right: float) -> None:
    def draw(flops: float, copy: float, label: str, style: Any) -> None:
        xs = sorted({left, min(max(flops / copy, left), right), right})
        ys = [min(flops, copy * x) / 1e9 for x in xs]
        axes.plot(xs, ys, color=INK, linestyle=style, linewidth=1.2, label=label)

    rates = sorted(ceilings.flops_per_s.items(), key=lambda item: -item[1])
    copy, in_cache = ceilings.copy_bytes_per_s, ceilings.copy_in_cache_bytes_per_s
    for number, (dtype, flops) in enumerate(rates):
        draw(flops, copy, f"{dtype}: {rate(flops)}, copy {bandwidth(copy)}", STYLES[number % len(STYLES)])
    if in_cache and rates:
        draw(rates[0][1], in_cache, f"copy in cache {bandwidth(in_cache)}", ":")


def ratios(results: Results) -> Figure | None:
    """A bar for each row: how much faster convkit is than the best peer, each in its best layout. None without any."""
    groups: dict[str, list[tuple[float, Row]]] = {}
    for row in results.rows:
        if best_own(row) is not None and row.best_peer() is not None:
            value = row.seconds(row.best_peer()) / row.seconds(best_own(row))
            groups.setdefault(row.family, []).append((value, row))
    if not groups:
        return None
    gap = 1.6  # bars, between two families
    bars = sum(map(len, groups.values())) + gap * (len(groups) - 1)
    figure, axes = _figure(1.2 + 0.16 * bars)
    ticks: dict[float, str] = {}
    at = 0.0
    for family, group in groups.items():
        group.sort(key=lambda pair: -pair[0])
        places = [at + i for i in range(len(group))]
        lengths = [value - 1 for value, _ in group]
        colour, title = COLOURS.get(family, INK), TITLES.get(family, family)
        axes.barh(places, lengths, left=1, height=0.78, color=colour, label=title)
        for place, (value, row) in zip(places, group, strict=True):
            ticks[place] = f"{row.name} {row.pass_}" + (f" {row.dtype}" if row.dtype != "f32" else "")
            above = value >= 1
            place_of_text = {"xytext": (3 if above else -3, 0), "ha": "left" if above else "right", "va": "center"}
            axes.annotate(
                f"{value:.2f}", (value, place), textcoords="offset points", fontsize=7, color=INK, **place_of_text
            )
        at = places[-1] + 1 + gap
    values = [value for group in groups.values() for value, _ in group]
    low, high = min(0.8, *values), max(1.25, *values)
    room = (high / low) ** 0.16  # for the numbers
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set(xscale="log", xlim=(low / room, high * room), ylim=(bars, -1))
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    _plain_ticks(axes.xaxis, low / room, high * room)
    # Of the figure: long names of rows leave the axes too narrow for it.
    figure.supxlabel("speed over the best peer's, each in its best layout (1: as fast)", color=INK, fontsize=8.5)
    figure.legend(handlelength=1, **LEGEND)
    return figure


def _figure(height: float) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(which="both", color=INK, labelcolor=INK, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=8.5)
    return figure, axes


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """0.5, 1, 2: an axis of a few factors, for which powers of ten are too far apart."""
    from matplotlib.ticker import FixedLocator, NullLocator

    steps = (
        (1, 2, 5) if high / low > 20 else (1, 1.5, 2, 3, 5, 7) if high / low > 3 else (1, 1.2, 1.5, 2, 3, 5, 7, 8, 9)
    )
    ticks = [step * 10.0**power for power in range(-6, 7) for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _speed(row: Row, who: str | None) -> float | None:
    """Gflop/s."""
    return None if who is None else row.flops / row.seconds(who) / 1e9


def rate(flops_per_s: float) -> str:
    scale, unit = (1e12, "Tflop/s") if flops_per_s >= 1e12 else (1e9, "Gflop/s")
    return f"{quantity(flops_per_s / scale)} {unit}"


def bandwidth(bytes_per_s: float) -> str:
    scale, unit = (1e12, "TB/s") if bytes_per_s >= 1e12 else (1e9, "GB/s")
    return f"{quantity(bytes_per_s / scale)} {unit}"
