"""AlexNet, VGG and network-in-network: one chain of convolutions each."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from convkit.lab.models.network import (
    CIFAR10,
    IMAGENET,
    Network,
    Normalize,
    OptionError,
    at_least,
    backed,
    conv_activation,
    initialize,
    norm2d,
    probability,
    register,
)


def _numbered(normalize: Normalize, layers: Sequence[nn.Module]) -> nn.Sequential:
    """The keys 0, 1 … of published weights for the layers after normalisation."""
    numbered = ((str(i), layer) for i, layer in enumerate(layers))
    return nn.Sequential(OrderedDict([("normalize", normalize), *numbered]))


class _Classic(Network):
    """Keys features.0 … and classifier.0 … of torchvision; the classifier is two dense layers before the last one."""

    head_name = "classifier.6"

    def embed(self, x: Tensor) -> Tensor:
        return self.classifier[:-1](self.pool(self.features(x)).flatten(1))


class _AlexNet(_Classic):
    def __init__(self, num_classes: int, channels: int, hidden: int, dropout: float, backend: str) -> None:
        super().__init__((channels, 224, 224), num_classes)
        at_least(1, hidden=hidden)
        probability(dropout=dropout)
        layers = [  # ReLUs before a max pool are left to it: swap has its kernel do both
            *(nn.Conv2d(channels, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *conv_activation(backend, "relu", 192, 384, 3, 1, 1),
            *conv_activation(backend, "relu", 384, 256, 3, 1, 1),
            *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        ]
        self.features = _numbered(Normalize.of(channels, IMAGENET), layers)
        self.pool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )


@register(
    title="AlexNet",
    input_shape=(3, 224, 224),
    source="Krizhevsky, 2014, arXiv:1404.5997; torchvision",
    claimed="43.48 % top-1 error on ImageNet",
)
def alexnet(
    num_classes: int = 1000,
    *,
    channels: int = 3,
    hidden: int = 4096,
    dropout: float = 0.5,
    backend: str = "convkit",
) -> Network:
    """Five convolutions and three dense layers with torchvision's keys: 61,100,840 parameters.

    The one-tower form, of 64, 192, 384, 256 and 256 channels. Pictures of at least 63×63. ``hidden``: width of the
    dense layers.
    """
    return backed(_AlexNet(num_classes, channels, hidden, dropout, backend), backend)


_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
_VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)


def _vgg_layers(widths: Sequence[int], channels: int, norm: str, backend: str) -> list[nn.Module]:
    """3×3 convolutions; a width of 0 stands for a max pool. They have a bias even before a norm, as torchvision's."""
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise((*widths, 0)):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        if norm == "none" and following != 0:
            layers += conv_activation(backend, "relu", channels, width, 3, 1, 1)
        elif norm == "none":  # swap has the pool's kernel do the ReLU before it
            layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
        else:
            layers += [nn.Conv2d(channels, width, 3, 1, 1), norm2d(norm, width), nn.ReLU()]
        channels = width
    return layers


class _VGG(_Classic):
    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        channels: int,
        norm: str,
        hidden: int,
        dropout: float,
        backend: str,
    ) -> None:
        super().__init__((channels, 224, 224), num_classes)
        at_least(1, hidden=hidden)
        probability(dropout=dropout)
        layers = _vgg_layers(widths, channels, norm, backend)
        self.features = _numbered(Normalize.of(channels, IMAGENET), layers)
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        initialize(self, "fan_out")
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
                nn.init.zeros_(layer.bias)


_SIMONYAN = "Simonyan and Zisserman, 2014, arXiv:1409.1556"


@register(
    title="VGG-16",
    input_shape=(3, 224, 224),
    source=f"{_SIMONYAN}; torchvision",
    claimed="28.41 % top-1 error on ImageNet",
)
def vgg16(
    num_classes: int = 1000,
    *,
    channels: int = 3,
    norm: str = "none",
    hidden: int = 4096,
    dropout: float = 0.5,
    backend: str = "convkit",
) -> Network:
    """Thirteen 3×3 convolutions and three dense layers with torchvision's keys: 138,357,544 parameters.

    Pictures of at least 32×32. ``hidden``: width of the dense layers.
    """
    return backed(_VGG(_VGG16, num_classes, channels, norm, hidden, dropout, backend), backend)


@register(
    title="VGG-16 with batch norm",
    input_shape=(3, 224, 224),
    source=f"{_SIMONYAN}; torchvision",
    claimed="26.64 % top-1 error on ImageNet",
)
def vgg16_bn(
    num_classes: int = 1000,
    *,
    channels: int = 3,
    hidden: int = 4096,
    dropout: float = 0.5,
    backend: str = "convkit",
) -> Network:
    """VGG-16 with batch norm after each convolution: 138,365,992 parameters."""
    return vgg16(num_classes, channels=channels, norm="batch", hidden=hidden, dropout=dropout, backend=backend)


