"""convkit's operators, with the signatures of :mod:`torch.nn.functional` and some fused ones.

All take float64, float32, bfloat16 and float16 tensors of any strides; 16-bit types are summed in float32. Results have
the memory format that PyTorch gives: channels_last if the input or the weight is, contiguous otherwise. Every operator
has derivatives of any order, results are bitwise repeatable and do not depend on the number of threads.

Shapes use the field's letters: N images, C channels, H x W pixels, K filters of R x S taps, P x Q output pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from convkit.ops import ops

__all__ = ["batch_norm_relu", "col2im", "conv2d", "conv_transpose2d", "im2col", "max_pool2d", "separable_conv2d"]

IntPair = int | Sequence[int]

# PyTorch's own message for a backend without kernels is a page long and says nothing to do.
_CUDA_KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("convkit::conv2d", "CUDA")


def _integer(value, op: str, name: str) -> int:
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        raise TypeError(f"convkit.{op}: {name}: got {value!r} ({type(value).__name__}); accepts integers")
    return value.__index__()


def _pair(value, op: str, name: str, one: bool = True) -> tuple[int, int]:
    """An integer or a sequence of two (or one) as (height, width)."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value  # what a module passes, without a loop: a small convolution takes as long
    if isinstance(value, list | tuple):
        values = tuple(_integer(v, op, name) for v in value)
        if len(values) == 2:
            return values
        if len(values) == 1 and one:
            return values * 2
        raise RuntimeError(f"convkit.{op}: {name}: got {value!r}; accepts an integer or two, (height, width)")
    value = _integer(value, op, name)
    return value, value


def _tensor(
    value, op: str, name: str, dims: Sequence[int] = (), what: str = "", like: Tensor | None = None, optional=False
) -> None:
    """Checks what the operator itself can't: what is no tensor, or would be sent to another backend's kernel."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"convkit.{op}: {name}: got {type(value).__name__}; accepts a torch.Tensor")
    if value.layout is not torch.strided:
        raise RuntimeError(f"convkit.{op}: {name}: got layout {value.layout}; accepts dense tensors: use .to_dense()")
    if value.is_cuda and not _CUDA_KERNELS:
        raise NotImplementedError(
            f"convkit.{op}: {name}: got a tensor on {value.device}; accepts CPU tensors: this build has no "
            'CUDA kernels. Move model and data with .to("cpu"), or leave the layer to PyTorch'
        )
    if like is not None and value.device != like.device:
        raise RuntimeError(
            f"convkit.{op}: {name}: got a tensor on {value.device}, with the input on {like.device}; "
            "accepts tensors of one device: move one of them with .to(device)"
        )
    if dims and value.dim() not in dims:
        raise RuntimeError(f"convkit.{op}: {name}: got {value.dim()}-D size {list(value.shape)}; accepts {what}")


def _four_sided(padding, kernel: Sequence[int], stride, dilation, op: str) -> tuple[int, int, int, int]:
    """Any accepted form of padding as (top, bottom, left, right)."""
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise RuntimeError(
                f"convkit.{op}: padding: got {padding!r}; accepts 'same', 'valid', an integer, (h, w) or "
                "((top, bottom), (left, right))"
            )
        if stride != (1, 1):
            raise RuntimeError(f"convkit.{op}: padding='same' is not supported with stride {stride}; accepts stride 1")
        # An odd total has its extra row or column at the bottom and at the right, as in PyTorch.
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    if isinstance(padding, list | tuple) and len(padding) == 2 and all(isinstance(p, list | tuple) for p in padding):
        (top, bottom), (left, right) = (_pair(p, op, "padding", one=False) for p in padding)
        return top, bottom, left, right
    h, w = _pair(padding, op, "padding")
    return h, h, w, w


_IMAGES = "(N, C, H, W) or (C, H, W)"


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair | Sequence[Sequence[int]] = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(scale * conv2d(input, weight) + bias + residual)`` in one kernel, each term optional.

    Without ``scale``, ``residual`` and ``activation`` it is :func:`torch.nn.functional.conv2d`. Scale and bias are what
    a batch norm in evaluation comes to. The result is rounded to the input's dtype once, after all terms are in.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (K, C / groups, R, S), of the input's dtype.
        bias: (K,), of the input's dtype; beside a scale, float32 for a 16-bit input as well.
        stride, dilation: pixels, one integer or (height, width).
        padding: pixels of zeros: one integer, (height, width), ((top, bottom), (left, right)), ``"valid"`` (none) or
            ``"same"`` (stride 1; the output has the input's size).
        groups: from 1 (dense) to C (depthwise); C and K must be divisible by it.
        activation: ``None`` or ``"relu"``.
        scale: (K,), of the input's dtype, or float32 for a 16-bit input. Autocast leaves it and its bias as they are.
        residual: of the output's shape and the input's dtype, any strides.

    Returns:
        (N, K, P, Q) or (K, P, Q), in the memory format that input and weight have, whatever the residual's.

    Raises:
        RuntimeError: shapes, dtypes or devices that don't fit, a kernel larger than the padded input.
        NotImplementedError: a dtype other than the four. TypeError: not a tensor, not an integer.
        ValueError: an unknown activation.

    The kernel gathers rows by a table of pointers instead of writing a column matrix: Dukhan, "The Indirect
    Convolution Algorithm", arXiv:1907.02129.
    """
    op = "conv2d"
    _tensor(input, op, "input", (3, 4), _IMAGES)
    _tensor(weight, op, "weight", (4,), "(K, C / groups, R, S)", input)
    _tensor(bias, op, "bias", like=input, optional=True)
    _tensor(scale, op, "scale", like=input, optional=True)
    batched = input.dim() == 4
    _tensor(residual, op, "residual", (input.dim(),), "(N, K, P, Q)" if batched else "(K, P, Q)", input, optional=True)
    stride, dilation = _pair(stride, op, "stride"), _pair(dilation, op, "dilation")
    padding = _four_sided(padding, weight.shape[2:], stride, dilation, op)
    groups = _integer(groups, op, "groups")
    if not batched:
        input, residual = input.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
    output = ops.conv2d(input, weight, bias, stride, padding, dilation, groups, activation, scale, residual)
    return output if batched else output.squeeze(0)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    output_padding: IntPair = 0,
    groups: int = 1,
    dilation: IntPair = 1,
) -> Tensor:
    """:func:`torch.nn.functional.conv_transpose2d`: the input gradient of a convolution, as an operator of its own.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (C, K / groups, R, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, padding, dilation: pixels, one integer or (height, width), of the convolution that this undoes.
        output_padding: rows and columns added at the bottom and the right; less than the stride or the dilation.
        groups: C and K must be divisible by it.

    Returns:
        (N, K, P, Q) or (K, P, Q), with P = (H - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1.

    Raises:
        As :func:`conv2d`; RuntimeError also where padding leaves nothing of the output.

    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285, section 4.
    """
    op = "conv_transpose2d"
    _tensor(input, op, "input", (3, 4), _IMAGES)
    _tensor(weight, op, "weight", (4,), "(C, K / groups, R, S)", input)
    _tensor(bias, op, "bias", like=input, optional=True)
    if isinstance(padding, str):
        raise TypeError(f"convkit.{op}: padding: got {padding!r}; accepts an integer or two, (height, width)")
    batched = input.dim() == 4
    output = ops.conv_transpose2d(
        input if batched else input.unsqueeze(0),
        weight,
        bias,
        _pair(stride, op, "stride"),
        _pair(padding, op, "padding"),
        _pair(output_padding, op, "output_padding"),
        _pair(dilation, op, "dilation"),
        _integer(groups, op, "groups"),
    )
    return output if batched else output.squeeze(0)


def separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    *,
    depthwise_scale: Tensor | None = None,
    depthwise_shift: Tensor | None = None,
    depthwise_activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    stride: IntPair = 1,
    padding: str | IntPair | Sequence[Sequence[int]] = 0,
    dilation: IntPair = 1,
) -> Tensor:
    """Depthwise, then pointwise convolution, each followed by an optional scale, shift and activation, in one pass.

    The depthwise result never reaches memory. Scale and shift are what a bias or a batch norm in evaluation comes to.
    For gradients nothing but the arguments is kept: the backward pass computes the depthwise result again.

    Args:
        input: (N, C, H, W) or (C, H, W).
        depthwise_weight: (C * M, 1, R, S) with a multiplier M >= 1; filter k reads channel k // M.
        pointwise_weight: (K, C * M, 1, 1).
        depthwise_scale, depthwise_shift: (C * M,), of the input's dtype or float32.
        scale, shift: (K,), of the input's dtype or float32.
        depthwise_activation, activation: ``None`` or ``"relu"``.
        stride, padding, dilation: of the depthwise convolution, as in :func:`conv2d`.

    Returns:
        (N, K, P, Q) or (K, P, Q).

    Raises:
        As :func:`conv2d`.

    Howard et al., "MobileNets", arXiv:1704.04861, section 3.1.
    """
    op = "separable_conv2d"
    _tensor(input, op, "input", (3, 4), _IMAGES)
    _tensor(depthwise_weight, op, "depthwise_weight", (4,), "(C * M, 1, R, S)", input)
    _tensor(pointwise_weight, op, "pointwise_weight", (4,), "(K, C * M, 1, 1)", input)
    for name, value in (
        ("depthwise_scale", depthwise_scale),
        ("depthwise_shift", depthwise_shift),
        ("scale", scale),
        ("shift", shift),
    ):
        _tensor(value, op, name, like=input, optional=True)
    stride, dilation = _pair(stride, op, "stride"), _pair(dilation, op, "dilation")
    batched = input.dim() == 4
    output = ops.separable_conv2d(
        input if batched else input.unsqueeze(0),
        depthwise_weight,
        pointwise_weight,
        depthwise_scale,
        depthwise_shift,
        depthwise_activation,
        scale,
        shift,
        activation,
        stride,
        _four_sided(padding, depthwise_weight.shape[2:], stride, dilation, op),
        dilation,
    )
    return output if batched else output.squeeze(0)


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """``relu(batch_norm(input) + residual)`` with the arguments of :func:`torch.nn.functional.batch_norm`.

    For the backward pass it keeps the input and per-channel values, and one bit an element with a residual; the
    normalised tensor and the sum are never stored.

    Args:
        input: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        running_mean, running_var: (C,), both or neither; needed in evaluation, updated in training.
        weight, bias: (C,). With a 16-bit input these and the running statistics may be float32.
        training: normalise by the batch's own statistics; else by the running ones, taken as constants.
        momentum: share of the batch in the updated running statistics; the running variance is the unbiased one.
        eps: added to the variance; finite, positive in training.
        residual: of the input's shape and dtype, added before the ReLU.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        ValueError: one value per channel in training, an eps that is not finite or not positive, one of the running
            statistics alone. RuntimeError: shapes, dtypes, devices. Nothing is written to the running statistics then.

    Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167; variances merged as Chan, Golub and LeVeque, 1983.
    """
    op = "batch_norm_relu"
    _tensor(input, op, "input", (2, 3, 4, 5), "(N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W)")
    arguments = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, value in {**arguments, "residual": residual}.items():
        _tensor(value, op, name, like=input, optional=True)
    for name, value in (("momentum", momentum), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat):
            raise TypeError(f"convkit.{op}: {name}: got {value!r} ({type(value).__name__}); accepts a number")
    if not training:
        for name in ("running_mean", "running_var"):
            if arguments[name] is None:
                raise RuntimeError(f"convkit.{op}: {name}: must be defined in evaluation mode; or pass training=True")
    elif (running_mean is None) != (running_var is None):
        raise ValueError(f"convkit.{op}: running_mean and running_var must either both be None or neither be None")
    for name in ("running_mean", "running_var"):
        statistic = arguments[name]
        if statistic is not None and statistic.requires_grad:
            raise RuntimeError(f"convkit.{op}: {name}: got a tensor that requires grad; it is not differentiable")
    if residual is not None and residual.shape != input.shape:
        raise RuntimeError(
            f"convkit.{op}: residual: got size {list(residual.shape)}; accepts the input's, {list(input.shape)}"
        )
    if running_mean is not None and input.numel() != 0:
        _check_running_stats(op, input, arguments)

    shape = input.shape
    image, added = _as_images(input), None if residual is None else _as_images(residual)
    save_mask = added is not None and torch.is_grad_enabled()
    save_mask = save_mask and any(t is not None and t.requires_grad for t in (input, residual, weight, bias))
    statistics = (None, None) if training else (running_mean, running_var)
    output, mean, var, _ = ops.batch_norm_relu(image, added, weight, bias, *statistics, float(eps), save_mask)
    if training and running_mean is not None and input.numel() != 0:
        ops.update_running_stats_(running_mean, running_var, mean, var, float(momentum), input.numel() // shape[1])
    return output if input.dim() == 4 else output.view(shape) if input.dim() < 4 else output.reshape(shape)


def _as_images(input: Tensor) -> Tensor:
    """(N, C, …) as (N, C, H, W): missing sizes are 1, depth and height are one."""
    if input.dim() == 4:
        return input
    n, c, *rest = input.shape
    if input.dim() == 5:
        return input.reshape(n, c, rest[0] * rest[1], rest[2])
    return input.contiguous().view(n, c, *rest, *[1] * (2 - len(rest)))


def _check_running_stats(op: str, input: Tensor, arguments: dict[str, Tensor | None]) -> None:
    """The operator knows them as mean and var, and in training they are written after the kernel has run: what could
    fail then must fail before."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    for name in ("running_mean", "running_var"):
        statistic = arguments[name]
        if statistic.dim() != 1 or statistic.shape[0] != input.shape[1]:
            raise RuntimeError(
                f"convkit.{op}: {name}: should contain {input.shape[1]} elements, one a channel of the input "
                f"{list(input.shape)}; got size {list(statistic.shape)}"
            )
        if statistic.dtype not in (wide, input.dtype):
            raise RuntimeError(
                f"convkit.{op}: {name}: got dtype {statistic.dtype}; accepts {wide} or the input's, {input.dtype}"
            )


def max_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
    *,
    activation: str | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.max_pool2d`, with an optional ReLU, before or after it, done by the same kernel.

    For the backward pass it keeps neither input nor output, only which tap of its window each output was: one byte, or
    four where a window has more than 255 taps. Equal values and NaN are chosen among as PyTorch does.

    Args:
        input: (N, C, H, W) or (C, H, W).
        kernel_size: of the window, one integer or (height, width).
        stride: pixels between windows, one integer or (height, width); the kernel's size if None or empty.
        padding: pixels around the image that are never the largest; at most half of the kernel.
        dilation: pixels between the taps of a window.
        ceil_mode: windows that begin inside but end outside of the padded image count too.
        activation: ``None`` or ``"relu"``. The largest of ReLUs is the ReLU of the largest, and so are the gradients.

    Returns:
        (N, C, P, Q) or (C, P, Q).

    Raises:
        RuntimeError: shapes that don't fit, a kernel larger than the padded image, more padding than half of it.
        NotImplementedError: a dtype other than the four. TypeError: not a tensor, not an integer.
        ValueError: an unknown activation.
    """
    op = "max_pool2d"
    _tensor(input, op, "input", (3, 4), _IMAGES)
    kernel_size = _pair(kernel_size, op, "kernel_size")
    stride = kernel_size if stride is None or stride in ((), []) else _pair(stride, op, "stride")
    padding, dilation = _pair(padding, op, "padding"), _pair(dilation, op, "dilation")
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"convkit.{op}: ceil_mode: got {ceil_mode!r} ({type(ceil_mode).__name__}); accepts a bool")
    batched = input.dim() == 4
    images = input if batched else input.unsqueeze(0)
    save_taps = torch.is_grad_enabled() and input.requires_grad
    output, _ = ops.max_pool2d(images, kernel_size, stride, padding, dilation, ceil_mode, activation, save_taps)
    return output if batched else output.squeeze(0)


