"""The work of one layer as a problem, and the seconds that convkit and PyTorch take for it, in turns."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convkit.functional as CF
from convkit.bench.problems import DTYPES, BatchNormProblem, ConvProblem, MaxPoolProblem
from convkit.bench.results import Ceilings, Failure
from convkit.bench.timing import Arena, carve, carved_elements, interleave, rotation_bytes
from convkit.calls import Call, same_luck
from convkit.ops import is_channels_last

__all__ = ["PASSES", "Seconds", "Task", "measure", "task"]

PASSES = ("forward", "backward")
Gradients = tuple[Literal["input", "weight"], ...]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KERNEL_PASSES = {
    "conv2d": {"forward": "fprop", "input": "dgrad", "weight": "wgrad"},
    # The transposed convolution is the input gradient of its problem, and the convolution is its own.
    "conv_transpose2d": {"forward": "dgrad", "input": "fprop", "weight": "wgrad"},
}


@dataclass(frozen=True)
class Task:
    """What one call of a layer asks for. Hashable; two layers with the same task take the same time.

    problem: of a transposed convolution, the convolution whose input gradient it is. options: arguments that the
    problem doesn't have, sorted. gradients: those that the backward pass computes; () if there is none.
    """

    operator: Literal["conv2d", "conv_transpose2d", "batch_norm_relu", "max_pool2d"]
    problem: ConvProblem | BatchNormProblem | MaxPoolProblem
    options: tuple[tuple[str, bool | str | float], ...]
    gradients: Gradients
    device: str

    def __str__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options)
        gradients = f", gradients of {' and '.join(self.gradients)}" if self.gradients else ""
        return f"{self.operator} {self.problem}{options}{gradients}"

    @property
    def kernel_passes(self) -> dict[str, str]:
        """forward, input, weight: the pass of the convolution's kernels that does it. Empty for all else."""
        passes = _KERNEL_PASSES.get(self.operator, {})
        return {name: passes[name] for name in ("forward", *self.gradients) if name in passes}

    def floors(self, ceilings: Ceilings) -> dict[str, float | None]:
        """Seconds below which no pass can be on a machine with these ceilings: {"forward": …, "backward": …}."""
        problem = self.problem
        if isinstance(problem, (BatchNormProblem, MaxPoolProblem)):
            sizes = {"forward": problem.forward_bytes, "backward": problem.backward_bytes}
            floors = {name: ceilings.floor(0, size, problem.dtype) for name, size in sizes.items()}
            return floors if self.gradients else {"forward": floors["forward"]}
        one = ceilings.floor(problem.flops, problem.bytes, problem.dtype)
        floors = {"forward": one}
        if self.gradients:
            floors["backward"] = one and one * len(self.gradients)
        return floors


def task(layer: nn.Module, call: Call, *, residual: bool = False, relu: bool = False) -> Task:
    """The task of one call of a convolution, a batch norm with the ReLU (and perhaps a sum) after it, or a max pool.

    residual: of a batch norm. relu: whether a max pool has one before or after it.

    Raises:
        ValueError: it cannot be told as a problem: an empty batch, an input of other dimensions.
    """
    gradients = tuple(name for name, asked in (("input", call.input_grad), ("weight", call.parameter_grads)) if asked)
    if call.dtype not in _NAMES:
        raise ValueError(f"its input has dtype {call.dtype}")
    dtype = _NAMES[call.dtype]
    if isinstance(layer, nn.BatchNorm2d):
        options = {
            "affine": layer.affine,
            "parameters": _NAMES.get(getattr(layer.weight, "dtype", call.dtype), "other"),
            "training": layer.training or layer.running_mean is None,
        }
        problem = BatchNormProblem(*call.shape, dtype, "nhwc" if call.channels_last else "nchw", residual)
        return Task("batch_norm_relu", problem, _sorted(options), gradients, str(call.device))

    if isinstance(layer, nn.MaxPool2d):
        geometry = (
            CF._pair(value, "max_pool2d", name)
            for name, value in (
                ("kernel_size", layer.kernel_size),
                ("stride", layer.stride or layer.kernel_size),
                ("padding", layer.padding),
                ("dilation", layer.dilation),
            )
        )
        shape = call.shape if len(call.shape) == 4 else (1, *call.shape)
        kernel, *steps = geometry
        layout = "nhwc" if call.channels_last else "nchw"
        problem = MaxPoolProblem(*shape, *kernel, *steps, layer.ceil_mode, dtype, layout)
        options = {"activation": "relu"} if relu or getattr(layer, "activation", None) else {}
        return Task("max_pool2d", problem, _sorted(options), gradients, str(call.device))

    weight_channels_last = is_channels_last(layer.weight)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    n = call.shape[0] if len(call.shape) == 4 else 1
    source, result = call.shape[-3:], call.output_shape[-3:]
    (c, h, w), k = (result, source[0]) if transposed else (source, result[0])
    if layer.padding_mode != "zeros":  # padded before the convolution
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        h, w, padding = h + top + bottom, w + left + right, (0, 0, 0, 0)
    else:
        padding = CF._four_sided(layer.padding, layer.kernel_size, layer.stride, layer.dilation, "conv2d")
    layout = "nhwc" if call.channels_last or weight_channels_last else "nchw"
    problem = ConvProblem(
        n, c, h, w, k, *layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups, dtype, layout
    )
    if transposed and problem.output_size != source[1:]:
        raise ValueError(f"its output_padding makes a size that no convolution leads from: {tuple(result)}")
    options = {"bias": layer.bias is not None}
    if getattr(layer, "activation", None):
        options["activation"] = layer.activation
    for name, channels_last in (("input", call.channels_last), ("weight", weight_channels_last)):
        if channels_last != (layout == "nhwc"):
            options[f"{name}_layout"] = "nchw"
    return Task("conv_transpose2d" if transposed else "conv2d", problem, _sorted(options), gradients, str(call.device))


