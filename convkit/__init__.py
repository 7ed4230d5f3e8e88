"""Convolution kernels for PyTorch: drop-in operators with derivatives of any order, and a swap into existing models.

import convkit, convkit.functional as CF, convkit.nn as cnn
y = CF.conv2d(x, w, b, stride=2, padding=1, activation="relu")
print(convkit.swap(model))    # in place; convkit.unswap(model) takes the kernels out again
print(convkit.explain(model, example_input))    # what each layer takes, with convkit and with PyTorch
"""

__version__ = "0.1.0"

from convkit import _load

_C = _load.load()

from convkit import batching, functional, nn  # noqa: E402, F401  (the operators must be loaded first)
from convkit.backends import set_winograd, winograd_enabled  # noqa: E402
from convkit.explain import explain  # noqa: E402
from convkit.swap import swap, unswap  # noqa: E402

__all__ = ["__version__", "explain", "functional", "nn", "set_winograd", "swap", "unswap", "winograd_enabled"]
