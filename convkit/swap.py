"""Put convkit's kernels into an existing model, and take them out again.

Nothing is rebuilt. A convolution is served by changing the class of the instance that is there, so that identity,
parameters, hooks, flags and names stay by construction. A batch norm is worth replacing only together with the ReLU
after it, and who calls what after what is known to the forward of the module that owns the two. So the batch norm and
the ReLU are left alone; it is their owner whose class changes, to a subclass with a rewritten forward (convkit.fuse).
An nn.Sequential is one more such owner, and can always be recorded, so neighbours in one fuse whatever is around it.
"""

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import convkit.nn as cnn
from convkit.fuse import FUSION, ORIGINAL, Fusion, fuse, fused_class, mentions_pool

__all__ = ["Report", "Row", "swap", "unswap"]

_CLASSES = {nn.Conv2d: cnn.Conv2d, nn.ConvTranspose2d: cnn.ConvTranspose2d, nn.MaxPool2d: cnn.MaxPool2d}
_OPERATORS = {
    nn.Conv2d: "conv2d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.BatchNorm2d: "batch_norm_relu",
    nn.MaxPool2d: "max_pool2d",
}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Row:
    """One convolution, batch norm or max pool of a model, and what :func:`swap` did with it.

    name: its name in the model, "" for the model itself; of a layer found at several places all names, joined by " = ".
    kind: the class that it had. replaced_by: what does its work now, or None. reason: why it was left, else None.
    """

    name: str
    kind: str
    replaced_by: str | None = None
    reason: str | None = None


class Report:
    """What :func:`swap` did: rows to iterate over, in the order of the model; prints as a table."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = tuple(rows)

    @property
    def replaced(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.replaced_by is not None)

    @property
    def left(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.replaced_by is None)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        table = [("layer", "kind", "replaced by, or why not")]
        table += [(row.name or "(the model)", row.kind, row.replaced_by or f"left: {row.reason}") for row in self.rows]
        first, second = (max(len(line[column]) for line in table) for column in (0, 1))
        lines = [f"{name:<{first}}  {kind:<{second}}  {result}" for name, kind, result in table]
        return "\n".join([*lines, f"{len(self.replaced)} of {len(self.rows)} layers replaced"])

    __repr__ = __str__


def swap(
    model: nn.Module, example_input: Any = None, *, exclude: str | Iterable[str] = (), only_faster: bool = False
) -> Report:
    """Have convkit do the work of a model's 2-D convolutions and max pools, and of its batch norms that a ReLU follows.

    In place: Conv2d, ConvTranspose2d and MaxPool2d become convkit.nn's. BatchNorm2d + ReLU and BatchNorm2d + sum + ReLU
    are computed in one operator (convkit.nn.BatchNormReLU2d), and a max pool with the ReLU before or after it in one,
    where the forward that calls them shows that nothing else sees what is between them; in evaluation without
    gradients, a convolution that feeds a fused batch norm alone does its work too. Such a forward's calls of
    torch.nn.functional.max_pool2d are replaced too, but not with ``only_faster``. Parameters, buffers, names, hooks,
    flags and dtypes stay, an optimizer stays valid, and the swapped model can be copied, pickled, saved, moved,
    compiled and changed like the original one. Where something that a fused forward was recorded from changes later (a
    hook on the batch norm, another activation, a flag), that module runs its original forward from then on; swap again
    to fuse again. ``torch.jit.script`` needs the unswapped model.

    Every call starts from the unswapped model: swapping twice is swapping once, and the last ``exclude`` holds.

    With ``only_faster`` the model is called once with ``example_input``, of which it keeps nothing, and each layer is
    timed with convkit and with PyTorch in turns on inputs like those it got: forward and backward if the model is in
    training mode, forward alone otherwise. Layers in which PyTorch is as fast are left. Times are kept in a file for
    the next time (:mod:`convkit.decisions`; the environment variable ``CONVKIT_CACHE`` names its folder).

    Args:
        model: any module; it may itself be the layer.
        example_input: what the model is to be fast for: a tensor, a tuple of arguments, or a dict of keyword ones.
        exclude: names of layers to leave, or patterns of names (``"layer4.*"``), as fnmatch takes them.
        only_faster: swap only the layers in which convkit is faster than PyTorch; needs ``example_input``.

    Returns:
        A :class:`Report` with a row for every convolution, batch norm and max pool, those left with the reason.

    Raises:
        TypeError: model is not a torch.nn.Module; example_input or only_faster without the other.
        RuntimeError: model is swapped already and cannot be unswapped (see :func:`unswap`).
        What the model raises when it is called with example_input; it is then as it was before.
    """
    if only_faster != (example_input is not None):
        got = "only_faster=True without example_input" if only_faster else "example_input without only_faster=True"
        raise TypeError(f"swap got {got}: layers are timed on example_input to swap those alone that get faster")
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    with unswapped(model):
        if only_faster:
            from convkit.faster import find_faster  # which imports this module, and the benchmarks' timing

            found = find_faster(model, patterns, example_input)
        else:
            found = find(model, patterns)
    unswap(model)
    for layer in found.replaced:
        if type(layer) in _CLASSES:
            _change_class(layer, _CLASSES[type(layer)])
    for module, fusion in found.fusions.items():
        _change_class(module, fused_class(type(module)))
        vars(module)[FUSION] = fusion
    return Report(
        Row(" = ".join(names), found.kinds[layer], found.replaced.get(layer), found.reasons.get(layer))
        for layer, names in found.names.items()
    )


@dataclass(frozen=True)
class Found:
    """What can be swapped in a model that is not swapped: all are keyed by the layer, in the order of the model."""

    names: dict[nn.Module, list[str]]
    kinds: dict[nn.Module, str]
    replaced: dict[nn.Module, str]
    """What would do the layer's work; of the others, ``reasons`` says why they stay."""
    reasons: dict[nn.Module, str]
    fusions: dict[nn.Module, Fusion]
    """New forwards of the modules that own fused layers."""

    def pools_with_relu(self) -> set[nn.Module]:
        """The max pools to be fused with a ReLU."""
        return {
            owner.get_submodule(site.pool)
            for owner, fusion in self.fusions.items()
            for site in fusion.poolings
            if site.pool is not None
        }

    def residuals(self) -> set[nn.Module]:
        """The batch norms to be fused with a residual."""
        return {
            owner.get_submodule(site.norm)
            for owner, fusion in self.fusions.items()
            for site in fusion.sites
            if site.residual
        }


