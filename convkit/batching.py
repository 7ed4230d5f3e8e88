"""torch.func.vmap: what a mapped operator comes to, in calls of the operator.

Mapped images are more images. Mapped filters are more filters where all see the same images; where each set of them has
its own, the images are laid side by side as channels, and each set is a group. Batch norm's channels stay apart in any
case, so what is mapped is more channels. A call for each is left to what is large or has a mask of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convkit.ops import is_channels_last, ops, out_size

# Multiply-adds of one mapped convolution from which on a call for each is faster than a group for each. Measured with
# two AVX-512 cores: weight gradients of 64 images of LeNet's second layer (3 million each) take 2.7 ms as groups and
# 8.6 to 12.5 as calls; those of 32 images of 64 channels and 32x32 pixels (38 million each) 11 to 28 ms, and 7 to 9.
LARGE = 1 << 24


def count(info) -> int:
    """How many calls are in one."""
    if info.batch_size == 0:
        raise NotImplementedError(
            "torch.func.vmap: got a dimension of size 0 to map; convkit's operators accept 1 and more"
        )
    return info.batch_size


def spread(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension first; what is not mapped is the same for all."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def as_images(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(B, N, …) as (B * N, …); of filters or per-channel values, (B, K, …) as (B * K, …)."""
    return None if tensor is None else spread(tensor, dim, size).flatten(0, 1)


as_filters = as_images


