"""What only the CUDA kernels have: other devices, little memory, tiles and bands beyond the problem table's."""

import dataclasses

import emulated
import pytest
import torch
from kernel_checks import batch_norm_sample, check_accuracy, conv_sample, separable_sample, transpose_sample

import convkit.functional as CF
from convkit import _C
from convkit.bench.problems import BatchNormProblem, ConvProblem

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

H100 = 9, 0, 132, 227 << 10
FORMS = [("f64", "nchw"), ("f32", "nhwc"), ("f32", "nchw"), ("bf16", "nhwc"), ("bf16", "nchw"), ("f16", "nhwc")]


@pytest.fixture
def module():
    with emulated.installed() as module:
        yield module
        module.set_device(*H100)
        module.set_most_workspace_bytes(2**62)


def conv(text: str, generator=None, dtype: str = "f32", layout: str = "nhwc", **options):
    return conv_sample(ConvProblem.parse(text).replace(dtype=dtype, layout=layout), generator, **options)


# Depthwise: several tiles in both directions and blocks of channels; bands of large planes; padding of either parity.
@pytest.mark.parametrize(("dtype", "layout"), FORMS, ids="-".join)
@pytest.mark.parametrize(
    "text",
    (
        "n2c80h21w39k80r3s3p1g80",
        "n1c16h70w71k16r3s3p1g16",
        "n2c24h41w38k24r3s3u2p1g24",
        "n1c8h90w88k8r3s3u2p0x1x0x1g8",
        "n1c16h40w41k16r5s5p2g16",
        "n2c8h33w35k8r5s5u2p2g8",
        "n1c8h80w82k8r7s7p3g8",
        "n1c8h31w50k8r7s7u2p3x2g8",
        "n1c8h20w20k8r5s5p7g8",
        "n2c8h2w3k8r5s5u2p2g8",
        "n1c8h1w300k8r3s3u2p1g8",
        "n1c3h300w9k3r7s7p3g3",
    ),
)
def test_depthwise_tiles(module, text: str, dtype: str, layout: str):
    check_accuracy(lambda g: conv(text, g, dtype, layout, activation="relu"))
    if ConvProblem.parse(text).transposed_output_padding is not None:
        problem = ConvProblem.parse(text).replace(dtype=dtype, layout=layout)
        check_accuracy(lambda g: transpose_sample(problem, g))


# Batch norm: several pieces of a channel, several blocks of channels, rows that are no multiple of 8.
@pytest.mark.parametrize(("dtype", "layout"), FORMS, ids="-".join)
@pytest.mark.parametrize("text", ("n2c320h9w11", "n3c264h8w8+res", "n2c3h80w96+res", "n1c2h150w151+res", "n9c40h7w7"))
def test_batch_norm_tiles(module, text: str, dtype: str, layout: str):
    problem = BatchNormProblem.parse(text).replace(dtype=dtype, layout=layout)
    for training in (False, True):
        check_accuracy(lambda g, training=training: batch_norm_sample(problem, g, training))


@pytest.mark.parametrize("device", ((8, 0, 108, 163 << 10), (8, 6, 2, 99 << 10), (9, 0, 1, 48 << 10)), ids=str)
def test_other_devices_have_other_plans(module, device):
    module.set_device(*device)
    for dtype, layout in FORMS:
        for text in (
            "n2c80h21w39k80r3s3p1g80",
            "n2c16h20w21k16r7s7u2p3g16",
            "n2c17h9w8k18r3s3p1",
            "n3c6h8w8k12r3s3p1g6",
        ):
            check_accuracy(lambda g, t=text, d=dtype, f=layout: conv(t, g, d, f))
        for text in ("n4c72h9w8+res", "n5c3h20w20"):
            problem = BatchNormProblem.parse(text).replace(dtype=dtype, layout=layout)
            check_accuracy(lambda g, p=problem: batch_norm_sample(p, g))


