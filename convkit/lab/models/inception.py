"""GoogLeNet and Inception-v4: convolutions of several sizes beside each other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convkit.lab.models.network import Network, Normalize, backed, initialize, probability, register


class _Conv(nn.Module):
    """Convolution, batch norm with the epsilon of TensorFlow's, ReLU; keys conv, bn."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


# ---------------------------------------------------------------- GoogLeNet


class _Inception(nn.Module):
    """1×1; 1×1 and 3×3; 1×1 and 3×3; max pool and 1×1; their outputs one after the other.

    The third branch has 5×5 filters in the paper. Published weights have 3×3 ones there.
    """

    def __init__(self, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int) -> None:
        super().__init__()
        self.branch1 = _Conv(inputs, one, 1)
        self.branch2 = nn.Sequential(_Conv(inputs, three[0], 1), _Conv(three[0], three[1], 3, padding=1))
        self.branch3 = nn.Sequential(_Conv(inputs, five[0], 1), _Conv(five[0], five[1], 3, padding=1))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), _Conv(inputs, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), 1)


class _Auxiliary(nn.Module):
    """A classifier half-way, which gives the layers before it a stronger gradient."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.conv = _Conv(inputs, 128, 1)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(0.7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, 4)).flatten(1)
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


class _GoogLeNet(Network):
    head_name = "fc"

    def __init__(self, num_classes: int, aux_logits: bool, dropout: float) -> None:
        super().__init__((3, 224, 224), num_classes)
        probability(dropout=dropout)
        # Its weights come from a network for pixels in [-1, 1]; torchvision turns ImageNet's form back into that.
        self.normalize = Normalize((0.5,) * 3, (0.5,) * 3)
        self.conv1 = _Conv(3, 64, 7, 2, 3)
        self.conv2 = _Conv(64, 64, 1)
        self.conv3 = _Conv(64, 192, 3, padding=1)
        self.inception3a = _Inception(192, 64, (96, 128), (16, 32), 32)
        self.inception3b = _Inception(256, 128, (128, 192), (32, 96), 64)
        self.inception4a = _Inception(480, 192, (96, 208), (16, 48), 64)
        self.inception4b = _Inception(512, 160, (112, 224), (24, 64), 64)
        self.inception4c = _Inception(512, 128, (128, 256), (24, 64), 64)
        self.inception4d = _Inception(512, 112, (144, 288), (32, 64), 64)
        self.inception4e = _Inception(528, 256, (160, 320), (32, 128), 128)
        self.inception5a = _Inception(832, 256, (160, 320), (32, 128), 128)
        self.inception5b = _Inception(832, 384, (192, 384), (48, 128), 128)
        self.aux1 = _Auxiliary(512, num_classes) if aux_logits else None
        self.aux2 = _Auxiliary(528, num_classes) if aux_logits else None
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.01)  # as torchvision

    def _stages(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the two auxiliary classifiers and the main one see."""
        x = F.max_pool2d(self.conv1(self.normalize(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.conv3(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.inception3b(self.inception3a(x)), 3, 2, ceil_mode=True)
        first = self.inception4a(x)
        second = self.inception4d(self.inception4c(self.inception4b(first)))
        x = F.max_pool2d(self.inception4e(second), 2, 2, ceil_mode=True)
        return first, second, self.inception5b(self.inception5a(x))

    def features(self, x: Tensor) -> Tensor:
        return self._stages(x)[-1]

    def _pool(self, features: Tensor) -> Tensor:
        return self.dropout(features.mean((2, 3)))

    def embed(self, x: Tensor) -> Tensor:
        return self._pool(self.features(x))

    def training_logits(self, x: Tensor) -> list[tuple[Tensor, float]]:
        """(logits, weight) of the classifiers whose weighted losses are summed in training, the main one first.

        In evaluation mode, or without auxiliary classifiers, the main one alone. Weights: section 5 of the paper.
        """
        first, second, last = self._stages(x)
        found = [(self.head(self._pool(last)), 1.0)]
        if self.training and self.aux1 is not None:
            found += [(self.aux2(second), 0.3), (self.aux1(first), 0.3)]
        return found

    def replace_head(self, num_classes: int) -> nn.Linear:
        """New last layers of the auxiliary classifiers too; returns the main one."""
        for aux in (self.aux1, self.aux2):
            if aux is not None:
                weight = aux.fc2.weight
                aux.fc2 = nn.Linear(aux.fc2.in_features, num_classes, device=weight.device, dtype=weight.dtype)
        return super().replace_head(num_classes)


@register(
    title="GoogLeNet",
    input_shape=(3, 224, 224),
    source="Szegedy et al., 2014, arXiv:1409.4842; torchvision",
    claimed="30.22 % top-1 error on ImageNet",
)
def googlenet(
    num_classes: int = 1000, *, aux_logits: bool = True, dropout: float = 0.2, backend: str = "convkit"
) -> Network:
    """Nine Inception blocks with torchvision's keys and batch norm: 6,624,904 parameters.

    ``aux_logits``: with the two auxiliary classifiers that the published weight file has too, 13,004,888 parameters.
    ``model(x)`` is the main classifier's logits in every mode, ``model.training_logits(x)`` all three's in training.
    """
    return backed(_GoogLeNet(num_classes, aux_logits, dropout), backend)


# ---------------------------------------------------------------- Inception-v4


class _Beside(nn.Module):
    """Branches whose outputs are put one after the other, channel-wise; keys are the branches' names, in that order."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        self.names = tuple(branches)
        for name, branch in branches.items():
            setattr(self, name, branch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in self.names], 1)


def _chain(inputs: int, *convolutions: tuple) -> nn.Sequential:
    """Convolutions one after the other, each (channels, size, stride, padding), the last two as in _Conv."""
    layers = []
    for outputs, *rest in convolutions:
        layers.append(_Conv(inputs, outputs, *rest))
        inputs = outputs
    return nn.Sequential(*layers)


def _pooled(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), _Conv(inputs, outputs, 1))


_WIDE = ((1, 7), 1, (0, 3))
_HIGH = ((7, 1), 1, (3, 0))
_SAME = (3, 1, 1)


def _inception_a() -> nn.Module:
    return _Beside(
        branch0=_Conv(384, 96, 1),
        branch1=_chain(384, (64, 1), (96, *_SAME)),
        branch2=_chain(384, (64, 1), (96, *_SAME), (96, *_SAME)),
        branch3=_pooled(384, 96),
    )


def _inception_b() -> nn.Module:
    return _Beside(
        branch0=_Conv(1024, 384, 1),
        branch1=_chain(1024, (192, 1), (224, *_WIDE), (256, *_HIGH)),
        branch2=_chain(1024, (192, 1), (192, *_HIGH), (224, *_WIDE), (224, *_HIGH), (256, *_WIDE)),
        branch3=_pooled(1024, 128),
    )


class _InceptionC(nn.Module):
    """Two of the branches end in a 1×3 and a 3×1 convolution beside each other."""

    def __init__(self) -> None:
        super().__init__()
        wide, high = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
        self.branch0 = _Conv(1536, 256, 1)
        self.branch1_0 = _Conv(1536, 384, 1)
        self.branch1_1a = _Conv(384, 256, *wide)
        self.branch1_1b = _Conv(384, 256, *high)
        self.branch2_0 = _Conv(1536, 384, 1)
        self.branch2_1 = _Conv(384, 448, *high)
        self.branch2_2 = _Conv(448, 512, *wide)
        self.branch2_3a = _Conv(512, 256, *wide)
        self.branch2_3b = _Conv(512, 256, *high)
        self.branch3 = _pooled(1536, 256)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1_0(x)
        two = self.branch2_2(self.branch2_1(self.branch2_0(x)))
        outputs = (
            self.branch0(x),
            self.branch1_1a(one),
            self.branch1_1b(one),
            self.branch2_3a(two),
            self.branch2_3b(two),
            self.branch3(x),
        )
        return torch.cat(outputs, 1)


class _InceptionV4(Network):
    """Keys features.0.conv.weight … and last_linear, those of the weights that Cadene ported."""

    head_name = "last_linear"

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__((3, 299, 299), num_classes)
        probability(dropout=dropout)
        blocks: Sequence[nn.Module] = [
            _Conv(3, 32, 3, 2),
            _Conv(32, 32, 3),
            _Conv(32, 64, 3, padding=1),
            _Beside(maxpool=nn.MaxPool2d(3, 2), conv=_Conv(64, 96, 3, 2)),
            _Beside(
                branch0=_chain(160, (64, 1), (96, 3)),
                branch1=_chain(160, (64, 1), (64, *_WIDE), (64, *_HIGH), (96, 3)),
            ),
            _Beside(conv=_Conv(192, 192, 3, 2), maxpool=nn.MaxPool2d(3, 2)),
            *(_inception_a() for _ in range(4)),
            _Beside(
                branch0=_Conv(384, 384, 3, 2),
                branch1=_chain(384, (192, 1), (224, *_SAME), (256, 3, 2)),
                branch2=nn.MaxPool2d(3, 2),
            ),
            *(_inception_b() for _ in range(7)),
            _Beside(
                branch0=_chain(1024, (192, 1), (192, 3, 2)),
                branch1=_chain(1024, (256, 1), (256, *_WIDE), (320, *_HIGH), (320, 3, 2)),
                branch2=nn.MaxPool2d(3, 2),
            ),
            *(_InceptionC() for _ in range(3)),
        ]
        numbered = ((str(i), block) for i, block in enumerate(blocks))
        self.features = nn.Sequential(OrderedDict([("normalize", Normalize((0.5,) * 3, (0.5,) * 3)), *numbered]))
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(1536, num_classes)
        initialize(self, "fan_in")

    def embed(self, x: Tensor) -> Tensor:
        return self.dropout(self.features(x).mean((2, 3)))


@register(
    title="Inception-v4",
    input_shape=(3, 299, 299),
    source="Szegedy et al., 2016, arXiv:1602.07261",
    claimed="20.0 % top-1 error on ImageNet",
)
def inception_v4(num_classes: int = 1000, *, dropout: float = 0.2, backend: str = "convkit") -> Network:
    """A stem, 4 blocks A, 7 B and 3 C with two reductions between: 42,679,816 parameters.

    Pictures of at least 75×75, 299×299 in the paper. Keys of Cadene's pretrained-models.pytorch.
    """
    return backed(_InceptionV4(num_classes, dropout), backend)
