"""Residual networks, in their forms for ImageNet and for CIFAR-10, and densely connected ones."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convkit.lab.models.network import (
    CIFAR10,
    IMAGENET,
    Network,
    Normalize,
    OptionError,
    SqueezeExcitation,
    at_least,
    backed,
    initialize,
    norm2d,
    register,
)

_HE = "He et al., 2015, arXiv:1512.03385"
_PREACTIVATION = "He et al., 2016, arXiv:1603.05027"
_SE = "Hu et al., 2017, arXiv:1709.01507"
_CIFAR_FORM = "form of kuangliu/pytorch-cifar"


class _PadShortcut(nn.Module):
    """The shortcut without parameters: every ``stride``-th pixel, and zeros for the new channels on both sides.

    He et al., 2015, section 4.2 (option A); the paper does not say on which side.
    """

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.before, self.after, self.stride = more // 2, more - more // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _shortcut(inputs: int, outputs: int, stride: int, norm: str | None, projects: bool) -> nn.Module | None:
    """None where the input can be added as it is. ``norm``: None for a projection that no norm follows."""
    if stride == 1 and inputs == outputs:
        return None
    if not projects:
        return _PadShortcut(outputs - inputs, stride)
    projection = nn.Conv2d(inputs, outputs, 1, stride, bias=norm == "none")
    return nn.Sequential(projection, *([] if norm is None else [norm2d(norm, outputs)]))


class _BasicBlock(nn.Module):
    """Two 3×3 convolutions; ``squeeze``: with squeeze and excitation in that many times fewer channels, 0 without."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, norm: str, projects: bool, squeeze: int) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=bias)
        self.bn1 = norm2d(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=bias)
        self.bn2 = norm2d(norm, width)
        self.se = SqueezeExcitation(width, width // squeeze) if squeeze else None
        self.downsample = _shortcut(inputs, width, stride, norm, projects)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        return F.relu(x + shortcut)


class _Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions; the stride is in the 3×3, as torchvision's and unlike the paper's."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, norm: str, projects: bool, squeeze: int) -> None:
        super().__init__()
        bias = norm == "none"
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=bias)
        self.bn1 = norm2d(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=bias)
        self.bn2 = norm2d(norm, width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=bias)
        self.bn3 = norm2d(norm, outputs)
        self.se = SqueezeExcitation(outputs, outputs // squeeze) if squeeze else None
        self.downsample = _shortcut(inputs, outputs, stride, norm, projects)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        return F.relu(x + shortcut)


class _PreactivatedBlock(nn.Module):
    """Norm and ReLU before each of two 3×3 convolutions, and nothing after the sum."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, norm: str, projects: bool, squeeze: int) -> None:
        super().__init__()
        bias = norm == "none"
        self.bn1 = norm2d(norm, inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=bias)
        self.bn2 = norm2d(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=bias)
        self.se = SqueezeExcitation(width, width // squeeze) if squeeze else None
        self.downsample = _shortcut(inputs, width, stride, None, projects)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        # Where the size changes the shortcut starts after the activation too: section 4.1 of the paper.
        shortcut = x if self.downsample is None else self.downsample(activated)
        x = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        if self.se is not None:
            x = self.se(x)
        return x + shortcut


class _ResNet(Network):
    """Keys as torchvision's: conv1, bn1, layer1 …, fc; with pre-activated blocks the one norm is the last, bn.

    ``depths`` and ``widths``: blocks of each stage, and channels of its 3×3 convolutions. ``imagenet``: a 7×7 stem of
    stride 2 and a max pool before the first stage instead of a 3×3 convolution.
    """

    head_name = "fc"

    def __init__(
        self,
        block: type[nn.Module],
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        *,
        imagenet: bool,
        channels: int = 3,
        norm: str = "batch",
        projects: bool = True,
        squeeze: int = 0,
    ) -> None:
        side = 224 if imagenet else 32
        super().__init__((channels, side, side), num_classes)
        at_least(1, **{f"blocks[{i}]": depth for i, depth in enumerate(depths)})
        self.normalize = Normalize.of(channels, IMAGENET if imagenet else CIFAR10)
        self.imagenet = imagenet
        self.preactivated = block is _PreactivatedBlock
        stem = partial(nn.Conv2d, channels, bias=norm == "none")
        inputs = widths[0]
        self.conv1 = stem(inputs, 7, 2, 3) if imagenet else stem(inputs, 3, 1, 1)
        if not self.preactivated:
            self.bn1 = norm2d(norm, inputs)
        self.stages = len(depths)
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks = []
            for stride in [1 if number == 1 else 2] + [1] * (depth - 1):
                blocks.append(block(inputs, width, stride, norm, projects, squeeze))
                inputs = block.expansion * width
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        if self.preactivated:
            self.bn = norm2d(norm, inputs)
        self.fc = nn.Linear(inputs, num_classes)
        initialize(self, "fan_out" if imagenet else "fan_in")  # as torchvision; as the paper

    def features(self, x: Tensor) -> Tensor:
        x = self.conv1(self.normalize(x))
        if not self.preactivated:
            x = F.relu(self.bn1(x))
        if self.imagenet:
            x = F.max_pool2d(x, 3, 2, 1)
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return F.relu(self.bn(x)) if self.preactivated else x

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


# ---------------------------------------------------------------- for ImageNet

_WIDTHS = (64, 128, 256, 512)


def _imagenet(block, depths, num_classes, channels, norm, backend, squeeze=0) -> Network:
    network = _ResNet(block, depths, _WIDTHS, num_classes, imagenet=True, channels=channels, norm=norm, squeeze=squeeze)
    return backed(network, backend)


@register(
    title="ResNet-18",
    input_shape=(3, 224, 224),
    source=f"{_HE}; torchvision",
    claimed="30.24 % top-1 error on ImageNet",
)
def resnet18(num_classes: int = 1000, *, channels: int = 3, norm: str = "batch", backend: str = "convkit") -> Network:
    """Basic blocks 2-2-2-2 with torchvision's keys: 11,689,512 parameters."""
    return _imagenet(_BasicBlock, (2, 2, 2, 2), num_classes, channels, norm, backend)


@register(
    title="ResNet-34",
    input_shape=(3, 224, 224),
    source=f"{_HE}; torchvision",
    claimed="26.69 % top-1 error on ImageNet",
)
def resnet34(num_classes: int = 1000, *, channels: int = 3, norm: str = "batch", backend: str = "convkit") -> Network:
    """Basic blocks 3-4-6-3 with torchvision's keys: 21,797,672 parameters."""
    return _imagenet(_BasicBlock, (3, 4, 6, 3), num_classes, channels, norm, backend)


@register(
    title="ResNet-50",
    input_shape=(3, 224, 224),
    source=f"{_HE}; torchvision",
    claimed="23.87 % top-1 error on ImageNet",
)
def resnet50(num_classes: int = 1000, *, channels: int = 3, norm: str = "batch", backend: str = "convkit") -> Network:
    """Bottlenecks 3-4-6-3 with torchvision's keys: 25,557,032 parameters."""
    return _imagenet(_Bottleneck, (3, 4, 6, 3), num_classes, channels, norm, backend)


@register(
    title="ResNet-101",
    input_shape=(3, 224, 224),
    source=f"{_HE}; torchvision",
    claimed="22.63 % top-1 error on ImageNet",
)
def resnet101(num_classes: int = 1000, *, channels: int = 3, norm: str = "batch", backend: str = "convkit") -> Network:
    """Bottlenecks 3-4-23-3 with torchvision's keys: 44,549,160 parameters."""
    return _imagenet(_Bottleneck, (3, 4, 23, 3), num_classes, channels, norm, backend)


@register(
    title="ResNet-152",
    input_shape=(3, 224, 224),
    source=f"{_HE}; torchvision",
    claimed="21.69 % top-1 error on ImageNet",
)
def resnet152(num_classes: int = 1000, *, channels: int = 3, norm: str = "batch", backend: str = "convkit") -> Network:
    """Bottlenecks 3-8-36-3 with torchvision's keys: 60,192,808 parameters."""
    return _imagenet(_Bottleneck, (3, 8, 36, 3), num_classes, channels, norm, backend)


@register(title="SE-ResNet-18", input_shape=(3, 224, 224), source=_SE)
def se_resnet18(
    num_classes: int = 1000, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """ResNet-18 with squeeze and excitation (16 times fewer channels) in each block: 11,778,592 parameters."""
    return _imagenet(_BasicBlock, (2, 2, 2, 2), num_classes, channels, norm, backend, squeeze=16)


@register(title="SE-ResNet-50", input_shape=(3, 224, 224), source=_SE, claimed="23.29 % top-1 error on ImageNet")
def se_resnet50(
    num_classes: int = 1000, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """ResNet-50 with squeeze and excitation (16 times fewer channels) in each block: 28,088,024 parameters."""
    return _imagenet(_Bottleneck, (3, 4, 6, 3), num_classes, channels, norm, backend, squeeze=16)


# ---------------------------------------------------------------- for CIFAR-10


@register(
    title="CIFAR ResNet-18",
    input_shape=(3, 32, 32),
    source=f"{_HE}; {_CIFAR_FORM}",
    claimed="6.98 % test error on CIFAR-10",
)
def cifar_resnet18(
    num_classes: int = 10, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """ResNet-18 with a 3×3 stem of stride 1: 11,173,962 parameters."""
    network = _ResNet(_BasicBlock, (2, 2, 2, 2), _WIDTHS, num_classes, imagenet=False, channels=channels, norm=norm)
    return backed(network, backend)


@register(
    title="CIFAR SE-ResNet-18",
    input_shape=(3, 32, 32),
    source=f"{_SE}; EEML 2020, vision tutorial",
    claimed="90.3 % accuracy, 89.1 % without SE",
)
def cifar_se_resnet18(
    num_classes: int = 10, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """The CIFAR ResNet-18 with squeeze and excitation (16 times fewer channels): 11,263,042 parameters."""
    network = _ResNet(
        _BasicBlock, (2, 2, 2, 2), _WIDTHS, num_classes, imagenet=False, channels=channels, norm=norm, squeeze=16
    )
    return backed(network, backend)


@register(
    title="CIFAR pre-activation ResNet-18",
    input_shape=(3, 32, 32),
    source=f"{_PREACTIVATION}; {_CIFAR_FORM}",
    claimed="4.89 % test error on CIFAR-10",
)
def cifar_preact_resnet18(
    num_classes: int = 10, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """The CIFAR ResNet-18 with norm and ReLU before each convolution: 11,172,170 parameters.

    With the norm and ReLU after the last block that the paper has (section 3.3) and kuangliu's form forgets.
    """
    network = _ResNet(
        _PreactivatedBlock, (2, 2, 2, 2), _WIDTHS, num_classes, imagenet=False, channels=channels, norm=norm
    )
    return backed(network, backend)


def _thin(block, depth, num_classes, channels, norm, backend) -> Network:
    """He et al., 2015, section 4.2: 6n + 2 layers of 16, 32 and 64 channels, shortcuts without parameters."""
    blocks = ((depth - 2) // 6,) * 3
    network = _ResNet(
        block, blocks, (16, 32, 64), num_classes, imagenet=False, channels=channels, norm=norm, projects=False
    )
    return backed(network, backend)


@register(title="CIFAR ResNet-20", input_shape=(3, 32, 32), source=_HE, claimed="8.75 % test error on CIFAR-10")
def cifar_resnet20(
    num_classes: int = 10, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """3 basic blocks each of 16, 32 and 64 channels, shortcuts without parameters: 269,722 parameters."""
    return _thin(_BasicBlock, 20, num_classes, channels, norm, backend)


@register(title="CIFAR ResNet-32", input_shape=(3, 32, 32), source=_HE, claimed="7.51 % test error on CIFAR-10")
def cifar_resnet32(
    num_classes: int = 10, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """5 basic blocks each of 16, 32 and 64 channels, shortcuts without parameters: 464,154 parameters."""
    return _thin(_BasicBlock, 32, num_classes, channels, norm, backend)


@register(title="CIFAR ResNet-44", input_shape=(3, 32, 32), source=_HE, claimed="7.17 % test error on CIFAR-10")
def cifar_resnet44(
    num_classes: int = 10, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """7 basic blocks each of 16, 32 and 64 channels, shortcuts without parameters: 658,586 parameters."""
    return _thin(_BasicBlock, 44, num_classes, channels, norm, backend)


@register(title="CIFAR ResNet-56", input_shape=(3, 32, 32), source=_HE, claimed="6.97 % test error on CIFAR-10")
def cifar_resnet56(
    num_classes: int = 10, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """9 basic blocks each of 16, 32 and 64 channels, shortcuts without parameters: 853,018 parameters."""
    return _thin(_BasicBlock, 56, num_classes, channels, norm, backend)


@register(title="CIFAR ResNet-110", input_shape=(3, 32, 32), source=_HE, claimed="6.43 % test error on CIFAR-10")
def cifar_resnet110(
    num_classes: int = 10, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """18 basic blocks each of 16, 32 and 64 channels, shortcuts without parameters: 1,727,962 parameters."""
    return _thin(_BasicBlock, 110, num_classes, channels, norm, backend)


@register(
    title="CIFAR pre-activation ResNet-110",
    input_shape=(3, 32, 32),
    source=_PREACTIVATION,
    claimed="6.37 % test error on CIFAR-10",
)
def cifar_preact_resnet110(
    num_classes: int = 10, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """ResNet-110 with norm and ReLU before each convolution: 1,727,962 parameters."""
    return _thin(_PreactivatedBlock, 110, num_classes, channels, norm, backend)


@register(title="Shrunk ResNet", input_shape=(3, 32, 32), source=f"{_HE}; ResNet-18 with fewer, narrower blocks")
def shrunk_resnet(
    num_classes: int = 10,
    *,
    width: int = 16,
    blocks: Sequence[int] = (2, 2, 2),
    channels: int = 3,
    norm: str = "batch",
    backend: str = "convkit",
) -> Network:
    """ResNet-18 made small: basic blocks of width, 2·width, 4·width … channels with projection shortcuts.

    ``blocks``: their number in each stage, of which each but the first halves height and width. Width 16 has 175,258
    parameters with blocks 2-2-2 and 78,042 with 1-1-1.
    """
    at_least(1, width=width)
    if not isinstance(blocks, Sequence) or isinstance(blocks, str) or not blocks:
        raise OptionError(f"blocks must be a sequence of whole numbers, one a stage, as (2, 2, 2), got {blocks!r}")
    widths = [width << stage for stage in range(len(blocks))]
    network = _ResNet(_BasicBlock, blocks, widths, num_classes, imagenet=False, channels=channels, norm=norm)
    return backed(network, backend)


# ---------------------------------------------------------------- densely connected

_DENSE = "Huang et al., 2016, arXiv:1608.06993"


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int, norm: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.norm1 = norm2d(norm, inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=bias)
        self.norm2 = norm2d(norm, 4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        return torch.cat((x, new), 1)


def _renamed(module: nn.Module, state: dict, prefix: str, *_: object) -> None:
    """The published DenseNet-121 has keys from before PyTorch 0.4.1, such as denselayer1.norm.1.weight."""
    old = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))")
    for key in list(state):
        if match := old.fullmatch(key):
            state[match[1] + match[2]] = state.pop(key)


class _DenseNet(Network):
    """Keys as torchvision's: features.conv0, norm0, denseblock1.denselayer1.norm1 …, transition1, norm5, classifier."""

    head_name = "classifier"

    def __init__(
        self, depths: Sequence[int], growth: int, num_classes: int, imagenet: bool, channels: int, norm: str
    ) -> None:
        side = 224 if imagenet else 32
        super().__init__((channels, side, side), num_classes)
        bias = norm == "none"
        width = 2 * growth
        layers: list[tuple[str, nn.Module]] = [("normalize", Normalize.of(channels, IMAGENET if imagenet else CIFAR10))]
        if imagenet:
            layers += [
                ("conv0", nn.Conv2d(channels, width, 7, 2, 3, bias=bias)),
                ("norm0", norm2d(norm, width)),
                ("relu0", nn.ReLU()),
                ("pool0", nn.MaxPool2d(3, 2, 1)),
            ]
        else:
            layers.append(("conv0", nn.Conv2d(channels, width, 3, 1, 1, bias=bias)))
        for number, depth in enumerate(depths, start=1):
            block = [(f"denselayer{i + 1}", _DenseLayer(width + i * growth, growth, norm)) for i in range(depth)]
            layers.append((f"denseblock{number}", nn.Sequential(OrderedDict(block))))
            width += depth * growth
            if number < len(depths):
                transition = OrderedDict(
                    norm=norm2d(norm, width),
                    relu=nn.ReLU(),
                    conv=nn.Conv2d(width, width // 2, 1, bias=bias),
                    pool=nn.AvgPool2d(2),
                )
                layers.append((f"transition{number}", nn.Sequential(transition)))
                width //= 2
        layers += [("norm5", norm2d(norm, width)), ("relu5", nn.ReLU())]
        self.features = nn.Sequential(OrderedDict(layers))
        self.classifier = nn.Linear(width, num_classes)
        initialize(self, "fan_in")
        nn.init.zeros_(self.classifier.bias)
        self.register_load_state_dict_pre_hook(_renamed)

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


@register(
    title="DenseNet-121",
    input_shape=(3, 224, 224),
    source=f"{_DENSE}; torchvision",
    claimed="25.57 % top-1 error on ImageNet",
)
def densenet121(
    num_classes: int = 1000, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """Dense blocks 6-12-24-16 that grow by 32, with torchvision's keys: 7,978,856 parameters."""
    return backed(_DenseNet((6, 12, 24, 16), 32, num_classes, True, channels, norm), backend)


@register(title="CIFAR DenseNet", input_shape=(3, 32, 32), source=f"{_DENSE}; {_CIFAR_FORM}")
def cifar_densenet(
    num_classes: int = 10, *, channels: int = 3, norm: str = "batch", backend: str = "convkit"
) -> Network:
    """Dense blocks 6-12-24-16 that grow by 12 after a 3×3 stem of stride 1: 1,000,618 parameters."""
    return backed(_DenseNet((6, 12, 24, 16), 12, num_classes, False, channels, norm), backend)
