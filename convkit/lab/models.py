"""The networks, in one registry of plain builder functions whose name is what the user types.

Every builder takes ``backend="convkit"`` (convkit's kernels) or ``backend="torch"`` (PyTorch's own). Both give the same
parameters under the same state_dict keys, drawn from the same random numbers, and the same outputs to rounding.

Every network takes pictures of shape (N, C, H, W) with values in [0, 1]: normalisation is its first layer, so that
pictures mean the same thing everywhere else (data, augmentation, plots). It offers

``features(x)``  the feature map (N, C', H', W') before it is flattened or pooled; (N, D) in a network without one
``embed(x)``     the vector (N, D) that the last layer classifies
``head``         that last layer; ``model(x)`` is ``model.head(model.embed(x))``, the logits (N, classes)
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convkit.lab import LabError

__all__ = ["BACKENDS", "MODELS", "Entry", "Network", "Normalize", "build", "count_parameters", "entry"]

BACKENDS = ("convkit", "torch")

# Mean and standard deviation of the pixels of MNIST's 60,000 training images, scaled to [0, 1].
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
# Those of ImageNet that every published ResNet was trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One network of the registry with what is known about it."""

    name: str
    title: str
    builder: Callable[..., Network]
    input_shape: tuple[int, int, int]
    """(C, H, W) of the pictures that it was designed for."""
    source: str
    claimed: str
    """What the source says it reaches, with the data set."""


MODELS: dict[str, Entry] = {}


def _register(*, title: str, input_shape: tuple[int, int, int], source: str, claimed: str):
    def enter(builder: Callable[..., Network]) -> Callable[..., Network]:
        MODELS[builder.__name__] = Entry(builder.__name__, title, builder, input_shape, source, claimed)
        return builder

    return enter


