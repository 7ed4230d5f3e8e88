"""What a network is made of, layer by layer: shapes, parameters, multiply-adds, and what im2col would cost."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import json
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from convkit.lab import LabError, require
from convkit.lab.models.network import MODELS, Entry, count_parameters, entry

__all__ = ["Layer", "describe", "describe_model", "layers", "list_models", "multiply_adds", "summary"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a network, in the order in which they are called; all numbers are for one picture."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    """Without the batch: (C, H, W), or (features,); () for a layer that was not called."""
    parameters: int
    formula: str
    """How that number comes about: ``64·3·7·7 + 64`` for weight and bias."""
    multiply_adds: int
    """Of convolutions and dense layers; those of norms, activations and pools are not counted."""
    input_values: int
    """Values of the input of a convolution, C·H·W; 0 for other layers."""
    patch_values: int
    """Values of the matrix that im2col makes of them, (C·R·S)·(P·Q)."""

    @property
    def im2col(self) -> float | None:
        """By how much im2col blows up the input of a convolution: R·S times for stride 1 with padding. Else None."""
        return self.patch_values / self.input_values if self.input_values else None


def layers(model: nn.Module, input_shape: tuple[int, int, int] | None = None) -> list[Layer]:
    """The layers of a network on a picture of ``input_shape`` (C, H, W), by default ``model.input_shape``.

    A layer is a module with parameters of its own, or one without children that changes the shape. One that is called
    twice is there twice, with its parameters at the first; those that are not called in evaluation mode come last,
    without a shape. Nothing is computed: it is a copy on the meta device that is called. LabError where the network
    does not take such a picture.
    """
    shape = input_shape or getattr(model, "input_shape", None)
    if shape is None:
        raise LabError(f"input_shape: a {type(model).__name__} does not say which pictures it takes; give (C, H, W)")
    twin = _twin(model)
    found: list[Layer] = []
    seen: set[nn.Module] = set()

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not inputs or not isinstance(inputs[0], Tensor):  # called with something else than a feature map
                return
            own = [] if module in seen else list(module.parameters(recurse=False))
            changed = isinstance(output, Tensor) and output.shape != inputs[0].shape
            if own or _multiply_adds(module, inputs[0], output) or (changed and not any(module.children())):
                found.append(_layer(name, module, own, inputs[0], output))
                seen.add(module)

        return hook

    for name, module in twin.named_modules():
        module.register_forward_hook(note(name))
    try:
        with torch.no_grad():
            twin(torch.empty(1, *shape, device="meta", dtype=_dtype(twin)))
    except (RuntimeError, ValueError) as error:
        sizes, message = "×".join(map(str, shape)), str(error).partition("\n")[0]
        raise LabError(f"input_shape: {_kind(model)} does not take pictures of {sizes}: {message}") from None
    for name, module in twin.named_modules():
        if module not in seen and (own := list(module.parameters(recurse=False))):
            found.append(_layer(name, module, own))
    return found


def _twin(model: nn.Module) -> nn.Module:
    """A copy on the meta device, in evaluation mode, without a moment in which all its values are there twice."""
    tensors = (*model.parameters(), *model.buffers())
    bare = {
        id(t): nn.Parameter(t.to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in tensors
    }
    twin = copy.deepcopy(model, bare).eval()
    for module in twin.modules():
        if isinstance(module, (_NormBase, nn.GroupNorm)):
            module.forward = lambda x: x  # all that counts is the shape; PyTorch takes milliseconds for each on meta
    return twin


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.get_default_dtype())


def _layer(
    name: str,
    module: nn.Module,
    own: list[nn.Parameter],
    input: Tensor | None = None,
    output: Tensor | None = None,
) -> Layer:
    inputs = patches = 0
    if isinstance(module, nn.Conv2d) and output is not None:
        inputs = input.numel()
        patches = input.shape[1] * math.prod(module.kernel_size) * math.prod(output.shape[2:])
    return Layer(
        name,
        _kind(module),
        () if output is None else tuple(output.shape[1:]),
        sum(p.numel() for p in own),
        " + ".join("·".join(map(str, p.shape)) for p in own),
        0 if output is None else _multiply_adds(module, input, output),
        inputs,
        patches,
    )


def _multiply_adds(module: nn.Module, input: Tensor, output: Any) -> int:
    if isinstance(module, nn.Conv2d):
        return output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, nn.ConvTranspose2d):
        return input.numel() * module.out_channels // module.groups * math.prod(module.kernel_size)
    return output.numel() * module.in_features if isinstance(module, nn.Linear) else 0


def _kind(module: nn.Module) -> str:
    """The class; of a convolution what it does."""
    if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return type(module).__name__.removeprefix("_")
    name = "conv" if isinstance(module, nn.Conv2d) else "transposed"
    if module.groups > 1:
        name = "depthwise" if module.groups == module.in_channels else f"{name} in {module.groups} groups"
    stride = "" if set(module.stride) == {1} else f" /{'×'.join(map(str, dict.fromkeys(module.stride)))}"
    return f"{name} {'×'.join(map(str, module.kernel_size))}{stride}"


def multiply_adds(model: nn.Module, input_shape: tuple[int, int, int] | None = None) -> int:
    """Multiply-adds of convolutions and dense layers for one picture; arguments and errors as of :func:`layers`."""
    return sum(layer.multiply_adds for layer in layers(model, input_shape))


def describe(model: nn.Module, input_shape: tuple[int, int, int] | None = None, *, console: Any = None) -> list[Layer]:
    """Prints the layers of a network as a table, and returns them; arguments and errors as of :func:`layers`.

    Columns: output shape, parameters and how their number comes about, multiply-adds, and by how much im2col would
    blow up the input; at the end the sums, and im2col for all convolutions together. ``console``: a rich Console.
    """
    require("rich")
    from rich import box
    from rich.table import Table

    found = layers(model, input_shape)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, padding=(0, 1, 0, 0))
    inputs, patches = sum(layer.input_values for layer in found), sum(layer.patch_values for layer in found)
    heads = {
        "Layer": "all",
        "Kind": "",
        "Output": "",
        "Parameters": f"{sum(layer.parameters for layer in found):,}",
        "which are": "",
        "Multiply-adds": f"{sum(layer.multiply_adds for layer in found):,}",
        "im2col": f"{patches / inputs:.1f}×" if inputs else "",
    }
    for head, footer in heads.items():
        justify = "right" if head in ("Parameters", "Multiply-adds", "im2col") else "left"
        table.add_column(head, footer=footer, justify=justify, overflow="fold")
    for layer in found:
        table.add_row(
            layer.name,
            layer.kind,
            "×".join(map(str, layer.output_shape)) or "not called",
            f"{layer.parameters:,}" if layer.parameters else "",
            layer.formula,
            f"{layer.multiply_adds:,}" if layer.multiply_adds else "",
            "" if layer.im2col is None else f"{layer.im2col:.1f}×",
        )
    (console or _console()).print(table)
    return found


def _console() -> Any:
    """A rich Console that folds no column where the output goes to a file or another program."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


