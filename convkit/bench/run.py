"""What ``convkit bench`` does: measure the rows asked for, keep each as soon as it is done, and show them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from convkit.bench import BenchError, nets, peers, suites
from convkit.bench.problems import LAYOUTS
from convkit.bench.results import Failure, Results, Row, Settings, Timing
from convkit.bench.roofline import ceilings, torch_dtype
from convkit.bench.suites import Case, Net
from convkit.bench.timing import Arena, Usage, carve, carved_elements, interleave, machine, rotation_bytes, short

__all__ = ["Interrupted", "measure", "run_bench"]

DTYPES = ("f32", "bf16", "f16", "f64", "tf32")
DEFAULT_PEERS = {"cpu": ("torch",), "cuda": ("torch", "native")}
# Seconds of calls for each candidate, and at least so many calls; a network's step takes many times a layer's.
BUDGET_S = {"normal": 0.25, "quick": 0.03}
ROUNDS = {"normal": 5, "quick": 3}
NET_BUDGETS = 12
# GPUs get warm, and their clocks fall.
REST_S = {"cpu": 0.0, "cuda": 1.0}


class Interrupted(BenchError):
    """Ctrl-C; the message says what is kept."""

    exit_code = 130


def run_bench(
    *,
    suite: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    layout: str | None = None,
    passes: str | None = None,
    filter: str = "*",
    problems: Sequence[str] = (),
    models: Sequence[str] = (),
    peer_names: str | None = None,
    json: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    compare: str | os.PathLike[str] | None = None,
    quick: bool = False,
    in_cache: bool = False,
    threads: int | None = None,
    budget_s: float | None = None,
    rest_s: float | None = None,
    screen: Any = None,
) -> Results:
    """Measures what the options (those of ``convkit bench``) select, prints tables, returns the results.

    ``json`` is written after every row; rows that it has already are not measured again. ``budget_s``: seconds of calls
    for each candidate, and ``rest_s`` between two rows, in the place of the usual ones. ``screen`` is shown what
    happens in the place of `convkit.bench.tables.Screen`, which needs rich. BenchError for options that don't fit,
    files that cannot be used, and a file of another machine or other settings; :class:`Interrupted`.
    """
    if screen is None:
        from convkit.bench.tables import Screen

        screen = Screen()
    device = _device(device)
    default_suites = () if problems or models else suites.SUITES
    chosen_dtypes = suites.words("--dtype", dtype, DTYPES, ("bf16",) if device == "cuda" else ("f32",))
    if "tf32" in chosen_dtypes and device == "cpu":
        raise BenchError("--dtype: got 'tf32', which is a way of GPUs; accepts f32, bf16, f16, f64 on a CPU")
    chosen_layouts = suites.words("--layout", layout, tuple(LAYOUTS), tuple(LAYOUTS))
    chosen_peers = suites.words("--peers", peer_names, peers.PEERS, DEFAULT_PEERS[device], all=peers.PEERS)
    cases = suites.cases(
        suites=suites.words("--suite", suite, suites.SUITES, default_suites, all=suites.SUITES),
        device=device,
        dtypes=chosen_dtypes,
        layouts=chosen_layouts,
        passes=suites.words("--passes", passes, suites.PASSES, suites.PASSES),
        filter=filter,
        quick=quick,
        problems=problems,
        models=models,
    )
    for case in cases:
        if isinstance(case.problem, Net):
            nets.factory(case.problem.factory)
    old = Results.load(compare) if compare is not None else None
    if json is not None and not Path(json).absolute().parent.is_dir():
        raise BenchError(f"--json: got '{json}', in a folder that does not exist: make it first")
    if report is not None:
        _make_folder(report)

    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        settings = Settings(
            device=device,
            threads=torch.get_num_threads(),
            layouts=chosen_layouts,
            peers=chosen_peers,
            in_cache=in_cache,
            budget_s=BUDGET_S["quick" if quick else "normal"] if budget_s is None else budget_s,
            min_rounds=ROUNDS["quick" if quick else "normal"],
            rotation_bytes=0 if in_cache else rotation_bytes(device),
        )
        torch.backends.cudnn.benchmark = True
        arenas: dict[torch.dtype, Arena] = {}
        results = _begin(settings, chosen_dtypes, cases, json, screen, arenas)
        done = {row.key for row in results.rows}
        left = [case for case in cases if case.key not in done]
        screen.resumed(len(cases) - len(left), len(left), json)
        try:
            for case in screen.track(left):
                results.rows.append(measure(case, settings, results, arenas))
                if json is not None:
                    results.save(json)
                time.sleep(REST_S[device] if rest_s is None else rest_s)
        except KeyboardInterrupt:
            shown = _shown(results, cases)
            screen.show(shown, old)
            kept = f"{len(shown.rows)} of {len(cases)} rows are in {json}; the same command goes on from there"
            lost = f"{len(shown.rows)} of {len(cases)} rows were measured; with --json FILE they would be kept"
            raise Interrupted(f"interrupted: {lost if json is None else kept}") from None
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.benchmark = before[1]

    shown = _shown(results, cases)
    screen.show(shown, old)
    if report is not None:
        from convkit.bench.report import write_report

        write_report(shown, report)
        screen.say(f"Report: {Path(report)}")
    return shown


def _device(name: str | None) -> str:
    kernels = torch._C._dispatch_has_kernel_for_dispatch_key("convkit::conv2d", "CUDA")
    if name is None:
        return "cuda" if torch.cuda.is_available() and kernels else "cpu"
    if name not in ("cpu", "cuda"):
        raise BenchError(f"--device: got '{name}'; accepts cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        build = "this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch finds no GPU"
        raise BenchError(f"--device: got 'cuda', but {build}; accepts cpu here")
    return name


def _make_folder(path: str | os.PathLike[str]) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--report: cannot make the folder '{path}': {error.strerror}") from None


def _begin(
    settings: Settings,
    dtypes: Sequence[str],
    cases: Sequence[Case],
    json: Any,
    screen: Any,
    arenas: dict[torch.dtype, Arena],
) -> Results:
    """A run without rows, or the one that the file holds; says what is measured on, and who disturbs it."""
    facts = machine(settings.device)
    old = Results.load(json) if json is not None and Path(json).exists() else None
    if old is not None:
        differences = old.machine.differences(facts) + old.settings.differences(settings)
        if differences:
            raise BenchError(
                f"--json: {json} was measured differently ({'; '.join(differences)}; its value first): "
                "name another file, or go back to what it was measured with"
            )
    screen.machine(facts, settings)
    wanted = list(dict.fromkeys((*dtypes, *(case.dtype for case in cases))))
    if old is not None and all(dtype in old.ceilings.flops_per_s for dtype in wanted):
        screen.ceilings(old.ceilings)
        return old
    # Copies are of memory beyond the caches, whatever the calls will be of.
    arena = Arena(torch.float32, settings.device, settings.rotation_bytes or rotation_bytes(settings.device))
    if settings.rotation_bytes:
        arenas[torch.float32] = arena
    with torch.no_grad():
        found = ceilings(settings.device, wanted, arena)
    results = Results(facts, settings, found)
    if old is not None:  # measured for other dtypes; the rest of its ceilings is what its floors were computed with
        rates = {**found.flops_per_s, **old.ceilings.flops_per_s}
        results = dataclasses.replace(old, ceilings=dataclasses.replace(old.ceilings, flops_per_s=rates))
    screen.ceilings(results.ceilings)
    if json is not None:
        results.save(json)  # before hours of work: can it be written?
    return results


def _shown(results: Results, cases: Sequence[Case]) -> Results:
    """The rows of the cases, in their order: a file may hold those of other commands too."""
    rows = {row.key: row for row in results.rows}
    return dataclasses.replace(results, rows=[rows[case.key] for case in cases if case.key in rows])


def measure(case: Case, settings: Settings, results: Results, arenas: dict[torch.dtype, Arena]) -> Row:
    """One row. Who fails is in it with the reason. ``arenas`` are made as needed, and kept for the next row."""
    dtype = torch_dtype(case.dtype)
    is_net = isinstance(case.problem, Net)
    if is_net:  # parameters and images stay float32 under autocast
        dtype = torch.float64 if case.dtype == "f64" else torch.float32
    if dtype not in arenas:
        arenas.clear()  # one at a time: they are large
        arenas[dtype] = Arena(dtype, settings.device, settings.rotation_bytes)
    with peers.precision(case.dtype):
        return (_measure_net if is_net else _measure_operator)(case, settings, results, arenas[dtype])


def _measure_operator(case: Case, settings: Settings, results: Results, arena: Arena) -> Row:
    problem, shapes = case.problem, peers.operands(case.problem, case.pass_)
    usage = Usage()
    candidates: dict[str, list[Callable] | Failure] = {}
    errors: dict[str, float] = {}
    with torch.no_grad():
        try:
            stretches = arena.stretches(carved_elements(shapes, problem.torch_dtype))
            views = {layout: [carve(stretch, shapes, layout == "nhwc") for stretch in stretches] for layout in LAYOUTS}
        except (RuntimeError, MemoryError) as error:
            views, stretches = error, []
        for key in peers.keys(problem, case.layouts, settings.peers):
            who, _, layout = key.partition("/")
            laid_out = problem.replace(layout=layout)
            try:
                if isinstance(views, Exception):
                    raise views
                first = views[layout][0]
                function = peers.prepare(who, laid_out, case.pass_, first)
                errors[key] = peers.error(function, laid_out, case.pass_, first)
                candidates[key] = [partial(function, *tensors) for tensors in views[layout]]
            except Exception as error:
                candidates[key] = Failure(short(error))
        times = _times(candidates, settings, settings.budget_s)
    floor = results.ceilings.floor(case.flops, case.bytes, case.dtype, in_cache=settings.in_cache)
    return _row(case, times, errors, usage, case.flops, floor, sets=max(1, len(stretches)))


def _measure_net(case: Case, settings: Settings, results: Results, arena: Arena) -> Row:
    """The floor of a network counts nothing but its matrix products."""
    usage = Usage()
    who = ["torch", *(peer for peer in settings.peers if peer == "compile")]
    keys = [f"{nets.OWN}/{layout}" for layout in case.layouts] + [f"{p}/{layout}" for p in who for layout in LAYOUTS]
    try:
        steps, errors, flops = nets.prepare(case.problem, case.pass_, case.dtype, keys, arena)
    except Exception as error:
        steps, errors, flops = {key: Failure(short(error)) for key in keys}, {}, 0
    times = _times(steps, settings, settings.budget_s * NET_BUDGETS)
    memory = {}
    for key, timing in times.items():
        if isinstance(timing, Timing):
            peak = nets.peak_bytes(steps[key][0], settings.device)
            memory |= {} if peak is None else {key: peak}
    rate = results.ceilings.flops_per_s.get(case.dtype)
    row = _row(case, times, errors, usage, flops or None, flops / rate if flops and rate else None)
    return dataclasses.replace(row, images=case.problem.shape[0], memory=memory)


def _times(candidates: dict[str, list[Callable] | Failure], settings: Settings, budget_s: float):
    able = {key: calls for key, calls in candidates.items() if not isinstance(calls, Failure)}
    found = interleave(able, device=settings.device, budget_s=budget_s, min_rounds=settings.min_rounds)
    return {key: found.get(key, candidates[key]) for key in candidates}


def _row(case: Case, times, errors, usage: Usage, flops: int | None, floor: float | None, sets: int = 1) -> Row:
    others, steal = usage.read()
    return Row(
        suite=case.suite,
        family=case.family,
        name=case.name,
        problem=case.text,
        pass_=case.pass_,
        dtype=case.dtype,
        flops=flops,
        bytes=case.bytes,
        floor_s=floor,
        times=times,
        errors={key: value for key, value in errors.items() if isinstance(times[key], Timing)},
        sets=sets,
        others=others,
        steal=steal,
    )
