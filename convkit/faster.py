"""Which layers of a model convkit serves faster than PyTorch: the ``only_faster`` of :func:`convkit.swap`."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from convkit import calls, decisions
from convkit.measure import Seconds, Task, measure, task
from convkit.swap import Found, find

__all__ = ["find_faster"]


def find_faster(model: nn.Module, exclude: Iterable[str], example_input: Any) -> Found:
    """:func:`convkit.swap.find` of those layers alone that take less time with convkit, in all their calls together.

    Raises as :func:`convkit.calls.record`.
    """
    left: dict[nn.Module, str] = {}
    known: dict[Task, Seconds] = {}
    found = find(model, exclude, functions=False)
    recorded = calls.record(model, found.names, example_input)
    while True:
        norms, pools = found.residuals(), found.pools_with_relu()
        tasks: dict[nn.Module, list[Task]] = {}
        slower: dict[nn.Module, str] = {}
        for layer in found.replaced:
            try:
                works = (task(layer, call, residual=layer in norms, relu=layer in pools) for call in recorded[layer])
                tasks[layer] = list(works)
            except ValueError as error:
                slower[layer] = f"it cannot be measured: {error}"
        _look_up([one for several in tasks.values() for one in several if one not in known], known)
        for layer, several in tasks.items():
            if (why := _why_not(several, known)) is not None:
                slower[layer] = why
        if not slower:
            return found
        # A batch norm that is left may be what kept another one from being fused: look again.
        left |= slower
        found = find(model, exclude, left, functions=False)


def _look_up(tasks: list[Task], known: dict[Task, Seconds]) -> None:
    known |= decisions.recall(tasks)
    measured = measure(one for one in tasks if one not in known)
    decisions.remember(measured)
    known |= measured


def _why_not(tasks: list[Task], known: dict[Task, Seconds]) -> str | None:
    if not tasks:
        return "not called with this example_input, so there is nothing to measure"
    failure = next((known[one].failures["convkit"] for one in tasks if "convkit" in known[one].failures), None)
    if failure is not None:
        return f"it could not be measured: {failure}"
    ours, theirs = (sum(totals) for totals in zip(*(known[one].totals for one in tasks), strict=True))
    if ours < theirs:
        return None
    return f"PyTorch is faster here ({1e3 * theirs:.3g} ms against {1e3 * ours:.3g} ms)"
