"""NaN and infinities flow through as in PyTorch; empty batches, no channels."""

import itertools

import pytest
import torch
from kernel_checks import (
    Sample,
    batch_norm_sample,
    col2im_sample,
    conv_sample,
    im2col_sample,
    separable_sample,
    transpose_sample,
)

import convkit.functional as CF
from convkit import reference
from convkit.bench.problems import BatchNormProblem, ConvProblem

NAN, INF = float("nan"), float("inf")
DTYPES = ("f64", "f32", "bf16", "f16")


def assert_flows_as_in_pytorch(sample: Sample, grad: torch.Tensor, what: str) -> None:
    """NaN where float64 PyTorch has NaN, the same infinity where it has one, and close elsewhere.

    float64, because the kernels that PyTorch takes for the other dtypes don't agree with each other: in bfloat16 a NaN
    reaches outputs that it has no part in, and in float32 some treat padding as zeros and some as nothing at all.
    """
    ours, right = sample.evaluate(CF, grad), sample.map(torch.Tensor.double).evaluate(reference, grad.double())
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[grad.dtype]
    for name, value in right.items():
        finite = value[value.isfinite()].abs()
        largest = finite.max().item() if finite.numel() else 1.0
        torch.testing.assert_close(
            *(ours[name].double(), value),
            equal_nan=True,
            rtol=tolerance,
            atol=tolerance * max(1.0, largest),
            msg=lambda text, name=name: f"{what}: {name}: {text}",
        )


def samples(dtype: str, layout: str) -> dict[str, Sample]:
    form = {"dtype": dtype, "layout": layout}

    def conv(text: str) -> ConvProblem:
        return ConvProblem.parse(text).replace(**form)

    return {
        "dense": conv_sample(conv("n2c5h7w8k18r3s3p1")),
        "dense relu": conv_sample(conv("n2c17h6w6k5r3s3u2p1"), activation="relu"),
        "dense epilogue": conv_sample(conv("n2c5h7w8k18r3s3p1"), activation="relu", scale=True, residual=True),
        "1x1": conv_sample(conv("n2c9h5w5k17r1s1"), activation="relu", residual=True),
        "few channels": conv_sample(conv("n2c1h9w9k5r5s5p2"), scale=True),
        "groups": conv_sample(conv("n2c32h7w8k32r3s3p1g4"), activation="relu", scale=True, residual=True),
        "depthwise": conv_sample(conv("n2c18h7w8k18r3s3p1g18"), activation="relu", scale=True, residual=True),
        "transposed": transpose_sample(conv("n2c6h8w8k7r3s3u2p1")),
        "separable": separable_sample(conv("n2c6h7w7k6r3s3p1g6"), 5, affines=()),
        "im2col": im2col_sample(conv("n2c3h6w6k1r3s3p1")),
        "col2im": col2im_sample(conv("n2c3h6w6k1r3s3p1")),
    }


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", (NAN, INF, -INF))
def test_one_bad_value_in_the_input_or_residual(bad: float, dtype: str, layout: str):
    """It reaches the outputs and weight gradients that it reaches in PyTorch, and no others."""
    for name, sample in samples(dtype, layout).items():
        for which, position in itertools.product(("input", "residual"), ((0, 0, 0, 0), (1, -1, 2, 3))):
            if which not in sample.tensors:
                continue
            x = sample.tensors[which].clone(memory_format=torch.preserve_format)
            x[position[: x.dim()]] = bad
            changed = Sample(sample.op, sample.tensors | {which: x}, sample.options)
            grad = torch.randn_like(sample())
            assert_flows_as_in_pytorch(changed, grad, f"{name}, bad value of {which} at {position}")