@pytest.mark.parametrize(
    ("device", "message"),
    (
        ((7, 5, 40, 64 << 10), r"conv2d: input: got a tensor on .*compute capability 7\.5; accepts 8\.0 and newer"),
        ((10, 0, 148, 227 << 10), r"built for 80,90a, this GPU .* is 10\.0: rebuild with TORCH_CUDA_ARCH_LIST=10\.0"),
    ),
)
def test_an_unsupported_device_is_refused(module, device, message: str):
    CF.conv2d(torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3))  # or installed() misses a kernel
    module.set_device(*device)
    with pytest.raises(NotImplementedError, match=message):
        CF.conv2d(torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3))


SUMS = [
    ("dense", lambda g: conv("n4c6h12w12k8r3s3p1", g)),
    ("depthwise", lambda g: conv("n4c16h12w12k16r3s3p1g16", g)),
    ("contiguous", lambda g: conv("n4c16h12w12k16r3s3p1g16", g, layout="nchw")),
    ("batch norm", lambda g: batch_norm_sample(BatchNormProblem.parse("n4c16h24w24_f32_nhwc"), g)),
]


@pytest.mark.parametrize("make", [make for _, make in SUMS], ids=[name for name, _ in SUMS])
def test_little_memory_takes_a_smaller_plan(module, make):
    sample = make(torch.Generator().manual_seed(0))
    right = sample.evaluate(CF)
    module.set_most_workspace_bytes(8192)
    check_accuracy(make)
    for name, value in sample.evaluate(CF).items():  # other splits, other roundings, no other result
        torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-4)
    if "depthwise" in str(sample) or sample.op == "batch_norm_relu":
        module.set_most_workspace_bytes(16)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            sample.evaluate(CF)


@pytest.mark.parametrize("make", [make for _, make in SUMS], ids=[name for name, _ in SUMS])
def test_the_same_bits_again(module, make):
    sample = make(torch.Generator().manual_seed(0))
    first = sample.evaluate(CF)
    for name, value in sample.evaluate(CF).items():
        assert torch.equal(value, first[name]), name


def test_tensors_of_two_devices(module):
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3, device="meta")
    CF.conv2d(x, w.to("cpu", copy=True) if w.device.type == "cpu" else torch.randn(2, 2, 3, 3))
    for call in (lambda: CF.conv2d(x, w), lambda: CF.batch_norm_relu(x, None, None, w[:, 0, 0, 0], training=True)):
        with pytest.raises(RuntimeError, match=r"weight: got a tensor on meta.*cpu"):
            call()


def test_plans_are_printed_for_devices_that_are_not_there():
    text = _C.plan_cuda("n32c64h56w56k64r3s3u1p1d1g64_bf16_nhwc", "wgrad")
    assert "depthwise_nhwc_3x3u1" in text and "splits" in text and "sm_90 with 132" in text
    small = _C.plan_cuda("n32c64h56w56k64r3s3u1p1d1g64_bf16_nhwc", "wgrad", 8, 6, 20, 99 << 10)
    assert "sm_86 with 20" in small and small != text


def test_separable_without_gradients_is_one_kernel(module):
    """And one that packs its weights, if it runs on tensor cores."""
    for dtype, launches in (("bf16", 2), ("f64", 1)):
        sample = separable_sample(ConvProblem.parse(f"n2c8h7w7k8r3s3p1g8_{dtype}_nhwc"), 5)
        before = module.counters()[0]
        sample()
        assert module.counters()[0] == before + launches


def test_torch_side_of_a_cuda_build_compiles():
    emulated.build("cuda_torch")


def test_weight_gradient_of_an_odd_layout(module):
    """The sums end in a weight whose memory is neither contiguous nor channels_last."""
    sample = conv("n2c6h7w7k4r3s3p1")
    tensors = {
        name: t.transpose(0, 1).contiguous().transpose(0, 1) if name == "weight" else t
        for name, t in sample.tensors.items()
    }
    check_accuracy(lambda g: dataclasses.replace(sample, tensors=tensors))