def _sorted(options: Mapping[str, bool | str | float]) -> tuple[tuple[str, bool | str | float], ...]:
    return tuple(sorted(options.items()))


@dataclass(frozen=True)
class Seconds:
    """What one task takes: medians in seconds by pass. Only "forward" if no gradient is asked for.

    failures: the first line of what "convkit" or "torch" raised instead; its times are then missing.
    """

    convkit: Mapping[str, float]
    torch: Mapping[str, float]
    failures: Mapping[str, str]

    @property
    def totals(self) -> tuple[float, float]:
        """Of convkit and PyTorch, over the passes; infinite for the one that failed."""
        convkit, pytorch = (
            float("inf") if name in self.failures else sum(times.values())
            for name, times in (("convkit", self.convkit), ("torch", self.torch))
        )
        return convkit, pytorch


def measure(
    tasks: Iterable[Task], *, budget_s: float = 0.1, progress: Callable[[Task], None] | None = None
) -> dict[Task, Seconds]:
    """Times each task once, convkit and PyTorch in turns, on memory that the caches have forgotten.

    PyTorch gets its faster form: sum and ReLU in place. The backward pass is what autograd runs. Random states are as
    before. ``budget_s``: seconds of calls for each pass of each of the two. ``progress`` is called before each task.
    """
    arenas: dict[tuple[str, str], Arena] = {}
    found: dict[Task, Seconds] = {}
    with same_luck():
        for one in dict.fromkeys(tasks):
            if progress is not None:
                progress(one)
            device = torch.device(one.device).type
            place = one.problem.dtype, one.device
            if place not in arenas:
                arenas[place] = Arena(one.problem.torch_dtype, one.device, rotation_bytes(device))
            with torch.inference_mode(False), torch.set_grad_enabled(bool(one.gradients)), _no_autocast(device):
                found[one] = _measure(one, arenas[place], device, budget_s)
    return found


def _no_autocast(device: str) -> torch.autocast:
    return torch.autocast(device, enabled=False)  # the task has the dtype that a region led to


def _measure(one: Task, arena: Arena, device: str, budget_s: float) -> Seconds:
    functions, parameters = _functions(one)
    sets = _sets(one, arena)
    medians: dict[str, dict[str, float]] = {who: {} for who in functions}
    failures: dict[str, str] = {}
    for name in PASSES if one.gradients else PASSES[:1]:
        make = _forward if name == "forward" else _backward
        candidates = {
            who: [make(one, function, parameters, *tensors) for tensors in sets]
            for who, function in functions.items()
            if who not in failures
        }
        for who, timing in interleave(candidates, device=device, budget_s=budget_s).items():
            if isinstance(timing, Failure):
                failures[who] = timing.message
            else:
                medians[who][name] = timing.median
    return Seconds(medians["convkit"], medians["torch"], failures)


Function = Callable[[Tensor, Tensor | None], Tensor]


def _forward(one: Task, function: Function, parameters: list[Tensor], x: Tensor, residual: Tensor | None, grad: Tensor):
    return lambda: function(x, residual)


