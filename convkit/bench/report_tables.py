"""The tables of a run, as cells that the HTML page, the markdown file and the README are made from."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from convkit.bench.results import OWN, Failure, Machine, Results, Row, geometric_mean

__all__ = [
    "FAMILIES",
    "Cell",
    "Table",
    "best_table",
    "layer_table",
    "net_table",
    "quantity",
    "short_table",
    "summary_table",
]

FAMILIES = {"dense": "Dense convolution", "depthwise": "Depthwise convolution", "batch-norm": "Batch norm + ReLU"}
NETS = "nets"
PEER_NAMES = {"torch": "PyTorch", "native": "PyTorch native", "compile": "torch.compile", "im2col": "im2col"}
BUSY = "†"


@dataclass(frozen=True)
class Cell:
    """What is read, what it sorts by (nothing: last), and what there is to say about it."""

    text: str
    value: float | str | None = None
    note: str = ""
    kind: str = ""
    """good, bad or failed; and "name" for what is no number."""


@dataclass(frozen=True)
class Table:
    """Heads and rows of as many cells. ``texts`` is how many columns, from the left, are no numbers."""

    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    texts: int

    def markdown(self) -> str:
        """As GitHub renders it, without a newline at the end."""
        align = [":---" if i < self.texts else "---:" for i in range(len(self.heads))]
        lines = [self.heads, align, *([cell.text for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)

    def html(self, name: str) -> str:
        """A <table> whose column heads are buttons that sort it, by the page's script."""
        buttons = (f'<button type="button">{html.escape(head)}</button>' for head in self.heads)
        heads = "".join(f'<th scope="col">{button}</th>' for button in buttons)
        body = "\n".join(f"<tr>{''.join(map(self._td, range(len(row)), row))}</tr>" for row in self.rows)
        caption = f"<caption>{html.escape(name)}</caption>"
        return f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table>"

    def _td(self, column: int, cell: Cell) -> str:
        kinds = " ".join(filter(None, (cell.kind, "" if column < self.texts or cell.kind == "name" else "number")))
        attributes = "".join(
            f' {name}="{html.escape(str(value))}"'
            for name, value in (("class", kinds), ("data-value", cell.value), ("title", cell.note))
            if value not in ("", None)
        )
        tag, scope = ("th", ' scope="row"') if column == 0 else ("td", "")
        return f"<{tag}{scope}{attributes}>{html.escape(cell.text) or '–'}</{tag}>"


def best_own(row: Row) -> str | None:
    """The key of convkit in its fastest layout."""
    own = [key for layout in row.layouts if row.seconds(key := f"{OWN}/{layout}") is not None]
    return min(own, key=row.seconds, default=None)


def best_ratio(row: Row) -> float | None:
    """The best peer's time over convkit's, each in its fastest layout."""
    own, peer = best_own(row), row.best_peer()
    return None if own is None or peer is None else row.seconds(peer) / row.seconds(own)


def quantity(value: float) -> str:
    """Three digits, never an exponent: 0.0123, 1.23, 12.3, 123, 1,234."""
    if value and abs(value) < 0.0995:
        return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.6f}"
    return f"{value:,.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"


def summary_table(results: Results) -> Table:
    """Geometric means of the ratios by family, pass, dtype and layout of convkit."""
    heads = ("family", "pass", "dtype", "layout", "rows", "ratio", "same layout", "worst", "worst row")
    rows = [
        (
            Cell(FAMILIES.get(one.family, "Networks")),
            Cell(one.pass_),
            Cell(one.dtype),
            Cell(one.layout),
            Cell(str(one.rows), one.rows),
            _ratio(one.any_layout),
            _ratio(one.same_layout),
            _ratio(one.worst),
            Cell(one.worst_name, kind="name"),
        )
        for one in results.summaries()
    ]
    return Table(heads, tuple(rows), texts=4)


def best_table(runs: Iterable[Results]) -> Table:
    """A column for each machine and dtype: by family the geometric mean of `best_ratio` and, in brackets, the least of
    them; of each network the training step's."""
    columns: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for row in run.rows:
            line = FAMILIES.get(row.family) or (f"{row.name}, training" if row.pass_ == "training" else None)
            ratio = best_ratio(row)
            if line is not None and ratio is not None:
                columns.setdefault(_where(run.machine, row.dtype), {}).setdefault(line, []).append(ratio)
    lines = dict.fromkeys(line for column in columns.values() for line in column)
    cells = [[_mean(column.get(line, [])) for column in columns.values()] for line in lines]
    rows = (tuple([Cell(line), *found]) for line, found in zip(lines, cells, strict=True))
    return Table(("", *columns), tuple(rows), texts=1)


def _where(machine: Machine, dtype: str) -> str:
    cpu = machine.cpu.replace("(R)", "").replace(" Processor", "")
    threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
    return ", ".join((machine.gpu or f"{cpu}, {machine.isa.partition('_')[0]}, {threads}", dtype))


def _mean(ratios: Sequence[float]) -> Cell:
    if len(ratios) < 2:
        return _ratio(ratios[0] if ratios else None)
    mean = _ratio(geometric_mean(ratios))
    return replace(mean, text=f"{mean.text} ({min(ratios):.2f})")


def _what(row: Row, layout: str, results: Results) -> tuple[Cell, ...]:
    """Which measurement a line is about: five cells."""
    return (_name(row, results), Cell(row.problem), Cell(row.pass_), Cell(row.dtype), Cell(layout))


