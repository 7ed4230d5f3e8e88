"""Memory formats and strides: PyTorch's own, for every combination of layouts and dtypes."""

import pytest
import torch
from kernel_checks import (
    DTYPES,
    LAYOUTS,
    Sample,
    batch_norm_sample,
    conv_sample,
    im2col_sample,
    separable_sample,
    transpose_sample,
)

import convkit.functional as CF
from convkit import reference
from convkit.bench.problems import BatchNormProblem, ConvProblem

NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
CONVOLUTIONS = {
    "dense": "n2c8h6w5k12r3s3p1",
    "one image": "n1c8h6w5k12r3s3p1",
    "1x1": "n2c8h6w5k12r1s1",
    "strided": "n2c8h6w5k12r3s3u2p1",
    "dilated": "n2c8h6w5k12r3s3p2d2",
    "grouped": "n2c8h6w5k12r3s3p1g2",
    "depthwise": "n2c8h6w5k8r3s3p1g8",
    "multiplier": "n2c8h6w5k16r3s3p1g8",
    "one channel": "n2c1h6w5k12r3s3p1",
    "one filter": "n2c8h6w5k1r3s3p1",
    "one pixel": "n2c8h1w1k12r3s3p1",
    "to one pixel": "n2c8h3w3k12r3s3",
    "one row": "n2c8h1w5k12r1s3",
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of tiny calls: waking a second thread takes longer than they do."""
    torch.set_num_threads(1)


def strides(t: torch.Tensor) -> list[int]:
    """Strides of the dimensions that have any: that of a dimension of size 1 says nothing."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]


def same_format(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, what
    assert strides(ours) == strides(theirs), f"{what}: strides {ours.stride()}, PyTorch's {theirs.stride()}"


def compare(sample: Sample, what: str) -> None:
    """Output and gradients, these for a dense gradient of the output, an expanded one, and one in the other format."""
    tensors = {name: t.detach().requires_grad_() for name, t in sample.tensors.items()}
    ours, theirs = sample(CF, **tensors), sample(reference, **tensors)
    same_format(ours, theirs, f"{what}: output")
    other = theirs.detach()
    if other.dim() == 4:
        is_last = other.is_contiguous(memory_format=torch.channels_last)
        other = other.contiguous(memory_format=torch.contiguous_format if is_last else torch.channels_last)
    for kind, grad in (
        ("dense", torch.ones_like(theirs)),
        ("expanded", torch.ones((), dtype=theirs.dtype).expand(theirs.shape)),
        ("other", torch.ones_like(other)),
    ):
        pair = (torch.autograd.grad(y, list(tensors.values()), grad, retain_graph=True) for y in (ours, theirs))
        for name, a, b in zip(tensors, *pair, strict=True):
            same_format(a, b, f"{what}: gradient of {name} from a {kind} gradient")


@pytest.mark.parametrize("weight_layout", ("contiguous", "channels_last", "sliced"))
@pytest.mark.parametrize("input_layout", LAYOUTS)
@pytest.mark.parametrize("make", (conv_sample, transpose_sample))
def test_convolutions(make, input_layout: str, weight_layout: str):
    for dtype in DTYPES:
        for name, text in CONVOLUTIONS.items():
            sample = make(ConvProblem.parse(text).replace(dtype=NAMES[dtype]))
            sample.tensors["input"] = LAYOUTS[input_layout](sample.tensors["input"])
            sample.tensors["weight"] = LAYOUTS[weight_layout](sample.tensors["weight"])
            compare(sample, f"{name} {dtype}")


@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("input_layout", ("contiguous", "channels_last", "sliced"))
def test_convolutions_with_a_residual(input_layout: str, residual_layout: str):
    """The output has the format that it has without."""
    for dtype in DTYPES:
        for name in ("dense", "1x1", "strided", "grouped", "depthwise", "multiplier"):
            problem = ConvProblem.parse(CONVOLUTIONS[name]).replace(dtype=NAMES[dtype])
            sample = conv_sample(problem, activation="relu", scale=True, residual=True)
            for which, layout in (("input", input_layout), ("residual", residual_layout)):
                sample.tensors[which] = LAYOUTS[layout](sample.tensors[which])
            compare(sample, f"{name} {dtype}")


@pytest.mark.parametrize("weight_layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("input_layout", ("contiguous", "channels_last", "channel_slice", "transposed"))
def test_unbatched_and_one_sided(input_layout: str, weight_layout: str):
    for padding in ((1, 0), "same", ((0, 1), (1, 0))):
        sample = conv_sample(ConvProblem.parse("n2c8h6w5k12r2s2"))
        x = LAYOUTS[input_layout](sample.tensors["input"])
        sample.options["padding"] = padding
        sample.tensors["weight"] = LAYOUTS[weight_layout](sample.tensors["weight"])
        for value, what in ((x, "batched"), (x[0], "unbatched")):
            sample.tensors["input"] = value
            compare(sample, f"{what}, padding {padding}")


@pytest.mark.parametrize("shape", ((2, 8, 6, 5), (1, 8, 6, 5), (2, 1, 6, 5), (2, 8, 1, 1), (2, 8, 1, 5), (1, 8, 2, 1)))
@pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))
def test_batch_norm_relu(shape, training: bool):
    for dtype in DTYPES:
        for input_layout in LAYOUTS:
            sample = batch_norm_sample(BatchNormProblem(*shape, dtype=NAMES[dtype]), training=training)
            sample.tensors["input"] = LAYOUTS[input_layout](sample.tensors["input"])
            compare(sample, f"{input_layout} {dtype}")
            for residual_layout in ("contiguous", "channels_last", "sliced"):
                sample.tensors["residual"] = LAYOUTS[residual_layout](torch.randn(shape).to(dtype))
                compare(sample, f"{input_layout} {dtype} + {residual_layout}")


@pytest.mark.parametrize("shape", ((6, 8), (3, 8, 5), (3, 8, 2, 3, 4)), ids=str)
@pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))
def test_batch_norm_relu_of_other_dimensions(shape, training: bool):
    x = torch.randn(shape)
    for value in (x, x.transpose(0, -1).contiguous().transpose(0, -1), x.movedim(1, -1).contiguous().movedim(-1, 1)):
        sample = batch_norm_sample(BatchNormProblem(1, 8, 1, 2), training=training)
        for residual in (None, torch.randn(shape)):
            tensors = sample.tensors | {"input": value} | ({} if residual is None else {"residual": residual})
            named = Sample(sample.op, tensors, sample.options, sample.buffers)
            ours, theirs = named.evaluate(CF), named.evaluate(reference)
            for name, right in theirs.items():
                torch.testing.assert_close(ours[name], right, rtol=1e-4, atol=1e-5, msg=name)
            assert ours["output"].is_contiguous() == theirs["output"].is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_are_contiguous(layout: str):
    for dtype in DTYPES:
        sample = im2col_sample(ConvProblem.parse("n2c8h6w5k1r3s2p1").replace(dtype=NAMES[dtype]))
        sample.tensors["input"] = LAYOUTS[layout](sample.tensors["input"])
        compare(sample, f"im2col {dtype}")
        columns = sample().detach()
        for value in (columns, columns.mT.contiguous().mT):
            compare(Sample("col2im", {"input": value}, sample.options | {"output_size": (6, 5)}), f"col2im {dtype}")


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "sliced", "channel_slice"))
def test_separable_conv2d(layout: str):
    """As the two convolutions one after the other would give; in one pass and with gradients alike."""
    for dtype in DTYPES:
        sample = separable_sample(ConvProblem.parse("n2c8h6w5k8r3s3p1g8").replace(dtype=NAMES[dtype]), 12, affines=())
        sample.tensors["input"] = LAYOUTS[layout](sample.tensors["input"])
        compare(sample, f"{layout} {dtype}")
        same_format(sample(CF), sample(reference), f"{layout} {dtype} without gradients")
