"""Networks of depthwise-separable convolutions: MobileNetV1, MobileNetV2, EfficientNet-B0."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convkit.lab.models.network import (
    CIFAR10,
    IMAGENET,
    Network,
    Normalize,
    SqueezeExcitation,
    backed,
    initialize,
    probability,
    register,
)

_HOWARD = "Howard et al., 2017, arXiv:1704.04861"
_SANDLER = "Sandler et al., 2018, arXiv:1801.04381"
_TAN = "Tan and Le, 2019, arXiv:1905.11946"
_CIFAR_FORM = "form of kuangliu/pytorch-cifar"


def _conv(
    inputs: int,
    outputs: int,
    size: int,
    stride: int = 1,
    *,
    depthwise: bool = False,
    activation: type[nn.Module] | None = nn.ReLU,
) -> list[nn.Module]:
    """Convolution, batch norm and activation; None: without the last."""
    groups = inputs if depthwise else 1
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([] if activation is None else [activation()])]


class _Mobile(Network):
    """Keys features.0 …, classifier.1: torchvision's, the first for a dropout before the one dense layer."""

    head_name = "classifier.1"

    def __init__(
        self,
        channels: int,
        blocks: Sequence[nn.Module],
        width: int,
        num_classes: int,
        dropout: float,
        imagenet: bool,
    ) -> None:
        side = 224 if imagenet else 32
        super().__init__((channels, side, side), num_classes)
        probability(dropout=dropout)
        numbered = ((str(i), block) for i, block in enumerate(blocks))
        normalize = Normalize.of(channels, IMAGENET if imagenet else CIFAR10)
        self.features = nn.Sequential(OrderedDict([("normalize", normalize), *numbered]))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, num_classes))

    def embed(self, x: Tensor) -> Tensor:
        return self.classifier[0](self.features(x).mean((2, 3)))


# ---------------------------------------------------------------- MobileNetV1

_V1 = (64, (128, 2), 128, (256, 2), 256, (512, 2), 512, 512, 512, 512, 512, (1024, 2), 1024)


def _mobilenet_v1(channels: int, num_classes: int, dropout: float, imagenet: bool) -> Network:
    inputs = 32
    blocks = [nn.Sequential(*_conv(channels, inputs, 3, 2 if imagenet else 1))]
    for block in _V1:
        width, stride = block if isinstance(block, tuple) else (block, 1)
        blocks.append(nn.Sequential(*_conv(inputs, inputs, 3, stride, depthwise=True), *_conv(inputs, width, 1)))
        inputs = width
    network = _Mobile(channels, blocks, inputs, num_classes, dropout, imagenet)
    initialize(network, "fan_in")
    return network


@register(
    title="MobileNetV1",
    input_shape=(3, 224, 224),
    source=_HOWARD,
    claimed="29.4 % top-1 error on ImageNet",
)
def mobilenet_v1(
    num_classes: int = 1000, *, channels: int = 3, dropout: float = 0.001, backend: str = "convkit"
) -> Network:
    """A convolution, then 13 depthwise and pointwise pairs, each with batch norm and ReLU: 4,231,976 parameters."""
    return backed(_mobilenet_v1(channels, num_classes, dropout, True), backend)


@register(title="CIFAR MobileNetV1", input_shape=(3, 32, 32), source=f"{_HOWARD}; {_CIFAR_FORM}")
def cifar_mobilenet_v1(
    num_classes: int = 10, *, channels: int = 3, dropout: float = 0.0, backend: str = "convkit"
) -> Network:
    """MobileNetV1 with a first convolution of stride 1: 3,217,226 parameters."""
    return backed(_mobilenet_v1(channels, num_classes, dropout, False), backend)


# ---------------------------------------------------------------- MobileNetV2


class _InvertedResidual(nn.Module):
    """Expansion, depthwise and linear projection, with the input added where shapes allow; keys conv.0 …

    ``everywhere``: the form for CIFAR, that expands by 1 too and has a projection on the shortcut where the number of
    channels changes at stride 1, and ReLU where torchvision's has ReLU6.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, everywhere: bool) -> None:
        super().__init__()
        width, activation = inputs * expansion, nn.ReLU if everywhere else nn.ReLU6
        steps: list[nn.Module] = []
        if expansion != 1 or everywhere:
            steps.append(nn.Sequential(*_conv(inputs, width, 1, activation=activation)))
        steps.append(nn.Sequential(*_conv(width, width, 3, stride, depthwise=True, activation=activation)))
        self.conv = nn.Sequential(*steps, *_conv(width, outputs, 1, activation=None))
        self.residual = stride == 1 and (inputs == outputs or everywhere)
        self.downsample = None
        if self.residual and inputs != outputs:
            self.downsample = nn.Sequential(*_conv(inputs, outputs, 1, activation=None))

    def forward(self, x: Tensor) -> Tensor:
        output = self.conv(x)
        if not self.residual:
            return output
        return output + (x if self.downsample is None else self.downsample(x))


# expansion, channels, number of blocks, stride of the first
_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _mobilenet_v2(channels: int, num_classes: int, dropout: float, imagenet: bool) -> Network:
    activation = nn.ReLU6 if imagenet else nn.ReLU
    inputs = 32
    blocks: list[nn.Module] = [nn.Sequential(*_conv(channels, inputs, 3, 2 if imagenet else 1, activation=activation))]
    for stage, (expansion, width, number, stride) in enumerate(_V2):
        first = 1 if stage == 1 and not imagenet else stride
        for step in [first] + [1] * (number - 1):
            blocks.append(_InvertedResidual(inputs, width, step, expansion, not imagenet))
            inputs = width
    blocks.append(nn.Sequential(*_conv(inputs, 1280, 1, activation=activation)))
    network = _Mobile(channels, blocks, 1280, num_classes, dropout, imagenet)
    initialize(network, "fan_out")
    nn.init.normal_(network.head.weight, 0, 0.01)
    nn.init.zeros_(network.head.bias)
    return network


@register(
    title="MobileNetV2",
    input_shape=(3, 224, 224),
    source=f"{_SANDLER}; torchvision",
    claimed="28.12 % top-1 error on ImageNet",
)
def mobilenet_v2(
    num_classes: int = 1000, *, channels: int = 3, dropout: float = 0.2, backend: str = "convkit"
) -> Network:
    """17 inverted residual blocks with torchvision's keys: 3,504,872 parameters."""
    return backed(_mobilenet_v2(channels, num_classes, dropout, True), backend)


