"""What the kernel tests share: samples of every operator, memory layouts, and the comparison with float64.

A sample is one call of an operator. `convkit.functional` and `convkit.reference` have the same signatures, so the same
sample runs through either, in any precision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import convkit.functional as CF
from convkit import reference
from convkit.bench.problems import BatchNormProblem, ConvProblem, MaxPoolProblem

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sample:
    """One call of the operator `op`: tensors that may need a gradient, all else, and buffers it writes in place."""

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    # What goes into the last ReLU, in plain PyTorch; None where there is none.
    before_relu: Callable[[Sample], Tensor] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Sample:
        """The same call with `function` of every tensor and buffer."""
        tensors = {name: function(value) for name, value in self.tensors.items()}
        buffers = {name: function(value) for name, value in self.buffers.items()}
        return dataclasses.replace(self, tensors=tensors, buffers=buffers)

    def __call__(self, module: ModuleType = CF, **tensors: Tensor) -> Tensor:
        """The output from `module`, with `tensors` in the place of its own; its buffers are left as they are."""
        buffers = {name: value.clone() for name, value in self.buffers.items()}
        return getattr(module, self.op)(**(self.tensors | tensors), **buffers, **self.options)

    def evaluate(self, module: ModuleType, grad: Tensor | None = None, gradients: bool = True) -> dict[str, Tensor]:
        """Output, gradients of all tensors for a gradient of the output (default: ones), and buffers, by name."""
        leaves = {name: value.detach().requires_grad_(gradients) for name, value in self.tensors.items()}
        buffers = {name: value.clone() for name, value in self.buffers.items()}
        y = getattr(module, self.op)(**leaves, **buffers, **self.options)
        if not gradients:
            return {"output": y} | buffers
        grads = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y) if grad is None else grad.to(y.dtype))
        named = {f"gradient of {name}": value for name, value in zip(leaves, grads, strict=True)}
        return {"output": y.detach()} | named | buffers

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(t.shape)} {str(t.dtype)[6:]}" for name, t in self.tensors.items())
        return f"{self.op}({shapes}, {self.options})"


def on_grid(t: Tensor) -> Tensor:
    """float64 values rounded to sixteenths within [-2, 2]; other dtypes as they are.

    Products and sums of such numbers are exact in float64 in any order, for all the sizes in the table. So a float64
    convolution has one right answer, to the last bit, and PyTorch's own is it.
    """
    return t if t.dtype != torch.float64 else t.mul(16).round().clamp(-32, 32).div(16)


def conv_options(problem: ConvProblem) -> dict[str, Any]:
    top, bottom, left, right = problem.padding
    padding = problem.torch_padding or ((top, bottom), (left, right))
    return {"stride": problem.stride, "padding": padding, "dilation": problem.dilation, "groups": problem.groups}


def conv_sample(
    problem: ConvProblem,
    generator=None,
    bias: bool = True,
    activation: str | None = None,
    scale: bool = False,
    residual: bool = False,
    mixed: bool = False,
) -> Sample:
    """`mixed`: bias and scale in float32 whatever the input's dtype."""
    x, weight, b, added = (on_grid(t) for t in problem.tensors(generator))
    tensors = {"input": x, "weight": weight} | ({"bias": b} if bias else {})
    if scale:
        tensors["scale"] = on_grid(torch.randn(problem.k, dtype=torch.float64, generator=generator).to(x.dtype))
    if residual:
        tensors["residual"] = added
    if mixed:
        tensors |= {name: tensors[name].float() for name in ("bias", "scale") if name in tensors}
    options = conv_options(problem) | {"activation": activation}
    return Sample("conv2d", tensors, options, before_relu=_linear if activation else None)


def _linear(sample: Sample) -> Tensor:
    return dataclasses.replace(sample, options=sample.options | {"activation": None})(reference)


def transpose_sample(problem: ConvProblem, generator=None, bias: bool = True) -> Sample:
    """The transposed convolution that leads from the problem's output shape back to its input shape."""
    x, weight, _, grad = (on_grid(t) for t in problem.tensors(generator))
    b = on_grid(torch.randn(problem.c, dtype=torch.float64, generator=generator).to(x.dtype))
    options = conv_options(problem) | {"output_padding": problem.transposed_output_padding}
    return Sample("conv_transpose2d", {"input": grad, "weight": weight} | ({"bias": b} if bias else {}), options)


