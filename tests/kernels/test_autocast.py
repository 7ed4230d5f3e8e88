"""Autocast on the CPU: the dtypes of outputs and gradients are PyTorch's."""

import pytest
import torch
from kernel_checks import Sample, small_samples

import convkit.functional as CF
from convkit import reference

NAMES = (
    "conv2d",
    "conv2d relu",
    "conv2d depthwise",
    "conv_transpose2d",
    "separable_conv2d plain",
    "batch_norm_relu training",
    "batch_norm_relu eval",
    "batch_norm_relu training no affine",
    "max_pool2d relu",
    "im2col",
    "col2im",
)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def run(module, sample: Sample, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return sample.evaluate(module)


def compare(sample: Sample, dtype: torch.dtype | None) -> None:
    ours, theirs = run(CF, sample, dtype), run(reference, sample, dtype)
    for name, right in theirs.items():
        assert ours[name].dtype == right.dtype, f"{name}: {ours[name].dtype}, PyTorch's {right.dtype}"
        tolerance = TOLERANCE[dtype or right.dtype]
        largest = right.abs().max().item()
        assert (ours[name] - right).abs().max() <= tolerance * max(1.0, largest), name


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("name", NAMES)
def test_float32_inputs(name: str, layout: str, dtype: torch.dtype):
    compare(small_samples("f32", layout)[name], dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("separable_conv2d", "conv2d epilogue", "conv2d residual"))
def test_an_epilogue_is_lowered_as_a_whole(name: str, dtype: torch.dtype):
    """float32 scales, shifts, residuals don't raise the output to float32, as they would between separate operators."""
    sample = small_samples("f32")[name]
    ours, right = run(CF, sample, dtype), sample.evaluate(reference)
    assert ours["output"].dtype == dtype
    for name, value in right.items():
        assert name == "output" or ours[name].dtype == torch.float32, name
        assert (ours[name] - value).abs().max() <= 2 * TOLERANCE[dtype] * value.abs().max(), name


@pytest.mark.parametrize("name", NAMES)
def test_float64_inputs_stay_float64(name: str):
    compare(small_samples("f64")[name], torch.bfloat16)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("conv2d", "conv_transpose2d", "conv2d relu", "separable_conv2d plain", "im2col"))
def test_low_precision_input_and_float32_weights(name: str, dtype: torch.dtype):
    """As the second layer of a network meets them."""
    sample = small_samples("f32")[name]
    tensors = sample.tensors | {"input": sample.tensors["input"].to(dtype)}
    compare(Sample(sample.op, tensors, sample.options), dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))
@pytest.mark.parametrize("residual", (False, True), ids=("", "residual"))
def test_batch_norm_relu_of_a_low_precision_input_with_float32_parameters(dtype, training, residual):
    samples = small_samples("f32")
    sample = samples[f"batch_norm_relu {'training' if training else 'eval'}{' residual' if residual else ''}"]
    images = {key: t.to(dtype) for key, t in sample.tensors.items() if t.dim() == 4}
    compare(Sample(sample.op, sample.tensors | images, sample.options, sample.buffers), dtype)


def test_nested_and_disabled():
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert CF.conv2d(x, w).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert CF.conv2d(x, w).dtype == torch.float16
        with torch.autocast("cpu", enabled=False):
            assert CF.conv2d(x, w).dtype == torch.float32
        assert CF.conv2d(x, w).dtype == torch.bfloat16
    assert CF.conv2d(x, w).dtype == torch.float32


def test_a_training_step():
    """A small network, its loss and the gradients of its float32 parameters, against the same step in PyTorch."""
    torch.manual_seed(1)
    x = torch.randn(4, 3, 8, 8)
    first, second = torch.randn(8, 3, 3, 3) / 5, torch.randn(8, 8, 3, 3) / 8
    scale, shift = torch.rand(8) + 0.5, torch.randn(8)

    def step(module, low: bool = True):
        leaves = [t.clone().requires_grad_() for t in (first, second, scale, shift)]
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = module.conv2d(x, leaves[0], padding=1)
            y = module.batch_norm_relu(y, torch.zeros(8), torch.ones(8), leaves[2], leaves[3], training=True)
            y = module.conv2d(y, leaves[1], padding=1, activation="relu")
            loss = y.float().square().mean()
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    for ours, theirs, right in zip(step(CF), step(reference), step(reference, low=False), strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        error, peer = (ours - right).abs().max(), (theirs - right).abs().max()
        assert error <= 2 * peer + 1e-2 * right.abs().max()


@pytest.mark.parametrize("name", ("conv2d", "batch_norm_relu training", "separable_conv2d plain"))
def test_compiled(name: str):
    sample = small_samples("f32")[name]
    torch._dynamo.reset()

    def call(tensors, buffers):
        return getattr(CF, sample.op)(**tensors, **buffers, **sample.options)

    def run(function):
        buffers = {key: t.clone() for key, t in sample.buffers.items()}
        with torch.autocast("cpu", torch.bfloat16):
            return function(sample.tensors, buffers)

    ours, right = run(torch.compile(call, fullgraph=True, backend="aot_eager")), run(call)
    assert ours.dtype == right.dtype and torch.equal(ours, right)