def entry(name: str) -> Entry:
    """The registry's entry for ``name``, in upper or lower case, with ``-`` or ``_``.

    LabError with the nearest name if there is none.
    """
    key = name.lower().replace("-", "_")
    if key not in MODELS:
        near = difflib.get_close_matches(key, MODELS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LabError(f"unknown network {name!r}: {hint}(known: {', '.join(sorted(MODELS))})")
    return MODELS[key]


def build(name: str, *, backend: str = "convkit", **options) -> Network:
    """Builds the network called ``name`` with randomly drawn parameters; ``options`` go to its builder function."""
    return entry(name).builder(backend=backend, **options)


def count_parameters(model: nn.Module) -> int:
    """Number of learnable values."""
    return sum(p.numel() for p in model.parameters())


class Normalize(nn.Module):
    """(x - mean) / std per channel, on (N, C, H, W).

    The constants belong to the network's definition, so they are not in the state_dict.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Network(nn.Module):
    """The contract of every network: see the module's docstring."""

    head: nn.Module

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class TorchConv2d(nn.Conv2d):
    """torch.nn.Conv2d with the ``activation`` argument of convkit.nn.Conv2d, so that one definition serves both."""

    def __init__(self, *args, activation: str | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if activation not in (None, "relu"):
            raise ValueError(f"activation must be None or 'relu', got {activation!r}")
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output if self.activation is None else F.relu(output)


def _conv2d(backend: str) -> type[nn.Conv2d]:
    """The convolution class of a backend."""
    if backend == "torch":
        return TorchConv2d
    if backend == "convkit":
        import convkit.nn

        return convkit.nn.Conv2d
    raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def _backed(network: Network, backend: str) -> Network:
    """A network written with torch.nn's modules, as it is or with convkit's kernels swapped in."""
    _conv2d(backend)  # refuses an unknown backend
    if backend == "convkit":
        import convkit

        convkit.swap(network)
    return network


class _MLP(Network):
    """Fully connected layers with ReLU between; keys fc1 … fcN, output."""

    def __init__(self, inputs: int, hidden: Sequence[int], classes: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.depth = len(hidden)
        for i, width in enumerate(hidden, start=1):
            setattr(self, f"fc{i}", nn.Linear(inputs, width))
            inputs = width
        self.output = nn.Linear(inputs, classes)

    @property
    def head(self) -> nn.Linear:
        return self.output

    def features(self, x: Tensor) -> Tensor:
        x = self.normalize(x).flatten(1)
        for i in range(1, self.depth + 1):
            x = F.relu(getattr(self, f"fc{i}")(x))
        return x


class _SimpLeNet(Network):
    def __init__(self, classes: int, backend: str) -> None:
        super().__init__()
        conv2d = _conv2d(backend)
        self.normalize = Normalize(MNIST_MEAN, MNIST_STD)
        self.conv1 = conv2d(1, 20, 5, activation="relu")
        self.conv2 = conv2d(20, 50, 5, activation="relu")
        self.fc1 = nn.Linear(50 * 4 * 4, 256)
        self.output = nn.Linear(256, classes)

    @property
    def head(self) -> nn.Linear:
        return self.output

    def features(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(self.normalize(x)), 2)
        return F.max_pool2d(self.conv2(x), 2)

    def embed(self, x: Tensor) -> Tensor:
        return F.relu(self.fc1(self.features(x).flatten(1)))


def _initialize(network: nn.Module, mode: str) -> None:
    """Convolutions before ReLUs as in He et al., "Delving Deep into Rectifiers", 2015.

    ``mode``: ``fan_in`` keeps the size of activations, of depthwise convolutions too; ``fan_out`` that of gradients.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")


class _Chain(Network):
    """Convolutions one after the other, then the mean over the pixels; keys trunk.conv1, trunk.bn1 …, output."""

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], width: int, classes: int) -> None:
        super().__init__()
        self.normalize = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # to [-1, 1]
        self.trunk = nn.Sequential(OrderedDict(layers))
        self.output = nn.Linear(width, classes)
        _initialize(self, "fan_in")

    @property
    def head(self) -> nn.Linear:
        return self.output

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(self.normalize(x))

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


def _conv_bn_relu(number: str, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1):
    """The three layers, named with ``number``."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return (f"conv{number}", conv), (f"bn{number}", nn.BatchNorm2d(outputs)), (f"relu{number}", nn.ReLU())


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class _ResNet(Network):
    """The ImageNet form, with torchvision's keys."""

    def __init__(self, blocks: Sequence[int], classes: int) -> None:
        super().__init__()
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number, depth in enumerate(blocks, start=1):
            outputs, stride = 32 << number, 1 if number == 1 else 2
            first = _BasicBlock(inputs, outputs, stride)
            rest = (_BasicBlock(outputs, outputs, 1) for _ in range(depth - 1))
            setattr(self, f"layer{number}", nn.Sequential(first, *rest))
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)
        _initialize(self, "fan_out")  # as torchvision

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.normalize(x))))
        x = F.max_pool2d(x, 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


_COURSE = "UEA CMP-6035B Computer Vision, lecture slides, 2022"


@_register(title="FC64", input_shape=(1, 28, 28), source=_COURSE, claimed="2.85 % test error on MNIST")
def fc64(classes: int = 10, *, backend: str = "convkit") -> Network:
    """784-64-10 with ReLU: 50,890 parameters. It has no convolution, so both backends run the same code."""
    _conv2d(backend)  # refuses an unknown backend
    return _MLP(28 * 28, [64], classes, MNIST_MEAN, MNIST_STD)


@_register(title="FC256-FC256", input_shape=(1, 28, 28), source=_COURSE, claimed="1.83 % test error on MNIST")
def fc256_fc256(classes: int = 10, *, backend: str = "convkit") -> Network:
    """784-256-256-10 with ReLU: 269,322 parameters. It has no convolution, so both backends run the same code."""
    _conv2d(backend)  # refuses an unknown backend
    return _MLP(28 * 28, [256, 256], classes, MNIST_MEAN, MNIST_STD)


@_register(title="SimpLeNet", input_shape=(1, 28, 28), source=_COURSE, claimed="0.79 % test error on MNIST, 300 passes")
def simplenet(classes: int = 10, *, backend: str = "convkit") -> Network:
    """conv5 1→20, ReLU, pool2, conv5 20→50, ReLU, pool2, 800-256-10: 233,196 parameters."""
    return _SimpLeNet(classes, backend)


_CHAIN = "TMLSS 2018, vision tutorial"


@_register(title="CIFAR baseline", input_shape=(3, 32, 32), source=_CHAIN, claimed="6 % test error on CIFAR-10")
def cifar_baseline(classes: int = 10, *, backend: str = "convkit") -> Network:
    """Eleven 3×3 convolutions of 64 to 512 channels, each with batch norm and ReLU: 7,790,794 parameters."""
    widths = (64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512)
    strides = (1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1)
    layers, inputs = [], 3
    for number, (width, stride) in enumerate(zip(widths, strides, strict=True), start=1):
        layers += _conv_bn_relu(str(number), inputs, width, 3, stride)
        inputs = width
    return _backed(_Chain(layers, inputs, classes), backend)


@_register(title="CIFAR MobileNet", input_shape=(3, 32, 32), source=_CHAIN, claimed="13 % test error on CIFAR-10")
def cifar_mobilenet(classes: int = 10, *, backend: str = "convkit") -> Network:
    """The baseline with each 3×3 convolution but the first split into depthwise and pointwise: 1,165,962 parameters."""
    widths = (128, 128, 128, 256, 256, 256, 512, 512, 512, 512)
    strides = (1, 2, 1, 1, 2, 1, 1, 2, 1, 1)
    layers, inputs = [*_conv_bn_relu("1", 3, 64, 3)], 64
    for number, (width, stride) in enumerate(zip(widths, strides, strict=True), start=2):
        layers += _conv_bn_relu(f"{number}_depthwise", inputs, inputs, 3, stride, groups=inputs)
        layers += _conv_bn_relu(f"{number}_pointwise", inputs, width, 1)
        inputs = width
    return _backed(_Chain(layers, inputs, classes), backend)


@_register(
    title="ResNet-18",
    input_shape=(3, 224, 224),
    source="He et al., 2015, arXiv:1512.03385; torchvision",
    claimed="30.24 % top-1 error on ImageNet",
)
def resnet18(classes: int = 1000, *, backend: str = "convkit") -> Network:
    """Basic blocks 2-2-2-2 with torchvision's keys: 11,689,512 parameters."""
    return _backed(_ResNet((2, 2, 2, 2), classes), backend)