AFFINES = ("depthwise_scale", "depthwise_shift", "scale", "shift")


def separable_sample(
    problem: ConvProblem,
    filters: int,
    generator=None,
    affines: tuple[str, ...] = AFFINES,
    depthwise_activation: str | None = "relu",
    activation: str | None = "relu",
) -> Sample:
    """A depthwise problem followed by a 1x1 convolution to `filters` channels."""
    x, depthwise, _, _ = (on_grid(t) for t in problem.tensors(generator))

    def draw(*shape: int) -> Tensor:
        return on_grid(torch.randn(shape, dtype=torch.float64, generator=generator).to(x.dtype))

    pointwise = draw(filters, problem.k, 1, 1).contiguous(memory_format=problem.memory_format)
    tensors = {"input": x, "depthwise_weight": depthwise, "pointwise_weight": pointwise}
    tensors |= {name: draw(problem.k if name.startswith("depthwise") else filters) for name in affines}
    if "depthwise_shift" in tensors and x.dtype.itemsize == 2 and depthwise_activation:
        # Keeps 16-bit sums between the two convolutions away from the kink of the ReLU: the side that they are rounded
        # to would decide about whole gradients, here and in PyTorch.
        tensors["depthwise_shift"] = 64 * tensors["depthwise_shift"].sign() + 32
    options = conv_options(problem) | {"depthwise_activation": depthwise_activation, "activation": activation}
    del options["groups"]
    return Sample("separable_conv2d", tensors, options, before_relu=_linear if activation else None)


def batch_norm_sample(
    problem: BatchNormProblem,
    generator=None,
    training: bool = True,
    affine: bool = True,
    tracking: bool = True,
    mixed: bool = False,
) -> Sample:
    """`mixed`: parameters and statistics in float32 whatever the input's dtype."""
    x, residual, weight, bias, _ = problem.tensors(generator)
    parameter_dtype = torch.float32 if mixed else x.dtype
    tensors = {"input": x}
    if residual is not None:
        tensors["residual"] = residual
    if affine:
        tensors |= {"weight": weight.to(parameter_dtype), "bias": bias.to(parameter_dtype)}
    mean, var = (torch.randn(problem.c, dtype=torch.float64, generator=generator) for _ in range(2))
    buffers = {"running_mean": mean.to(parameter_dtype), "running_var": (var.abs() + 0.5).to(parameter_dtype)}
    options: dict[str, Any] = {"training": training, "momentum": 0.2, "eps": 1e-4}
    if not tracking:
        buffers, options = {}, options | {"running_mean": None, "running_var": None}
    return Sample("batch_norm_relu", tensors, options, buffers, before_relu=_normalized)


def _normalized(sample: Sample) -> Tensor:
    arguments = sample.tensors | {name: value.clone() for name, value in sample.buffers.items()} | sample.options
    residual = arguments.pop("residual", None)
    y = torch.nn.functional.batch_norm(**arguments)
    return y if residual is None else y + residual


def max_pool_sample(problem: MaxPoolProblem, generator=None, activation: str | None = None) -> Sample:
    options = {"kernel_size": (problem.r, problem.s), "stride": problem.stride, "padding": problem.padding}
    options |= {"dilation": problem.dilation, "ceil_mode": problem.ceil_mode, "activation": activation}
    return Sample("max_pool2d", {"input": on_grid(problem.tensors(generator)[0])}, options)


def _column_options(problem: ConvProblem) -> dict[str, Any]:
    options = conv_options(problem) | {"kernel_size": (problem.r, problem.s)}
    del options["groups"]
    return options


def im2col_sample(problem: ConvProblem, generator=None) -> Sample:
    return Sample("im2col", {"input": on_grid(problem.tensors(generator)[0])}, _column_options(problem))


def col2im_sample(problem: ConvProblem, generator=None) -> Sample:
    p, q = problem.output_size
    shape = problem.n, problem.c * problem.r * problem.s, p * q
    columns = on_grid(torch.randn(shape, dtype=torch.float64, generator=generator).to(problem.torch_dtype))
    return Sample("col2im", {"input": columns}, _column_options(problem) | {"output_size": (problem.h, problem.w)})


