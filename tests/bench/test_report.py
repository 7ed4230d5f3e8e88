"""The report of a run: a page that stands alone and is well-formed, pictures that show every row, tables that fit."""

import dataclasses
import re
import sys
from html.parser import HTMLParser

import pytest
from result_checks import layer, many, network, results

from convkit.bench import BenchError
from convkit.bench.pictures import COLOURS, GRID, INK, ratios, roofline
from convkit.bench.problems import BatchNormProblem, ConvProblem
from convkit.bench.report import markdown, write_report
from convkit.bench.report_tables import (
    Cell,
    Table,
    best_table,
    failures,
    layer_table,
    net_table,
    quantity,
    short_table,
    summary_table,
)
from convkit.bench.results import Ceilings, Failure

pytest.importorskip("matplotlib")
CONV = ConvProblem.parse("n8c64h56w56k64r3s3p1")
ONE = [layer("one", CONV, "fprop", 0.7)]
RUNS = {
    "one": ONE,
    "many": many(),
    "batch_norm": [layer("bn", BatchNormProblem(8, 64, 56, 56, residual=True), "backward")],
    "net": [network("resnet18")],
    "dtypes": [layer("a", CONV.replace(dtype=d), "fprop", dtype=d) for d in ("f32", "bf16", "f16", "f64")],
}