def find(
    model: nn.Module,
    exclude: Iterable[str] = (),
    left: Mapping[nn.Module, str] = MappingProxyType({}),
    functions: bool = True,
) -> Found:
    """Looks for layers that convkit can serve, and changes nothing. ``left``: layers to leave, and why.

    ``functions``: max pools that are called as functions, too.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    layers = [module for module in names if isinstance(module, (_ConvNd, _BatchNorm, nn.MaxPool2d))]
    reasons = {
        layer: "excluded"
        if any(fnmatch.fnmatchcase(name, pattern) for name in names[layer] for pattern in exclude)
        else _why_not(layer) or left.get(layer)
        for layer in layers
    }
    norms = {layer for layer in layers if type(layer) is nn.BatchNorm2d and reasons[layer] is None}
    pools = {layer for layer in layers if type(layer) is nn.MaxPool2d and reasons[layer] is None}
    fusions: dict[nn.Module, Fusion] = {}
    replaced: dict[nn.Module, str] = {}
    # Children before their owners: the reason of the innermost forward says most.
    for module, (name, *_) in reversed(names.items()):
        wanted = norms | pools
        calls_function = functions and mentions_pool(type(module))
        if module not in reasons and (calls_function or not wanted.isdisjoint(module.modules())):
            fusion, unfused = fuse(module, norms, _called(name), pools, functions)
            for layer, reason in unfused.items():
                reasons[layer] = reasons[layer] or reason
            if fusion is not None:
                fusions[module] = fusion
                for site in fusion.sites:
                    what = "with residual, " if site.residual else ""
                    replaced[module.get_submodule(site.norm)] = f"BatchNormReLU2d, {what}in {_called(name)}"
                for site in fusion.poolings:
                    if site.pool is not None:
                        replaced[module.get_submodule(site.pool)] = (
                            f"convkit.nn.MaxPool2d, with ReLU in {_called(name)}"
                        )
    for layer in norms:
        reasons[layer] = reasons[layer] or "no forward that could be recorded calls it"
    for layer in layers:
        if type(layer) in _CLASSES and reasons[layer] is None:
            replaced.setdefault(layer, f"convkit.nn.{_CLASSES[type(layer)].__name__}")
    return Found(
        {layer: names[layer] for layer in layers},
        {layer: type(layer).__name__ for layer in layers},
        {layer: replaced[layer] for layer in layers if layer in replaced},
        {layer: reason for layer, reason in reasons.items() if layer not in replaced},
        fusions,
    )


@contextlib.contextmanager
def unswapped(model: nn.Module) -> Iterator[None]:
    """Within it the model is not swapped; afterwards it is as it was. Raises as :func:`unswap`."""
    was = [
        (module, type(module), {name: vars(module)[name] for name in (ORIGINAL, FUSION) if name in vars(module)})
        for module in (model.modules() if isinstance(model, nn.Module) else ())
        if ORIGINAL in vars(module)
    ]
    unswap(model)
    try:
        yield
    finally:
        for module, kind, attributes in was:
            vars(module).update(attributes)
            object.__setattr__(module, "__class__", kind)


def unswap(model: nn.Module) -> None:
    """Undo :func:`swap`, exactly: classes, forwards and attributes are as they were. What swap left is not touched.

    Raises:
        TypeError: model is not a torch.nn.Module.
        RuntimeError: the class of a swapped module was changed again since (parametrizations and fully_shard do that),
            and has to be changed back first. Nothing has been undone then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    swapped = [(name, module) for name, module in model.named_modules() if ORIGINAL in vars(module)]
    for name, module in swapped:
        expected = _swapped_class(vars(module)[ORIGINAL])
        if type(module) is not expected:
            raise RuntimeError(
                f"model cannot be unswapped: {name or 'it'} was a {expected.__name__} after convkit.swap and is a "
                f"{type(module).__name__} now; undo what changed its class (for a parametrization, "
                "torch.nn.utils.parametrize.remove_parametrizations), then call again"
            )
    for _, module in swapped:
        object.__setattr__(module, "__class__", vars(module).pop(ORIGINAL))
        vars(module).pop(FUSION, None)