@register(
    title="VGG-19",
    input_shape=(3, 224, 224),
    source=f"{_SIMONYAN}; torchvision",
    claimed="27.62 % top-1 error on ImageNet",
)
def vgg19(
    num_classes: int = 1000,
    *,
    channels: int = 3,
    norm: str = "none",
    hidden: int = 4096,
    dropout: float = 0.5,
    backend: str = "convkit",
) -> Network:
    """Sixteen 3×3 convolutions and three dense layers with torchvision's keys: 143,667,240 parameters.

    Pictures of at least 32×32. ``hidden``: width of the dense layers.
    """
    return backed(_VGG(_VGG19, num_classes, channels, norm, hidden, dropout, backend), backend)


@register(
    title="VGG-19 with batch norm",
    input_shape=(3, 224, 224),
    source=f"{_SIMONYAN}; torchvision",
    claimed="25.78 % top-1 error on ImageNet",
)
def vgg19_bn(
    num_classes: int = 1000,
    *,
    channels: int = 3,
    hidden: int = 4096,
    dropout: float = 0.5,
    backend: str = "convkit",
) -> Network:
    """VGG-19 with batch norm after each convolution: 143,678,248 parameters."""
    return vgg19(num_classes, channels=channels, norm="batch", hidden=hidden, dropout=dropout, backend=backend)


class _CifarVGG(Network):
    """Keys features.0 … and classifier."""

    head_name = "classifier"

    def __init__(self, num_classes: int, channels: int, norm: str, backend: str) -> None:
        super().__init__((channels, 32, 32), num_classes)
        self.features = _numbered(Normalize.of(channels, CIFAR10), _vgg_layers(_VGG16, channels, norm, backend))
        self.classifier = nn.Linear(512, num_classes)
        initialize(self, "fan_in")

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


@register(
    title="CIFAR VGG-16",
    input_shape=(3, 32, 32),
    source=f"{_SIMONYAN}; form of kuangliu/pytorch-cifar",
    claimed="7.36 % test error on CIFAR-10",
)
def cifar_vgg16(num_classes: int = 10, *, channels: int = 3, norm: str = "batch", backend: str = "convkit") -> Network:
    """The convolutions of VGG-16 with batch norm, and one dense layer: 14,728,266 parameters."""
    return backed(_CifarVGG(num_classes, channels, norm, backend), backend)


class _NIN(Network):
    """Keys trunk.block1.conv1, trunk.block1.bn1 …, output."""

    def __init__(self, num_classes: int, blocks: int, channels: int, norm: str) -> None:
        super().__init__((channels, 32, 32), num_classes)
        at_least(3, blocks=blocks)
        self.normalize = Normalize.of(channels, CIFAR10)
        inputs, trunk = channels, OrderedDict()
        for number in range(1, blocks + 1):
            layers = OrderedDict()
            for i, width in enumerate((192, 160, 96) if number == 1 else (192, 192, 192), start=1):
                size = 1 if i > 1 else 5 if number < 3 else 3
                layers[f"conv{i}"] = nn.Conv2d(inputs, width, size, 1, size // 2, bias=norm == "none")
                layers[f"bn{i}"] = norm2d(norm, width)
                layers[f"relu{i}"] = nn.ReLU()
                inputs = width
            if number == 1:
                layers["pool"] = nn.MaxPool2d(3, 2, 1)
            elif number == 2 or (number == 3 and blocks > 3):
                layers["pool"] = nn.AvgPool2d(3, 2, 1)
            trunk[f"block{number}"] = nn.Sequential(layers)
        self.trunk = nn.Sequential(trunk)
        self.output = nn.Linear(inputs, num_classes)
        initialize(self, "fan_out")
        nn.init.zeros_(self.output.bias)

    def features(self, x: Tensor, block: int | None = None) -> Tensor:
        """The output of the last block, or of block ``block``, counted from 1."""
        if block is not None and not 1 <= block <= len(self.trunk):
            raise OptionError(f"block must be from 1 to {len(self.trunk)}, got {block}")
        x = self.normalize(x)
        return self.trunk(x) if block is None else self.trunk[:block](x)

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


@register(
    title="NIN for rotations",
    input_shape=(3, 32, 32),
    source="Gidaris et al., 2018, arXiv:1803.07728; Lin et al., 2013, arXiv:1312.4400",
    claimed="6.35 % error at telling the rotation on CIFAR-10; 10.94 % of a probe on block 2",
)
def rotation_nin(
    num_classes: int = 4, *, blocks: int = 4, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """Network in network: 5×5 or 3×3, then two 1×1 convolutions a block; 1,411,140 parameters with 4 blocks.

    ``features(x, block=2)`` is what the second block says, of which the probes of the paper work best.
    """
    return backed(_NIN(num_classes, blocks, channels, norm), backend)