class Page(HTMLParser):
    """Checks that elements are closed in order, and gathers ids, links, tables and text."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.attributes, self.rows, self.text = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag == "table":
            self.rows.append([])
        if tag == "tr":
            self.rows[-1].append(0)
        if tag in ("td", "th"):
            self.rows[-1][-1] += 1

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("rows", RUNS.values(), ids=RUNS)
def test_page(tmp_path, rows):
    path = write_report(results(rows), tmp_path / "a" / "report")
    assert path == tmp_path / "a" / "report" / "index.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    # Every reference stays in the page.
    links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert all(link.startswith("#") and link[1:] in page.ids for link in links)
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "<link" not in text
    # Every row of a table has a cell for every head.
    assert page.rows and all(len(set(cells)) == 1 for cells in page.rows)
    said = "".join(page.text)
    assert "Made-up <Processor> & Sons" in said and all(row.name in said for row in rows)
    # Colours of the pictures are the page's, so that they follow the colour scheme.
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert pictures and not any(colour in pictures for colour in (INK, GRID, *COLOURS.values(), "#000000"))
    assert {name for name in re.findall(r"var\(--([\w-]+)\)", text)} <= set(re.findall(r"--([\w-]+):", text))
    for name in ("roofline", "ratios"):
        png = tmp_path / "a" / "report" / f"{name}.png"
        drawn = name == "ratios" or any(row.bytes for row in rows)
        assert png.exists() == drawn == (f'id="{name}-' in text)
        assert not drawn or png.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a" / "report" / "tables.md").read_text(encoding="utf-8") == markdown(results(rows))


def test_hostile_text_stays_text(tmp_path):
    bad = '<script>alert("x")</script>|'
    row = dataclasses.replace(ONE[0], name=bad, times={**ONE[0].times, "im2col/nchw": Failure(f"no {bad}")})
    run = results([row], cpu=bad)
    text = write_report(run, tmp_path).read_text(encoding="utf-8")
    assert text.count("<script>") == 1
    assert "".join(Page(text).text).count(bad) >= 4
    table = layer_table(run).markdown().splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1 and r"</script>\|" in table[2]


def test_failures_and_disturbances_are_said(tmp_path):
    rows = many(15)
    run = results(rows, others=1.0)
    failed = failures(run)
    assert len(failed) == sum(isinstance(t, Failure) for row in rows for t in row.times.values()) > 10
    said = "".join(Page(write_report(run, tmp_path).read_text(encoding="utf-8")).text)
    assert failed[0][0] in said and "BackendCompilerFailed: <no> | compiler" in said
    assert "before the run: other programs kept 1.0 of 2 cores busy" in said and "†: the machine was busy" in said
    calm = "".join(Page(write_report(results(ONE), tmp_path).read_text(encoding="utf-8")).text)
    assert "busy" not in calm and "Failures" not in calm
    disturbed = dataclasses.replace(ONE[0], others=1.5)
    assert layer_table(results([disturbed])).rows[0][0].text == "one †"


def test_nothing_measured(tmp_path):
    with pytest.raises(BenchError, match="needs at least one row"):
        write_report(results([]), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_run_without_any_time(tmp_path):
    """All failed: there is nothing to draw, and that is said."""
    row = dataclasses.replace(ONE[0], times={key: Failure("RuntimeError: no") for key in ONE[0].times})
    text = write_report(results([row]), tmp_path).read_text(encoding="utf-8")
    assert "<svg" not in text and "RuntimeError: no" in text and not (tmp_path / "ratios.png").exists()


def test_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchError, match="needs matplotlib, which is not installed: type"):
        write_report(results(ONE), tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BenchError, match="cannot be written to"):
        write_report(results(ONE), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- pictures


def test_ratios_have_a_bar_a_row():
    rows = many()
    (axes,) = ratios(results(rows)).axes
    assert len(axes.patches) == len(rows) and axes.get_xscale() == "log"
    ends = sorted(round(bar.get_x() + bar.get_width(), 6) for bar in axes.patches)
    speed_ups = []
    for row in rows:
        own = min(row.seconds(f"convkit/{layout}") for layout in row.layouts)
        speed_ups.append(round(row.seconds(row.best_peer()) / own, 6))
    assert ends == sorted(speed_ups)
    low, high = axes.get_xlim()
    assert low < min(speed_ups) and high > max(speed_ups) and low < 1 < high
    assert any(list(line.get_xdata()) == [1, 1] for line in axes.lines)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(labels) == sorted(f"{row.name} {row.pass_}" for row in rows)


def test_roofline_shows_every_layer_under_its_roof():
    rows = many()
    figure = roofline(results(rows))
    (axes,) = figure.axes
    measured = [row for row in rows if row.family != "nets"]
    drawn = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert len(drawn) == 2 * len(measured)  # convkit and the best peer
    left, right = axes.get_xlim()
    assert all(left < row.flops / row.bytes < right for row in measured)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "f32: 420 Gflop/s, copy 40.0 GB/s" and labels[-1] == "hollow: the best peer"
    assert len(labels) == len(set(labels)) and "Depthwise convolution, f32" in labels
    bottom, top = axes.get_ylim()
    assert all(bottom < float(y) < top for line in drawn for y in line.get_ydata())


def test_no_ceiling_in_a_dtype(tmp_path):
    run = results(RUNS["dtypes"])
    run.ceilings = Ceilings(4e10, None, {})
    write_report(run, tmp_path)


# ---------------------------------------------------------------- tables


def test_layer_table():
    table = layer_table(results(ONE))
    assert [len(row) for row in table.rows] == [len(table.heads)] * 2
    cells = {head: cell for head, cell in zip(table.heads, table.rows[1], strict=True)}
    floor = ONE[0].floor_s
    assert cells["layout"].text == "nhwc" and cells["layer"].text == "one"
    assert cells["convkit, ms"].text == quantity(2e3 * floor) and cells["of floor"].text == "50 %"
    assert cells["best peer"].text == "PyTorch nchw" and cells["ratio"].text == "0.70" and cells["ratio"].kind == "bad"
    assert cells["same layout"].value == pytest.approx(0.7 * 1.5) and cells["same layout"].kind == "good"
    assert cells["error"].text == "2.0e-07" and "median of 5" in cells["convkit, ms"].note


def test_short_table_takes_the_best_layout():
    table = short_table(results(ONE), "dense")
    texts = [cell.text for cell in table.rows[0]]
    assert len(table.rows) == 1 and texts[1] == "`n8c64h56w56k64r3s3u1p1d1g1_f32`"
    assert texts[3] == quantity(2e3 * ONE[0].floor_s) and texts[5:] == ["PyTorch nchw", "0.70", "50 %"]
    assert short_table(results(ONE), "depthwise").rows == ()


def test_net_table():
    table = net_table(results([network("resnet18", 1.25)]))
    cells = {head: cell for head, cell in zip(table.heads, table.rows[0], strict=True)}
    assert cells["convkit, images/s"].text == "320" and cells["PyTorch nchw, images/s"].text == "256"
    assert cells["torch.compile nchw, images/s"].text == "failed" and cells["convkit, MiB"].text == "123"
    assert cells["ratio"].text == "1.25"


def test_best_table_has_a_column_a_machine():
    problem = ConvProblem(8, 64, 56, 56, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    rows = [layer("a", problem, "fprop", 2.0), layer("a", problem, "dgrad", 0.5), network("resnet18", 1.5)]
    other = results(
        [layer("a", problem, "fprop", 1.1), network("simplenet")], cpu="Intel(R) Xeon(R) Processor", threads=1
    )
    table = best_table([results(rows[:1]), results(rows[1:]), other])
    assert table.heads[2] == "Intel Xeon, avx2, 1 thread, f32"
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["Dense convolution", "1.00 (0.50)", "1.10"],
        ["resnet18, training", "1.50", ""],
        ["simplenet, training", "", "1.10"],
    ]


def test_summary_table():
    table = summary_table(results(many()))
    cells = [cell.text for cell in table.rows[0]]
    assert cells[:4] == ["Dense convolution", "fprop", "f32", "nchw"] and len(table.rows[0]) == len(table.heads)
    assert table.rows[-1][0].text == "Networks"


def test_markdown_is_a_table():
    lines = Table(("a", "b"), ((Cell("x|y"), Cell("1")),), texts=1).markdown().splitlines()
    assert lines == ["| a | b |", "| :--- | ---: |", r"| x\|y | 1 |"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (0.00001, "0.000010"), (0.0123, "0.0123"), (0.1, "0.10"), (0.0999, "0.10"), (1.234, "1.23")]
    + [(9.996, "10.0"), (12.34, "12.3"), (99.96, "100"), (1234.5, "1,234"), (-0.5, "-0.50")],
)
def test_quantity(value, text):
    assert quantity(value) == text
