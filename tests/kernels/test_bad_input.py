"""Wrong arguments: PyTorch's type of exception, a message that names the argument and what it got, nothing written."""

import re
import subprocess
import sys

import numpy
import pytest
import torch
import torch.nn.functional as F

import convkit.functional as CF

X, W, B = torch.randn(2, 8, 6, 6), torch.randn(12, 8, 3, 3), torch.randn(12)
COLUMNS = torch.randn(2, 32, 25)
FP8 = torch.float8_e4m3fn


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


# Name of the argument that is to blame, changed arguments, what the message must say besides the name (a pattern).
# `None` for the exception type: whatever PyTorch raises for the same call. Where a type stands, PyTorch takes what
# convkit does not, or fails by accident.
CONV2D = [
    ("input", {"input": torch.randn(6, 6)}, r"2-D.*\[6, 6\]", None),
    ("input", {"input": torch.randn(1, 2, 8, 6, 6)}, r"5-D", None),
    ("input", {"input": torch.randn(6)}, r"1-D", None),
    ("weight", {"weight": torch.randn(12, 8, 3)}, r"3-D.*\[12, 8, 3\]", None),
    ("weight", {"weight": torch.randn(12, 8, 3, 3, 3)}, r"5-D", None),
    ("input", {"input": torch.randn(2, 7, 6, 6)}, r"7 channels.*8 channels", None),
    ("input", {"groups": 2}, r"8 channels.*groups=2.*16 channels", None),
    ("weight", {"weight": torch.randn(11, 4, 3, 3), "groups": 2}, r"\[11, 4, 3, 3\].*groups=2.*divisible", None),
    ("input", {"input": torch.randn(2, 7, 6, 6), "weight": torch.randn(12, 3, 3, 3), "groups": 2}, "7 channels", None),
    ("groups", {"groups": 0}, "0", None),
    ("groups", {"groups": -1}, "-1", None),
    ("groups", {"groups": 1.0}, "1.0", None),
    ("groups", {"groups": True}, "True", None),
    ("groups", {"groups": None}, "None", None),
    ("weight|groups", {"groups": 2**62}, str(2**62), None),
    ("stride", {"stride": 0}, "0", None),
    ("stride", {"stride": -1}, "-1", None),
    ("stride", {"stride": (1, 0)}, "1, 0", None),
    ("stride", {"stride": 1.5}, "1.5", None),
    ("stride", {"stride": "a"}, "'a'", None),
    ("stride", {"stride": None}, "None", None),
    ("stride", {"stride": ()}, r"\(\)", None),
    ("stride", {"stride": (1, 1, 1)}, r"\(1, 1, 1\)", None),
    ("padding", {"padding": -1}, "-1", None),
    ("padding", {"padding": (1, -1)}, "-1", None),
    ("padding", {"padding": ((1, 1), (1, -1))}, "-1", RuntimeError),
    ("padding", {"padding": ((1, 1), (1,))}, r"\(1,\)", RuntimeError),
    ("padding", {"padding": ((1, 1), (1, 1), (1, 1))}, "", (RuntimeError, TypeError)),
    ("padding", {"padding": "SAME"}, "'SAME'.*same.*valid", None),
    ("padding", {"padding": 1.5}, "1.5", None),
    ("padding", {"padding": (1, 1, 1)}, r"\(1, 1, 1\)", None),
    ("padding", {"padding": (1, 1, 1, 1)}, r"\(1, 1, 1, 1\)", None),
    ("padding", {"padding": None}, "None", None),
    ("padding", {"padding": "same", "stride": 2}, "stride.*2", None),
    ("padding", {"padding": "same", "stride": (1, 2)}, r"stride.*\(1, 2\)", None),
    ("dilation", {"dilation": 0}, "0", None),
    ("dilation", {"dilation": -1}, "-1", None),
    ("dilation", {"dilation": (1, 0)}, "1, 0", None),
    ("dilation", {"dilation": 1.0}, "1.0", None),
    ("weight", {"weight": torch.randn(12, 8, 7, 3)}, "height.* 7 .* 6", None),
    ("weight", {"dilation": 3}, "height.* 7 .* 6", None),
    ("weight", {"weight": torch.randn(12, 8, 3, 7), "padding": ((3, 3), (0, 0))}, "width.* 7 .* 6", RuntimeError),
    ("weight", {"weight": W.double()}, "(?i)double|float64", None),
    ("weight", {"weight": W.bfloat16()}, "(?i)bfloat16", None),
    ("weight", {"input": X.bfloat16()}, "(?i)float", None),
    ("bias", {"bias": B.double()}, "(?i)double|float64", None),
    ("bias", {"input": X.bfloat16(), "weight": W.bfloat16(), "bias": B}, "(?i)float", None),
    ("input", {"input": X.int()}, "(?i)int", RuntimeError),
    ("input", {"input": X.long(), "weight": W.long()}, "(?i)long|int64", NotImplementedError),
    ("input", {"input": X.bool(), "weight": W.bool()}, "(?i)bool", None),
    ("input", {"input": X.cfloat(), "weight": W.cfloat()}, "(?i)complex", NotImplementedError),
    ("input", {"input": X.to(FP8), "weight": W.to(FP8)}, "(?i)float8", None),
    ("input", {"input": X.to_sparse()}, "(?i)sparse", None),
    ("weight", {"weight": W.to_sparse()}, "(?i)sparse", None),
    ("bias", {"bias": torch.randn(11)}, r"\[11\].*\[12\]", None),
    ("bias", {"bias": torch.randn(1)}, r"\[1\].*\[12\]", None),
    ("bias", {"bias": torch.randn(12, 1)}, r"\[12, 1\]", None),
    ("bias", {"bias": torch.randn(())}, r"\[\]", None),
    ("weight", {"weight": torch.randn(0, 8, 3, 3)}, r"\[0, 8, 3, 3\]", None),
    ("weight", {"weight": torch.randn(12, 8, 0, 3)}, r"\[12, 8, 0, 3\]", None),
    ("input|weight", {"input": torch.randn(2, 8, 0, 6)}, "", None),
    ("input|weight", {"input": torch.randn(2, 8, 0, 6), "padding": 2}, "0", None),
    ("weight", {"weight": meta(12, 8, 3, 3)}, "meta", RuntimeError),
    ("input|weight", {"input": meta(2, 8, 6, 6)}, "meta", RuntimeError),
    ("bias", {"bias": meta(12)}, "meta", RuntimeError),
    ("input", {"input": None}, "NoneType", None),
    ("input", {"input": [1.0]}, "list", None),
    ("weight", {"weight": W.numpy()}, "ndarray", None),
    ("bias", {"bias": 1.0}, "float", None),
    ("activation", {"activation": "gelu"}, "'gelu'.*relu", ValueError),
    ("activation", {"activation": True}, "", (ValueError, TypeError, RuntimeError)),
    ("scale", {"scale": torch.ones(11)}, r"\[11\].*\[12\]", RuntimeError),
    ("scale", {"scale": torch.ones(1, 12)}, r"\[1, 12\].*1-D", RuntimeError),
    ("scale", {"scale": torch.ones(12).double()}, "(?i)double.*Float", RuntimeError),
    ("scale", {"scale": torch.ones(12).half()}, "(?i)half.*Float", RuntimeError),
    ("scale", {"scale": torch.ones(12).to_sparse()}, "(?i)sparse", RuntimeError),
    ("scale", {"scale": meta(12)}, "meta", RuntimeError),
    ("scale", {"scale": 2.0}, "float", TypeError),
    (
        "scale",
        {"input": X.half(), "weight": W.half(), "scale": torch.ones(12).bfloat16()},
        "BFloat16.*Half",
        RuntimeError,
    ),
    ("bias", {"scale": torch.ones(12), "bias": B.double()}, "(?i)double", RuntimeError),
    ("bias", {"scale": torch.ones(12), "bias": torch.randn(11)}, r"\[11\].*\[12\]", RuntimeError),
    ("residual", {"residual": torch.randn(2, 12, 4, 3)}, r"\[2, 12, 4, 3\].*\[2, 12, 4, 4\]", RuntimeError),
    ("residual", {"residual": torch.randn(1, 12, 1, 1)}, r"\[1, 12, 1, 1\].*expand", RuntimeError),
    ("residual", {"residual": torch.randn(12, 4, 4)}, r"3-D.*\(N, K, P, Q\)", RuntimeError),
    ("residual", {"input": X[0], "residual": torch.randn(1, 12, 4, 4)}, r"4-D.*\(K, P, Q\)", RuntimeError),
    ("residual", {"residual": torch.randn(2, 12, 4, 4).double()}, "(?i)double.*Float", RuntimeError),
    ("residual", {"input": X.half(), "weight": W.half(), "residual": torch.randn(2, 12, 4, 4)}, "Half", RuntimeError),
    ("residual", {"residual": torch.randn(2, 12, 4, 4).to_sparse()}, "(?i)sparse", RuntimeError),
    ("residual", {"residual": meta(2, 12, 4, 4)}, "meta", RuntimeError),
    ("residual", {"residual": 1.0}, "float", TypeError),
]
CONV_TRANSPOSE2D = [
    ("input", {"input": torch.randn(6, 6)}, "2-D", None),
    ("weight", {"weight": torch.randn(8, 12, 3)}, "3-D", None),
    ("input", {"weight": torch.randn(7, 12, 3, 3)}, "8 channels.*7", None),
    ("weight", {"groups": 3}, "groups=3.*divisible", None),
    ("groups", {"groups": 0}, "0", None),
    ("stride", {"stride": 0}, "0", None),
    ("stride", {"stride": (2, -1)}, "2, -1", None),
    ("padding", {"padding": -1}, "-1", None),
    ("padding", {"padding": "same"}, "'same'", None),
    ("padding", {"padding": ((1, 1), (1, 1))}, "", (RuntimeError, TypeError)),
    ("dilation", {"dilation": 0}, "0", None),
    ("output_padding", {"output_padding": 1}, "1.*stride", None),
    ("output_padding", {"output_padding": 2, "stride": 2}, "2.*stride", None),
    ("output_padding", {"output_padding": -1, "stride": 2}, "-1", None),
    ("output_padding", {"output_padding": 1.5, "stride": 2}, "1.5", None),
    ("output_padding", {"output_padding": (1, 1, 1), "stride": 2}, r"\(1, 1, 1\)", None),
    ("output_padding", {"output_padding": 2**62}, str(2**62), None),
    ("padding", {"padding": 9}, "-10", None),
    ("bias", {"bias": torch.randn(8)}, r"\[8\].*\[12\]", None),
    ("bias", {"weight": torch.randn(8, 6, 3, 3), "bias": torch.randn(6), "groups": 2}, r"\[6\].*\[12\]", None),
    ("weight", {"weight": torch.randn(8, 12, 3, 3).double()}, "(?i)double|float64", None),
    ("weight", {"input": torch.randn(2, 0, 6, 6), "weight": torch.randn(0, 12, 3, 3)}, r"\[0, 12, 3, 3\]", None),
    ("weight", {"weight": torch.randn(8, 0, 3, 3)}, r"\[8, 0, 3, 3\]", None),
    ("weight", {"weight": torch.randn(8, 12, 0, 3)}, r"\[8, 12, 0, 3\]", None),
    ("input", {"input": torch.randn(2, 8, 0, 6)}, r"\[2, 8, 0, 6\]", None),
    ("weight", {"weight": meta(8, 12, 3, 3)}, "meta", RuntimeError),
    ("input", {"input": X.long(), "weight": torch.ones(8, 12, 3, 3).long()}, "(?i)long|int64", NotImplementedError),
    ("input", {"input": None}, "NoneType", None),
]
STATS = {"running_mean": torch.zeros(8), "running_var": torch.ones(8)}
NO_STATS = {"running_mean": None, "running_var": None, "training": True}
TRAIN = STATS | {"training": True}
BATCH_NORM_RELU = [
    ("input", NO_STATS | {"input": torch.randn(1, 8, 1, 1)}, r"more than 1 value per channel.*\[1, 8, 1, 1\]", None),
    ("input", TRAIN | {"input": torch.randn(1, 8, 1, 1)}, r"more than 1 value per channel", None),
    ("input", NO_STATS | {"input": torch.randn(1, 8)}, r"more than 1 value per channel.*\[1, 8", None),
    ("running_mean", {"running_mean": None, "running_var": None}, "defined in evaluation", None),
    ("running_var", {"running_mean": torch.zeros(8), "running_var": None}, "defined in evaluation", None),
    ("running_mean and running_var", TRAIN | {"running_var": None}, "both", None),
    ("running_mean and running_var", TRAIN | {"running_mean": None}, "both", None),
    ("running_mean", STATS | {"running_mean": torch.zeros(7)}, "8 elements.*7", None),
    ("running_var", STATS | {"running_var": torch.zeros(7)}, "8 elements.*7", None),
    ("running_mean", TRAIN | {"running_mean": torch.zeros(7)}, "8 elements.*7", None),
    ("running_var", TRAIN | {"running_var": torch.zeros(7)}, "8 elements.*7", None),
    ("running_mean", TRAIN | {"running_mean": torch.zeros(8, 1)}, r"\[8, 1\]", None),
    ("weight", STATS | {"weight": torch.ones(7)}, "8 elements.*7", None),
    ("bias", STATS | {"bias": torch.ones(9)}, "8 elements.*9", None),
    ("weight", TRAIN | {"weight": torch.ones(7)}, "8 elements.*7", None),
    ("eps", TRAIN | {"eps": float("nan")}, "nan", ValueError),
    ("eps", TRAIN | {"eps": float("inf")}, "inf", ValueError),
    ("eps", STATS | {"eps": float("nan")}, "nan", ValueError),
    ("eps", TRAIN | {"eps": -1.0}, "-1", None),
    ("eps", TRAIN | {"eps": 0.0}, "0", None),
    ("eps", STATS | {"eps": -1e-7}, "-1e-07", None),
    ("eps", TRAIN | {"eps": "a"}, "'a'", None),
    ("momentum", TRAIN | {"momentum": None}, "None", None),
    ("momentum", STATS | {"momentum": None}, "None", None),
    ("momentum", TRAIN | {"momentum": "a"}, "'a'", None),
    ("input", NO_STATS | {"input": torch.randn(8)}, "1-D", (IndexError, RuntimeError)),
    ("input", NO_STATS | {"input": torch.randn(())}, "0-D", (IndexError, RuntimeError)),
    ("input", NO_STATS | {"input": torch.randn(1, 2, 3, 1, 2, 1)}, "6-D", RuntimeError),
    ("input", NO_STATS | {"input": X.int()}, "(?i)int", None),
    ("input", NO_STATS | {"input": X.cfloat()}, "(?i)complex", None),
    ("input", NO_STATS | {"input": X.bool()}, "(?i)bool", None),
    (
        "weight",
        NO_STATS | {"weight": torch.ones(8).double(), "bias": torch.ones(8).double()},
        "(?i)double|float64",
        None,
    ),
    ("running_mean", STATS | {"running_mean": torch.zeros(8).double()}, "(?i)double|float64", None),
    ("running_var", TRAIN | {"running_var": torch.zeros(8).double()}, "(?i)double|float64", None),
    ("weight", NO_STATS | {"weight": torch.ones(8).bfloat16(), "bias": torch.ones(8).bfloat16()}, "(?i)bfloat16", None),
    ("weight", NO_STATS | {"input": X.double(), "weight": torch.ones(8), "bias": torch.ones(8)}, "(?i)float", None),
    (
        "weight",
        NO_STATS | {"input": X.bfloat16(), "weight": torch.ones(8).half(), "bias": torch.ones(8).half()},
        "(?i)half|float16",
        None,
    ),
    ("running_mean", TRAIN | {"running_mean": torch.zeros(8, requires_grad=True)}, "grad", None),
    ("running_var", STATS | {"running_var": torch.ones(8, requires_grad=True)}, "grad", None),
    ("weight", NO_STATS | {"weight": meta(8), "bias": meta(8)}, "meta", None),
    ("running_mean", STATS | {"running_mean": meta(8), "running_var": meta(8)}, "meta", None),
    ("running_mean", TRAIN | {"running_mean": meta(8), "running_var": meta(8)}, "meta", None),
    ("residual", TRAIN | {"residual": torch.randn(2, 8, 6, 5)}, r"\[2, 8, 6, 5\].*\[2, 8, 6, 6\]", RuntimeError),
    ("residual", TRAIN | {"residual": torch.randn(1, 8, 1, 1)}, r"\[1, 8, 1, 1\]", RuntimeError),
    ("residual", TRAIN | {"residual": torch.randn(2, 8, 6, 6).double()}, "(?i)double|float64", RuntimeError),
    ("residual", TRAIN | {"residual": meta(2, 8, 6, 6)}, "meta", RuntimeError),
    ("residual", TRAIN | {"residual": 1.0}, "float", TypeError),
    ("input", TRAIN | {"input": None}, "NoneType", (TypeError, AttributeError)),
    ("input", TRAIN | {"input": torch.randn(2, 7, 6, 6)}, "7", None),
]
SIZES_2 = {"kernel_size": 2}
IM2COL = [
    ("input", {"input": torch.randn(6, 6)}, "2-D|3-D", (RuntimeError, IndexError)),
    ("input", {"input": torch.randn(1, 2, 3, 6, 6)}, "5-D", None),
    ("kernel_size", {"kernel_size": 7}, "7.*6", None),
    ("kernel_size", {"kernel_size": 0}, "0", None),
    ("kernel_size", {"kernel_size": (2, -1)}, "2, -1", None),
    ("kernel_size", {"kernel_size": (2, 2, 2)}, r"\(2, 2, 2\)", None),
    ("kernel_size", {"kernel_size": 1.5}, "1.5", None),
    ("stride", {"stride": 0}, "0", None),
    ("dilation", {"dilation": 0}, "0", None),
    ("dilation|kernel_size", {"kernel_size": 3, "dilation": 3}, "3.*6", None),
    ("padding", {"padding": -1}, "-1", None),
    ("input", {"input": X.int()}, "(?i)int", None),
    ("input", {"input": torch.randn(2, 0, 6, 6)}, r"\[2, 0, 6, 6\]", None),
    ("input|size", {"input": torch.randn(2, 8, 0, 6), "padding": 1}, "0, 6", None),
    ("kernel_size", {"kernel_size": 2**62}, str(2**62), None),
    ("input", {"input": [1.0]}, "list", (TypeError, AttributeError)),
]
COL2IM = [
    ("input", {"input": torch.randn(6)}, "1-D", None),
    ("input", {"input": torch.randn(1, 2, 8, 25)}, "4-D", None),
    ("input", {"input": torch.randn(2, 31, 25)}, r"\[2, 31, 25\].*divisible", None),
    ("input", {"input": torch.randn(2, 32, 24)}, "24.*5 \\* 5 = 25", None),
    ("output_size|kernel_size", {"output_size": (1, 1)}, "1, 1", None),
    ("output_size|size", {"output_size": (0, 6)}, "0, 6", None),
    ("output_size|size", {"output_size": (-1, 6)}, "-1, 6", None),
    ("output_size", {"output_size": (6, 6, 6)}, r"\(6, 6, 6\)", None),
    ("kernel_size", {"kernel_size": 0}, "0", None),
    ("stride", {"stride": 0}, "0", None),
    ("dilation", {"dilation": 0}, "0", None),
    ("padding", {"padding": -1}, "-1", None),
    ("input", {"input": COLUMNS.int()}, "(?i)int", None),
    ("input", {"input": torch.randn(2, 0, 25)}, r"\[2, 0, 25\]", None),
    ("input", {"input": torch.randn(2, 32, 0)}, r"\[2, 32, 0\]", None),
]
DEPTHWISE, POINTWISE = torch.randn(8, 1, 3, 3), torch.randn(12, 8, 1, 1)
SEPARABLE = [
    ("input", {"input": torch.randn(6, 6)}, "2-D", RuntimeError),
    ("depthwise_weight", {"depthwise_weight": torch.randn(8, 3, 3)}, "3-D", RuntimeError),
    ("depthwise_weight", {"depthwise_weight": torch.randn(8, 2, 3, 3)}, r"\[8, 2, 3, 3\]", RuntimeError),
    ("depthwise_weight", {"depthwise_weight": torch.randn(9, 1, 3, 3)}, r"\[9, 1, 3, 3\]", RuntimeError),
    ("pointwise_weight", {"pointwise_weight": torch.randn(12, 7, 1, 1)}, r"\[12, 7, 1, 1\]", RuntimeError),
    ("pointwise_weight", {"pointwise_weight": torch.randn(12, 8, 3, 3)}, r"\[12, 8, 3, 3\]", RuntimeError),
    ("pointwise_weight", {"pointwise_weight": torch.randn(12, 8)}, "2-D", RuntimeError),
    ("pointwise_weight", {"pointwise_weight": torch.randn(0, 8, 1, 1)}, r"\[0, 8, 1, 1\]", RuntimeError),
    ("pointwise_weight", {"pointwise_weight": POINTWISE.double()}, "(?i)double|float64", RuntimeError),
    ("depthwise_weight", {"depthwise_weight": DEPTHWISE.half()}, "(?i)half|float16", RuntimeError),
    ("depthwise_scale", {"depthwise_scale": torch.ones(12)}, r"12", RuntimeError),
    ("depthwise_shift", {"depthwise_shift": torch.ones(8, 1)}, r"\[8, 1\]", RuntimeError),
    ("scale", {"scale": torch.ones(8)}, "8", RuntimeError),
    ("shift", {"shift": torch.ones(12).long()}, "(?i)long|int64", RuntimeError),
    ("shift", {"shift": [1.0]}, "list", TypeError),
    ("depthwise_activation", {"depthwise_activation": "gelu"}, "'gelu'", ValueError),
    ("activation", {"activation": "relu6"}, "'relu6'", ValueError),
    ("stride", {"stride": 0}, "0", RuntimeError),
    ("padding", {"padding": -1}, "-1", RuntimeError),
    ("padding", {"padding": "full"}, "'full'", RuntimeError),
    ("dilation", {"dilation": (1, 2, 3)}, r"\(1, 2, 3\)", RuntimeError),
    ("depthwise_weight|weight", {"depthwise_weight": torch.randn(8, 1, 7, 3)}, "7.*6", RuntimeError),
    ("input", {"input": X.int()}, "(?i)int", RuntimeError),
    ("pointwise_weight", {"pointwise_weight": meta(12, 8, 1, 1)}, "meta", RuntimeError),
]

