"""The networks of courses for CIFAR-10: logistic regression, on pixels and on a filter bank, an MLP, small CNNs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convkit.lab.models.digits import MLP
from convkit.lab.models.network import (
    BACKENDS,
    Network,
    Normalize,
    OptionError,
    accept,
    activation,
    at_least,
    backed,
    conv2d_class,
    norm2d,
    register,
)

_COURSE = "UEA CMP-6035B Computer Vision, lecture slides, 2022"

# ---------------------------------------------------------------- logistic regression


def filters(sigma: float = 1.0) -> Tensor:
    """The bank: gaussian, laplacian of gaussian, and the gaussian's two derivatives as edge filters; (4, 5, 5) float32.

    Sampled at the centres of 5×5 pixels. The gaussian sums to 1, the others to 0 with absolute values that sum to 2, so
    that all answers to pictures in [0, 1] are at most 1 in size. ``sigma`` in pixels.
    """
    if not 0 < sigma < math.inf:
        raise OptionError(f"sigma must be a positive number of pixels, got {sigma!r}")
    at = torch.arange(-2.0, 3.0, dtype=torch.float64)
    y, x = torch.meshgrid(at, at, indexing="ij")
    gaussian = torch.exp(-(x * x + y * y) / (2 * sigma**2))
    laplacian = ((x * x + y * y) / sigma**2 - 2) * gaussian
    laplacian -= laplacian.mean()  # the tails that 5×5 pixels leave out
    bank = torch.stack([gaussian, laplacian, x * gaussian, y * gaussian])
    sums = torch.tensor([1.0, 2.0, 2.0, 2.0]).view(4, 1, 1)
    return (sums * bank / bank.abs().sum((1, 2), keepdim=True)).float()


def filter_bank(channels: int, *, sigma: float = 1.0, learnable: bool = False, backend: str = "convkit") -> nn.Conv2d:
    """:func:`filters` as a convolution layer of each channel for itself: (N, channels, H, W) -> (N, 4·channels, H, W).

    Fixed filters are a buffer, learnable ones the layer's parameter, from the same values and under the same key
    ``weight``, (4·channels, 1, 5, 5). The border is reflected, as zeros outside would be edges.
    """
    at_least(1, channels=channels)
    bank = conv2d_class(backend)(
        channels, 4 * channels, 5, padding=2, groups=channels, bias=False, padding_mode="reflect"
    )
    weight = filters(sigma).repeat(channels, 1, 1).unsqueeze(1).to(bank.weight.device)
    if learnable:
        bank.weight = nn.Parameter(weight)
    else:
        del bank.weight
        bank.register_buffer("weight", weight)
    return bank


class _Logistic(Network):
    """Keys bank.weight where there is one, output."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, bank: nn.Conv2d | None) -> None:
        super().__init__(input_shape, num_classes)
        channels, height, width = input_shape
        self.normalize = Normalize.of(channels)
        self.bank = bank
        inputs = math.prod(input_shape) if bank is None else bank.out_channels * (height // 2) * (width // 2)
        self.output = nn.Linear(inputs, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        # Linear answers alone would add nothing to a linear classifier: what counts is how strong they are.
        return x if self.bank is None else F.avg_pool2d(self.bank(x).abs(), 2)


@register(title="Logistic regression", input_shape=(3, 32, 32), source=_COURSE)
def logistic(num_classes: int = 10, *, channels: int = 3, size: int = 32, backend: str = "convkit") -> Network:
    """One dense layer on the pixels: 30,730 parameters. It has no convolution, so both backends run the same code."""
    accept("backend", backend, BACKENDS)
    return _Logistic((channels, size, size), num_classes, None)


@register(title="Logistic regression on filters", input_shape=(3, 32, 32), source=_COURSE)
def logistic_filters(
    num_classes: int = 10,
    *,
    channels: int = 3,
    size: int = 32,
    sigma: float = 1.0,
    learnable: bool = False,
    backend: str = "convkit",
) -> Network:
    """One dense layer on the answers of gaussian, laplacian and two edge filters, 2×2 averaged: 30,730 parameters.

    The classical pipeline: fixed filters of each colour, the size of their answers, pooling, a linear classifier.
    ``learnable``: the filters are parameters too, 300 more; they start as they are otherwise.
    """
    at_least(4, size=size)
    bank = filter_bank(channels, sigma=sigma, learnable=learnable, backend=backend)
    return _Logistic((channels, size, size), num_classes, bank)


# ---------------------------------------------------------------- MLP and CNNs


@register(title="MLP of 5 layers", input_shape=(3, 32, 32), source=_COURSE)
def mlp5(
    num_classes: int = 10, *, channels: int = 3, size: int = 32, activation: str = "relu", backend: str = "convkit"
) -> Network:
    """3072-400-200-100-50-10: 1,335,060 parameters. It has no convolution, so both backends run the same code."""
    accept("backend", backend, BACKENDS)
    return MLP((channels, size, size), [400, 200, 100, 50], num_classes, activation)


class _CourseCNN(Network):
    """Convolutions, each with norm, activation and a 2×2 max pool, then dense layers; keys conv1, bn1 …, fc1 …, output.

    ``convolutions``: (channels, filter size, padding) each. They have a bias even before a norm.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        convolutions: Sequence[tuple[int, int, int]],
        hidden: Sequence[int],
        num_classes: int,
        norm: str,
        act: str,
    ) -> None:
        super().__init__(input_shape, num_classes)
        inputs, height, width = input_shape
        self.normalize = Normalize.of(inputs)
        trunk = nn.Sequential()
        for number, (outputs, size, padding) in enumerate(convolutions, start=1):
            conv = nn.Conv2d(inputs, outputs, size, padding=padding)
            layers = {"conv": conv, "bn": norm2d(norm, outputs), "act": activation(act), "pool": nn.MaxPool2d(2)}
            for kind, layer in layers.items():
                trunk.add_module(f"{kind}{number}", layer)
            inputs = outputs
            height, width = ((side + 2 * padding - size + 1) // 2 for side in (height, width))
        self.trunk = trunk
        inputs *= height * width
        dense = nn.Sequential()
        for number, outputs in enumerate(hidden, start=1):
            dense.add_module(f"fc{number}", nn.Linear(inputs, outputs))
            dense.add_module(f"act{number}", activation(act))
            inputs = outputs
        self.dense = dense
        self.output = nn.Linear(inputs, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(self.normalize(x))

    def embed(self, x: Tensor) -> Tensor:
        return self.dense(self.features(x).flatten(1))


@register(title="CIFAR CNN", input_shape=(3, 32, 32), source=_COURSE)
def cifar_cnn(
    num_classes: int = 10,
    *,
    channels: int = 3,
    size: int = 32,
    norm: str = "none",
    activation: str = "relu",
    backend: str = "convkit",
) -> Network:
    """conv5 3→6, pool2, conv5 6→16, pool2, 400-120-10: 52,202 parameters."""
    at_least(16, size=size)
    shape = (channels, size, size)
    return backed(_CourseCNN(shape, [(6, 5, 0), (16, 5, 0)], [120], num_classes, norm, activation), backend)


@register(title="SimpleCNN", input_shape=(3, 32, 32), source=_COURSE)
def simple_cnn(
    num_classes: int = 10,
    *,
    channels: int = 3,
    size: int = 32,
    norm: str = "none",
    activation: str = "relu",
    backend: str = "convkit",
) -> Network:
    """conv5 3→12, pool2, conv3 12→24, pool2, 864-120-60-10: 115,198 parameters."""
    at_least(12, size=size)
    shape = (channels, size, size)
    return backed(_CourseCNN(shape, [(12, 5, 0), (24, 3, 0)], [120, 60], num_classes, norm, activation), backend)


@register(title="SimpleCNN with batch norm", input_shape=(3, 32, 32), source=_COURSE)
def simple_cnn_bn(
    num_classes: int = 10, *, channels: int = 3, size: int = 32, activation: str = "relu", backend: str = "convkit"
) -> Network:
    """SimpleCNN with batch norm after each convolution: 115,270 parameters."""
    return simple_cnn(num_classes, channels=channels, size=size, norm="batch", activation=activation, backend=backend)