def layer_table(results: Results, families: Iterable[str] = FAMILIES) -> Table:
    """A line for each pass of each layer and each layout of convkit: all times in milliseconds, medians."""
    rows = [row for row in results.rows if row.family in families]
    peers = _peers(rows)
    heads = ("layer", "problem", "pass", "dtype", "layout", "convkit, ms", *(f"{_who(peer)}, ms" for peer in peers))
    heads += ("best peer", "ratio", "same layout", "floor, ms", "of floor", "error")
    lines = []
    for row in rows:
        for layout in row.layouts:
            best, floor, error = row.best_peer(), row.floor_fraction(layout), row.errors.get(f"{OWN}/{layout}")
            lines.append(
                (
                    *_what(row, layout, results),
                    *(_time(row, who) for who in (f"{OWN}/{layout}", *peers)),
                    Cell("" if best is None else _who(best), kind="name"),
                    _ratio(row.ratio(layout)),
                    _ratio(row.ratio(layout, same_layout=True)),
                    Cell("") if row.floor_s is None else Cell(quantity(1e3 * row.floor_s), row.floor_s),
                    Cell("") if floor is None else Cell(f"{100 * floor:.0f} %", floor),
                    Cell("") if error is None else Cell(f"{error:.1e}", error),
                )
            )
    return Table(heads, tuple(lines), texts=5)


def short_table(results: Results, family: str) -> Table:
    """A line for each pass of each layer: convkit and the best peer, each in its best layout."""
    heads = ("layer", "problem", "pass", "convkit, ms", "best peer, ms", "which", "ratio", "of floor")
    lines = []
    for row in results.rows:
        own, peer = best_own(row), row.best_peer()
        if row.family == family and own is not None:
            floor = row.floor_fraction(own.partition("/")[2])
            lines.append(
                (
                    _name(row, results),
                    Cell(f"`{row.problem}`", row.problem),
                    Cell(row.pass_),
                    _time(row, own),
                    Cell("") if peer is None else _time(row, peer),
                    Cell("" if peer is None else _who(peer), kind="name"),
                    _ratio(best_ratio(row)),
                    Cell("") if floor is None else Cell(f"{100 * floor:.0f} %", floor),
                )
            )
    return Table(heads, tuple(lines), texts=3)


def net_table(results: Results) -> Table:
    """A line for each network, pass, dtype and layout of convkit: images a second, and peak memory."""
    rows = [row for row in results.rows if row.family == NETS]
    peers = _peers(rows)
    heads = ("network", "input", "pass", "dtype", "layout", "convkit, images/s")
    heads += (*(f"{_who(peer)}, images/s" for peer in peers), "best peer", "ratio", "same layout")
    heads += ("convkit, MiB", "PyTorch, MiB")
    lines = []
    for row in rows:
        for layout in row.layouts:
            best = row.best_peer()
            memory = (row.memory.get(f"{who}/{layout}") for who in (OWN, "torch"))
            lines.append(
                (
                    *_what(row, layout, results),
                    *(_speed(row, who) for who in (f"{OWN}/{layout}", *peers)),
                    Cell("" if best is None else _who(best), kind="name"),
                    _ratio(row.ratio(layout)),
                    _ratio(row.ratio(layout, same_layout=True)),
                    *(Cell("") if m is None else Cell(quantity(m / 2**20), m) for m in memory),
                )
            )
    return Table(heads, tuple(lines), texts=5)


def version(machine: Machine) -> str:
    """convkit's version and its commit, with a + where files differed; without a commit the native module's digest."""
    build = machine.revision or machine.native
    return f"{machine.convkit} ({build.rstrip('+')[:12]}{'+' if build.endswith('+') else ''})"


def failures(results: Results) -> list[tuple[str, str]]:
    """(what, message) of everything that could not be timed."""
    return [
        (f"{_who(who)}: {row.name} {row.pass_}, {row.problem}", timing.message)
        for row in results.rows
        for who, timing in row.times.items()
        if isinstance(timing, Failure)
    ]


def _peers(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(key for row in rows for key in row.times if not key.startswith(OWN + "/"))
    order = list(PEER_NAMES)
    rank = {name: (order.index(name.partition("/")[0]) if name.partition("/")[0] in order else 99) for name in found}
    return sorted(found, key=lambda name: (rank[name], name))


def _who(key: str) -> str:
    who, _, layout = key.partition("/")
    return " ".join(filter(None, (PEER_NAMES.get(who, who), layout)))


def _name(row: Row, results: Results) -> Cell:
    busy = row.disturbed(results.machine)
    return Cell(f"{row.name} {BUSY}", row.name, busy) if busy else Cell(row.name)


def _time(row: Row, who: str) -> Cell:
    timing = row.times.get(who)
    if timing is None:
        return Cell("")
    if isinstance(timing, Failure):
        return Cell("failed", None, timing.message, "failed")
    note = f"median of {len(timing.samples)}, half of them within {quantity(1e3 * timing.iqr)} ms"
    return Cell(quantity(1e3 * timing.median), timing.median, note)


def _speed(row: Row, who: str) -> Cell:
    time, speed = _time(row, who), row.images_per_s(who)
    if speed is None:
        return time
    return Cell(quantity(speed), speed, f"{time.text} ms a step, {time.note}")


def _ratio(value: float | None) -> Cell:
    if value is None:
        return Cell("")
    return Cell(f"{value:.2f}", value, kind="good" if value >= 1 else "bad")