@pytest.mark.parametrize("bad", (NAN, INF))
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_value_in_the_gradient(bad: float, dtype: str):
    for name, sample in samples(dtype, "nchw").items():
        grad = torch.randn_like(sample())
        grad[(1,) + (2,) * (grad.dim() - 1)] = bad
        assert_flows_as_in_pytorch(sample, grad, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_parameter_spoils_its_channel_only(dtype: str):
    for name, sample in samples(dtype, "nchw").items():
        if "weight" not in sample.tensors:
            continue
        for which, place in itertools.product(("bias", "weight", "scale"), (0, -1)):
            if which not in sample.tensors:
                continue
            value = sample.tensors[which].clone()
            value[place] = NAN
            changed = Sample(sample.op, sample.tensors | {which: value}, sample.options)
            assert_flows_as_in_pytorch(changed, torch.randn_like(sample()), f"{name}, bad {which}")


def test_relu_of_nan_is_nan_and_lets_the_gradient_through():
    x = torch.tensor([NAN, -1.0, 0.0, -0.0, 1.0, INF, -INF]).view(1, 1, 1, 7)
    one = torch.ones(1, 1, 1, 1)
    for sample in (
        Sample("conv2d", {"input": x, "weight": one}, {"activation": "relu"}),
        Sample(
            "separable_conv2d", {"input": x, "depthwise_weight": one, "pointwise_weight": one}, {"activation": "relu"}
        ),
    ):
        assert sample().flatten().tolist()[1:] == [0.0, 0.0, 0.0, 1.0, INF, 0.0]
        assert_flows_as_in_pytorch(sample, torch.ones_like(x), sample.op)


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("residual", (False, True), ids=("", "residual"))
@pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", (NAN, INF, -INF))
def test_batch_norm_relu(bad: float, dtype: str, training: bool, residual: bool, layout: str):
    """A bad value spoils its channel, its statistics included, and no other."""
    problem = BatchNormProblem(3, 19, 4, 5, dtype, layout, residual)
    sample = batch_norm_sample(problem, training=training)
    # An infinite weight is no data; what PyTorch makes of it depends on how it has folded it with the mean.
    for which in sample.tensors if bad != bad else ("input", "residual") if residual else ("input",):
        value = sample.tensors[which].clone(memory_format=torch.preserve_format)
        value[(1, 17, 2, 3) if value.dim() == 4 else 17] = bad
        changed = Sample(sample.op, sample.tensors | {which: value}, sample.options, sample.buffers)
        grad = torch.randn_like(value) if value.dim() == 4 else torch.randn(problem.shape).to(problem.torch_dtype)
        assert_flows_as_in_pytorch(changed, grad, f"bad {which}")


@pytest.mark.parametrize("value", (0.0, 3.25, -1e4))
@pytest.mark.parametrize("dtype", ("f64", "f32", "bf16"))
def test_batch_norm_of_a_constant_channel(value: float, dtype: str):
    """No variance at all: x - mean is exactly zero, so the output is the bias."""
    problem = BatchNormProblem(3, 5, 4, 5, dtype, "nhwc")
    sample = batch_norm_sample(problem, tracking=False)
    sample.tensors["input"] = torch.full(problem.shape, value, dtype=problem.torch_dtype)
    y = sample()
    torch.testing.assert_close(y, torch.relu(sample.tensors["bias"]).view(1, -1, 1, 1).expand(y.shape))


@pytest.mark.parametrize("offset", (1e3, 1e4))
def test_variance_of_values_far_from_zero(offset: float):
    """|mean| much larger than the deviation: sums of squares would lose all digits."""
    x = torch.randn(8, 6, 9, 10, generator=torch.Generator().manual_seed(1)) + offset
    options = {"running_mean": None, "running_var": None, "training": True}
    for value in (x, x.contiguous(memory_format=torch.channels_last)):
        right = reference.batch_norm_relu(value.double(), **options)
        ours = (CF.batch_norm_relu(value, **options) - right).abs().max()
        peer = (reference.batch_norm_relu(value, **options) - right).abs().max()
        assert ours <= 2 * peer + 1e-6


def empty_samples() -> dict[str, Sample]:
    w, b = torch.randn(6, 4, 3, 3), torch.randn(6)
    x, depthwise = torch.randn(0, 4, 7, 5), torch.randn(4, 1, 3, 3)
    norm = {"weight": torch.rand(4), "bias": torch.rand(4)}
    none = {"running_mean": None, "running_var": None, "training": True}
    return {
        "no images": Sample("conv2d", {"input": x, "weight": w, "bias": b}, {"padding": 1}),
        "no images, relu": Sample("conv2d", {"input": x, "weight": w, "bias": b}, {"activation": "relu"}),
        "no images, epilogue": Sample(
            "conv2d", {"input": x, "weight": w, "bias": b, "scale": b, "residual": torch.randn(0, 6, 5, 3)}
        ),
        "no images, depthwise": Sample("conv2d", {"input": x, "weight": depthwise}, {"groups": 4, "stride": 2}),
        "no images, channels_last": Sample(
            "conv2d", {"input": x.to(memory_format=torch.channels_last), "weight": w}, {"padding": ((0, 1), (2, 0))}
        ),
        "no channels": Sample(
            "conv2d", {"input": torch.randn(2, 0, 7, 5), "weight": torch.randn(6, 0, 3, 3), "bias": b}
        ),
        "no channels, unbatched": Sample("conv2d", {"input": torch.randn(0, 7, 5), "weight": torch.randn(6, 0, 3, 3)}),
        "no images, transposed": Sample(
            "conv_transpose2d", {"input": x, "weight": w.transpose(0, 1), "bias": b}, {"stride": 2, "output_padding": 1}
        ),
        "no images, separable": Sample(
            "separable_conv2d",
            {"input": x, "depthwise_weight": depthwise, "pointwise_weight": torch.randn(6, 4, 1, 1), "shift": b},
            {"activation": "relu"},
        ),
        "no images, batch norm": Sample("batch_norm_relu", {"input": x, **norm}, none),
        "no images, batch norm, residual": Sample("batch_norm_relu", {"input": x, "residual": x, **norm}, none),
        "no images, batch norm, eval": Sample(
            "batch_norm_relu", {"input": x, **norm}, {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
        ),
        "no rows, batch norm": Sample("batch_norm_relu", {"input": torch.randn(2, 4, 0, 5), **norm}, none),
        "no channels, batch norm": Sample("batch_norm_relu", {"input": torch.randn(2, 0, 3, 3)}, none),
        "no images, max pool": Sample("max_pool2d", {"input": x}, {"kernel_size": 2, "activation": "relu"}),
        "no images, im2col": Sample("im2col", {"input": x}, {"kernel_size": 3}),
        "no images, col2im": Sample(
            "col2im", {"input": torch.randn(0, 36, 15)}, {"output_size": (7, 5), "kernel_size": 3}
        ),
    }


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", empty_samples())
def test_empty(name: str, dtype: torch.dtype):
    """Shapes, dtypes and gradients as PyTorch's: those of parameters are zeros."""
    sample = empty_samples()[name].map(lambda t: t.to(dtype))
    sample.options.update({key: v.to(dtype) for key, v in sample.options.items() if isinstance(v, torch.Tensor)})
    ours, theirs = sample.evaluate(CF), sample.evaluate(reference)
    for which, right in theirs.items():
        assert ours[which].shape == right.shape and ours[which].dtype == right.dtype, which
        assert torch.equal(ours[which], right), which


def test_convolution_without_channels_and_with_a_scale():
    """Without channels the result has none either, PyTorch's rule, and nothing to scale."""
    x, w, scale = torch.randn(2, 0, 7, 5), torch.randn(6, 0, 3, 3), torch.rand(6, requires_grad=True)
    y = CF.conv2d(x, w, scale=scale)
    assert y.shape == (2, 0, 5, 3)
    y.sum().backward()
    assert scale.grad.tolist() == [0.0] * 6


def test_batch_norm_without_channels_and_with_parameters():
    """PyTorch looks at the first weight, and fails; there is nothing to do."""
    none = torch.zeros(0, requires_grad=True)
    x = torch.randn(2, 0, 3, 3, requires_grad=True)
    y = CF.batch_norm_relu(x, torch.zeros(0), torch.ones(0), none, none, training=True)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape and none.grad.shape == (0,)


def test_an_empty_batch_leaves_the_running_statistics():
    mean, var = torch.full((4,), 2.0), torch.full((4,), 3.0)
    CF.batch_norm_relu(torch.randn(0, 4, 3, 3), mean, var, training=True)
    assert mean.tolist() == [2.0] * 4 and var.tolist() == [3.0] * 4
