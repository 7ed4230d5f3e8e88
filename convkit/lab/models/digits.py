"""Networks for MNIST's digits, grey pictures of 28×28."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from convkit.lab.models.network import (
    BACKENDS,
    Network,
    Normalize,
    accept,
    activation,
    activation_pool,
    at_least,
    conv2d_class,
    conv_activation,
    register,
)

_COURSE = "UEA CMP-6035B Computer Vision, lecture slides, 2022"


class MLP(Network):
    """Fully connected layers with an activation between; keys fc1 … fcN, output. No convolution: no backend."""

    def __init__(
        self, input_shape: tuple[int, int, int], hidden: Sequence[int], num_classes: int, act: str = "relu"
    ) -> None:
        super().__init__(input_shape, num_classes)
        self.normalize = Normalize.of(input_shape[0])
        self.depth = len(hidden)
        inputs = math.prod(input_shape)
        for i, width in enumerate(hidden, start=1):
            setattr(self, f"fc{i}", nn.Linear(inputs, width))
            inputs = width
        self.activation = activation(act)
        self.output = nn.Linear(inputs, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.normalize(x).flatten(1)
        for i in range(1, self.depth + 1):
            x = self.activation(getattr(self, f"fc{i}")(x))
        return x


class _SimpLeNet(Network):
    def __init__(self, num_classes: int, channels: int, size: int, act: str, backend: str) -> None:
        super().__init__((channels, size, size), num_classes)
        self.normalize = Normalize.of(channels)
        conv2d = conv2d_class(backend)
        self.conv1, self.pool1 = conv2d(channels, 20, 5), activation_pool(backend, act, 2)
        self.conv2, self.pool2 = conv2d(20, 50, 5), activation_pool(backend, act, 2)
        side = ((size - 4) // 2 - 4) // 2
        self.fc1 = nn.Linear(50 * side * side, 256)
        self.act3 = activation(act)
        self.output = nn.Linear(256, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.pool2(self.conv2(self.pool1(self.conv1(self.normalize(x)))))

    def embed(self, x: Tensor) -> Tensor:
        return self.act3(self.fc1(self.features(x).flatten(1)))


class _LeNet5(Network):
    def __init__(self, num_classes: int, channels: int, size: int, act: str, backend: str) -> None:
        super().__init__((channels, size, size), num_classes)
        self.margin = (32 - size) // 2
        self.normalize = Normalize.of(channels)
        self.conv1, self.act1 = conv_activation(backend, act, channels, 6, 5)
        self.conv2, self.act2 = conv_activation(backend, act, 6, 16, 5)
        self.conv3, self.act3 = conv_activation(backend, act, 16, 120, 5)
        self.fc1 = nn.Linear(120, 84)
        self.act4 = activation(act)
        self.output = nn.Linear(84, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.normalize(F.pad(x, (self.margin,) * 4))  # with black, as the pictures of the paper
        x = F.avg_pool2d(self.act1(self.conv1(x)), 2)
        x = F.avg_pool2d(self.act2(self.conv2(x)), 2)
        return self.act3(self.conv3(x))

    def embed(self, x: Tensor) -> Tensor:
        return self.act4(self.fc1(self.features(x).flatten(1)))


@register(title="FC64", input_shape=(1, 28, 28), source=_COURSE, claimed="2.85 % test error on MNIST")
def fc64(
    num_classes: int = 10, *, channels: int = 1, size: int = 28, activation: str = "relu", backend: str = "convkit"
) -> Network:
    """784-64-10 with ReLU: 50,890 parameters. It has no convolution, so both backends run the same code."""
    accept("backend", backend, BACKENDS)
    return MLP((channels, size, size), [64], num_classes, activation)


@register(title="FC256-FC256", input_shape=(1, 28, 28), source=_COURSE, claimed="1.83 % test error on MNIST")
def fc256_fc256(
    num_classes: int = 10, *, channels: int = 1, size: int = 28, activation: str = "relu", backend: str = "convkit"
) -> Network:
    """784-256-256-10 with ReLU: 269,322 parameters. It has no convolution, so both backends run the same code."""
    accept("backend", backend, BACKENDS)
    return MLP((channels, size, size), [256, 256], num_classes, activation)


@register(title="SimpLeNet", input_shape=(1, 28, 28), source=_COURSE, claimed="0.79 % test error on MNIST, 300 passes")
def simplenet(
    num_classes: int = 10, *, channels: int = 1, size: int = 28, activation: str = "relu", backend: str = "convkit"
) -> Network:
    """conv5 1→20, ReLU, pool2, conv5 20→50, ReLU, pool2, 800-256-10: 233,196 parameters."""
    at_least(16, size=size)
    return _SimpLeNet(num_classes, channels, size, activation, backend)


@register(
    title="LeNet-5",
    input_shape=(1, 28, 28),
    source="LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998",
    claimed="0.95 % test error on MNIST",
)
def lenet5(
    num_classes: int = 10, *, channels: int = 1, size: int = 28, activation: str = "relu", backend: str = "convkit"
) -> Network:
    """conv5 1→6, pool2, conv5 6→16, pool2, conv5 16→120, 120-84-10, average pooling: 61,706 parameters.

    ``size``: 28, which is padded to LeCun's 32 by the network, or 32. ``activation``: relu, sigmoid or tanh.
    Unlike the original every second convolution sees all 6 maps, and pooling and output have no extra parameters.
    """
    accept("size", size, (28, 32))
    return _LeNet5(num_classes, channels, size, activation, backend)