@register(title="CIFAR MobileNetV2", input_shape=(3, 32, 32), source=f"{_SANDLER}; {_CIFAR_FORM}")
def cifar_mobilenet_v2(
    num_classes: int = 10, *, channels: int = 3, dropout: float = 0.0, backend: str = "convkit"
) -> Network:
    """MobileNetV2 with two strides less, and projections on shortcuts: 2,296,922 parameters."""
    return backed(_mobilenet_v2(channels, num_classes, dropout, False), backend)


# ---------------------------------------------------------------- EfficientNet


class _StochasticDepth(nn.Module):
    """In training the whole branch of a picture is dropped with probability ``p``; the others are scaled to make up.

    Huang et al., "Deep Networks with Stochastic Depth", arXiv:1603.09382.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = 1.0 - self.p
        kept = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * kept.div_(keep or 1.0)

    def extra_repr(self) -> str:
        return f"p={self.p:.4g}"


class _MBConv(nn.Module):
    """Expansion, depthwise, squeeze and excitation, linear projection, with SiLU; keys block.0 …"""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int, expansion: int, drop: float, everywhere: bool
    ) -> None:
        super().__init__()
        width = inputs * expansion
        steps: list[nn.Module] = []
        if expansion != 1 or everywhere:
            steps.append(nn.Sequential(*_conv(inputs, width, 1, activation=nn.SiLU)))
        steps += [
            nn.Sequential(*_conv(width, width, size, stride, depthwise=True, activation=nn.SiLU)),
            SqueezeExcitation(width, inputs // 4, nn.SiLU),
            nn.Sequential(*_conv(width, outputs, 1, activation=None)),
        ]
        self.block = nn.Sequential(*steps)
        self.stochastic_depth = _StochasticDepth(drop) if stride == 1 and inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        output = self.block(x)
        return output if self.stochastic_depth is None else self.stochastic_depth(output) + x


# expansion, filter size, stride of the first block, channels, number of blocks
_B0 = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def _efficientnet_b0(channels: int, num_classes: int, dropout: float, drop: float, imagenet: bool) -> Network:
    """``drop``: probability of stochastic depth after the last block; it grows from 0 block by block."""
    probability(stochastic_depth=drop)
    inputs, total, done = 32, sum(number for *_, number in _B0), 0
    blocks: list[nn.Module] = [nn.Sequential(*_conv(channels, inputs, 3, 2 if imagenet else 1, activation=nn.SiLU))]
    for expansion, size, stride, width, number in _B0:
        stage = []
        for step in [stride] + [1] * (number - 1):
            stage.append(_MBConv(inputs, width, size, step, expansion, drop * done / total, not imagenet))
            inputs, done = width, done + 1
        blocks.append(nn.Sequential(*stage))
    if imagenet:
        blocks.append(nn.Sequential(*_conv(inputs, 1280, 1, activation=nn.SiLU)))
        inputs = 1280
    network = _Mobile(channels, blocks, inputs, num_classes, dropout, imagenet)
    initialize(network, "fan_out")
    bound = 1 / math.sqrt(num_classes)
    nn.init.uniform_(network.head.weight, -bound, bound)
    nn.init.zeros_(network.head.bias)
    return network


@register(
    title="EfficientNet-B0",
    input_shape=(3, 224, 224),
    source=f"{_TAN}; torchvision",
    claimed="22.31 % top-1 error on ImageNet",
)
def efficientnet_b0(
    num_classes: int = 1000,
    *,
    channels: int = 3,
    dropout: float = 0.2,
    stochastic_depth: float = 0.2,
    backend: str = "convkit",
) -> Network:
    """16 inverted residual blocks with squeeze and excitation, SiLU and torchvision's keys: 5,288,548 parameters.

    ``stochastic_depth``: the probability to drop the last block; it grows from 0 block by block.
    """
    return backed(_efficientnet_b0(channels, num_classes, dropout, stochastic_depth, True), backend)


@register(title="CIFAR EfficientNet-B0", input_shape=(3, 32, 32), source=f"{_TAN}; {_CIFAR_FORM}")
def cifar_efficientnet_b0(
    num_classes: int = 10,
    *,
    channels: int = 3,
    dropout: float = 0.2,
    stochastic_depth: float = 0.2,
    backend: str = "convkit",
) -> Network:
    """EfficientNet-B0 with a stride less and without its last 1×1 convolution: 3,599,686 parameters.

    The first block expands by 1: kuangliu's form has these 1,088 parameters too, but does not use them.
    """
    return backed(_efficientnet_b0(channels, num_classes, dropout, stochastic_depth, False), backend)
