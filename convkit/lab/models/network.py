"""What every network is made of: the contract, normalisation, the registry, backends, norms and activations."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convkit.lab import LabError

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "MODELS",
    "NORMS",
    "Entry",
    "Network",
    "Normalize",
    "OptionError",
    "TorchConv2d",
    "build",
    "count_parameters",
    "entry",
]

BACKENDS = ("convkit", "torch")
NORMS = ("batch", "instance", "group", "none")
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}

# Mean and standard deviation per channel, of pixels in [0, 1] of the training pictures.
MNIST = (0.1307,), (0.3081,)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those that every published ResNet was trained with


class OptionError(LabError, ValueError):
    """A builder was given an option, or a value of one, that its network does not have."""


def accept(argument: str, value: object, accepted: Iterable[object]) -> None:
    """Raises OptionError unless ``value`` is one of ``accepted``."""
    accepted = tuple(accepted)
    if value not in accepted:
        raise OptionError(f"{argument} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def at_least(minimum: int, **sizes: int) -> None:
    """Raises OptionError unless every argument is a whole number of at least ``minimum``."""
    for argument, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise OptionError(f"{argument} must be a whole number of at least {minimum}, got {value!r}")


def probability(**values: float) -> None:
    """Raises OptionError unless every argument is a number from 0 to 1."""
    for argument, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise OptionError(f"{argument} must be a number from 0 to 1, got {value!r}")


# ---------------------------------------------------------------- the registry


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
    """What the source says it reaches, with the data set; "" where it says nothing."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the arguments that the builder takes."""
        return tuple(inspect.signature(self.builder).parameters)


MODELS: dict[str, Entry] = {}


def register(*, title: str, input_shape: tuple[int, int, int], source: str, claimed: str = ""):
    """Decorator that enters a builder function into the registry, under the function's name."""

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
    """Builds the network called ``name`` with randomly drawn parameters; ``options`` go to its builder function.

    OptionError names an option that the network does not have, and those that it has.
    """
    found = entry(name)
    for option in options:
        if option not in found.options:
            raise OptionError(f"{found.name} has no option {option!r}; it has {', '.join(found.options)}")
    return found.builder(backend=backend, **options)


def count_parameters(model: nn.Module) -> int:
    """Number of values in the parameters of a module."""
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- the contract


class Normalize(nn.Module):
    """(x - mean) / std per channel, on (N, C, H, W).

    The constants belong to the network's definition, so they are not in the state_dict.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @classmethod
    def of(cls, channels: int, mean_std: tuple[Sequence[float], Sequence[float]] | None = None) -> Normalize:
        """The constants ``mean_std`` if they are for that many channels, else those of MNIST for one and of CIFAR-10
        for three, and [0, 1] to [-1, 1] for any other number."""
        known = {len(constants[0]): constants for constants in (MNIST, CIFAR10, mean_std) if constants}
        return cls(*known.get(channels, ((0.5,) * channels, (0.5,) * channels)))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Network(nn.Module):
    """The contract of every network: see the docstring of :mod:`convkit.lab.models`."""

    features: Callable[[Tensor], Tensor]  # a method; a module where published weights have keys "features.…"
    head_name: str = "output"
    """Path of the last layer in the module."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        at_least(1, channels=channels, height=height, width=width, num_classes=num_classes)
        self.input_shape = input_shape

    @property
    def head(self) -> nn.Linear:
        return self.get_submodule(self.head_name)

    def replace_head(self, num_classes: int) -> nn.Linear:
        """Puts a new, randomly drawn last layer for that many classes in place of ``head``, and returns it."""
        at_least(1, num_classes=num_classes)
        old = self.head
        new = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)
        self.set_submodule(self.head_name, new)
        return new

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


# ---------------------------------------------------------------- backends, norms, activations


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


def conv2d_class(backend: str) -> type[nn.Conv2d]:
    """The convolution class of a backend, with the argument ``activation``."""
    accept("backend", backend, BACKENDS)
    if backend == "torch":
        return TorchConv2d
    import convkit.nn

    return convkit.nn.Conv2d


def backed(network: Network, backend: str) -> Network:
    """A network written with torch.nn's modules, as it is or with convkit's kernels swapped in."""
    accept("backend", backend, BACKENDS)
    if backend == "convkit":
        import convkit

        convkit.swap(network)
    return network


def activation(kind: str) -> nn.Module:
    """A new module of one of ACTIVATIONS."""
    accept("activation", kind, ACTIVATIONS)
    return ACTIVATIONS[kind]()


def conv_activation(backend: str, kind: str, *args, **kwargs) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution and what follows it; a ReLU is done by the convolution's kernel, and an Identity follows."""
    conv2d = conv2d_class(backend)
    if kind == "relu":
        return conv2d(*args, activation="relu", **kwargs), nn.Identity()
    return conv2d(*args, **kwargs), activation(kind)


def activation_pool(backend: str, kind: str, size: int) -> nn.Module:
    """An activation, then a max pool; a ReLU is done by the pool's kernel, where most of its input is gone already."""
    accept("backend", backend, BACKENDS)
    if backend == "torch":
        return nn.Sequential(activation(kind), nn.MaxPool2d(size))
    import convkit.nn

    if kind == "relu":
        return convkit.nn.MaxPool2d(size, activation="relu")
    return nn.Sequential(activation(kind), convkit.nn.MaxPool2d(size))


def norm2d(kind: str, channels: int) -> nn.Module:
    """A normalisation of (N, channels, H, W), one of NORMS, all with a learnable scale and shift.

    ``instance``: Ulyanov et al., arXiv:1607.08022. ``group``: Wu and He, arXiv:1803.08494, with 32 groups as there
    where each has at least two channels, else with the largest number of them that divides.
    """
    accept("norm", kind, NORMS)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(math.gcd(32, channels // 2) if channels % 2 == 0 else 1, channels)
    return nn.Identity()


class SqueezeExcitation(nn.Module):
    """Channels weighed by what the whole picture has in them; keys fc1, fc2, as torchvision's, of 1×1 convolutions.

    Hu et al., "Squeeze-and-Excitation Networks", arXiv:1709.01507. ``squeezed``: channels in between.
    """

    def __init__(self, channels: int, squeezed: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = activation()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.fc2(self.activation(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(weights)


def initialize(network: nn.Module, mode: str) -> None:
    """Convolutions before ReLUs as in He et al., "Delving Deep into Rectifiers", 2015; their biases zero.

    ``mode``: ``fan_in`` keeps the size of activations, of depthwise convolutions too; ``fan_out`` that of gradients.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
