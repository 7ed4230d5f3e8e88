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

from convkit.lab.models.cifar import cifar_baseline, cifar_mobilenet
from convkit.lab.models.digits import fc64, fc256_fc256, lenet5, simplenet
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
from convkit.lab.models.resnet import resnet18

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
    "cifar_baseline",
    "cifar_mobilenet",
    "count_parameters",
    "entry",
    "fc64",
    "fc256_fc256",
    "lenet5",
    "resnet18",
    "simplenet",
]