def small_samples(
    dtype: str = "f64", layout: str = "nchw", generator: torch.Generator | None = None
) -> dict[str, Sample]:
    """A few small calls of each operator that between them use every option, by name."""
    generator = generator or torch.Generator().manual_seed(3)

    def conv(text: str) -> ConvProblem:
        return ConvProblem.parse(text).replace(dtype=dtype, layout=layout)

    def norm(text: str, **changes: Any) -> BatchNormProblem:
        return BatchNormProblem.parse(text).replace(dtype=dtype, layout=layout, **changes)

    dense, strided = conv("n2c3h5w4k4r3s3p1"), conv("n1c4h6w7k6r3s2u2x1p1x2d1x2g2")
    depthwise, one_sided = conv("n2c3h5w5k6r3s3u2p1g3"), conv("n1c2h5w4k3r2s3p0x1x2x0")
    separable = conv("n2c3h5w4k6r3s3p1g3")
    samples = {
        "conv2d": conv_sample(dense, generator),
        "conv2d no bias": conv_sample(dense, generator, bias=False),
        "conv2d relu": conv_sample(dense, generator, activation="relu"),
        "conv2d relu no bias": conv_sample(strided, generator, bias=False, activation="relu"),
        "conv2d strided grouped dilated": conv_sample(strided, generator),
        "conv2d depthwise": conv_sample(depthwise, generator),
        "conv2d one-sided": conv_sample(one_sided, generator),
        "conv2d 1x1": conv_sample(conv("n2c4h3w3k5r1s1"), generator),
        "conv2d epilogue": conv_sample(dense, generator, True, "relu", scale=True, residual=True),
        "conv2d scale": conv_sample(strided, generator, bias=False, scale=True),
        "conv2d residual": conv_sample(conv("n2c4h3w3k5r1s1"), generator, residual=True),
        "conv2d depthwise epilogue": conv_sample(depthwise, generator, True, "relu", scale=True, residual=True),
        "conv_transpose2d": transpose_sample(dense, generator),
        "conv_transpose2d no bias": transpose_sample(dense, generator, bias=False),
        "conv_transpose2d strided grouped dilated": transpose_sample(strided, generator),
        "conv_transpose2d output_padding": transpose_sample(conv("n1c3h6w6k2r3s3u2p1"), generator),
        "conv_transpose2d depthwise": transpose_sample(conv("n2c3h5w5k3r3s3u2p1g3"), generator),
        "separable_conv2d": separable_sample(separable, 4, generator),
        "separable_conv2d plain": separable_sample(separable, 4, generator, (), None, None),
        "separable_conv2d affine": separable_sample(separable, 4, generator, AFFINES, None, None),
        "separable_conv2d shift": separable_sample(
            conv("n1c4h5w6k4r3s3u2p1d2x1g4"), 3, generator, ("depthwise_shift", "shift"), "relu", None
        ),
        "separable_conv2d scale": separable_sample(
            conv("n1c4h5w6k4r3s2p0x1x1x0g4"), 3, generator, ("depthwise_scale", "scale"), None, "relu"
        ),
        "batch_norm_relu training": batch_norm_sample(norm("n2c3h3w4"), generator),
        "batch_norm_relu training residual": batch_norm_sample(norm("n2c3h3w4+res"), generator),
        "batch_norm_relu training no affine": batch_norm_sample(norm("n2c3h2w3"), generator, affine=False),
        "batch_norm_relu training no tracking": batch_norm_sample(norm("n3c2h2w3+res"), generator, tracking=False),
        "batch_norm_relu eval": batch_norm_sample(norm("n2c3h3w4"), generator, training=False),
        "batch_norm_relu eval residual": batch_norm_sample(norm("n2c3h3w4+res"), generator, training=False),
        "batch_norm_relu eval no affine": batch_norm_sample(norm("n2c3h2w3"), generator, training=False, affine=False),
        "im2col": im2col_sample(dense, generator),
        "im2col strided dilated": im2col_sample(strided, generator),
        "col2im": col2im_sample(dense, generator),
        "col2im strided dilated": col2im_sample(strided, generator),
    }
    plain = MaxPoolProblem(2, 3, 6, 4, 2, 2, (2, 2), dtype=dtype, layout=layout)
    overlapping = MaxPoolProblem(1, 2, 7, 6, 3, 3, (2, 2), (1, 1), dtype=dtype, layout=layout)
    past_the_end = overlapping.replace(padding=(1, 0), ceil_mode=True)
    large = MaxPoolProblem(1, 2, 17, 18, 16, 17, (1, 1), dtype=dtype, layout=layout)
    samples |= {
        "max_pool2d": max_pool_sample(plain, generator),
        "max_pool2d relu": max_pool_sample(plain, generator, "relu"),
        "max_pool2d overlapping": max_pool_sample(overlapping, generator),
        "max_pool2d ceil_mode": max_pool_sample(past_the_end, generator, "relu"),
        "max_pool2d dilated": max_pool_sample(overlapping.replace(dilation=(2, 1)), generator),
        "max_pool2d large": max_pool_sample(large, generator),
    }
    weight_only = samples["batch_norm_relu training"]
    samples["batch_norm_relu weight only"] = dataclasses.replace(
        weight_only, tensors={name: value for name, value in weight_only.tensors.items() if name != "bias"}
    )
    for name in ("conv2d", "conv_transpose2d", "separable_conv2d", "max_pool2d", "im2col", "col2im"):
        tensors = samples[name].tensors
        samples[f"{name} unbatched"] = dataclasses.replace(
            samples[name], tensors=tensors | {"input": tensors["input"][0]}
        )
    epilogue = samples["conv2d epilogue"]
    one = {name: epilogue.tensors[name][0] for name in ("input", "residual")}
    samples["conv2d epilogue unbatched"] = dataclasses.replace(epilogue, tensors=epilogue.tensors | one)
    for padding in ("same", "valid"):
        sample = conv_sample(conv("n1c3h5w8k2r2s4d1x2"), generator)
        samples[f"conv2d {padding}"] = dataclasses.replace(sample, options=sample.options | {"padding": padding})
    return samples