def _change_class(module: nn.Module, new: type[nn.Module]) -> None:
    vars(module)[ORIGINAL] = type(module)
    object.__setattr__(module, "__class__", new)


def _swapped_class(original: type[nn.Module]) -> type[nn.Module]:
    return _CLASSES.get(original) or fused_class(original)


def _called(name: str) -> str:
    return f"the forward of {name}" if name else "the model's forward"


def _why_not(layer: nn.Module) -> str | None:
    """Why convkit cannot serve this layer, or None. What follows a batch norm is not looked at here."""
    kind = type(layer)
    if kind.__module__ == cnn.__name__:
        return "convkit's own already"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "not initialized yet: call the model once, then swap"
    if hasattr(layer, "parametrizations"):
        return "parametrized: its weight is computed by code of its own"
    if kind not in _OPERATORS:
        for base in _OPERATORS:
            if isinstance(layer, base):
                return f"{kind.__module__}.{kind.__qualname__} is a subclass with code of its own"
        two_d = "a batch norm over (N, C, H, W)" if isinstance(layer, _BatchNorm) else "a 2-D convolution"
        return f"not {two_d}" if kind is not nn.SyncBatchNorm else "synchronizes its statistics between processes"
    if isinstance(layer, nn.MaxPool2d) and layer.return_indices:
        return "it returns indices"
    if not {"forward", "_conv_forward"}.isdisjoint(vars(layer)):
        return "its forward was replaced on the instance"
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if name != "num_batches_tracked" and tensor.dtype not in _DTYPES:
            return f"{name} has dtype {tensor.dtype}; served: {', '.join(map(str, _DTYPES))}"
        if not _has_kernel(_OPERATORS[kind], tensor.device.type):
            return f"{name} is on {tensor.device.type}, for which this build has no {_OPERATORS[kind]} kernel"
    if kind is nn.BatchNorm2d and cnn.hooked(layer):
        return "it has hooks, which would see the output of the ReLU"
    return None


def _has_kernel(name: str, device: str) -> bool:
    # A model on meta has no data yet, and may go anywhere from there.
    key = torch._C._dispatch_key_for_device(device)
    return device == "meta" or torch._C._dispatch_has_kernel_for_dispatch_key(f"convkit::{name}", key)
