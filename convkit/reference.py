"""Every operator in plain PyTorch: the oracle of the tests, with the signatures of `convkit.functional`.

In float64 these are what convkit is compared with; in convkit's precision they say how large PyTorch's own error is.
Nothing here is fused, and nothing calls convkit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Size = int | Sequence[int]
Padding = Size | Sequence[Sequence[int]] | Literal["same", "valid"]


def _activate(y: Tensor, activation: str | None) -> Tensor:
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu', but got {activation!r}")
    return y if activation is None else F.relu(y)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`F.conv2d`, its zero padding also as ((top, bottom), (left, right)); scale, bias, residual, activation."""
    if not isinstance(padding, int | str) and any(not isinstance(side, int) for side in padding):
        (top, bottom), (left, right) = padding
        input, padding = F.pad(input, (left, right, top, bottom)), 0
    if scale is None:
        y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    else:
        y = F.conv2d(input, weight, None, stride, padding, dilation, groups)
        y = _affine(y, scale, bias).to(y.dtype)
    return _activate(y if residual is None else y + residual, activation)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """`F.conv_transpose2d`."""
    return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _affine(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is not None:
        y = y * scale.view(-1, 1, 1)
    return y if shift is None else y + shift.view(-1, 1, 1)


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
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
) -> Tensor:
    """Depthwise convolution, affine, activation, then the same with a 1x1 convolution; affine, activation optional."""
    y = conv2d(input, depthwise_weight, None, stride, padding, dilation, input.shape[-3])
    y = _activate(_affine(y, depthwise_scale, depthwise_shift), depthwise_activation)
    y = F.conv2d(y, pointwise_weight)
    return _activate(_affine(y, scale, shift), activation)


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
    """`F.batch_norm`, which in training updates the running statistics in place, then the residual, then ReLU."""
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.relu(y if residual is None else y + residual)


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    *,
    activation: str | None = None,
) -> Tensor:
    """`F.max_pool2d`, then the activation."""
    return _activate(F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode), activation)


def im2col(input: Tensor, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1) -> Tensor:
    """`F.unfold`."""
    return F.unfold(input, kernel_size, dilation, padding, stride)


def col2im(
    input: Tensor, output_size: Size, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1
) -> Tensor:
    """`F.fold`."""
    return F.fold(input, output_size, kernel_size, dilation, padding, stride)