def as_channels(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(B, N, C, …) as (N, B * C, …)."""
    return None if tensor is None else spread(tensor, dim, size).transpose(0, 1).flatten(1, 2)


def stacked(tensors: tuple[Tensor, ...]) -> Tensor:
    if tensors[0].dim() == 4 and is_channels_last(tensors[0]):
        return torch.stack([t.permute(0, 2, 3, 1) for t in tensors]).permute(0, 1, 4, 2, 3)
    return torch.stack(tensors)


def each(op: Callable, size: int, in_dims: tuple, args: tuple) -> tuple[Any, Any]:
    """A call for each."""
    dims = [dim if isinstance(dim, int) else None for dim in in_dims]
    results = [
        op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(results[0], Tensor):
        return stacked(results), 0
    return tuple(map(stacked, zip(*results, strict=True))), (0,) * len(results[0])


def register_images(name: str, tensors: int = 1) -> None:
    """The rule of an operator whose first so many arguments are tensors of images, and no others are tensors."""
    op = getattr(ops, name)

    def rule(info, in_dims, *args):
        size = count(info)
        images = (as_images(*pair, size) for pair in zip(args[:tensors], in_dims[:tensors], strict=True))
        out = op(*images, *args[tensors:])
        if isinstance(out, Tensor):
            return out.unflatten(0, (size, -1)), 0
        # What was not asked for is an empty tensor of one dimension.
        dims = tuple(None if t.dim() == 1 else 0 for t in out)
        return tuple(t if dim is None else t.unflatten(0, (size, -1)) for t, dim in zip(out, dims, strict=True)), dims

    torch.library.register_vmap(f"convkit::{name}", rule)


for images_only, how_many in (
    ("im2col", 1),
    ("col2im", 1),
    ("max_pool2d", 1),
    ("max_pool2d_grad", 2),
    ("max_pool2d_pick", 2),
):
    register_images(images_only, how_many)


# ---- convolution -----------------------------------------------------------------------------------------------------


def one(tensor: Tensor, dim: int | None) -> torch.Size:
    """The shape of one of the mapped tensors."""
    return tensor.shape if dim is None else tensor.select(dim, 0).shape


@torch.library.register_vmap("convkit::conv2d")
def _(info, in_dims, *args):
    input, weight, bias, stride, padding, dilation, groups, activation, scale, residual = (*args, None, None)[:10]
    of_input, of_weight, of_bias, *_, of_scale, of_residual = (*in_dims, None, None)[:10]
    size = count(info)
    options = stride, padding, dilation
    if of_weight is None and of_bias is None and of_scale is None:
        x, y = as_images(input, of_input, size), as_images(residual, of_residual, size)
        return ops.conv2d(x, weight, bias, *options, groups, activation, scale, y).unflatten(0, (size, -1)), 0
    n, _, h, w = one(input, of_input)
    k, c, r, s = one(weight, of_weight)
    p, q = out_size((h, w), padding, (r, s), stride, dilation)
    if n * p * q * k * c * r * s >= LARGE:
        return each(ops.conv2d, size, in_dims, args)
    if of_input is not None or groups != 1:
        input, groups = as_channels(input, of_input, size), groups * size
    weight, bias, scale = (
        as_filters(t, dim, size) for t, dim in ((weight, of_weight), (bias, of_bias), (scale, of_scale))
    )
    y = ops.conv2d(input, weight, bias, *options, groups, activation, scale, as_channels(residual, of_residual, size))
    return y.unflatten(1, (size, -1)), 1


@torch.library.register_vmap("convkit::conv2d_input_grad")
def _(info, in_dims, grad, weight, input_size, stride, padding, dilation, groups, channels_last):
    size, (of_grad, of_weight) = count(info), in_dims[:2]
    options = input_size, stride, padding, dilation
    if of_weight is None:
        grad = as_images(grad, of_grad, size)
        return ops.conv2d_input_grad(grad, weight, *options, groups, channels_last).unflatten(0, (size, -1)), 0
    n, _, p, q = one(grad, of_grad)
    if n * p * q * one(weight, of_weight).numel() >= LARGE:
        return each(ops.conv2d_input_grad, size, in_dims, (grad, weight, *options, groups, channels_last))
    grad, weight = as_channels(grad, of_grad, size), as_filters(weight, of_weight, size)
    return ops.conv2d_input_grad(grad, weight, *options, groups * size, False).unflatten(1, (size, -1)), 1


@torch.library.register_vmap("convkit::conv2d_weight_grad")
def _(info, in_dims, grad, input, kernel_size, stride, padding, dilation, groups, channels_last):
    size, (of_grad, of_input) = count(info), in_dims[:2]
    options = stride, padding, dilation
    n, c = one(input, of_input)[:2]
    k, r, s = kernel_size
    p, q = one(grad, of_grad)[2:]
    if n * p * q * k * (c // groups) * r * s >= LARGE:
        args = grad, input, kernel_size, *options, groups, channels_last
        return each(ops.conv2d_weight_grad, size, in_dims, args)
    if of_input is not None or groups != 1:
        input, groups, channels_last = as_channels(input, of_input, size), groups * size, False
    grad = as_channels(grad, of_grad, size)
    weight_grad = ops.conv2d_weight_grad(grad, input, (size * k, r, s), *options, groups, channels_last)
    return weight_grad.unflatten(0, (size, -1)), 0


@torch.library.register_vmap("convkit::conv_transpose2d")
def _(info, in_dims, input, weight, bias, stride, padding, output_padding, dilation, groups):
    size, (of_input, of_weight, of_bias) = count(info), in_dims[:3]
    options = stride, padding, output_padding, dilation
    if of_weight is None and of_bias is None:
        input = as_images(input, of_input, size)
        return ops.conv_transpose2d(input, weight, bias, *options, groups).unflatten(0, (size, -1)), 0
    n, _, h, w = one(input, of_input)
    if n * h * w * one(weight, of_weight).numel() >= LARGE:
        return each(ops.conv_transpose2d, size, in_dims, (input, weight, bias, *options, groups))
    input = as_channels(input, of_input, size)
    weight, bias = as_filters(weight, of_weight, size), as_filters(bias, of_bias, size)
    return ops.conv_transpose2d(input, weight, bias, *options, groups * size).unflatten(1, (size, -1)), 1


@torch.library.register_vmap("convkit::separable_conv2d")
def _(info, in_dims, input, *parameters):
    size = count(info)
    if any(isinstance(dim, int) for dim in in_dims[1:]):
        return each(ops.separable_conv2d, size, in_dims, (input, *parameters))
    return ops.separable_conv2d(as_images(input, in_dims[0], size), *parameters).unflatten(0, (size, -1)), 0


@torch.library.register_vmap("convkit::channel_sum")
def _(info, in_dims, grad):
    size = count(info)
    return ops.channel_sum(as_channels(grad, in_dims[0], size)).unflatten(0, (size, -1)), 0


# ---- batch normalisation + ReLU --------------------------------------------------------------------------------------


@torch.library.register_vmap("convkit::batch_norm_relu")
def _(info, in_dims, input, residual, weight, bias, mean, var, eps, save_mask):
    size = count(info)
    tensors = input, residual, weight, bias, mean, var
    if mean is not None and all(dim is None for dim in in_dims[2:6]) and not save_mask:
        images = (as_images(t, dim, size) for t, dim in zip(tensors[:2], in_dims[:2], strict=True))
        y, *others = ops.batch_norm_relu(*images, *tensors[2:], eps, save_mask)
        return (y.unflatten(0, (size, -1)), *others), (0, None, None, None)
    if save_mask:
        (y, mean, var, mask), _ = each(ops.batch_norm_relu, size, in_dims, (*tensors, eps, save_mask))
        dim, of_mask = 0, 0
    else:
        images = (as_channels(t, dim, size) for t, dim in zip(tensors[:2], in_dims[:2], strict=True))
        values = (as_filters(t, dim, size) for t, dim in zip(tensors[2:], in_dims[2:6], strict=True))
        y, mean, var, mask = ops.batch_norm_relu(*images, *values, eps, save_mask)
        y, mean, var = (t.unflatten(d, (size, -1)) for t, d in ((y, 1), (mean, 0), (var, 0)))
        dim, of_mask = 1, None
    if in_dims[0] is None and in_dims[4] is None and in_dims[5] is None:  # one mean and one variance for all
        return (y, mean[0], var[0], mask), (dim, None, None, of_mask)
    return (y, mean, var, mask), (dim, 0, 0, of_mask)


@torch.library.register_vmap("convkit::batch_norm_relu_grad")
def _(info, in_dims, grad, input, weight, bias, mean, var, mask, eps, training, output_mask):
    size = count(info)
    tensors = grad, input, weight, bias, mean, var
    if mask is not None:
        return each(ops.batch_norm_relu_grad, size, in_dims, (*tensors, mask, eps, training, output_mask))
    images = (as_channels(t, dim, size) for t, dim in zip(tensors[:2], in_dims[:2], strict=True))
    values = (as_filters(t, dim, size) for t, dim in zip(tensors[2:], in_dims[2:6], strict=True))
    grads = ops.batch_norm_relu_grad(*images, *values, None, eps, training, output_mask)
    dims = tuple(dim if wanted else None for dim, wanted in zip((1, 1, 0, 0), output_mask, strict=True))
    return tuple(t if d is None else t.unflatten(d, (size, -1)) for t, d in zip(grads, dims, strict=True)), dims


@torch.library.register_vmap("convkit::update_running_stats_")
def _(info, in_dims, running_mean, running_var, mean, var, momentum, count):
    for name, dim in (("running_mean", in_dims[0]), ("running_var", in_dims[1])):
        if dim is None:
            raise RuntimeError(
                f"convkit.batch_norm_relu: {name}: got one tensor for all that vmap maps, and the statistics of each "
                "would go to it; accepts one for each: map it too, leave the running statistics out, or pass "
                "training=False"
            )
    args = running_mean, running_var, mean, var, momentum, count
    for i in range(info.batch_size):
        ops.update_running_stats_(
            *(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True))
        )
    return None, None
