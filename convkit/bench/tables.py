"""What a run of the benchmarks looks like in a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from convkit.bench.results import (
    OWN,
    Ceilings,
    Failure,
    Machine,
    Results,
    Row,
    Settings,
    Timing,
    disturbance,
    geometric_mean,
)

__all__ = ["Screen"]

T = TypeVar("T")
NOTHING = "–"


class Screen:
    """Prints to a rich console; the progress bar goes to stderr, so that stdout is the tables alone."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console

        self._console = console or Console()

    def say(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def machine(self, machine: Machine, settings: Settings) -> None:
        where = machine.gpu if settings.device == "cuda" else f"{machine.cpu}, {machine.isa}"
        threads = f"{machine.threads} thread{'s' if machine.threads > 1 else ''} on {machine.cores} cores"
        self.say(f"Machine: {where}, {threads}, torch {machine.torch}, convkit {machine.convkit}.")
        memory = "calls stay in one place, in cache where it fits"
        if settings.rotation_bytes:
            memory = f"calls move on over {settings.rotation_bytes >> 20} MiB"
        self.say(f"Measured: single calls in turns, {memory}; medians. Peers: {', '.join(settings.peers)}.")
        why = disturbance(machine.others, None, machine.cores, machine.threads)
        if why:
            self.say(f"This machine is busy: just now {why}. The times will mean little.", "bold yellow")

    def ceilings(self, ceilings: Ceilings) -> None:
        rates = ", ".join(f"{dtype} {rate / 1e9:,.0f}" for dtype, rate in ceilings.flops_per_s.items())
        cache = ceilings.copy_in_cache_bytes_per_s
        cached = f", {cache / 1e9:,.0f} in cache" if cache else ""
        self.say(f"Ceilings: copy {ceilings.copy_bytes_per_s / 1e9:,.1f} GB/s{cached}; GFLOP/s {rates or 'none'}.")

    def resumed(self, done: int, left: int, path: str | os.PathLike[str] | None) -> None:
        if done:
            rest = f"the other {left} are measured now" if left else "delete it, or name another, to measure again"
            self.say(f"{done} rows are in {path} already; {rest}.")

    def track(self, cases: Sequence[T]) -> Iterator[T]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                progress.update(task, description=f"{case.name} {case.pass_}")
                yield case
                progress.advance(task)

    def show(self, results: Results, old: Results | None = None) -> None:
        """A table for every family and dtype, the geometric means, what failed, and who disturbed the run."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in results.rows:
            groups.setdefault((row.family, row.dtype), []).append(row)
        before = {row.key: row for row in old.rows} if old is not None else None
        for (family, dtype), rows in groups.items():
            lines = _net_lines if family == "nets" else _lines
            self._print(_table(f"{family}, {dtype}", *lines(rows, before)))
        if results.rows:
            self._print(_means(results, before))
            self._notes(results, old)

    def _print(self, table: Any) -> None:
        """Whole, also where the terminal is too narrow or a file: a cut-off number is worse than a wrapped line."""
        from rich.measure import Measurement

        width = self._console.width
        self._console.width = 1000
        self._console.width = max(width, Measurement.get(self._console, self._console.options, table).maximum)
        self._console.print(table, soft_wrap=True)
        self._console.width = width

    def _notes(self, results: Results, old: Results | None) -> None:
        self.say(
            "× any, × same: how many times faster convkit is than the best peer at any layout, at the same one. "
            "Floor: the time that the ceilings leave. Error: convkit's largest, against float64, as a share of the "
            "largest value.",
            "dim",
        )
        for row in results.rows:
            for key, timing in row.times.items():
                if isinstance(timing, Failure):
                    self.say(f"{row.name} {row.pass_} {row.dtype}: {key} failed: {timing.message}", "yellow")
        if old is not None:
            changes = old.machine.differences(results.machine) + old.settings.differences(results.settings)
            if changes:
                self.say(f"Old and new were not measured alike: {'; '.join(changes)} (the old first).", "yellow")
        disturbed = results.disturbances()
        if disturbed:
            more = f", and {len(disturbed) - 3} more" if len(disturbed) > 3 else ""
            self.say(f"The machine was busy: {'; '.join(disturbed[:3])}{more}.", "bold yellow")


Lines = tuple[list[str], Iterable[list[str]]]


def _lines(rows: Sequence[Row], before: dict | None) -> Lines:
    """A line for every pass of a problem and layout of convkit, in milliseconds."""
    peers = _peers(rows)
    heads = ["Layer", "Pass", "Layout", "convkit\nms", *(f"{peer.replace('/', chr(10))}" for peer in peers)]
    heads += ["×\nany", "×\nsame", "Floor\nms", "% of\nfloor", "Error"] + ["old /\nnew"] * (before is not None)
    return heads, (_line(row, layout, peers, before) for row in rows for layout in row.layouts)


def _line(row: Row, layout: str, peers: Sequence[str], before: dict | None) -> list[str]:
    own = f"{OWN}/{layout}"
    fraction = row.floor_fraction(layout)
    cells = [row.name, row.pass_, layout, _ms(row, own), *(_ms(row, peer) for peer in peers)]
    cells += [_ratio(row.ratio(layout)), _ratio(row.ratio(layout, same_layout=True))]
    cells += [_number(row.floor_s and row.floor_s * 1e3), f"{fraction:.0%}" if fraction else NOTHING]
    cells.append(f"{row.errors[own]:.0e}" if own in row.errors else NOTHING)
    return cells + ([] if before is None else [_ratio(_change(row, before, own))])


def _net_lines(rows: Sequence[Row], before: dict | None) -> Lines:
    """A line for every network, pass and layout of convkit, in images per second."""
    peers = _peers(rows)
    heads = ["Network", "Pass", "Batch", "Layout", "convkit\nimages/s", *(peer.replace("/", "\n") for peer in peers)]
    heads += ["×\nany", "×\nsame", "convkit\nMiB", "torch\nMiB", "Error"] + ["old /\nnew"] * (before is not None)
    return heads, (_net_line(row, layout, peers, before) for row in rows for layout in row.layouts)


def _net_line(row: Row, layout: str, peers: Sequence[str], before: dict | None) -> list[str]:
    own = f"{OWN}/{layout}"
    cells = [row.name, row.pass_, row.problem, layout]
    cells += [_speed(row, key) for key in (own, *peers)]
    cells += [_ratio(row.ratio(layout)), _ratio(row.ratio(layout, same_layout=True))]
    for key in (own, f"torch/{layout}"):
        cells.append(f"{row.memory[key] / 2**20:,.0f}" if key in row.memory else NOTHING)
    cells.append(f"{row.errors[own]:.0e}" if own in row.errors else NOTHING)
    return cells + ([] if before is None else [_ratio(_change(row, before, own))])


def _means(results: Results, before: dict | None) -> Any:
    """Geometric means, a line a family, pass and layout, with the row where convkit is least ahead or most behind."""
    heads = ["Geometric mean", "Pass", "Layout", "Rows", "×\nany", "×\nsame", "Least × any"]
    heads += ["old /\nnew", "peers\nold / new"] * (before is not None)
    lines = []
    for s in results.summaries():
        line = [f"{s.family}, {s.dtype}", s.pass_, s.layout, str(s.rows), _ratio(s.any_layout), _ratio(s.same_layout)]
        line.append(f"{_ratio(s.worst)} {s.worst_name}")
        if before is not None:
            rows = [r for r in results.rows if (r.family, r.dtype, r.pass_) == (s.family, s.dtype, s.pass_)]
            own = [_change(row, before, f"{OWN}/{s.layout}") for row in rows]
            rest = [_change(row, before, key) for row in rows for key in row.times if not key.startswith(OWN + "/")]
            line += [_ratio(_mean(own)), _ratio(_mean(rest))]
        lines.append(line)
    return _table(None, heads, lines, left={0, 1, 2, 6})


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value]
    return geometric_mean(known) if known else None


def _change(row: Row, before: dict, key: str) -> float | None:
    """Old time over new: above 1 is faster now."""
    old = before.get(row.key)
    was, now = old.seconds(key) if old is not None else None, row.seconds(key)
    return was / now if was and now else None


def _peers(rows: Iterable[Row]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row.times if not key.startswith(OWN + "/"))
    return list(keys)


def _ms(row: Row, key: str) -> str:
    timing = row.times.get(key)
    if isinstance(timing, Timing):
        return _number(timing.median * 1e3)
    return "failed" if isinstance(timing, Failure) else NOTHING


def _speed(row: Row, key: str) -> str:
    speed = row.images_per_s(key)
    if speed:
        return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"
    return "failed" if isinstance(row.times.get(key), Failure) else NOTHING


def _number(value: float | None) -> str:
    """Three digits that count."""
    if not value:
        return NOTHING
    if value < 0.01:
        return f"{value:.1e}"
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    return f"{value:.2f}" if value else NOTHING


def _table(
    title: str | None, heads: Sequence[str], lines: Iterable[Sequence[str]], left: Iterable[int] = (0, 1)
) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    ratios = {column for column, head in enumerate(heads) if head.startswith("×")}
    for column, head in enumerate(heads):
        table.add_column(head, justify="left" if column in left else "right", no_wrap=True)
    for line in lines:
        cells = [Text(cell) for cell in line]
        for column in ratios:
            if line[column] != NOTHING:
                cells[column].stylize("green" if float(line[column].replace(",", "")) >= 1 else "red")
        table.add_row(*cells)
    return table