MAX_POOL2D = [
    ("input", {"input": torch.randn(6, 6)}, "2-D", None),
    ("input", {"input": torch.randn(1, 2, 3, 6, 6)}, "5-D", None),
    ("kernel_size", {"kernel_size": 7}, "7.*6", None),
    ("kernel_size", {"kernel_size": 0}, "0", None),
    ("kernel_size", {"kernel_size": (2, -1)}, "2, -1", None),
    ("kernel_size", {"kernel_size": (2, 2, 2)}, r"\(2, 2, 2\)", None),
    ("kernel_size", {"kernel_size": 1.5}, "1.5", None),
    ("kernel_size", {"kernel_size": 2**62}, str(2**62), None),
    ("kernel_size", {"kernel_size": 3, "dilation": 3}, "3.*6", None),
    ("stride", {"stride": 0}, "0", None),
    ("stride", {"stride": (1, -1)}, "1, -1", None),
    ("stride", {"stride": (1, 1, 1)}, r"\(1, 1, 1\)", None),
    ("padding", {"padding": -1}, "-1", None),
    ("padding", {"padding": 2}, "2.*half", None),
    ("padding", {"padding": (0, 2)}, "0, 2.*half", None),
    ("padding", {"padding": "same"}, "'same'", None),
    ("dilation", {"dilation": 0}, "0", None),
    ("ceil_mode", {"ceil_mode": 1.5}, "1.5", None),
    ("activation", {"activation": "gelu"}, "'gelu'.*relu", ValueError),
    ("input", {"input": X.int()}, "(?i)int", NotImplementedError),
    ("input", {"input": X.cfloat()}, "(?i)complex", NotImplementedError),
    ("input", {"input": X.to_sparse()}, "(?i)sparse", (RuntimeError, NotImplementedError)),
    ("input", {"input": torch.randn(2, 0, 6, 6)}, r"\[2, 0, 6, 6\]", None),
    ("input", {"input": torch.randn(2, 8, 0, 6)}, r"\[2, 8, 0, 6\]", None),
    ("input", {"input": None}, "NoneType", None),
    ("input", {"input": [1.0]}, "list", None),
]

