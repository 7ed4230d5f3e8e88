"""convkit and what it is compared with, as calls on the same tensors.

``convkit``  the operators that autograd calls, without autograd's own time
``torch``    PyTorch's, called likewise: oneDNN on a CPU; cuDNN in benchmark mode, or what PyTorch prefers
``native``   PyTorch's own depthwise kernels, with oneDNN or cuDNN off
``compile``  ``torch.compile`` of PyTorch's
``im2col``   the explicit column matrix and a matrix product: ``torch.nn.functional.unfold`` and ``torch.matmul``
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import convkit.functional as CF
from convkit.bench.problems import LAYOUTS, BatchNormProblem, ConvProblem
from convkit.bench.results import OWN
from convkit.bench.suites import family
from convkit.ops import compute_dtype, ops

__all__ = ["PEERS", "Call", "error", "keys", "operands", "prepare"]

PEERS = ("torch", "native", "compile", "im2col")
EPS = 1e-5

Problem = ConvProblem | BatchNormProblem
Call = Callable[..., Tensor]


def keys(problem: Problem, layouts: Sequence[str], peers: Sequence[str]) -> list[str]:
    """``who/layout`` of all that can be measured: convkit in ``layouts``, each peer in all of its own."""
    found = [f"{OWN}/{layout}" for layout in layouts]
    kind = family(problem)
    for peer in peers:
        if peer == "native" and kind != "depthwise" or peer == "im2col" and kind == "batch-norm":
            continue
        found += [f"{peer}/{layout}" for layout in (["nchw"] if peer == "im2col" else LAYOUTS)]
    return found


def operands(problem: Problem, pass_: str) -> list[tuple[int, int, int, int]]:
    """Shapes of the tensors that a call takes, which are all that it reads, but for values a channel."""
    if isinstance(problem, ConvProblem):
        x, weight, y = problem.input_shape, problem.weight_shape, problem.output_shape
        return {"fprop": [x, weight], "dgrad": [y, weight], "wgrad": [y, x]}[pass_]
    if pass_ == "backward":
        return [problem.shape] * 3  # x, the gradient, the forward's output
    return [problem.shape] * (1 + problem.residual)


def prepare(who: str, problem: Problem, pass_: str, tensors: Sequence[Tensor]) -> Call:
    """The function of tensors shaped and laid out as ``tensors``, an example, that does a pass; gradients disabled."""
    if isinstance(problem, ConvProblem):
        base = {OWN: _convkit_conv, "im2col": _im2col_conv}.get(who, _torch_conv)(problem, pass_, tensors)
    else:
        base = (_convkit_batch_norm if who == OWN else _torch_batch_norm)(problem, pass_, tensors)
    if who == "compile":
        torch._dynamo.reset()  # a function that was compiled for eight problems is run uncompiled from then on
        return torch.compile(base, dynamic=False)
    if who == "native":
        return _without_libraries(base)
    return base


def _without_libraries(function: Call) -> Call:
    def call(*tensors: Tensor) -> Tensor:
        library = torch.backends.cudnn if tensors[0].is_cuda else torch.backends.mkldnn
        enabled, library.enabled = library.enabled, False
        try:
            return function(*tensors)
        finally:
            library.enabled = enabled

    return call


# ---- convolution -----------------------------------------------------------------------------------------------------


def _convkit_conv(problem: ConvProblem, pass_: str, tensors: Sequence[Tensor]) -> Call:
    geometry = problem.stride, problem.padding, problem.dilation, problem.groups
    top, bottom, left, right = problem.padding
    last = problem.layout == "nhwc"
    size, kernel = (problem.h, problem.w), (problem.k, problem.r, problem.s)
    if pass_ == "dgrad":
        return lambda grad, weight: ops.conv2d_input_grad(grad, weight, size, *geometry, last)
    if pass_ == "wgrad":
        return lambda grad, x: ops.conv2d_weight_grad(grad, x, kernel, *geometry, last)
    stride, padding, dilation, groups = problem.stride, ((top, bottom), (left, right)), *geometry[2:]
    return lambda x, weight: CF.conv2d(x, weight, None, stride, padding, dilation, groups)


def _torch_conv(problem: ConvProblem, pass_: str, tensors: Sequence[Tensor]) -> Call:
    stride, padding, dilation, groups = problem.stride, problem.torch_padding, problem.dilation, problem.groups
    top, bottom, left, right = problem.padding
    one_sided = padding is None
    if one_sided:  # as one has to do it in PyTorch: pad first, or cut the padding off the gradient
        padding = (0, 0)

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, (left, right, top, bottom)) if one_sided else x

    # The gradients take the other operand for its size and layout, and do not read it.
    like = {"device": tensors[0].device, "dtype": tensors[0].dtype}
    layout = LAYOUTS[problem.layout]

    def backward(grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )

    if pass_ == "dgrad":
        unread = padded(torch.empty(problem.input_shape, **like, memory_format=layout))

        def dgrad(grad: Tensor, weight: Tensor) -> Tensor:
            found = backward(grad, unread, weight, [True, False, False])[0]
            return found[:, :, top : top + problem.h, left : left + problem.w] if one_sided else found

        return dgrad
    if pass_ == "wgrad":
        unread = torch.empty(problem.weight_shape, **like, memory_format=layout)
        return lambda grad, x: backward(grad, padded(x), unread, [False, True, False])[1]
    return lambda x, weight: F.conv2d(padded(x), weight, None, stride, padding, dilation, groups)


def _im2col_conv(problem: ConvProblem, pass_: str, tensors: Sequence[Tensor]) -> Call:
    if problem.torch_padding is None:
        raise NotImplementedError("unfold takes the same padding on both sides")
    window = (problem.r, problem.s), problem.dilation, problem.torch_padding, problem.stride
    n, groups, (p, q) = problem.n, problem.groups, problem.output_size

    def columns(x: Tensor) -> Tensor:
        return F.unfold(x, *window).view(n, groups, -1, p * q)

    def matrix(weight: Tensor) -> Tensor:
        return weight.view(groups, problem.k // groups, -1)

    def rows(y: Tensor) -> Tensor:
        return y.view(n, groups, problem.k // groups, p * q)

    if pass_ == "dgrad":
        return lambda grad, weight: F.fold(
            (matrix(weight).transpose(1, 2) @ rows(grad)).view(n, -1, p * q), (problem.h, problem.w), *window
        )
    if pass_ == "wgrad":
        return lambda grad, x: (rows(grad) @ columns(x).transpose(2, 3)).sum(0).view(problem.weight_shape)
    return lambda x, weight: (matrix(weight) @ columns(x)).view(problem.output_shape)


# ---- batch norm + ReLU -----------------------------------------------------------------------------------------------


def _per_channel(problem: BatchNormProblem, example: Tensor) -> list[Tensor]:
    """Scale, shift, running mean and variance: the same at every call, float32 for 16-bit tensors as in autocast."""
    values = torch.linspace(0.5, 1.5, problem.c).to(example.device, compute_dtype(example))
    return [values.flip(0), values - 1, (values - 1) / 4, values]


def _before_relu(problem: BatchNormProblem, x: Tensor, residual: Tensor | None, training: bool = True) -> Tensor:
    """In plain PyTorch, of the first channels where x has not all of them."""
    weight, bias, mean, var = (value[: x.shape[1]] for value in _per_channel(problem, x))
    y = F.batch_norm(x, mean, var, weight, bias, training, 0.0, EPS)
    return y if residual is None else y + residual


def _convkit_batch_norm(problem: BatchNormProblem, pass_: str, tensors: Sequence[Tensor]) -> Call:
    weight, bias, mean, var = _per_channel(problem, tensors[0])
    if pass_ == "evaluation":
        return lambda x, residual=None: CF.batch_norm_relu(x, mean, var, weight, bias, eps=EPS, residual=residual)
    count = problem.n * problem.h * problem.w
    if pass_ == "forward":

        def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y, *batch, _ = ops.batch_norm_relu(x, residual, weight, bias, None, None, EPS, residual is not None)
            ops.update_running_stats_(mean, var, *batch, 0.1, count)
            return y

        return forward
    x, _, z = tensors
    # What the ReLU lets through with a residual is one bit an element, too few to lie anywhere but in a cache: the
    # example's, with its last tensor as the residual.
    _, mean, var, mask = ops.batch_norm_relu(
        x, z if problem.residual else None, weight, bias, None, None, EPS, problem.residual
    )
    wanted = [True, problem.residual, True, True]
    mask = mask if problem.residual else None
    return lambda x, grad, y: ops.batch_norm_relu_grad(grad, x, weight, bias, mean, var, mask, EPS, True, wanted)[0]


def _torch_batch_norm(problem: BatchNormProblem, pass_: str, tensors: Sequence[Tensor]) -> Call:
    weight, bias, mean, var = _per_channel(problem, tensors[0])
    if pass_ == "backward":
        # The two halves of what F.batch_norm is, which picks cuDNN's kernel or PyTorch's own.
        enabled = torch.backends.cudnn.enabled
        _, *saved, reserve, which = torch.ops.aten._batch_norm_impl_index(
            tensors[0], weight, bias, mean, var, True, 0.1, EPS, enabled
        )

        def backward(x: Tensor, grad: Tensor, y: Tensor) -> Tensor:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
            return torch.ops.aten._batch_norm_impl_index_backward(
                which, x, grad, weight, mean, var, *saved, True, EPS, [True, True, True], reserve
            )[0]

        return backward
    training = pass_ == "forward"

    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.batch_norm(x, mean, var, weight, bias, training, 0.1, EPS)
        return (y if residual is None else y.add_(residual)).relu_()

    return forward


# ---- errors ----------------------------------------------------------------------------------------------------------


def error(function: Call, problem: Problem, pass_: str, tensors: Sequence[Tensor]) -> float:
    """The largest difference of ``function(*tensors)`` from float64, as a share of the largest value in float64.

    The float64 result is computed from the same tensors, of some images, groups, filters or channels where all would
    take too long. ArithmeticError if a value is not finite.
    """
    expected, part = (_conv_reference if isinstance(problem, ConvProblem) else _batch_norm_reference)(
        problem, pass_, tensors
    )
    if pass_ == "backward":
        x, grad, z = tensors
        y = _before_relu(problem, x.to(compute_dtype(x)), z if problem.residual else None).relu().to(x.dtype)
        tensors = x, grad, y
    result = function(*tensors)
    if not bool(result.isfinite().all()):
        raise ArithmeticError("the result has values that are not finite")
    result = part(result).double()
    if result.shape != expected.shape:
        raise ArithmeticError(f"the result has size {list(result.shape)} and not {list(expected.shape)}")
    seen = ~expected.isnan()
    largest = expected[seen].abs().max()
    return float((result - expected)[seen].abs().max() / largest) if largest else 0.0


# Floating-point operations that a float64 reference may take: on a GPU cuDNN tries each of its ways first.
REFERENCE_FLOPS = {"cpu": 2e8, "cuda": 2e10}


def _conv_reference(
    problem: ConvProblem, pass_: str, tensors: Sequence[Tensor]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    device = tensors[0].device.type
    groups = min(problem.groups, 8)
    c, k = problem.c // problem.groups * groups, problem.k // problem.groups * groups
    if groups == 1 and pass_ == "wgrad":
        share = REFERENCE_FLOPS[device] / problem.flops
        k = max(1, min(k, int(k * share)))
    sample = problem.replace(c=c, k=k, groups=groups, dtype="f64")
    if pass_ != "wgrad":
        sample = sample.replace(n=max(1, min(problem.n, int(problem.n * REFERENCE_FLOPS[device] / sample.flops))))
    n = sample.n
    first, second = tensors
    if pass_ == "fprop":
        inputs, part = (first[:n, :c], second[:k]), lambda y: y[:n, :k]
    elif pass_ == "dgrad":
        inputs, part = (first[:n, :k], second[:k]), lambda x: x[:n, :c]
    else:
        inputs, part = (first[:n, :k], second[:n, :c]), lambda weight: weight[:k]
    # Contiguous: PyTorch's float64 kernels for it are many times faster.
    sample = sample.replace(layout="nchw")
    inputs = [value.double().contiguous() for value in inputs]
    return _torch_conv(sample, pass_, inputs)(*inputs), part


def _batch_norm_reference(
    problem: BatchNormProblem, pass_: str, tensors: Sequence[Tensor]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    channels = min(problem.c, 8)
    inputs = [value[:, :channels].double().contiguous() for value in tensors]
    x = inputs[0].requires_grad_(pass_ == "backward")
    if pass_ != "backward":
        residual = inputs[1] if problem.residual else None
        expected = _before_relu(problem, x, residual, training=pass_ == "forward").relu()
    else:
        with torch.enable_grad():
            before = _before_relu(problem, x, inputs[2] if problem.residual else None)
            (expected,) = torch.autograd.grad(before.relu(), x, inputs[1])
        # Nobody can know on which side of the ReLU's corner these are.
        expected[before.detach().abs() < 1e-5] = float("nan")
    return expected, lambda y: y[:, :channels]


@contextlib.contextmanager
def precision(dtype: str):
    """PyTorch's switches for what a dtype's name stands for: ``tf32`` rounds products of float32, ``f32`` does not."""
    convolution, matrix = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolution, matrix