def _unread(t: Tensor) -> float:
    """What lies beside the values."""
    return torch.nan if t.is_floating_point() else 77


def sliced(t: Tensor) -> Tensor:
    """The same values, every dimension taken out of one twice as long."""
    big = torch.full([2 * size for size in t.shape], _unread(t), dtype=t.dtype)
    view = big[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def transposed(t: Tensor) -> Tensor:
    """The same values, height and width exchanged in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else t


def channel_slice(t: Tensor) -> Tensor:
    """The same values in channels_last order, as the middle channels of a tensor with three times as many."""
    if t.dim() != 4:
        return sliced(t)
    n, c, h, w = t.shape
    big = torch.full((n, h, w, 3 * c), _unread(t), dtype=t.dtype)
    return big[..., c : 2 * c].copy_(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def expanded(t: Tensor) -> Tensor:
    """The first image's first channel, for all images and channels (strides 0)."""
    return t[:1, :1].expand(t.shape) if t.dim() == 4 else t


def expanded_pixels(t: Tensor) -> Tensor:
    """The first pixel, for all pixels (strides 0)."""
    return t[..., :1, :1].expand(t.shape) if t.dim() == 4 else t


def offset(t: Tensor) -> Tensor:
    """The same values and strides, from the fourth element of a larger storage: nothing is aligned to a vector."""
    flat = torch.empty(t.numel() + 3, dtype=t.dtype)
    return torch.as_strided(flat, t.shape, t.stride(), 3).copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "sliced": sliced,
    "transposed": transposed,
    "channel_slice": channel_slice,
    "expanded": expanded,
    "expanded_pixels": expanded_pixels,
    "offset": offset,
}


class Calls(TorchDispatchMode):
    """The convkit operators called inside, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "convkit":
            self.calls.append((function._schema.name.split("::")[1], args))
        return function(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return sorted(name for name, _ in self.calls)


_device = torch.device("cpu")


def set_device(device: torch.device) -> None:
    """Where convkit computes from now on; PyTorch, which it is held against, stays on the CPU."""
    global _device
    _device = device


def place(t: Tensor) -> Tensor:
    """The same values, strides and alignment on convkit's device."""
    if _device.type == "cpu":
        return t
    size = t.untyped_storage().nbytes() // t.element_size()
    whole = torch.as_strided(t.detach(), (size,), (1,), 0).to(_device)
    return torch.as_strided(whole, t.shape, t.stride(), t.storage_offset())