class _Undrawn(TorchFunctionMode):
    """On the meta device, where nothing has values: parameters that are not drawn, which would take seconds there."""

    _DRAWS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, Tensor.erfinv_, Tensor.clamp_)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function in self._DRAWS else function(*args, **(kwargs or {}))


def undrawn(entry: Entry, **options: Any) -> nn.Module:
    """A network of the registry on the meta device, in milliseconds; on PyTorch's backend unless options say else."""
    with torch.device("meta"), _Undrawn():
        return entry.builder(**{"backend": "torch"} | options)


def summary(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """What is known about networks of the registry, as ``convkit models --json`` prints it."""
    found = []
    for one in entries:
        model = undrawn(one)
        found.append(
            {
                "name": one.name,
                "title": one.title,
                "parameters": count_parameters(model),
                "multiply_adds": multiply_adds(model),
                "input_shape": list(one.input_shape),
                "source": one.source,
                "claimed": one.claimed,
                "options": [option for option in one.options if option != "backend"],
            }
        )
    return found


# ---------------------------------------------------------------- the commands


def list_models(glob: str = "*", *, as_json: bool = False) -> None:
    """``convkit models``: prints the networks whose name is like ``glob``. LabError if there is none."""
    pattern = glob.lower().replace("-", "_")
    chosen = [MODELS[name] for name in sorted(MODELS) if fnmatch.fnmatchcase(name, pattern)]
    if not chosen:
        entry(glob)  # says which are there
    found = summary(chosen)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    require("rich")
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("Name", "Parameters", "Multiply-\nadds, 10⁶", "Input"):
        table.add_column(head, justify="left" if head in ("Name", "Input") else "right", no_wrap=True)
    table.add_column("Claimed; source", overflow="fold")
    for one in found:
        table.add_row(
            one["name"],
            f"{one['parameters']:,}",
            f"{one['multiply_adds'] / 1e6:,.2f}",
            "×".join(map(str, one["input_shape"])),
            "; ".join(filter(None, (one["claimed"], one["source"]))),
        )
    _console().print(table)


def describe_model(name: str, input: str | None = None, *, as_json: bool = False) -> None:
    """``convkit describe``: prints the layers of a network of the registry. ``input``: sizes as ``3x64x64``."""
    found = entry(name)
    shape = None
    if input is not None:
        if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){2}", input):
            raise LabError(f"--input: got {input!r}; accepts channels, height and width, as in 3x64x64")
        shape = tuple(int(size) for size in input.split("x"))
    model = _built_for(found, shape)
    if not as_json:
        describe(model, shape)
        return
    rows = [dataclasses.asdict(layer) | {"im2col": layer.im2col} for layer in layers(model, shape)]
    shape = shape or found.input_shape
    print(json.dumps({"name": found.name, "input_shape": list(shape), "layers": rows}, indent=2, ensure_ascii=False))


def _built_for(found: Entry, shape: tuple[int, int, int] | None) -> nn.Module:
    """The network with the options, of those that it has, that make it take such pictures."""
    options: dict[str, int] = {}
    if shape is not None:
        if "channels" in found.options:
            options["channels"] = shape[0]
        if "size" in found.options and shape[1] == shape[2]:
            options["size"] = shape[1]
    return undrawn(found, **options)
