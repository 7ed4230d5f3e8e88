"""What PyTorch must know of the operators besides their kernels: shapes without data, and derivatives.

The gradient of a convolution is two more convolution operators, and their gradients are again among the three, so
derivatives of any order need no further formula:

    y  = conv2d(x, w)        gx = conv2d_input_grad(gy, w)      gw = conv2d_weight_grad(gy, x)

Every formula computes only what is asked (``ctx.needs_input_grad``). Autocast rules are in csrc/torch/module.cpp.
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


def relu_grad(grad: Tensor, output: Tensor) -> Tensor:
    """The gradient before a ReLU whose output is known; NaN lets it through, as in torch."""
    return torch.ops.aten.threshold_backward(grad, output, 0)


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


def _conv2d_setup(ctx, inputs, output):
    input, weight, bias, *ctx.geometry, activation, scale, residual = inputs
    ctx.channels_last = is_channels_last(input) or is_channels_last(weight)
    ctx.filters = weight.shape[0]
    # What stands at the end with its default is not among the arguments that autograd knows.
    need = ctx.needs_input_grad
    ctx.need_scale = scale is not None and need[8]
    ctx.need_residual = residual is not None and need[9]
    ctx.bias_dtype = None if bias is None else bias.dtype
    # Each gradient needs the other argument; sizes are kept apart so that nothing is held for a size's sake.
    ctx.input_size, ctx.kernel_size = input.shape[2:], weight.shape[2:]
    ctx.save_for_backward(
        input if need[1] or ctx.need_scale else None,
        weight if need[0] or ctx.need_scale else None,
        scale if any(need[:2]) or ctx.need_scale else None,
        output if activation else None,
    )


def _conv2d_backward(ctx, grad):
    """With a scale s: y = s * conv2d(x, w) = conv2d(x, s * w), which spares products of the images' size. Only the
    gradient of s needs conv2d(x, w) itself, which is computed again for it."""
    input, weight, scale, output = ctx.saved_tensors
    if output is not None:
        grad = relu_grad(grad, output)
    factor = None if scale is None else scale.view(-1, 1, 1, 1)
    grad_input = grad_weight = grad_bias = grad_scale = None
    if ctx.needs_input_grad[0]:
        scaled = weight if factor is None else (weight * factor).to(weight.dtype)
        grad_input = ops.conv2d_input_grad(grad, scaled, ctx.input_size, *ctx.geometry, ctx.channels_last)
    if ctx.needs_input_grad[1]:
        kernel = (ctx.filters, *ctx.kernel_size)
        grad_weight = ops.conv2d_weight_grad(grad, input, kernel, *ctx.geometry, ctx.channels_last)
        if factor is not None:
            grad_weight = (grad_weight * factor).to(grad.dtype)

    def sums(images):
        # A convolution of zero channels has an empty result (PyTorch's rule), which tells nothing of bias and scale.
        return ops.channel_sum(images) if images.shape[1] else images.new_zeros(ctx.filters)

    if ctx.needs_input_grad[2]:
        grad_bias = sums(grad.to(ctx.bias_dtype))
    if ctx.need_scale:
        bare = ops.conv2d(input, weight, None, *ctx.geometry, None)
        grad_scale = sums(grad.to(compute_dtype(grad)) * bare).to(scale.dtype)
    grad_residual = grad if ctx.need_residual else None
    return grad_input, grad_weight, grad_bias, None, None, None, None, None, grad_scale, grad_residual


torch.library.register_autograd("convkit::conv2d", _conv2d_backward, setup_context=_conv2d_setup)


@torch.library.register_fake("convkit::conv2d_input_grad")
def _(grad, weight, input_size, stride, padding, dilation, groups, channels_last):
    return empty(grad, (grad.shape[0], weight.shape[1] * groups, *input_size), channels_last)


def _input_grad_setup(ctx, inputs, output):
    grad, weight, _, *ctx.geometry, ctx.channels_last = inputs
    ctx.kernel = weight.shape[0], *weight.shape[2:]
    need_grad, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(grad if need_weight else None, weight if need_grad else None)


def _input_grad_backward(ctx, direction):
    grad, weight = ctx.saved_tensors
    grad_grad = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_grad = ops.conv2d(direction, weight, None, *ctx.geometry, None)
    if ctx.needs_input_grad[1]:
        grad_weight = ops.conv2d_weight_grad(grad, direction, ctx.kernel, *ctx.geometry, ctx.channels_last)
    return grad_grad, grad_weight, None, None, None, None, None, None


torch.library.register_autograd("convkit::conv2d_input_grad", _input_grad_backward, setup_context=_input_grad_setup)


@torch.library.register_fake("convkit::conv2d_weight_grad")
def _(grad, input, kernel_size, stride, padding, dilation, groups, channels_last):
    filters, r, s = kernel_size
    return empty(input, (filters, input.shape[1] // groups, r, s), channels_last)


def _weight_grad_setup(ctx, inputs, output):
    grad, input, _, *ctx.geometry, ctx.channels_last = inputs
    ctx.input_size = input.shape[2:]
    need_grad, need_input = ctx.needs_input_grad[:2]
    ctx.save_for_backward(grad if need_input else None, input if need_grad else None)


def _weight_grad_backward(ctx, direction):
    grad, input = ctx.saved_tensors
    grad_grad = grad_input = None
    if ctx.needs_input_grad[0]:
        grad_grad = ops.conv2d(input, direction, None, *ctx.geometry, None)
    if ctx.needs_input_grad[1]:
        grad_input = ops.conv2d_input_grad(grad, direction, ctx.input_size, *ctx.geometry, ctx.channels_last)
    return grad_grad, grad_input, None, None, None, None, None, None


torch.library.register_autograd("convkit::conv2d_weight_grad", _weight_grad_backward, setup_context=_weight_grad_setup)


@torch.library.register_fake("convkit::channel_sum")
def _(grad):
    return grad.new_empty(grad.shape[1])


def _channel_sum_setup(ctx, inputs, output):
    ctx.shape = inputs[0].shape


def _channel_sum_backward(ctx, direction):
    return direction.view(1, -1, 1, 1).expand(ctx.shape)


torch.library.register_autograd("convkit::channel_sum", _channel_sum_backward, setup_context=_channel_sum_setup)


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


def _conv_transpose2d_setup(ctx, inputs, output):
    input, weight, bias, stride, padding, output_padding, dilation, groups = inputs
    ctx.channels_last = is_channels_last(input) or is_channels_last(weight)
    # The convolution of which this is the input gradient. Output padding takes away from its far padding; where it is
    # more than that, the last rows or columns met no filter and the gradient has nothing to read from them.
    far = [max(0, p - o) for p, o in zip(padding, output_padding, strict=True)]
    ctx.cut = [max(0, o - p) for p, o in zip(padding, output_padding, strict=True)]
    ctx.geometry = stride, (padding[0], far[0], padding[1], far[1]), dilation, groups
    ctx.kernel = weight.shape[0], *weight.shape[2:]
    need_input, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(input if need_weight else None, weight if need_input else None)


def _conv_transpose2d_backward(ctx, grad):
    input, weight = ctx.saved_tensors
    grad_bias = ops.channel_sum(grad) if ctx.needs_input_grad[2] else None
    if any(cut >= stride for cut, stride in zip(ctx.cut, ctx.geometry[0], strict=True)):
        grad = grad[:, :, : grad.shape[2] - ctx.cut[0], : grad.shape[3] - ctx.cut[1]]
    if ctx.channels_last:  # the results follow the forward's layout, whatever the gradient came in
        grad = grad.contiguous(memory_format=torch.channels_last)
    grad_input = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_input = ops.conv2d(grad, weight, None, *ctx.geometry, None)
        if not ctx.channels_last:
            grad_input = grad_input.contiguous()
    if ctx.needs_input_grad[1]:
        grad_weight = ops.conv2d_weight_grad(input, grad, ctx.kernel, *ctx.geometry, ctx.channels_last)
    return grad_input, grad_weight, grad_bias, None, None, None, None, None


torch.library.register_autograd(
    "convkit::conv_transpose2d", _conv_transpose2d_backward, setup_context=_conv_transpose2d_setup
)


# ---- separable convolution -------------------------------------------------------------------------------------------


@torch.library.register_fake("convkit::separable_conv2d")
def _(input, depthwise_weight, pointwise_weight, dscale, dshift, dact, scale, shift, act, stride, padding, dilation):
    size = out_size(input.shape[2:], padding, depthwise_weight.shape[2:], stride, dilation)
    channels_last = any(map(is_channels_last, (input, depthwise_weight, pointwise_weight)))
    return empty(input, (input.shape[0], pointwise_weight.shape[0], *size), channels_last)


def _separable_setup(ctx, inputs, output):
    input, depthwise, pointwise, dscale, dshift, ctx.dact, scale, shift, act, stride, padding, dilation = inputs
    ctx.geometry = stride, padding, dilation, input.shape[1]
    ctx.channels_last = any(map(is_channels_last, (input, depthwise, pointwise)))
    ctx.save_for_backward(input, depthwise, pointwise, dscale, dshift, scale, output if act else None)


def _separable_backward(ctx, grad):
    """Keeps no intermediate from the forward pass: the depthwise result is computed again, at 1/K of the arithmetic."""
    input, depthwise, pointwise, dscale, dshift, scale, output = ctx.saved_tensors
    need = ctx.needs_input_grad
    one = (1, 1), (0, 0, 0, 0), (1, 1), 1
    if output is not None:
        grad = relu_grad(grad, output)

    def affine(x, factor, term):
        if factor is not None:
            x = x * factor.view(-1, 1, 1)
        return (x if term is None else x + term.view(-1, 1, 1)).to(input.dtype)

    def per_channel(x, like):
        return x.sum((0, 2, 3)).to(like.dtype)

    bare = ops.conv2d(input, depthwise, None, *ctx.geometry, None)
    middle = affine(bare, dscale, dshift)
    if ctx.dact:
        middle = torch.relu(middle)
    grads = [None] * 12
    if need[7]:
        grads[7] = per_channel(grad, ctx.saved_tensors[5] if scale is not None else grad)
    if need[6]:
        grads[6] = per_channel(grad * ops.conv2d(middle, pointwise, None, *one, None), scale)
    grad = affine(grad, scale, None)
    if need[2]:
        kernel = (pointwise.shape[0], 1, 1)
        grads[2] = ops.conv2d_weight_grad(grad, middle, kernel, *one, ctx.channels_last)
    if any(need[i] for i in (0, 1, 3, 4)):
        grad = ops.conv2d_input_grad(grad, pointwise, middle.shape[2:], *one, ctx.channels_last)
        if ctx.dact:
            grad = relu_grad(grad, middle)
        if need[4]:
            grads[4] = per_channel(grad, dshift)
        if need[3]:
            grads[3] = per_channel(grad * bare, dscale)
        grad = affine(grad, dscale, None)
        if need[0]:
            grads[0] = ops.conv2d_input_grad(grad, depthwise, input.shape[2:], *ctx.geometry, ctx.channels_last)
        if need[1]:
            kernel = (depthwise.shape[0], *depthwise.shape[2:])
            grads[1] = ops.conv2d_weight_grad(grad, input, kernel, *ctx.geometry, ctx.channels_last)
    return tuple(grads)


torch.library.register_autograd("convkit::separable_conv2d", _separable_backward, setup_context=_separable_setup)


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


def _batch_norm_relu_setup(ctx, inputs, output):
    input, residual, weight, bias, mean, var, ctx.eps, _ = inputs
    out, batch_mean, batch_var, mask = output
    ctx.mark_non_differentiable(batch_mean, batch_var, mask)
    ctx.set_materialize_grads(False)
    ctx.training = mean is None
    ctx.has_residual = residual is not None
    ctx.save_for_backward(input, weight, bias, batch_mean, batch_var, mask)


def _batch_norm_relu_backward(ctx, grad, *_):
    input, weight, bias, mean, var, mask = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    if not ctx.has_residual:
        mask = None
    elif mask.numel() == 0 and input.numel() != 0:
        raise RuntimeError("convkit.batch_norm_relu: save_mask: got False; a gradient with a residual needs True")
    need = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3)]
    if not any(need):
        return (None,) * 8
    grads = ops.batch_norm_relu_grad(grad, input, weight, bias, mean, var, mask, ctx.eps, ctx.training, need)
    return *(g if wanted else None for g, wanted in zip(grads, need, strict=True)), None, None, None, None


torch.library.register_autograd(
    "convkit::batch_norm_relu", _batch_norm_relu_backward, setup_context=_batch_norm_relu_setup
)


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


def _batch_norm_relu_grad_setup(ctx, inputs, output):
    grad, input, weight, bias, mean, var, mask, ctx.eps, ctx.training, ctx.output_mask = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, input, weight, bias, mean, var, mask)


def _batch_norm_relu_grad_backward(ctx, v, u, a, b):
    """Gradients of <v, input_grad> + <u, residual_grad> + <a, weight_grad> + <b, bias_grad>, in plain PyTorch.

    With z the normalised input, r = 1 / sqrt(var + eps), g = mask * grad and means over a channel:
    input_grad = weight * r * (g - mean(g) - z * mean(g * z)), weight_grad = sum(g * z), bias_grad = sum(g). The
    statistics are computed from the input again, so that these formulas can be differentiated further.
    """
    grad, input, weight, bias, mean, var, mask = ctx.saved_tensors
    none = (None,) * 10
    keep = [x if wanted else None for x, wanted in zip((v, u, a, b), ctx.output_mask, strict=True)]
    if all(x is None for x in keep):
        return none
    v, u, a, b = keep
    # The kernel's own mask, exactly: what it lets through of a gradient of ones.
    ones = torch.ones_like(input)
    only_residual = [False, True, False, False]
    passes = ops.batch_norm_relu_grad(
        ones, input.detach(), weight, bias, mean, var, mask, ctx.eps, ctx.training, only_residual
    )[1].detach()
    wide, dims = compute_dtype(input), (0, 2, 3)

    def channel(x):
        return x.to(wide).view(1, -1, 1, 1)

    def average(x):
        return x.mean(dims, keepdim=True)

    x, m, g = input.to(wide), passes.to(wide), grad.to(wide)
    g = g * m
    if ctx.training:
        centre = x - average(x)
        r = (average(centre * centre) + ctx.eps).rsqrt()
    else:
        centre = x - channel(mean)
        r = (channel(var) + ctx.eps).rsqrt()
    z = centre * r
    w = 1.0 if weight is None else channel(weight)
    to_grad = torch.zeros_like(x)  # before the mask
    to_z = torch.zeros_like(x)
    to_r = to_weight = None
    if v is not None:
        v = v.to(wide)
        if ctx.training:
            gz, vz = average(g * z), average(v * z)
            to_grad = to_grad + w * r * (v - average(v) - z * vz)
            to_z = to_z - w * r * (gz * v + vz * g)
            spread = average(v * g) - average(v) * average(g) - gz * vz
            to_r = w * spread  # times the number of values
            to_weight = (spread * r * (x.numel() / x.shape[1])).flatten()
        else:
            to_grad = to_grad + w * r * v
            to_weight = (v * g * r).sum(dims)
    if u is not None:
        to_grad = to_grad + u.to(wide)
    if a is not None:
        to_grad = to_grad + channel(a) * z
        to_z = to_z + channel(a) * g
    if b is not None:
        to_grad = to_grad + channel(b)
    need_grad, need_input, need_weight = ctx.needs_input_grad[:3]
    to_input = None
    if need_input:
        if ctx.training:
            to_input = r * (to_z - average(to_z) - z * average(to_z * z))
            if to_r is not None:
                to_input = to_input - to_r * r * r * z
        else:
            to_input = to_z * r
        to_input = to_input.to(input.dtype)
    if need_weight:
        to_weight = torch.zeros_like(weight) if to_weight is None else to_weight.view_as(weight).to(weight.dtype)
    return (m * to_grad).to(grad.dtype) if need_grad else None, to_input, to_weight if need_weight else None, *none[3:]


torch.library.register_autograd(
    "convkit::batch_norm_relu_grad", _batch_norm_relu_grad_backward, setup_context=_batch_norm_relu_grad_setup
)


@torch.library.register_fake("convkit::update_running_stats_")
def _(running_mean, running_var, mean, var, momentum, count):
    return None


# ---- im2col, col2im: each is the other's gradient --------------------------------------------------------------------


@torch.library.register_fake("convkit::im2col")
def _(input, kernel_size, dilation, padding, stride):
    n, c, h, w = input.shape
    quad = padding[0], padding[0], padding[1], padding[1]
    p, q = out_size((h, w), quad, kernel_size, stride, dilation)
    return input.new_empty((n, c * kernel_size[0] * kernel_size[1], p * q))


def _im2col_setup(ctx, inputs, output):
    input, *ctx.geometry = inputs
    ctx.size = input.shape[2:]


def _im2col_backward(ctx, grad):
    return ops.col2im(grad, ctx.size, *ctx.geometry), None, None, None, None


torch.library.register_autograd("convkit::im2col", _im2col_backward, setup_context=_im2col_setup)


@torch.library.register_fake("convkit::col2im")
def _(input, output_size, kernel_size, dilation, padding, stride):
    return input.new_empty((input.shape[0], input.shape[1] // (kernel_size[0] * kernel_size[1]), *output_size))


def _col2im_setup(ctx, inputs, output):
    _, _, *ctx.geometry = inputs


def _col2im_backward(ctx, grad):
    return ops.im2col(grad, *ctx.geometry), None, None, None, None, None


torch.library.register_autograd("convkit::col2im", _col2im_backward, setup_context=_col2im_setup)


# ---- max pooling: its gradient puts values where outputs were taken from, and the gradient of that picks them up -----


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


def _max_pool2d_setup(ctx, inputs, output):
    input, *ctx.geometry, activation, save_taps = inputs
    ctx.size, ctx.channels_last = input.shape[2:], is_channels_last(input)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.saved_taps = save_taps


def _max_pool2d_backward(ctx, grad, _):
    (taps,) = ctx.saved_tensors
    if grad is not None and not ctx.saved_taps:
        raise RuntimeError("convkit.max_pool2d: save_taps: got False; a gradient needs True")
    grad = None if grad is None else ops.max_pool2d_grad(grad, taps, ctx.size, *ctx.geometry, ctx.channels_last)
    return grad, None, None, None, None, None, None, None


torch.library.register_autograd("convkit::max_pool2d", _max_pool2d_backward, setup_context=_max_pool2d_setup)


@torch.library.register_fake("convkit::max_pool2d_grad")
def _(grad, taps, input_size, kernel_size, stride, padding, dilation, ceil_mode, channels_last):
    return empty(grad, (*grad.shape[:2], *input_size), channels_last)


def _max_pool2d_grad_setup(ctx, inputs, output):
    _, taps, _, *ctx.geometry = inputs
    ctx.save_for_backward(taps)


def _max_pool2d_grad_backward(ctx, direction):
    (taps,) = ctx.saved_tensors
    return ops.max_pool2d_pick(direction, taps, *ctx.geometry), *(None,) * 8


torch.library.register_autograd(
    "convkit::max_pool2d_grad", _max_pool2d_grad_backward, setup_context=_max_pool2d_grad_setup
)


@torch.library.register_fake("convkit::max_pool2d_pick")
def _(input, taps, kernel_size, stride, padding, dilation, ceil_mode, channels_last):
    return empty(input, taps.shape, channels_last)


def _max_pool2d_pick_setup(ctx, inputs, output):
    input, taps, *ctx.geometry = inputs
    ctx.size = input.shape[2:]
    ctx.save_for_backward(taps)


def _max_pool2d_pick_backward(ctx, direction):
    (taps,) = ctx.saved_tensors
    return ops.max_pool2d_grad(direction, taps, ctx.size, *ctx.geometry), *(None,) * 7


torch.library.register_autograd(
    "convkit::max_pool2d_pick", _max_pool2d_pick_backward, setup_context=_max_pool2d_pick_setup
)
