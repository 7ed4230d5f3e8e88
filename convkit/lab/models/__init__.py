"""The networks, in one registry of plain builder functions whose name is what the user types.

Every builder takes ``backend="convkit"`` (convkit's kernels) or ``backend="torch"`` (PyTorch's own). Both give the same
parameters under the same state_dict keys, drawn from the same random numbers, and the same outputs to rounding.

Every network takes pictures of shape (N, C, H, W) with values in [0, 1]: normalisation is its first layer, so that
pictures mean the same thing everywhere else (data, augmentation, plots). It offers

``features(x)``   the feature map (N, C', H', W') before it is flattened or pooled; (N, D) in a network without one
``embed(x)``      the vector (N, D) that the last layer classifies
``head``          that last layer; ``model(x)`` is ``model.head(model.embed(x))``, the logits (N, classes)
``input_shape``   (C, H, W) of the pictures that it was built for
``replace_head``  puts a new last layer, for another number of classes, in its place

One with auxiliary classifiers has ``training_logits(x)`` too: the (logits, weight) pairs that its training loss sums.
"""

from convkit.lab.models.cifar import (
    cifar_baseline,
    cifar_mobilenet,
)
from convkit.lab.models.classic import (
    alexnet,
    cifar_vgg16,
    rotation_nin,
    vgg16,
    vgg16_bn,
    vgg19,
    vgg19_bn,
)
from convkit.lab.models.course import (
    cifar_cnn,
    filter_bank,
    logistic,
    logistic_filters,
    mlp5,
    simple_cnn,
    simple_cnn_bn,
)
from convkit.lab.models.describe import Layer, describe, layers, multiply_adds
from convkit.lab.models.digits import (
    fc64,
    fc256_fc256,
    lenet5,
    simplenet,
)
from convkit.lab.models.inception import (
    googlenet,
    inception_v4,
)
from convkit.lab.models.mobile import (
    cifar_efficientnet_b0,
    cifar_mobilenet_v1,
    cifar_mobilenet_v2,
    efficientnet_b0,
    mobilenet_v1,
    mobilenet_v2,
)
from convkit.lab.models.network import (
    ACTIVATIONS,
    BACKENDS,
    MODELS,
    NORMS,
    Entry,
    Network,
    Normalize,
    OptionError,
    TorchConv2d,
    build,
    count_parameters,
    entry,
)
from convkit.lab.models.resnet import (
    cifar_densenet,
    cifar_preact_resnet18,
    cifar_preact_resnet110,
    cifar_resnet18,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    cifar_se_resnet18,
    densenet121,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    se_resnet18,
    se_resnet50,
    shrunk_resnet,
)

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "Entry",
    "Layer",
    "MODELS",
    "NORMS",
    "Network",
    "Normalize",
    "OptionError",
    "TorchConv2d",
    "alexnet",
    "build",
    "cifar_baseline",
    "cifar_cnn",
    "cifar_densenet",
    "cifar_efficientnet_b0",
    "cifar_mobilenet",
    "cifar_mobilenet_v1",
    "cifar_mobilenet_v2",
    "cifar_preact_resnet110",
    "cifar_preact_resnet18",
    "cifar_resnet110",
    "cifar_resnet18",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_se_resnet18",
    "cifar_vgg16",
    "count_parameters",
    "densenet121",
    "describe",
    "efficientnet_b0",
    "entry",
    "fc256_fc256",
    "fc64",
    "filter_bank",
    "googlenet",
    "inception_v4",
    "layers",
    "lenet5",
    "logistic",
    "logistic_filters",
    "mlp5",
    "mobilenet_v1",
    "mobilenet_v2",
    "multiply_adds",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "rotation_nin",
    "se_resnet18",
    "se_resnet50",
    "shrunk_resnet",
    "simple_cnn",
    "simple_cnn_bn",
    "simplenet",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
]
