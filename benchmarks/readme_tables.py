"""Fills the tables of README.md and benchmarks/README.md from the files in benchmarks/results, and makes their
README.md: what each file is, and what has run on a GPU.

A table stands between two comments on lines of their own, ``<!-- table: FILE VIEW -->`` and ``<!-- end -->``. FILE is
the name of a file in benchmarks/results without its ``.json``. For a result of ``convkit bench --json``, VIEW is
``means``, or a family (dense, depthwise, batch-norm, nets), or ``best``, which takes any number of files; it is left
out for one of ``make demo``, and for a reproduce.json. ``--check`` writes nothing and exits with status 1 where a table
is not up to date. ``make readme-tables`` runs this.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_report

from convkit.bench import BenchError
from convkit.bench.report_tables import FAMILIES, NETS, best_table, net_table, short_table, summary_table, version
from convkit.bench.results import Results
from convkit.lab import LabError, reproduce
from convkit.lab.demo import results_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "benchmarks/README.md")
MARK = re.compile(r"^<!-- table:", re.MULTILINE)
MARKED = re.compile(r"^<!-- table:(.*?)-->\n(.*?)^<!-- end -->", re.DOTALL | re.MULTILINE)
LIST_HEADS = ("file", "what", "machine", "date", "PyTorch", "convkit")


def markdown(lines: list[list[str]], align: str) -> str:
    """Heads and lines as a markdown table; ``align`` has l or r for each column."""
    rule = [":---" if side == "l" else "---:" for side in align]
    cells = [lines[0], rule, *lines[1:]]
    return "\n".join("| " + " | ".join(text.replace("\n", " ") for text in line) + " |" for line in cells)


def read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.json")))
        raise SystemExit(f"no file {path.name} in {path.parent}; there are: {known or 'none'}") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict) or not data.keys() & {"runs", "claims", "rows"}:
        raise SystemExit(f"{path}: not a result of `make demo`, `convkit reproduce` or `convkit bench --json`")
    return data


def demo_table(data: dict[str, Any]) -> str:
    """The table with which the demo ends, smallest network first."""
    runs = sorted(data["runs"].values(), key=lambda run: run["training_step"]["torch"]["median_ms"])
    table = results_table(runs)
    return markdown(table, "l" + "r" * (len(table[0]) - 1))


def reproduce_table(data: dict[str, Any]) -> str:
    return markdown(reproduce.table(data["claims"]), "llrrrlr")


def bench_table(paths: list[Path], view: str) -> str:
    runs = [Results.load(path) for path in paths]
    views: dict[str, Callable[[Results], Any]] = {
        "means": summary_table,
        **{family: lambda run, family=family: short_table(run, family) for family in FAMILIES},
        NETS: net_table,
    }
    what = f"table of {', '.join(path.stem for path in paths)}"
    if view not in (*views, "best"):
        raise SystemExit(f"{what}: got view '{view}'; accepts {', '.join(views)}, best")
    if view != "best" and len(runs) != 1:
        raise SystemExit(f"{what}: view '{view}' is of one file")
    table = best_table(runs) if view == "best" else views[view](runs[0])
    if not table.rows:
        raise SystemExit(f"{what}: no row for '{view}'")
    return table.markdown()


def filled(text: str, folder: Path) -> str:
    """The text with each marked table made anew from the files in ``folder``."""

    def table(found: re.Match) -> str:
        names = found[1].split()
        view = names.pop() if len(names) > 1 else ""
        paths = [folder / f"{name}.json" for name in names]
        data = [read(path) for path in paths]
        if all("rows" in one for one in data):
            content = bench_table(paths, view)
        elif view:
            raise SystemExit(f"table of {', '.join(names)}: view '{view}' is of results of `convkit bench`")
        else:
            content = demo_table(data[0]) if "runs" in data[0] else reproduce_table(data[0])
        return f"<!-- table:{found[1]}-->\n{content}\n<!-- end -->"

    if len(MARK.findall(text)) != len(MARKED.findall(text)):
        raise SystemExit("a '<!-- table: … -->' has no '<!-- end -->' after it")
    return MARKED.sub(table, text)


def listed(folder: Path) -> str:
    """The README.md of the results: what each file is."""
    lines = [list(LIST_HEADS)]
    for path in sorted(folder.glob("*.json")):
        data = read(path)
        if "rows" in data:
            facts = _bench_facts(path)
        else:
            facts = _demo_facts(data) if "runs" in data else _reproduce_facts(data)
        lines.append([f"[{path.name}]({path.name})", *facts])
    return (
        "# Results\n\nMeasured on these machines; the numbers of the project's [README](../../README.md) and of "
        "[its benchmarks](../README.md) are made from these files. Made by `make readme-tables`.\n\n"
        + markdown(lines, "l" * len(LIST_HEADS))
        + f"\n\n{on_gpus(folder)}\n"
    )


def on_gpus(folder: Path) -> str:
    """What has run on a real GPU, when, and what has not: of each `make gpu-report` whose folder lies here."""
    reports = {path.parent.name: gpu_report.load(path) for path in sorted(folder.glob("*/report.json"))}
    title = "## On a GPU"
    if not reports:
        what = "; ".join(gpu_report.UNTIL)
        return (
            f"{title}\n\nNothing has run on a real GPU yet: the CUDA kernels are compiled by nvcc, and run by the "
            f"emulator of the tests. On a machine that has one, `make gpu-report` does, and then says here: {what}."
        )
    lines = [["", *(f"[{report['gpu']}]({name}/README.md)" for name, report in reports.items())]]
    lines += [[what, *(str(report[what]) for report in reports.values())] for what in ("date", "torch", "revision")]
    for stage in gpu_report.UNTIL:
        cells = []
        for report in reports.values():
            found = [one for one in report["stages"] if one["name"] == stage]
            cells.append(": ".join(filter(None, (found[0]["outcome"], found[0]["detail"]))) if found else "not run")
        lines.append([stage, *cells])
    return f"{title}\n\nWhat `make gpu-report` did, and what it did not.\n\n{markdown(lines, 'l' * len(lines[0]))}"


def _demo_facts(data: dict[str, Any]) -> list[str]:
    env = data["env"]
    return [
        f"`{data['command']}`",
        data["machine"],
        data["date"],
        env["torch"],
        f"{env['convkit']} ({env['git'][:12]})",
    ]


def _reproduce_facts(data: dict[str, Any]) -> list[str]:
    envs = [env for claim in data["claims"] for env in claim["environments"]]

    def all_of(text: str) -> str:
        return ", ".join(dict.fromkeys(text.format_map(env) for env in envs))

    where = all_of("{device}, {threads} threads")
    return [f"`{data['command']}`", where, data["date"], all_of("{torch}"), all_of("{convkit} ({git!s:.12})")]


def _bench_facts(path: Path) -> list[str]:
    results = Results.load(path)
    machine, rows = results.machine, results.rows
    families, dtypes, peers = (
        ", ".join(dict.fromkeys(names))
        for names in ((r.family for r in rows), (r.dtype for r in rows), results.settings.peers)
    )
    threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
    where = machine.gpu or f"{machine.cpu}, {machine.isa}, {threads} on {machine.cores} cores"
    busy = ", busy meanwhile" if results.disturbances() else ""
    what = f"`convkit bench`: {len(rows)} rows of {families}; {dtypes}; peers {peers}"
    return [what, where + busy, machine.date[:10], machine.torch, version(machine)]


def main(arguments: list[str]) -> None:
    folder, stale = ROOT / "benchmarks" / "results", []
    texts = {folder / "README.md": listed(folder)}
    for path in (ROOT / name for name in PAGES):
        try:
            texts[path] = filled(path.read_text(encoding="utf-8"), folder)
        except SystemExit as error:
            raise SystemExit(f"{path.relative_to(ROOT)}: {error}") from None
    for path, text in texts.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in arguments:
                path.write_text(text, encoding="utf-8")
    if stale and "--check" in arguments:
        raise SystemExit(f"not up to date: {', '.join(stale)}; type: make readme-tables")
    print(f"{'written: ' + ', '.join(stale) if stale else 'the tables are up to date'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BenchError, LabError) as error:
        raise SystemExit(str(error)) from None