OPERATORS = {
    "conv2d": (CONV2D, {"input": X, "weight": W}, F.conv2d),
    "conv_transpose2d": (CONV_TRANSPOSE2D, {"input": X, "weight": torch.randn(8, 12, 3, 3)}, F.conv_transpose2d),
    "batch_norm_relu": (BATCH_NORM_RELU, {"input": X}, F.batch_norm),
    "max_pool2d": (MAX_POOL2D, {"input": X, "kernel_size": 2}, F.max_pool2d),
    "im2col": (IM2COL, {"input": X, "kernel_size": 2}, F.unfold),
    "col2im": (COL2IM, {"input": COLUMNS, "output_size": (6, 6), "kernel_size": 2}, F.fold),
    "separable_conv2d": (SEPARABLE, {"input": X, "depthwise_weight": DEPTHWISE, "pointwise_weight": POINTWISE}, None),
}
CASES = [(op, *case) for op, (cases, _, _) in OPERATORS.items() for case in cases]


def describe(value) -> str:
    if isinstance(value, torch.Tensor):
        return "x".join(map(str, value.shape)) + f" {value.dtype} {value.device}"
    return type(value).__name__ if isinstance(value, numpy.ndarray) else repr(value)


def name_of(case) -> str:
    op, _, changes, _, _ = case
    return f"{op} " + ", ".join(f"{key}={describe(value)}" for key, value in changes.items())


