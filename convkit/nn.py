"""Modules with convkit's kernels: drop-in subclasses of torch.nn's.

Constructor arguments, parameters, buffers, initial values and state_dict keys are torch.nn's, so a checkpoint goes
either way. Inputs are (N, C, H, W), or (C, H, W) for the convolutions, in float64, float32, bfloat16 or float16, of
any memory format. Errors are those of :mod:`convkit.functional`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import convkit.functional as CF

__all__ = ["Activation", "BatchNormReLU2d", "Conv2d", "ConvTranspose2d", "MaxPool2d", "SeparableConv2d"]

Activation = Literal["relu"] | None


def hooked(module: torch.nn.Module) -> bool:
    """Whether something listens to calls of ``module`` itself, so that they must really happen, one by one."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class Conv2d(torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` with an optional activation applied by the same kernel.

    Args: those of :class:`torch.nn.Conv2d` (every ``padding``, ``padding_mode``, ``dilation`` and ``groups``), and
        activation: ``None`` or ``"relu"``, keyword only.

    Raises:
        ValueError: ``activation`` is something else, or what torch.nn.Conv2d raises.
    """

    # On the class, so that an instance made by torch.nn.Conv2d has it as soon as its class is changed (swap).
    activation: Activation = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = None,
    ) -> None:
        if activation not in (None, "relu"):
            raise ValueError(f'activation must be None or "relu", but got {activation!r}')
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.activation = activation

    def _padded(self, input: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
        """The input, padded where padding_mode asks for other than zeros, and the zero padding that is left to do."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = self._padded(input)
        return CF.conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, activation=self.activation
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d`: the same arguments, the same ``forward(input, output_size=None)``."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W'), or the same without N.

        ``output_size`` picks (H', W') among the ``stride`` sizes that the convolution maps to (H, W).
        """
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return CF.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class BatchNormReLU2d(torch.nn.BatchNorm2d):
    """``relu(batch_norm(input) + residual)`` in one operator: what :class:`torch.nn.BatchNorm2d` and a ReLU do.

    Args: those of :class:`torch.nn.BatchNorm2d`. ``momentum=None`` (cumulative average), ``affine=False`` and
    ``track_running_stats=False`` mean what they mean there, and the running statistics move as there.

    Ioffe and Szegedy, "Batch Normalization", 2015; with a residual it ends the block of He et al., "Deep Residual
    Learning for Image Recognition", 2015, figure 2.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, num_features, H, W), and a residual of the same shape and dtype -> the same shape.

        An input that is rejected changes nothing, neither the running statistics nor ``num_batches_tracked``.
        """
        self._check_input_dim(input)
        tracking = self.training and self.track_running_stats
        counting = tracking and self.num_batches_tracked is not None
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.momentum is None and counting:
            momentum = 1.0 / float(self.num_batches_tracked + 1)
        output = CF.batch_norm_relu(
            input,
            self.running_mean if tracking or not self.training else None,
            self.running_var if tracking or not self.training else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
            residual=residual,
        )
        if counting:
            self.num_batches_tracked.add_(1)  # after the call, which may have raised
        return output


class MaxPool2d(torch.nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` with an optional ReLU, before or after it, done by the same kernel.

    Args: those of :class:`torch.nn.MaxPool2d`, and activation: ``None`` or ``"relu"``, keyword only.

    With ``return_indices``, and for integers (which have no gradient), it is PyTorch's that runs.

    Raises:
        ValueError: ``activation`` is something else, or is given together with ``return_indices``.
    """

    activation: Activation = None  # on the class, as Conv2d's

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        activation: Activation = None,
    ) -> None:
        if activation not in (None, "relu"):
            raise ValueError(f'activation must be None or "relu", but got {activation!r}')
        if activation is not None and return_indices:
            raise ValueError("return_indices must be False with an activation, but got True")
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, P, Q), or the same without N."""
        if self.return_indices:
            return super().forward(input)
        return max_pool(input, self.activation, *pool_geometry(self))

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")


def pool_geometry(pool: torch.nn.MaxPool2d) -> tuple:
    """The arguments of max_pool2d after its input."""
    return pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode


def max_pool(input: Tensor, activation: Activation, *geometry, **options) -> Tensor:
    """max_pool2d, by PyTorch where there is no kernel: no parameter of a pool says in advance what it will be given."""
    key = torch._C._dispatch_key_for_device(input.device.type)
    here = input.is_meta or torch._C._dispatch_has_kernel_for_dispatch_key("convkit::max_pool2d", key)
    if input.is_floating_point() and here:
        return CF.max_pool2d(input, *geometry, **options, activation=activation)
    output = F.max_pool2d(input, *geometry, **options)
    return output if activation is None else F.relu(output)


class SeparableConv2d(torch.nn.Module):
    """A depthwise convolution, then a pointwise (1 x 1) one, in one pass where no gradient is needed.

    The parameters lie in two submodules, ``depthwise`` and ``pointwise``, as in the pair of torch.nn.Conv2d that it
    stands for: state_dict keys ``depthwise.weight`` (in_channels * depth_multiplier, 1, R, S), ``pointwise.weight``
    (out_channels, in_channels * depth_multiplier, 1, 1), and ``depthwise.bias``, ``pointwise.bias`` where asked.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode, device, dtype: as in
            torch.nn.Conv2d; all but ``out_channels`` describe the depthwise convolution.
        depth_multiplier: outputs of the depthwise convolution per input channel, at least 1.
        bias: a bias after the pointwise convolution.
        depthwise_bias: one after the depthwise convolution too; ``bias`` does its work unless an activation is between.
        activation, depthwise_activation: ``None`` or ``"relu"``, after the pointwise and the depthwise convolution.

    Raises:
        ValueError: ``depth_multiplier`` below 1, an unknown activation, or what torch.nn.Conv2d raises.

    Howard et al., "MobileNets", 2017, section 3.1; Chollet, "Xception", 2016.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        depth_multiplier: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        depthwise_bias: bool = False,
        activation: Activation = None,
        depthwise_activation: Activation = None,
    ) -> None:
        super().__init__()
        if depth_multiplier < 1:
            raise ValueError(f"depth_multiplier must be at least 1, but got {depth_multiplier}")
        middle = in_channels * depth_multiplier
        self.depthwise = Conv2d(
            in_channels,
            middle,
            kernel_size,
            stride,
            padding,
            dilation,
            in_channels,
            depthwise_bias,
            padding_mode,
            device,
            dtype,
            activation=depthwise_activation,
        )
        self.pointwise = Conv2d(middle, out_channels, 1, bias=bias, device=device, dtype=dtype, activation=activation)

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, P, Q), or the same without N."""
        depthwise, pointwise = self.depthwise, self.pointwise
        # Pruning, parametrizations and hooks act when the two are called, and a user may have put others in.
        if any(type(child) is not Conv2d or hooked(child) for child in (depthwise, pointwise)):
            return pointwise(depthwise(input))
        input, padding = depthwise._padded(input)
        return CF.separable_conv2d(
            input,
            depthwise.weight,
            pointwise.weight,
            depthwise_shift=depthwise.bias,
            depthwise_activation=depthwise.activation,
            shift=pointwise.bias,
            activation=pointwise.activation,
            stride=depthwise.stride,
            padding=padding,
            dilation=depthwise.dilation,
        )
