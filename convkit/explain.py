"""Where a model's time goes, layer by layer: what convkit and PyTorch take for each, and what the machine allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import convkit.nn as cnn
from convkit import _load, calls
from convkit.swap import find, unswapped

if TYPE_CHECKING:
    from convkit.bench.results import Ceilings, Machine
    from convkit.measure import Seconds, Task

__all__ = ["Explanation", "Row", "explain"]

PASSES = ("forward", "backward")
OWN = "convkit's own already"
MENTIONED = 8  # layers named in the words below the table


@dataclass(frozen=True)
class Row:
    """One layer and the calls of it that ask for the same work.

    Seconds are of all these calls together, by pass: {"forward": …, "backward": …}, the first alone in evaluation.
    """

    name: str
    """In the model, "" for the model itself; of a layer found at several places all names, joined by " = "."""
    kind: str
    problem: str | None = None
    """In the text form of convkit.bench.problems; of a transposed convolution that of the convolution it undoes."""
    calls: int = 0
    plans: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What convkit runs, kernel and plan, by its pass: fprop, dgrad, wgrad; of a batch norm forward, backward."""
    floor: Mapping[str, float] = dataclasses.field(default_factory=dict)
    convkit: Mapping[str, float] = dataclasses.field(default_factory=dict)
    torch: Mapping[str, float] = dataclasses.field(default_factory=dict)
    share: float | None = None
    """Of the time that convkit takes for all layers that were measured."""
    reason: str | None = None
    """Why there are no times."""

    @property
    def ratio(self) -> float | None:
        """How many times faster convkit is than PyTorch; below 1 where it is slower."""
        return _total(self.torch) / _total(self.convkit) if self.convkit and self.torch else None

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the kernels in ``plans``."""
        return tuple(dict.fromkeys(plan.partition(",")[0] for plan in self.plans.values()))


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: rows to iterate over, in the order of the model; prints as a table."""

    rows: tuple[Row, ...]
    training: bool
    machine: Machine
    ceilings: Ceilings | None
    """None where nothing was measured."""
    disturbed: str | None
    """What else used the machine meanwhile, if anything did: the times then mean little."""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def measured(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.reason is None)

    @property
    def slower(self) -> tuple[Row, ...]:
        """The layers in which PyTorch is still faster, those that lose most time first."""
        return tuple(sorted((row for row in self.measured if _lost(row) > 0), key=_lost, reverse=True))

    @property
    def totals(self) -> dict[str, dict[str, float]]:
        """Seconds over all rows, by who ("floor", "convkit", "torch") and pass."""
        passes = PASSES if self.training else PASSES[:1]
        return {
            who: {name: sum(getattr(row, who).get(name, 0.0) for row in self.measured) for name in passes}
            for who in ("floor", "convkit", "torch")
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON. Seconds."""
        return {
            "schema": 1,
            "training": self.training,
            "machine": dataclasses.asdict(self.machine),
            "ceilings": self.ceilings and dataclasses.asdict(self.ceilings),
            "disturbed": self.disturbed,
            "rows": [{**dataclasses.asdict(row), "ratio": row.ratio} for row in self.rows],
            "totals": self.totals,
            "slower": [row.name for row in self.slower],
        }

    def __str__(self) -> str:
        return "\n\n".join(filter(None, (self._table(), self._words(), self._plans())))

    __repr__ = __str__

    def _table(self) -> str:
        passes = PASSES if self.training else PASSES[:1]
        totals = self.totals
        lines = [["layer", "problem", "calls", *("floor", "convkit", "PyTorch") * len(passes), "ratio", "share"]]
        lasts = ["kernels, or why there are no times"]
        for row in self.rows:
            times = [_ms(getattr(row, who).get(name)) for name in passes for who in totals]
            numbers = [str(row.calls or ""), *times, _plain(row.ratio, ".2f"), _plain(row.share, ".1%")]
            lines.append([row.name or "(the model)", row.problem or "", *numbers])
            lasts.append(", ".join(row.kernels) if row.reason is None else f"{row.kind}: {row.reason}")
        times = [_ms(totals[who][name]) for name in passes for who in totals]
        ours, theirs = (_total(totals[who]) for who in ("convkit", "torch"))
        lines.append(["all measured", "", "", *times, _plain(theirs / ours if ours else None, ".2f"), ""])
        lasts.append("")
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = []
        for line, last in zip(lines, lasts, strict=True):
            aligned = [f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(line)]
            texts.append("  ".join([*aligned, last]).rstrip())
        groups = [f"{f' {name}, ms ':-^{sum(widths[3:6]) + 4}}" for name in passes]
        above = " " * (sum(widths[:3]) + 6) + "  ".join(groups)
        return "\n".join([above, *texts[:-1], "-" * (sum(widths) + 2 * len(widths)), texts[-1]])

    def _words(self) -> str:
        measured, slower, totals = self.measured, self.slower, self.totals
        if not measured:
            return "No layer was measured."
        ours, theirs = (_ms(_total(totals[who])) for who in ("convkit", "torch"))
        what = "forward and backward" if self.training else "forward"
        lines = [
            f"These layers take {ours} ms with convkit and {theirs} ms with PyTorch, {what}. Ratio: PyTorch's time "
            "over convkit's. Floor: what this machine can do at best, by the copy and multiply rates just measured."
        ]
        if slower:
            each = [
                f"{row.name or 'the model'} ({_ms(_total(row.torch))} ms against {_ms(_total(row.convkit))} ms)"
                for row in slower
            ]
            more = f" and {len(each) - MENTIONED} more" if len(each) > MENTIONED else ""
            lines.append(
                f"PyTorch is still faster in {len(slower)} of {len(measured)}, by {_ms(sum(map(_lost, slower)))} ms "
                f"together: {', '.join(each[:MENTIONED])}{more}. "
                "convkit.swap(model, example_input, only_faster=True) leaves such layers to PyTorch."
            )
        else:
            lines.append("convkit is faster in every one.")
        if self.disturbed:
            lines.append(f"The machine was busy ({self.disturbed}): these times mean little.")
        return "\n".join(lines)

    def _plans(self) -> str:
        lines = []
        for problem, plans in {row.problem: row.plans for row in self.measured}.items():
            details = [f"  {name}  {plan}" for name, plan in plans.items() if "," in plan]
            lines += [problem, *details] if details else []
        return "\n".join(["Plans:", *lines]) if lines else ""


def _lost(row: Row) -> float:
    """Seconds that PyTorch takes less."""
    return _total(row.convkit) - _total(row.torch) if row.convkit and row.torch else 0.0


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


def _ms(seconds: float | None) -> str:
    return _plain(None if seconds is None else 1e3 * seconds, ".3f")


def _plain(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def explain(
    model: nn.Module, example_input: Any, *, budget_s: float = 0.1, progress: Callable[[Task], None] | None = None
) -> Explanation:
    """Times each convolution, batch norm with the ReLU after it, and max pool, with convkit and with PyTorch.

    The model is called once with ``example_input`` to see what reaches its layers; of that it keeps nothing, and a
    swapped model stays swapped. Then each distinct problem is timed once, on random numbers: forward and backward if
    the model is in training mode, forward alone otherwise. A layer that convkit cannot serve gets a row that says why,
    as :func:`convkit.swap` does.

    Args:
        model: any module; it may itself be the layer.
        example_input: a tensor; a tuple of positional arguments; or a dict of keyword arguments. What the forward
            takes as one tuple or dict is given inside a tuple: ``({"image": x},)``.
        budget_s: seconds of calls for each pass of a problem, for each of convkit and PyTorch.
        progress: called with each task before it is timed.

    Returns:
        An :class:`Explanation`.

    Raises:
        TypeError: model is not a torch.nn.Module, or example_input is none of the above.
        ValueError: the model has lazy layers that are not initialized yet.
        What the model raises when it is called with example_input; it is then as it was before.

    The floor is that of the roofline model: Williams, Waterman and Patterson, "Roofline", 2009.
    """
    # Now, as `import convkit` should not load the benchmarks.
    from convkit.bench.results import disturbance
    from convkit.bench.timing import Usage, machine
    from convkit.measure import Task, measure, task

    with unswapped(model):
        found = find(model)
        recorded = calls.record(model, found.names, example_input)
    residuals, pools = found.residuals(), found.pools_with_relu()
    rows: dict[tuple[nn.Module, Task | str], Row] = {}  # by layer, and what it is to do or why that is not known
    for layer, names in found.names.items():
        row = Row(" = ".join(names), found.kinds[layer])
        reason = found.reasons.get(layer)
        if reason not in (None, OWN):
            rows[layer, reason] = dataclasses.replace(row, reason=f"left: {reason}")
            continue
        if not recorded[layer]:
            rows[layer, ""] = dataclasses.replace(row, reason="not called with this example_input")
        for call in recorded[layer]:
            residual = layer in residuals or (isinstance(layer, cnn.BatchNormReLU2d) and call.tensors == 2)
            try:
                work = task(layer, call, residual=residual, relu=layer in pools)
                row = dataclasses.replace(row, problem=str(work.problem))
            except ValueError as error:
                work = str(error)
                row = dataclasses.replace(row, reason=f"not measured: {error}")
            before = rows.get((layer, work), row)
            rows[layer, work] = dataclasses.replace(before, calls=before.calls + 1)

    tasks = list(dict.fromkeys(work for _, work in rows if isinstance(work, Task)))
    device = next((one.device for one in tasks), "cpu").partition(":")[0]
    facts, usage = machine(device), Usage()
    with calls.same_luck():
        ceilings = _ceilings(device, sorted({one.problem.dtype for one in tasks}))
    seconds = measure(tasks, budget_s=budget_s, progress=progress)
    disturbed = disturbance(*usage.read(), facts.cores, facts.threads)
    for (layer, work), row in rows.items():
        if isinstance(work, Task):
            rows[layer, work] = _timed(row, work, seconds[work], ceilings)
    whole = sum(_total(row.convkit) for row in rows.values())
    shared = (
        dataclasses.replace(row, share=_total(row.convkit) / whole) if row.convkit else row for row in rows.values()
    )
    return Explanation(tuple(shared), model.training, facts, ceilings, disturbed)


def _ceilings(device: str, dtypes: list[str]) -> Ceilings | None:
    from convkit.bench import roofline
    from convkit.bench.problems import DTYPES
    from convkit.bench.timing import Arena, rotation_bytes

    if not dtypes:
        return None
    return roofline.ceilings(device, dtypes, Arena(DTYPES[dtypes[0]], device, rotation_bytes(device)), budget_s=0.05)


def _timed(row: Row, work: Task, seconds: Seconds, ceilings: Ceilings) -> Row:
    if seconds.failures:
        what = "; ".join(f"{who}: {message}" for who, message in seconds.failures.items())
        return dataclasses.replace(row, reason=f"not measured: {what}")
    floors = {name: floor for name, floor in work.floors(ceilings).items() if floor is not None}
    times = {"floor": floors, "convkit": seconds.convkit, "torch": seconds.torch}
    all_calls = {who: {name: row.calls * value for name, value in each.items()} for who, each in times.items()}
    return dataclasses.replace(row, plans=_plans(work), **all_calls)


def _plans(work: Task) -> dict[str, str]:
    """By pass; kernel and plan are functions of the problem and of what the device is."""
    module, device = _load.load(), torch.device(work.device)
    problem, training = work.problem, dict(work.options).get("training", True)
    facts = _gpu(device) if device.type == "cuda" else None
    if device.type not in ("cpu", "cuda"):
        return {}
    passes = PASSES if work.gradients else PASSES[:1]
    if work.operator == "max_pool2d":
        return {name: "max_pool_cuda" if facts else f"max_pool_{module.isa()}" for name in passes}
    if work.operator == "batch_norm_relu":
        if facts is None:
            return {name: f"batch_norm_relu_{module.isa()}" for name in passes}
        shape = problem.n, problem.c, problem.h * problem.w, problem.dtype, problem.layout == "nhwc"
        works = passes if training else ("evaluation", "evaluation_backward")
        plans = (module.plan_batch_norm_cuda(*shape, what, *facts) for what in works)
        return {name: plan.partition(" -> ")[2] for name, plan in zip(passes, plans, strict=False)}
    plan = module.plan if facts is None else module.plan_cuda
    passes = work.kernel_passes.values()
    return {pass_: plan(str(problem), pass_, *(facts or ())).partition(" -> ")[2] for pass_ in passes}


def _gpu(device: torch.device) -> tuple[int, int, int, int]:
    """What a plan depends on: compute capability, multiprocessors, bytes of shared memory of a block."""
    properties = torch.cuda.get_device_properties(device)
    facts = "major", "minor", "multi_processor_count", "shared_memory_per_block_optin"
    return tuple(getattr(properties, name) for name in facts)