def im2col(
    input: Tensor, kernel_size: IntPair, dilation: IntPair = 1, padding: IntPair = 0, stride: IntPair = 1
) -> Tensor:
    """:func:`torch.nn.functional.unfold`: every window of the image as a column.

    A convolution is then ``weight.flatten(1) @ im2col(input)``: the way the method is taught, and R * S / stride**2
    times the input's memory. :func:`conv2d` does without.

    Args:
        input: (N, C, H, W) or (C, H, W).
        kernel_size, dilation, padding, stride: pixels, one integer or (height, width).

    Returns:
        (N, C * R * S, P * Q) or (C * R * S, P * Q), contiguous.

    Raises:
        RuntimeError: shapes that don't fit, a kernel larger than the padded input.

    Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006.
    """
    op = "im2col"
    _tensor(input, op, "input", (3, 4), _IMAGES)
    geometry = [
        _pair(value, op, name, one=False)
        for name, value in (
            ("kernel_size", kernel_size),
            ("dilation", dilation),
            ("padding", padding),
            ("stride", stride),
        )
    ]
    batched = input.dim() == 4
    output = ops.im2col(input if batched else input.unsqueeze(0), *geometry)
    return output if batched else output.squeeze(0)


def col2im(
    input: Tensor,
    output_size: IntPair,
    kernel_size: IntPair,
    dilation: IntPair = 1,
    padding: IntPair = 0,
    stride: IntPair = 1,
) -> Tensor:
    """:func:`torch.nn.functional.fold`: the columns of :func:`im2col` added back to where they came from.

    Args:
        input: (N, C * R * S, P * Q) or (C * R * S, P * Q).
        output_size: (H, W) of the image, or one integer for both.
        kernel_size, dilation, padding, stride: those of :func:`im2col`.

    Returns:
        (N, C, H, W) or (C, H, W), contiguous; 16-bit types are summed in float32.

    Raises:
        RuntimeError: a number of rows or blocks that the other arguments don't lead to.
    """
    op = "col2im"
    _tensor(input, op, "input", (2, 3), "(N, C * R * S, P * Q) or (C * R * S, P * Q)")
    geometry = [
        _pair(value, op, name, one=False)
        for name, value in (
            ("output_size", output_size),
            ("kernel_size", kernel_size),
            ("dilation", dilation),
            ("padding", padding),
            ("stride", stride),
        )
    ]
    batched = input.dim() == 3
    output = ops.col2im(input if batched else input.unsqueeze(0), *geometry)
    return output if batched else output.squeeze(0)