@pytest.mark.parametrize("case", CASES, ids=map(name_of, CASES))
def test_refused(case):
    op, argument, changes, message, expected = case
    _, arguments, peer = OPERATORS[op]
    arguments = arguments | changes
    if expected is None:
        with pytest.raises(Exception) as theirs:  # noqa: PT011 (its type is the question)
            peer(**{key: clone(value) for key, value in arguments.items()})
        expected = theirs.type
    statistics = {key: clone(arguments.get(key)) for key in ("running_mean", "running_var") if key in arguments}
    with pytest.raises(expected) as ours:
        getattr(CF, op)(**(arguments | statistics))
    text = str(ours.value)
    # The second form is torch's own, for a value that doesn't fit the operator's schema.
    head = re.match(rf"convkit\.{op}: |convkit::{op}\(\) Expected a value of type ", text)
    assert head, text
    complaint = text[head.end() :].split("; accepts")[0]
    assert any(re.search(rf"\b{name}\b", complaint) for name in argument.split("|")), f"{argument} is not named: {text}"
    assert re.search(message, text[head.end() :], re.DOTALL), text
    for key, value in statistics.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            assert torch.equal(value, arguments[key]), f"{key} was written to"


def clone(value):
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


@pytest.mark.parametrize(
    "options", ({"momentum": 2.0}, {"momentum": 0.0}, {"eps": 1.0}, {"momentum": 1}, {"eps": 1}), ids=str
)
def test_unusual_but_accepted(options):
    x = torch.randn(3, 8, 4, 4)
    for module, peer in ((CF.batch_norm_relu, False), (F.batch_norm, True)):
        mean, var = torch.zeros(8), torch.ones(8)
        y = module(x, mean, var, training=True, **options)
        results = (y.relu() if peer else y), mean, var
        if not peer:
            ours = results
    torch.testing.assert_close(ours, results)


