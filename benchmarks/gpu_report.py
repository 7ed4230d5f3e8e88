"""``make gpu-report``: builds convkit for the GPU of this machine, tests it, measures it, and keeps what was found.

For a machine where nothing can be installed: it runs with the interpreter that it is started with, and needs torch
(2.11 or newer, a CUDA build), nvcc, setuptools, cmake, ninja and pytest there. Without rich, matplotlib or
compute-sanitizer what needs them is left out, and said so.

One stage after the other, in processes of their own, each stopped when its share of the time is over; one that fails
does not keep the next from running. What they print goes to ``log.txt``, and what was reached to ``report.json``, at
once. The folder (``benchmarks/results/NAME-OF-THE-GPU``, or ``--out``) then holds:

``README.md``    stages and means as tables          ``report.json``  the stages, for benchmarks/results/README.md
``*.json``       all samples, as ``convkit bench``   ``*.png``        roofline and ratios       ``log.txt``

The exit status is 0 if all went well, 1 if a stage failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
MINUTES = 9.5
GRACE_S = 10  # for a stage to end by itself after it was told to
RESTARTS = 5
OPERATOR_TESTS = (
    "tests/kernels/test_numeric.py",
    "tests/kernels/test_derivatives.py",
    "tests/kernels/test_max_pool.py",
)
GPU_TESTS = "tests/cuda/test_gpu.py"


@dataclass(frozen=True)
class Stage:
    """``until``: the share of the whole time after which it is stopped."""

    name: str
    until: float
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    results: str | None = None
    """The file of `convkit bench` that it writes. One that dies goes on where it was: the GPU's memory may be lost to a
    process after an illegal access."""
    missing: str | None = None
    """Why it cannot run here."""


@dataclass
class Outcome:
    name: str
    outcome: str
    """ok, failed, cut off, or not run."""
    seconds: float
    detail: str


# ---- the stages ------------------------------------------------------------------------------------------------------

# What is measured, in which file, with which options of `run_bench`; the file's name is what other runs compare with.
MEASURED = {
    "depthwise, batch norm in bf16": ("depthwise-batch-norm", "depthwise,batch-norm", "bf16", "torch,native", False),
    "dense in bf16": ("dense", "dense", "bf16", "torch", False),
    "torch.compile in bf16": ("compile", "batch-norm,depthwise,dense", "bf16", "torch,compile", True),
    "dense in tf32, f16, f32": ("dense", "dense", "tf32,f16,f32", "torch", False),
    "depthwise, batch norm in f16, f32": (
        "depthwise-batch-norm",
        "depthwise,batch-norm",
        "f16,f32",
        "torch,native",
        False,
    ),
}
UNTIL = {
    "build": 0.42,
    "tests of the GPU": 0.50,
    "tests of the operators": 0.62,
    "memcheck": 0.67,
    "racecheck": 0.72,
    "depthwise, batch norm in bf16": 0.86,
    "dense in bf16": 0.97,
    "torch.compile in bf16": 0.99,
    "dense in tf32, f16, f32": 1.0,
    "depthwise, batch norm in f16, f32": 1.0,
}


def stages(out: Path, capability: tuple[int, int]) -> list[Stage]:
    """What is done on a GPU of that compute capability, in order."""
    python, me = sys.executable, str(Path(__file__).resolve())
    # 9.0a has the instructions that only this one has; other architectures have no such variant that is used.
    arch = f"{capability[0]}.{capability[1]}" + ("a" if capability == (9, 0) else "")
    building = {"TORCH_CUDA_ARCH_LIST": arch, "FORCE_CUDA": "1"}
    pytest = (python, "-m", "pytest", "-v", "-rN", "--tb=short", "-p", "no:cacheprovider", "-m", "cuda")
    workers = min(8, os.cpu_count() or 1)
    parallel = ("-n", str(workers)) if importlib.util.find_spec("xdist") and workers > 1 else ()
    no_pytest = None if importlib.util.find_spec("pytest") else f"no pytest in {python}"
    threads = {"OMP_NUM_THREADS": "1"}
    found = [
        Stage("build", UNTIL["build"], (python, "setup.py", "build_ext", "--inplace"), building),
        Stage("tests of the GPU", UNTIL["tests of the GPU"], (*pytest, GPU_TESTS), threads, missing=no_pytest),
        Stage(
            "tests of the operators",
            UNTIL["tests of the operators"],
            (*pytest, *parallel, *OPERATOR_TESTS),
            threads,
            missing=no_pytest,
        ),
    ]
    sanitizer = find_sanitizer()
    for tool in ("memcheck", "racecheck"):
        why = no_pytest or (None if sanitizer else "no compute-sanitizer in PATH or CUDA_HOME")
        # Every tensor an allocation of its own, or what lies beside it in torch's cache would pass for it.
        checked = {**threads, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = (str(sanitizer), "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no", *pytest)
        some = (f"{GPU_TESTS}", "-k", "test_every_kernel and (f32-nchw or bf16-nhwc)")
        found.append(Stage(tool, UNTIL[tool], (*command, *some), checked, missing=why))
    for name, (file, suites, dtypes, peers, quick) in MEASURED.items():
        path = out / f"{file}.json"
        command = (python, me, "--measure", suites, "--dtype", dtypes, "--peers", peers, "--json", str(path))
        found.append(Stage(name, UNTIL[name], command + ("--quick",) * quick, results=str(path)))
    return found


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", "")] + [
        f"{home}/{part}" for home in homes for part in ("bin", "compute-sanitizer")
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


# ---- running them ----------------------------------------------------------------------------------------------------


def run(
    todo: Sequence[Stage], out: Path, seconds: float, facts: Mapping[str, Any], say: Callable = print
) -> list[Outcome]:
    """Runs the stages, and keeps log.txt and report.json up to date. ``seconds``: for all of them."""
    began, log = time.monotonic(), out / "log.txt"
    log.unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    for stage in todo:
        outcome = _run_stage(stage, log, began + stage.until * seconds)
        outcomes.append(outcome)
        say(f"{outcome.name:<34} {outcome.outcome:<8} {outcome.seconds:6.1f} s  {outcome.detail}", flush=True)
        if outcome.outcome == "failed":
            say(_tail(log), flush=True)
        _write(out / "report.json", {"schema": SCHEMA, **facts, "stages": [asdict(one) for one in outcomes]})
    return outcomes


def _run_stage(stage: Stage, log: Path, end: float) -> Outcome:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n======== {stage.name}: {' '.join(stage.command)}\n")
    if stage.missing:
        return Outcome(stage.name, "not run", 0.0, stage.missing)
    began, start = time.monotonic(), log.stat().st_size
    if end - began < 2:
        return Outcome(stage.name, "not run", 0.0, "no time was left")
    for _ in range(RESTARTS):
        before = _rows(stage.results)
        status = _run_process(stage, log, end - time.monotonic())
        if status in (0, None) or not stage.results or _rows(stage.results) == before:
            break
    with log.open("rb") as file:
        file.seek(start)
        said = file.read().decode(errors="replace")
    outcome = "ok" if status == 0 else "cut off" if status is None else "failed"
    return Outcome(stage.name, outcome, round(time.monotonic() - began, 1), _detail(stage, said, status))


def _run_process(stage: Stage, log: Path, seconds: float) -> int | None:
    """The exit status; None if the time was over. Then it is asked to end, as by Ctrl-C, and ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **stage.environment}
    # A session of its own: what it starts is told to end with it.
    with log.open("ab") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        try:
            process = subprocess.Popen(stage.command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        except OSError as error:
            file.write(f"{stage.command[0]}: {error.strerror}\n".encode())
            return 127
    try:
        for told, wait in ((None, max(0.1, seconds)), (signal.SIGINT, GRACE_S), (signal.SIGKILL, GRACE_S)):
            if told is not None:
                os.killpg(process.pid, told)
            try:
                status = process.wait(wait)
                return status if told is None else None
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return None


def _rows(path: str | None) -> int:
    try:
        return len(json.loads(Path(path).read_text(encoding="utf-8"))["rows"]) if path else 0
    except (OSError, ValueError, KeyError):
        return 0


def _detail(stage: Stage, said: str, status: int | None) -> str:
    """What came of it, in a few words."""
    if stage.results:
        of = re.findall(r"^rows: (\d+)$", said, re.MULTILINE)
        new, *_ = re.findall(r"^already: (\d+)$", said, re.MULTILINE) or ["0"]
        return f"{_rows(stage.results) - int(new)} of {of[0]} rows" if of else "nothing was measured"
    words = []
    counted = re.findall(r"(?:^|\s)(PASSED|FAILED|ERROR|SKIPPED)(?:\s|$)", said, re.MULTILINE)
    words += [f"{counted.count(word)} {word.lower()}" for word in dict.fromkeys(counted)]
    words += re.findall(r"(ERROR SUMMARY: .*|RACECHECK SUMMARY: .*)", said)[-1:]
    if stage.name == "build":
        words.append(f"for {stage.environment.get('TORCH_CUDA_ARCH_LIST')}")
    if status not in (0, 1, None) and not words:
        words.append(f"exit status {status}")
    return ", ".join(words)


def load(path: Path) -> dict[str, Any]:
    """A report.json. SystemExit names the file and what is wrong with it."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["schema"] != SCHEMA:
            raise ValueError(f"schema is {report['schema']!r}, this version reads {SCHEMA}")
        for name in ("gpu", "date", "torch", "revision", "stages"):
            report[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}: not a report of `make gpu-report`: {error!r}") from None
    return report


def _tail(path: Path, lines: int = 25) -> str:
    return "\n".join("    " + line for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _write(path: Path, data: Any) -> None:
    """Whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


# ---- measuring, in a process of its own ------------------------------------------------------------------------------


class Lines:
    """What a run of the benchmarks says, a line each: for a log, and without rich."""

    def say(self, text: str, style: str | None = None) -> None:
        print(text, flush=True)

    def machine(self, machine: Any, settings: Any) -> None:
        self.say(f"{machine.gpu or machine.cpu}; torch {machine.torch}; {machine.driver}; convkit {machine.convkit}")

    def ceilings(self, ceilings: Any) -> None:
        rates = ", ".join(f"{dtype} {rate / 1e12:,.1f}" for dtype, rate in ceilings.flops_per_s.items())
        self.say(f"ceilings: copy {ceilings.copy_bytes_per_s / 1e9:,.0f} GB/s; Tflop/s {rates or 'none'}")

    def resumed(self, done: int, left: int, path: Any) -> None:
        self.say(f"rows: {done + left}")

    def track(self, cases: Sequence[Any]):
        import torch

        for case in cases:
            self.say(f"{case.name} {case.pass_} {case.dtype}")
            yield case
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises if an illegal access has made the GPU useless to this process

    def show(self, results: Any, old: Any = None) -> None:
        for row in results.rows:
            for key, timing in row.times.items():
                if hasattr(timing, "message"):
                    self.say(f"{row.name} {row.pass_} {row.dtype}: {key} failed: {timing.message}")


def measure(suites: str, dtypes: str, peers: str, path: Path, quick: bool, device: str, filter: str) -> None:
    from convkit.bench import BenchError
    from convkit.bench.run import run_bench

    print(f"already: {_rows(str(path))}", flush=True)
    try:
        run_bench(
            suite=suites,
            device=device,
            dtype=dtypes,
            peer_names=peers,
            json=path,
            quick=quick,
            filter=filter,
            budget_s=0.015,
            rest_s=0.1 if device == "cuda" else 0.0,
            screen=Lines(),
        )
    except BenchError as error:
        sys.exit(f"convkit: {error}")


# ---- what is shown at the end ----------------------------------------------------------------------------------------


def means(out: Path) -> list[list[str]]:
    """Heads, then a line for each family, dtype, pass and layout in the files of the folder."""
    from convkit.bench.results import Results, geometric_mean

    lines = [["family", "dtype", "pass", "layout", "rows", "ratio", "same layout", "of floor", "worst", "worst row"]]
    for file in dict.fromkeys(file for file, *_ in MEASURED.values()):
        if not (out / f"{file}.json").exists():
            continue
        results = Results.load(out / f"{file}.json")
        for one in results.summaries():
            rows = [r for r in results.rows if (r.family, r.dtype, r.pass_) == (one.family, one.dtype, one.pass_)]
            shares = [share for row in rows if (share := row.floor_fraction(one.layout))]
            family = f"{one.family}, torch.compile too" if file == "compile" else one.family
            lines.append(
                [family, one.dtype, one.pass_, one.layout, str(one.rows), f"{one.any_layout:.2f}"]
                + [f"{one.same_layout:.2f}" if one.same_layout else "–"]
                + [f"{100 * geometric_mean(shares):.0f} %" if shares else "–", f"{one.worst:.2f}", one.worst_name]
            )
    return lines


def summarise(out: Path, outcomes: Sequence[Outcome], facts: Mapping[str, Any], say: Callable = print) -> None:
    """Writes README.md and the pictures, and prints the tables."""
    try:
        table, pictures = means(out), _draw(out, say)
    except ImportError as error:  # not built
        say(str(error))
        table, pictures = [[]], []
    stage_lines = [["stage", "outcome", "seconds", "what"]]
    stage_lines += [[one.name, one.outcome, f"{one.seconds:.0f}", one.detail] for one in outcomes]
    parts = [
        f"# {facts['gpu']}",
        f"{facts['date'][:10]}; {', '.join(f'{name} {facts[name]}' for name in ('torch', 'convkit', 'revision'))}. "
        "Made by `make gpu-report`.",
        _markdown(stage_lines),
    ]
    if len(table) > 1:
        parts += [
            "Ratio: the best peer's time over convkit's, at any layout and at the same one, geometric means; above 1 "
            "convkit is faster. Of floor: the share of what copies and matrix products reached in the same run.",
            _markdown(table),
        ]
    parts += [f"![{name}]({name}.png)" for name in pictures]
    (out / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    say("\n" + _columns(stage_lines))
    if len(table) > 1:
        say("\n" + _columns(table))
    say(f"\n{facts['gpu']}: {out}", flush=True)


def _draw(out: Path, say: Callable) -> list[str]:
    """The pictures of what was measured in bf16, or what was; their names."""
    if importlib.util.find_spec("matplotlib") is None:
        say("no matplotlib here: no pictures")
        return []
    from convkit.bench.pictures import PAPER, ratios, roofline
    from convkit.bench.results import Results

    loaded = [
        Results.load(path) for name in ("depthwise-batch-norm", "dense") if (path := out / f"{name}.json").exists()
    ]
    rows = [row for one in loaded for row in one.rows]
    rows = [row for row in rows if row.dtype == "bf16"] or rows
    if not rows:
        return []
    ceilings = loaded[0].ceilings
    dtypes = {row.dtype for row in rows}
    rates = {dtype: rate for dtype, rate in ceilings.flops_per_s.items() if dtype in dtypes}
    together = Results(
        loaded[0].machine, loaded[0].settings, type(ceilings)(ceilings.copy_bytes_per_s, None, rates), rows
    )
    drawn = {"roofline": roofline(together), "ratios": ratios(together)}
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(out / f"{name}.png", dpi=160, facecolor=PAPER)
    return [name for name, figure in drawn.items() if figure is not None]


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = [":---"] * len(lines[0])
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [lines[0], rule, *lines[1:]]
    )


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


# ---- the command -----------------------------------------------------------------------------------------------------


def gpu() -> tuple[str, tuple[int, int]]:
    """Name and compute capability; SystemExit with one line where there is none."""

    def stop(why: str) -> None:
        print(f"convkit: gpu-report: {why}", file=sys.stderr)
        sys.exit(2)

    try:
        import torch
    except ModuleNotFoundError:
        stop(f"{sys.executable} has no torch: name an interpreter that has, as in: make gpu-report PYTHON=python3.12")
    if torch.version.cuda is None:
        stop(f"torch {torch.__version__} of {sys.executable} is a CPU build: name one with CUDA in PYTHON=")
    if not torch.cuda.is_available():
        stop(f"torch {torch.__version__} finds no GPU here")
    return torch.cuda.get_device_name(), torch.cuda.get_device_capability()


def revision() -> str:
    """The commit of this checkout, with a + where files differ; unknown for a copy without its history."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for what is found; what an earlier run left there is replaced")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all stages together (default {MINUTES})")
    parser.add_argument("--measure", metavar="SUITES", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bf16", help=argparse.SUPPRESS)
    parser.add_argument("--peers", default="torch", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--filter", default="*", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        measure(given.measure, given.dtype, given.peers, given.json, given.quick, given.device, given.filter)
        return 0

    name, capability = gpu()
    import torch

    out = given.out or ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    for stage_results in dict.fromkeys(file for file, *_ in MEASURED.values()):
        (out / f"{stage_results}.json").unlink(missing_ok=True)
    version = re.search(r'__version__ = "([^"]+)"', (ROOT / "convkit/__init__.py").read_text())[1]
    facts = {
        "gpu": f"{name} (sm_{capability[0]}{capability[1]})",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "convkit": version,
        "revision": revision(),
    }
    print(f"{facts['gpu']}, torch {facts['torch']}, {given.minutes:g} minutes at most; into {out}", flush=True)
    outcomes = run(stages(out.resolve(), capability), out, 60 * given.minutes, facts)
    sys.path.insert(0, str(ROOT))
    summarise(out, outcomes, facts)
    failed = [one.name for one in outcomes if one.outcome == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}; see {out / 'log.txt'}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