# The largest of many small errors is one element's, and half luck. Where the first draw fails, the root mean square
# over this many draws decides: of two equally good sums, one is twice as far off in every hundredth draw, not in 32.
_DRAWS = 32


def check_accuracy(
    make: Callable[[torch.Generator], Sample],
    grad_layout: Callable[[Tensor], Tensor] | None = None,
    gradients: bool = True,
) -> None:
    """Fails unless convkit's output, gradients and buffers are at most twice as far from float64 as PyTorch's own.

    The error of a tensor is its largest difference from float64 PyTorch on the same (rounded) inputs; one rounding of
    the largest value in the tensor's dtype is allowed on top, for the last rounding is luck. `make` makes the sample
    out of a generator's numbers; `grad_layout` arranges the gradient of the output in memory; without `gradients` only
    the output and buffers are compared.
    """
    draws: list[dict[str, tuple[float, float, float]]] = []
    for number in (1, _DRAWS):
        while len(draws) < number:
            sample, errors = _draw_errors(make, grad_layout, gradients, seed=len(draws))
            draws.append(errors)
        bad = []
        for name in errors:
            ours, peer, rounding = (_root_mean_square(draw[name][i] for draw in draws) for i in range(3))
            if not ours <= 2 * peer + rounding:  # this way round, so that a NaN fails
                bad.append(f"{name}: error {ours:.3g}, PyTorch's {peer:.3g}, one rounding {rounding:.3g}")
        if not bad:
            return
    raise AssertionError(f"{sample}\n" + "\n".join(bad))


def _root_mean_square(values: Iterable[float]) -> float:
    squares = [value * value for value in values]
    return math.sqrt(sum(squares) / len(squares))


def _draw_errors(make, grad_layout, gradients: bool, seed: int) -> tuple[Sample, dict[str, tuple[float, float, float]]]:
    """A sample, and of each of its results convkit's error, PyTorch's, and one rounding of the largest value."""
    sample = make(torch.Generator().manual_seed(seed))
    exact = sample.map(Tensor.double)
    grad = _upstream(sample, exact, seed)
    if grad_layout:
        grad = grad_layout(grad)
    want = exact.evaluate(reference, grad.double(), gradients)
    peer = sample.evaluate(reference, grad, gradients)
    got = {name: t.cpu() for name, t in sample.map(place).evaluate(CF, place(grad), gradients).items()}
    errors = {}
    for name, right in want.items():
        value = got[name]
        assert value.shape == right.shape, f"{sample}: {name} has shape {list(value.shape)}, not {list(right.shape)}"
        assert value.dtype == peer[name].dtype, f"{sample}: {name} has dtype {value.dtype}, not {peer[name].dtype}"
        largest = right.abs().max().item() if right.numel() else 0.0
        rounding = _roundings(sample, value) * torch.finfo(value.dtype).eps / 2 * largest
        errors[name] = largest_difference(value, right), largest_difference(peer[name], right), rounding
    return sample, errors


def _roundings(sample: Sample, value: Tensor) -> int:
    """Batch norm in float64 has no better oracle than PyTorch's float64, whose own roundings then count as errors."""
    return 256 if sample.op == "batch_norm_relu" and value.dtype == torch.float64 else 1


def _upstream(sample: Sample, exact: Sample, seed: int) -> Tensor:
    """A random gradient of the output; zero where rounding alone decides on which side of the ReLU a value lies."""
    with torch.no_grad():
        shape = (y := (exact.before_relu or (lambda s: s(reference)))(exact)).shape
    dtype = sample.tensors["input"].dtype
    grad = on_grid(
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(99 + seed)).to(dtype)
    )
    if sample.before_relu and y.numel() and (dtype != torch.float64 or sample.op == "batch_norm_relu"):
        grad = grad.masked_fill(y.abs() < 8 * torch.finfo(dtype).eps * y.abs().max(), 0)
    return grad.contiguous(memory_format=torch.channels_last) if _is_channels_last(y) else grad


def _is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