def test_evaluation_with_eps_zero():
    x, mean, var = torch.randn(3, 8, 4, 4), torch.zeros(8), torch.ones(8)
    torch.testing.assert_close(CF.batch_norm_relu(x, mean, var, eps=0.0), F.batch_norm(x, mean, var, eps=0.0).relu())


# Sizes whose products overflow, and what else could crash: each in a process of its own, with little memory.
# (expression, None for whatever error, else the shape)
NASTY = [
    ("CF.conv2d(x, w, stride=2**62).shape", (2, 12, 1, 1)),
    ("CF.conv2d(x, w, stride=2**31).shape", (2, 12, 1, 1)),
    ("CF.conv2d(x, w, stride=2**63 - 1, padding=1).shape", (2, 12, 1, 1)),
    ("CF.conv2d(x, w, dilation=2**31, padding=2**31).shape", (2, 12, 6, 6)),
    ("CF.conv2d(x, w, dilation=2**20, padding=2**20).shape", (2, 12, 6, 6)),
    ("CF.conv2d(x, one, dilation=2**62).shape", (2, 12, 6, 6)),
    ("CF.conv2d(x, w, residual=torch.zeros(1).expand(2, 12, 4, 4)).shape", (2, 12, 4, 4)),
    ("CF.conv2d(x, w, residual=torch.zeros(1).expand(2, 12, 2**40, 4))", None),
    ("CF.conv2d(x, w, stride=2**64)", None),
    ("CF.conv2d(x, w, stride=-2**63)", None),
    ("CF.conv2d(x, w, padding=2**62)", None),
    ("CF.conv2d(x, w, padding=2**63 - 1)", None),
    ("CF.conv2d(x, w, padding=2**40)", None),
    ("CF.conv2d(x, w, padding=((2**62, 2**62), (0, 0)))", None),
    ("CF.conv2d(x, w, padding=2**31 - 1)", None),
    ("CF.conv2d(x, w, padding=2**20)", None),
    ("CF.conv2d(x, w, dilation=2**62)", None),
    ("CF.conv2d(x, w, dilation=2**62, padding=2**62)", None),
    ("CF.conv2d(x, w, groups=2**62)", None),
    ("CF.conv2d(x, w, groups=2**63)", None),
    ("CF.conv2d(torch.zeros(1).expand(2**20, 8, 2**15, 2**15), w)", None),
    ("CF.conv2d(torch.zeros(1).expand(2**31, 2**31, 1, 1), torch.zeros(1).expand(1, 2**31, 1, 1))", None),
    ("CF.conv2d(torch.zeros(1).expand(1, 2**40, 1, 1), torch.zeros(1).expand(2**20, 2**40, 1, 1))", None),
    ("CF.conv_transpose2d(x, t, stride=2**62)", None),
    ("CF.conv_transpose2d(x, t, stride=2**31)", None),
    ("CF.conv_transpose2d(x, t, stride=2**20)", None),
    ("CF.conv_transpose2d(x, t, dilation=2**62)", None),
    ("CF.conv_transpose2d(x, t, dilation=2**40, padding=2**40 - 2)", None),
    ("CF.conv_transpose2d(x, t, stride=2**62, output_padding=2**62 - 1)", None),
    ("CF.conv_transpose2d(x, t, padding=2**62)", None),
    ("CF.conv_transpose2d(x[..., :1, :1], t, stride=2**62).shape", (2, 12, 3, 3)),
    ("CF.im2col(x, 2, stride=2**62).shape", (2, 32, 1)),
    ("CF.im2col(x, 2, padding=2**62)", None),
    ("CF.im2col(x, 2, padding=2**40)", None),
    ("CF.im2col(x, 2, padding=2**20)", None),
    ("CF.im2col(x, 3, dilation=2**62)", None),
    ("CF.im2col(x, 3, dilation=2**62, padding=2**62)", None),
    ("CF.im2col(x, 2**31)", None),
    ("CF.col2im(c, (2**62, 2**62), 2)", None),
    ("CF.col2im(c, (6, 6), 2, padding=2**62)", None),
    ("CF.col2im(c, (6, 6), 2, dilation=2**62)", None),
    ("CF.col2im(torch.randn(1, 4, 1), (2**31, 2**31), 2, stride=2**62)", None),
    ("CF.max_pool2d(x, 2, stride=2**62).shape", (2, 8, 1, 1)),
    ("CF.max_pool2d(x, 2, stride=2**62, ceil_mode=True).shape", (2, 8, 1, 1)),
    ("CF.max_pool2d(x, 1, dilation=2**62).shape", (2, 8, 6, 6)),
    ("CF.max_pool2d(x, 2**40, padding=2**39, stride=2**62, ceil_mode=True).shape", (2, 8, 1, 1)),
    ("CF.max_pool2d(x, 2**20, padding=2**19).shape", (2, 8, 1, 1)),
    ("CF.max_pool2d(x, 3, dilation=2**20, padding=2**20, stride=2**20).shape", (2, 8, 1, 1)),
    ("CF.max_pool2d(x, 2, stride=2**64)", None),
    ("CF.max_pool2d(x, 2, padding=2**62)", None),
    ("CF.max_pool2d(x, 3, dilation=2**62)", None),
    ("CF.max_pool2d(x, 2**62, padding=2**61).shape", (2, 8, 1, 1)),
    ("ops.max_pool2d(x, [2], [2, 2], [0, 0], [1, 1], False, None, True)", None),
    ("ops.max_pool2d_grad(x, x, [6, 6], [2, 2], [2, 2], [0, 0], [1, 1], False, False)", None),
    ("ops.max_pool2d_grad(z, b, [6], [2, 2], [2, 2], [0, 0], [1, 1], False, False)", None),
    (
        "ops.max_pool2d_grad(z, b[:, :, :2], [6, 6], [2, 2], [2, 2], [0, 0], [1, 1], False, False)",
        None,
    ),
    # Taps that no forward wrote
    (
        "ops.max_pool2d_grad(z, b, [6, 6], [2, 2], [2, 2], [0, 0], [1, 1], False, False).shape",
        (2, 8, 6, 6),
    ),
    ("ops.max_pool2d_pick(x, b, [2, 2], [2, 2], [0, 0], [1, 1], False, False).shape", (2, 8, 3, 3)),
    ("ops.max_pool2d_pick(x, b[:1], [2, 2], [2, 2], [0, 0], [1, 1], False, True)", None),
    ("CF.separable_conv2d(x, d, one, padding=2**40)", None),
    ("CF.separable_conv2d(x, d, one, dilation=2**62)", None),
    ("CF.separable_conv2d(x, d, one, stride=2**62).shape", (2, 12, 1, 1)),
    ("CF.batch_norm_relu(torch.zeros(1).expand(2**31, 8, 2**15, 2**15), None, None, training=True)", None),
    ("ops.conv2d(x, w, None, [1], [0] * 4, [1, 1], 1, None)", None),
    ("ops.conv2d(x, w, None, [1, 1], [0, 0], [1, 1], 1, None)", None),
    ("ops.conv2d(x, w, None, [1, 1], [0] * 4, [1, 1], 1, None, v[:3])", None),
    ("ops.conv2d(x, w, None, [1, 1], [0] * 4, [1, 1], 1, None, None, y[0])", None),
    ("ops.conv2d(x, w, None, [1, 1], [0] * 4, [1, 1], 1, None, None, x)", None),
    ("ops.conv2d(x[0], w, None, [1, 1], [0] * 4, [1, 1], 1, None)", None),
    ("ops.conv2d_input_grad(x, w, [8, 8], [1, 1], [0] * 4, [1, 1], 1, False)", None),
    ("ops.conv2d_input_grad(y, w, [9, 8], [1, 1], [0] * 4, [1, 1], 1, False)", None),
    ("ops.conv2d_input_grad(y, w, [6], [1, 1], [0] * 4, [1, 1], 1, False)", None),
    ("ops.conv2d_input_grad(y, w, [2**62, 6], [1, 1], [0] * 4, [1, 1], 1, False)", None),
    ("ops.conv2d_input_grad(y, w[:, :, :, 0], [6, 6], [1, 1], [0] * 4, [1, 1], 1, False)", None),
    ("ops.conv2d_weight_grad(x, x, [12, 3, 3], [1, 1], [0] * 4, [1, 1], 1, False)", None),
    ("ops.conv2d_weight_grad(y, x, [12, 4, 3], [1, 1], [0] * 4, [1, 1], 1, False)", None),
    ("ops.conv2d_weight_grad(y, x, [12, 3], [1, 1], [0] * 4, [1, 1], 1, False)", None),
    ("ops.conv2d_weight_grad(y, x, [12, 3, 3], [1, 1], [0] * 4, [1, 1], 5, False)", None),
    ("ops.conv2d_weight_grad(y, x, [12, 2**62, 3], [1, 1], [0] * 4, [1, 1], 1, False)", None),
    ("ops.conv2d_weight_grad(y.double(), x, [12, 3, 3], [1, 1], [0] * 4, [1, 1], 1, False)", None),
    ("ops.conv_transpose2d(x, t, None, [1, 1], [0] * 4, [0, 0], [1, 1], 1)", None),
    ("ops.channel_sum(x[0])", None),
    ("ops.channel_sum(x.int())", None),
    ("ops.batch_norm_relu(x, None, None, None, v, None, 1e-5, False)", None),
    ("ops.batch_norm_relu(x, None, v[:7], None, None, None, 1e-5, False)", None),
    ("ops.batch_norm_relu(x, x[:1], None, None, None, None, 1e-5, True)", None),
    ("ops.batch_norm_relu_grad(x, x, None, None, v[:3], v, None, 1e-5, True, [True] * 4)", None),
    ("ops.batch_norm_relu_grad(x[:1], x, None, None, v, v, None, 1e-5, True, [True] * 4)", None),
    ("ops.batch_norm_relu_grad(x, x, v, v, v, v, torch.zeros(3, dtype=torch.uint8), 1e-5, True, [True] * 4)", None),
    ("ops.update_running_stats_(v, v[:3], v, v, 0.1, 72)", None),
    ("ops.update_running_stats_(v.int(), v.int(), v, v, 0.1, 72)", None),
    ("ops.im2col(x, [2], [1, 1], [0, 0], [1, 1])", None),
    ("ops.col2im(c, [6], [2, 2], [1, 1], [0, 0], [1, 1])", None),
    ("ops.separable_conv2d(x, d, one[:, :3], None, None, None, None, None, None, [1, 1], [0] * 4, [1, 1])", None),
]
PROGRAM = """
import resource, sys
import torch
import convkit.functional as CF
ops = torch.ops.convkit
x, w, t = torch.randn(2, 8, 6, 6), torch.randn(12, 8, 3, 3), torch.randn(8, 12, 3, 3)
one, d, c = torch.randn(12, 8, 1, 1), torch.randn(8, 1, 3, 3), torch.randn(2, 32, 25)
v, y = torch.rand(8), CF.conv2d(x, w)
z, b = torch.randn(2, 8, 3, 3), torch.full((2, 8, 3, 3), 200, dtype=torch.uint8)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**31  # what is there, and 2 GiB
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for line in sys.stdin:
    number, _, expression = line.strip().partition(" ")
    print(number, "begins", flush=True)
    try:
        result = eval(expression)
        print(number, "gives", tuple(result) if isinstance(result, torch.Size) else
              result if not isinstance(result, torch.Tensor) else f"a tensor {tuple(result.shape)}", flush=True)
    except Exception as error:
        print(number, "raises", type(error).__name__, " ".join(str(error).split()), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[int, str]:
    """What came of each expression: "gives …", "raises …", or how the process ended."""
    found: dict[int, str] = {}
    while len(found) < len(NASTY):
        lines = [f"{i} {expression}" for i, (expression, _) in enumerate(NASTY) if i not in found]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input="\n".join(lines),
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        begun = None
        for line in done.stdout.splitlines():
            number, _, outcome = line.partition(" ")
            begun = int(number)
            found[begun] = outcome
        assert begun is not None, done.stderr
        if found[begun] == "begins":
            found[begun] = f"ended the process with {done.returncode}: {done.stderr[-500:]}"
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory as Linux does")
@pytest.mark.parametrize("number", range(len(NASTY)), ids=[expression for expression, _ in NASTY])
def test_nothing_crashes(number: int, outcomes):
    expression, shape = NASTY[number]
    outcome = outcomes[number]
    if shape is not None:
        assert outcome == f"gives {shape}", f"{expression} {outcome}"
    else:
        errors = "RuntimeError|ValueError|TypeError|OverflowError|NotImplementedError|MemoryError"
        assert re.match(rf"raises ({errors}) \S", outcome), f"{expression} {outcome}"
