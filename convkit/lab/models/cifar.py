"""The efficiency chain on CIFAR-10: a plain network, and the same with its convolutions made depthwise-separable."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from convkit.lab.models.network import (
    Network,
    Normalize,
    activation,
    backed,
    initialize,
    norm2d,
    register,
)

_CHAIN = "TMLSS 2018, vision tutorial"


class _Chain(Network):
    """Convolutions one after the other, then the mean over the pixels; keys trunk.conv1, trunk.bn1 …, output."""

    def __init__(self, channels: int, layers: Sequence[tuple[str, nn.Module]], width: int, num_classes: int) -> None:
        super().__init__((channels, 32, 32), num_classes)
        self.normalize = Normalize((0.5,) * channels, (0.5,) * channels)  # to [-1, 1]
        self.trunk = nn.Sequential(OrderedDict(layers))
        self.output = nn.Linear(width, num_classes)
        initialize(self, "fan_in")

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(self.normalize(x))

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


def _conv_norm_activation(number, inputs, outputs, size, stride, groups, norm, act):
    """The three layers, named with ``number``."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=norm == "none")
    return (f"conv{number}", conv), (f"bn{number}", norm2d(norm, outputs)), (f"relu{number}", activation(act))


@register(title="CIFAR baseline", input_shape=(3, 32, 32), source=_CHAIN, claimed="6 % test error on CIFAR-10")
def cifar_baseline(
    num_classes: int = 10,
    *,
    channels: int = 3,
    norm: str = "batch",
    activation: str = "relu",
    backend: str = "convkit",
) -> Network:
    """Eleven 3×3 convolutions of 64 to 512 channels, each with batch norm and ReLU: 7,790,794 parameters.

    Pictures of any size from 1×1, as the mean over the pixels comes before the one dense layer.
    """
    widths = (64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512)
    strides = (1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1)
    layers, inputs = [], channels
    for number, (width, stride) in enumerate(zip(widths, strides, strict=True), start=1):
        layers += _conv_norm_activation(str(number), inputs, width, 3, stride, 1, norm, activation)
        inputs = width
    return backed(_Chain(channels, layers, inputs, num_classes), backend)


@register(title="CIFAR MobileNet", input_shape=(3, 32, 32), source=_CHAIN, claimed="13 % test error on CIFAR-10")
def cifar_mobilenet(
    num_classes: int = 10,
    *,
    channels: int = 3,
    norm: str = "batch",
    activation: str = "relu",
    backend: str = "convkit",
) -> Network:
    """The baseline with each 3×3 convolution but the first split into depthwise and pointwise: 1,165,962 parameters.

    About 8 % test error on CIFAR-10 when it is distilled from the baseline.
    """
    widths = (128, 128, 128, 256, 256, 256, 512, 512, 512, 512)
    strides = (1, 2, 1, 1, 2, 1, 1, 2, 1, 1)
    layers, inputs = [*_conv_norm_activation("1", channels, 64, 3, 1, 1, norm, activation)], 64
    for number, (width, stride) in enumerate(zip(widths, strides, strict=True), start=2):
        depthwise = _conv_norm_activation(f"{number}_depthwise", inputs, inputs, 3, stride, inputs, norm, activation)
        pointwise = _conv_norm_activation(f"{number}_pointwise", inputs, width, 1, 1, 1, norm, activation)
        layers += (*depthwise, *pointwise)
        inputs = width
    return backed(_Chain(channels, layers, inputs, num_classes), backend)
