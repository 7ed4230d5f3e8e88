"""What PyTorch must know of the operators to trace them: the shapes, dtypes and strides of their results, without data.

Schemas and autocast rules are in csrc/torch/module.cpp, derivatives in csrc/torch/autograd.cpp.
"""

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

ops = torch.ops.convkit


def is_channels_last(tensor: Tensor) -> bool:
    """PyTorch's rule for the layout of a result: judged on strides alone, contiguous where a tensor is both."""
    return suggest_memory_format(tensor) is torch.channels_last


def empty(like: Tensor, shape, channels_last: bool) -> Tensor:
    return like.new_empty(shape).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def out_size(size, padding, taps, stride, dilation):
    """Output height and width of a convolution; padding is top, bottom, left, right."""
    return [
        (size[i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (taps[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]


# ---- convolution -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("convkit::conv2d")
def _(input, weight, bias, stride, padding, dilation, groups, activation, scale=None, residual=None):
    torch._check(input.dim() == 4 and weight.dim() == 4, lambda: "convkit.conv2d: input and weight must be 4-D")
    size = out_size(input.shape[2:], padding, weight.shape[2:], stride, dilation)
    channels_last = is_channels_last(input) or is_channels_last(weight)
    filters = 0 if input.shape[1] == 0 else weight.shape[0]
    return empty(input, (input.shape[0], filters, *size), channels_last)


@torch.library.register_fake("convkit::conv2d_input_grad")
def _(grad, weight, input_size, stride, padding, dilation, groups, channels_last):
    return empty(grad, (grad.shape[0], weight.shape[1] * groups, *input_size), channels_last)


@torch.library.register_fake("convkit::conv2d_weight_grad")
def _(grad, input, kernel_size, stride, padding, dilation, groups, channels_last):
    filters, r, s = kernel_size
    return empty(input, (filters, input.shape[1] // groups, r, s), channels_last)


@torch.library.register_fake("convkit::channel_sum")
def _(grad):
    return grad.new_empty(grad.shape[1])


# ---- transposed convolution ------------------------------------------------------------------------------------------


@torch.library.register_fake("convkit::conv_transpose2d")
def _(input, weight, bias, stride, padding, output_padding, dilation, groups):
    size = [
        (input.shape[2 + i] - 1) * stride[i]
        - 2 * padding[i]
        + dilation[i] * (weight.shape[2 + i] - 1)
        + output_padding[i]
        + 1
        for i in range(2)
    ]
    channels_last = is_channels_last(input) or is_channels_last(weight)
    return empty(input, (input.shape[0], weight.shape[1] * groups, *size), channels_last)


# ---- separable convolution -------------------------------------------------------------------------------------------


@torch.library.register_fake("convkit::separable_conv2d")
def _(input, depthwise_weight, pointwise_weight, dscale, dshift, dact, scale, shift, act, stride, padding, dilation):
    size = out_size(input.shape[2:], padding, depthwise_weight.shape[2:], stride, dilation)
    channels_last = any(map(is_channels_last, (input, depthwise_weight, pointwise_weight)))
    return empty(input, (input.shape[0], pointwise_weight.shape[0], *size), channels_last)


# ---- batch normalisation + ReLU --------------------------------------------------------------------------------------


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What per-channel values are held in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _mask_bytes(input: Tensor):
    """One bit an element; every row (pixel of channels, or plane of one channel) starts on its own byte."""
    n, c, h, w = input.shape
    if c > 1 and (is_channels_last(input) or h * w == 1):
        return n * h * w * ((c + 7) // 8)
    return n * c * ((h * w + 7) // 8)


@torch.library.register_fake("convkit::batch_norm_relu")
def _(input, residual, weight, bias, mean, var, eps, save_mask):
    statistics = input.new_empty((2, input.shape[1]), dtype=compute_dtype(input))
    mask = input.new_empty(_mask_bytes(input) if save_mask else 0, dtype=torch.uint8)
    return empty(input, input.shape, is_channels_last(input)), statistics[0].clone(), statistics[1].clone(), mask


@torch.library.register_fake("convkit::batch_norm_relu_grad")
def _(grad, input, weight, bias, mean, var, mask, eps, training, output_mask):
    def like(wanted):
        return empty(input, input.shape, is_channels_last(input)) if wanted else input.new_empty(0)

    def per_channel(wanted, parameter):
        dtype = compute_dtype(input) if parameter is None else parameter.dtype
        return input.new_empty(input.shape[1] if wanted else 0, dtype=dtype)

    return (
        like(output_mask[0]),
        like(output_mask[1]),
        per_channel(output_mask[2], weight),
        per_channel(output_mask[3], bias),
    )


@torch.library.register_fake("convkit::update_running_stats_")
def _(running_mean, running_var, mean, var, momentum, count):
    return None


# ---- im2col, col2im --------------------------------------------------------------------------------------------------


@torch.library.register_fake("convkit::im2col")
def _(input, kernel_size, dilation, padding, stride):
    n, c, h, w = input.shape
    quad = padding[0], padding[0], padding[1], padding[1]
    p, q = out_size((h, w), quad, kernel_size, stride, dilation)
    return input.new_empty((n, c * kernel_size[0] * kernel_size[1], p * q))


@torch.library.register_fake("convkit::col2im")
def _(input, output_size, kernel_size, dilation, padding, stride):
    return input.new_empty((input.shape[0], input.shape[1] // (kernel_size[0] * kernel_size[1]), *output_size))


# ---- max pooling -----------------------------------------------------------------------------------------------------


def pooled_size(size, kernel, stride, padding, dilation, ceil_mode):
    """Output height and width, by PyTorch's rule: in ceil_mode too, the last window begins in the image or before."""
    quad = [pad for pad in padding for _ in range(2)]
    if not ceil_mode:
        return out_size(size, quad, kernel, stride, dilation)
    more = [(pad, pad + step - 1) for pad, step in zip(padding, stride, strict=True)]
    whole = out_size(size, [*more[0], *more[1]], kernel, stride, dilation)
    return [torch.sym_min(whole[i], (size[i] + padding[i] - 1) // stride[i] + 1) for i in range(2)]


@torch.library.register_fake("convkit::max_pool2d")
def _(input, kernel_size, stride, padding, dilation, ceil_mode, activation, save_taps):
    size = pooled_size(input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    output = empty(input, (*input.shape[:2], *size), is_channels_last(input))
    dtype = torch.int32 if kernel_size[0] * kernel_size[1] > 255 else torch.uint8
    return output, torch.empty_like(output, dtype=dtype) if save_taps else input.new_empty(0, dtype=dtype)


@torch.library.register_fake("convkit::max_pool2d_grad")
def _(grad, taps, input_size, kernel_size, stride, padding, dilation, ceil_mode, channels_last):
    return empty(grad, (*grad.shape[:2], *input_size), channels_last)


@torch.library.register_fake("convkit::max_pool2d_pick")
def _(input, taps, kernel_size, stride, padding, dilation, ceil_mode, channels_last):
    return empty(input, taps.shape, channels_last)
