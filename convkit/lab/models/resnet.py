"""Residual networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from convkit.lab.models.network import IMAGENET, Network, Normalize, backed, initialize, register


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

    head_name = "fc"

    def __init__(self, blocks: Sequence[int], num_classes: int) -> None:
        super().__init__((3, 224, 224))
        self.normalize = Normalize(*IMAGENET)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number, depth in enumerate(blocks, start=1):
            outputs, stride = 32 << number, 1 if number == 1 else 2
            first = _BasicBlock(inputs, outputs, stride)
            rest = (_BasicBlock(outputs, outputs, 1) for _ in range(depth - 1))
            setattr(self, f"layer{number}", nn.Sequential(first, *rest))
            inputs = outputs
        self.fc = nn.Linear(inputs, num_classes)
        initialize(self, "fan_out")  # as torchvision

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.normalize(x))))
        x = F.max_pool2d(x, 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


@register(
    title="ResNet-18",
    input_shape=(3, 224, 224),
    source="He et al., 2015, arXiv:1512.03385; torchvision",
    claimed="30.24 % top-1 error on ImageNet",
)
def resnet18(num_classes: int = 1000, *, backend: str = "convkit") -> Network:
    """Basic blocks 2-2-2-2 with torchvision's keys: 11,689,512 parameters."""
    return backed(_ResNet((2, 2, 2, 2), num_classes), backend)
