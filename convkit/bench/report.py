"""A run as a web page, pictures and a markdown file: what ``convkit bench --report FOLDER`` writes.

``index.html``    everything in one file: facts, means, pictures, tables that sort. It needs no network.
``roofline.png``  operations a second over operations a byte, under what the machine can do
``ratios.png``    convkit's speed over the best peer's, a bar for each pass of each layer
``tables.md``     the tables
"""

from __future__ import annotations

import html
import importlib.resources
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from convkit.bench import BenchError
from convkit.bench.pictures import COLOURS, GRID, INK, PAPER, bandwidth, rate, ratios, roofline
from convkit.bench.report_tables import (
    BUSY,
    FAMILIES,
    NETS,
    Table,
    failures,
    layer_table,
    net_table,
    summary_table,
    version,
)
from convkit.bench.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["markdown", "write_report"]

MEANS = "Geometric means"
CAPTIONS = {
    "roofline": (
        "Roofline",
        "Every pass of every layer: operations a second over operations a byte. Lines: what this machine can do at "
        "best, measured in the same run.",
    ),
    "ratios": (
        "convkit and its best peer",
        "How many times faster convkit is than the fastest of the others; both in their best layout.",
    ),
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>
{script}</script>
</body>
</html>
"""


def write_report(results: Results, folder: str | os.PathLike[str]) -> Path:
    """Writes the four files into ``folder``, which is made if it is missing, and returns the path of the page.

    Raises:
        BenchError: matplotlib is not installed, nothing was measured, the folder cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise BenchError(f"a report needs {error.name}, which is not installed: type  pip install matplotlib") from None
    if not results.rows:
        raise BenchError("a report needs at least one row: nothing has been measured")
    folder = Path(folder)
    drawn = {"roofline": roofline(results), "ratios": ratios(results)}
    pictures = {name: figure for name, figure in drawn.items() if figure is not None}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            figure.savefig(folder / f"{name}.png", dpi=260, facecolor=PAPER)
        (folder / "tables.md").write_text(markdown(results), encoding="utf-8")
        page = folder / "index.html"
        page.write_text(_page(results, pictures), encoding="utf-8")
    except OSError as error:
        raise BenchError(f"the report cannot be written to {folder}: {error.strerror or error}") from None
    return page


def markdown(results: Results) -> str:
    """The tables with headings, for a reader of plain text."""
    parts = [f"# {_title(results)}", _notes(results)]
    for heading, table in _tables(results):
        parts += [f"## {heading}", table.markdown()]
    if failed := failures(results):
        parts += ["## Failures", "\n".join(f"- {what}: {message}" for what, message in failed)]
    return "\n\n".join(parts) + "\n"


def _tables(results: Results) -> Iterator[tuple[str, Table]]:
    families = {row.family for row in results.rows}
    yield MEANS, summary_table(results)
    for family, title in FAMILIES.items():
        if family in families:
            yield title, layer_table(results, [family])
    if NETS in families:
        yield "Networks", net_table(results)


def _title(results: Results) -> str:
    machine = results.machine
    return (
        f"convkit bench: {machine.gpu or f'{machine.cpu}, {machine.isa}, {machine.threads} of {machine.cores} cores'}"
    )


def _notes(results: Results) -> str:
    """What must be known to read the tables."""
    cache = "tensors in the caches" if results.settings.in_cache else "tensors beyond the caches"
    notes = (
        f"{results.machine.date[:10]}, PyTorch {results.machine.torch}. Times are medians of single calls taken in "
        f"turns, {cache}. Ratio: the best peer's time over convkit's, above 1 where convkit is faster; the best peer "
        "at any layout, then at the same one. Floor: what the ceilings measured in this run allow. Error: the largest "
        "difference from float64, as a share of its largest value."
    )
    return f"{notes} {BUSY}: the machine was busy meanwhile." if results.disturbances() else notes


def _facts(results: Results) -> dict[str, str]:
    machine, ceilings = results.machine, results.ceilings
    clock = f", {machine.clock_mhz:.0f} MHz" if machine.clock_mhz else ""
    facts = {
        "Date": machine.date,
        "Processor": f"{machine.cpu}{clock}, {machine.isa}; {machine.threads} threads, {machine.cores} cores",
    }
    if machine.gpu:
        clocks = {"SM": machine.gpu_clock_mhz, "memory": machine.memory_clock_mhz}
        parts = [machine.gpu] + [f"driver {machine.driver}"] * bool(machine.driver)
        facts["GPU"] = ", ".join(parts + [f"{value:.0f} MHz {what}" for what, value in clocks.items() if value])
    facts["Software"] = (
        f"convkit {version(machine)}, PyTorch {machine.torch}, Python {machine.python}, {machine.system}"
    )
    measured = [f"copy {bandwidth(ceilings.copy_bytes_per_s)}"]
    if ceilings.copy_in_cache_bytes_per_s:
        measured.append(f"in cache {bandwidth(ceilings.copy_in_cache_bytes_per_s)}")
    facts["Ceilings"] = ", ".join(
        measured + [f"{dtype} {rate(value)}" for dtype, value in ceilings.flops_per_s.items()]
    )
    if machine.load_average is not None:
        facts["Load"] = f"average {machine.load_average:.2f} before the run"
    return facts


# ---- the page --------------------------------------------------------------------------------------------------------


def _page(results: Results, pictures: dict[str, Figure]) -> str:
    (_, means), *tables = _tables(results)
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in _facts(results).items()
    )
    parts = [f"<h1>{html.escape(_title(results))}</h1>", f"<dl>{facts}</dl>"]
    if disturbances := results.disturbances():
        summary = f"The machine was busy with something else: what is marked {BUSY} means little."
        parts.append(f'<details class="warning"><summary>{summary}</summary>{_list(disturbances)}</details>')
    parts += [f"<p>{html.escape(_notes(results))}</p>", _section(MEANS, means), '<div class="pictures">']
    for name, figure in pictures.items():
        heading, caption = CAPTIONS[name]
        picture = f"<figure>{_svg(figure, name, f'{heading}. {caption}')}<figcaption>{caption}</figcaption></figure>"
        parts.append(f"<section><h2>{heading}</h2>{picture}</section>")
    parts.append("</div>")
    parts += [_section(heading, table) for heading, table in tables]
    if failed := failures(results):
        parts.append(f"<h2>Failures</h2>{_list(f'{what}: {message}' for what, message in failed)}")
    files = importlib.resources.files(__package__)
    style, script = (files.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return PAGE.format(title=html.escape(_title(results)), style=style, script=script, body="\n".join(parts))


def _list(lines) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def _section(heading: str, table: Table) -> str:
    """A wide table scrolls in its own box, by keyboard too."""
    name = html.escape(heading)
    box = f'<div class="scrolling" role="region" aria-label="{name}" tabindex="0">{table.html(heading)}</div>'
    return f"<section><h2>{name}</h2>{box}</section>"


def _svg(figure: Figure, name: str, title: str) -> str:
    """The picture as an SVG element whose colours the page sets, with its text as text."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)  # the page's to set
    # Two pictures of one page may not share the ids of their parts.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'font: ([\d.]+px)[^;"]*', r"font-size: \1", svg)
    for variable, colour in {"ink": INK, "grid": GRID, **COLOURS}.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