def _backward(
    one: Task, function: Function, parameters: list[Tensor], x: Tensor, residual: Tensor | None, grad: Tensor
):
    # The edge, not the output: that is kept only if the gradient needs it, as in a network.
    edge = torch.autograd.graph.get_gradient_edge(function(x, residual))
    inputs = [t for t in (x, residual, *parameters) if t is not None and t.requires_grad]
    return lambda: torch.autograd.grad(edge, inputs, grad, retain_graph=True)


def _sets(one: Task, arena: Arena) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """(input, residual or None, gradient of the output) in every stretch of the arena."""
    problem, options = one.problem, dict(one.options)
    channels_last = problem.layout == "nhwc"
    if isinstance(problem, BatchNormProblem):
        shapes = [problem.shape] * (3 if problem.residual else 2)
    else:
        shapes = [problem.input_shape, problem.output_shape]
        if one.operator == "conv_transpose2d":
            shapes.reverse()
    first = carved_elements(shapes[:1], problem.torch_dtype)
    sets = []
    for stretch in arena.stretches(first + carved_elements(shapes[1:], problem.torch_dtype)):
        (x,) = carve(stretch[:first], shapes[:1], channels_last and options.get("input_layout") != "nchw")
        *residual, grad = carve(stretch[first:], shapes[1:], channels_last)
        x, *residual = (t.detach().requires_grad_("input" in one.gradients) for t in (x, *residual))
        sets.append((x, residual[0] if residual else None, grad))
    return sets


def _functions(one: Task) -> tuple[dict[str, Function], list[Tensor]]:
    """The task with convkit's kernels and with PyTorch's, and the parameters that both use."""
    problem, options = one.problem, dict(one.options)
    generator = torch.Generator(one.device).manual_seed(0)

    def parameter(*shape: int, dtype: torch.dtype = problem.torch_dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, device=one.device)
        return values.to(dtype).requires_grad_("weight" in one.gradients)

    if isinstance(problem, BatchNormProblem):
        wide = DTYPES.get(options["parameters"], problem.torch_dtype)
        weight = bias = None
        if options["affine"]:
            weight, bias = parameter(problem.c, dtype=wide), parameter(problem.c, dtype=wide)
        mean, var = (torch.ones(problem.c, dtype=wide, device=one.device) for _ in range(2))
        training = options["training"]

        def fused(x: Tensor, residual: Tensor | None) -> Tensor:
            return CF.batch_norm_relu(x, mean, var, weight, bias, training, residual=residual)

        def unfused(x: Tensor, residual: Tensor | None) -> Tensor:
            y = F.batch_norm(x, mean, var, weight, bias, training)
            return F.relu_(y if residual is None else y.add_(residual))

        return {"convkit": fused, "torch": unfused}, [t for t in (weight, bias) if t is not None]

    if isinstance(problem, MaxPoolProblem):
        geometry = (problem.r, problem.s), problem.stride, problem.padding, problem.dilation, problem.ceil_mode
        activation = options.get("activation")

        def pooled(x: Tensor, _: Tensor | None) -> Tensor:
            return CF.max_pool2d(x, *geometry, activation=activation)

        def apart(x: Tensor, _: Tensor | None) -> Tensor:
            y = F.max_pool2d(x, *geometry)
            return y if activation is None else F.relu_(y)

        return {"convkit": pooled, "torch": apart}, []

    weight = parameter(*problem.weight_shape).detach()
    if problem.layout == "nhwc" and options.get("weight_layout") != "nchw":
        weight = weight.to(memory_format=torch.channels_last)
    weight.requires_grad_("weight" in one.gradients)
    transposed = one.operator == "conv_transpose2d"
    bias = parameter(problem.c if transposed else problem.k) if options["bias"] else None
    parameters = [weight] if bias is None else [weight, bias]
    stride, dilation, groups = problem.stride, problem.dilation, problem.groups
    if transposed:
        geometry = stride, problem.torch_padding, problem.transposed_output_padding, groups, dilation
        return {
            "convkit": lambda x, _: CF.conv_transpose2d(x, weight, bias, *geometry),
            "torch": lambda x, _: F.conv_transpose2d(x, weight, bias, *geometry),
        }, parameters

    top, bottom, left, right = problem.padding
    activation = options.get("activation")
    # Only padding="same" pads one side more than the other.
    padding = "same" if problem.torch_padding is None else problem.torch_padding

    def ours(x: Tensor, _: Tensor | None) -> Tensor:
        sides = (top, bottom), (left, right)
        return CF.conv2d(x, weight, bias, stride, sides, dilation, groups, activation=activation)

    def theirs(x: Tensor, _: Tensor | None) -> Tensor:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return y if activation is None else F.relu_(y)

    return {"convkit": ours, "torch": theirs}, parameters
