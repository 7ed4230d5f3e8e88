"""What only the CUDA kernels have: other devices, little memory, tiles and bands beyond the problem table's."""

import dataclasses
import os
import subprocess
import sys

import emulated
import pytest
import torch
from kernel_checks import batch_norm_sample, check_accuracy, conv_sample, offset, separable_sample, transpose_sample

import convkit.functional as CF
from convkit import _C, reference
from convkit.bench.problems import BatchNormProblem, ConvProblem

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

H100 = 9, 0, 132, 227 << 10, 8
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
        "n9c8h33w35k8r3s3p1g8",
        "n2c8h2w3k8r5s5u2p2g8",
        "n1c8h1w300k8r3s3u2p1g8",
        "n1c3h300w9k3r7s7p3g3",
    ),
)
def test_depthwise_tiles(module, text: str, dtype: str, layout: str):
    check_accuracy(lambda g: conv(text, g, dtype, layout, activation="relu", scale=True, residual=True))
    if ConvProblem.parse(text).transposed_output_padding is not None:
        problem = ConvProblem.parse(text).replace(dtype=dtype, layout=layout)
        check_accuracy(lambda g: transpose_sample(problem, g))


# Batch norm: several pieces of a channel, several blocks of channels, rows that are no multiple of 8, planes that are
# none while images are; and the same on chip, in a block of its own for some channels.
NO_CHIP = *H100[:4], 0


@pytest.mark.parametrize("device", (NO_CHIP, H100, (8, 0, 4, 163 << 10, 1)), ids=str)
@pytest.mark.parametrize(("dtype", "layout"), FORMS, ids=["-".join(form) for form in FORMS])
@pytest.mark.parametrize(
    "text",
    (
        "n2c320h9w11",
        "n3c264h8w8+res",
        "n2c3h80w96+res",
        "n1c2h150w151+res",
        "n9c40h7w7",
        "n7c24h7w7+res",
        "n5c16h14w14+res",
        "n2c8h15w15+res",
    ),
)
def test_batch_norm_tiles(module, text: str, dtype: str, layout: str, device):
    module.set_device(*device)
    problem = BatchNormProblem.parse(text).replace(dtype=dtype, layout=layout)
    for training in (False, True) if device == NO_CHIP else (True,):
        check_accuracy(lambda g, training=training: batch_norm_sample(problem, g, training))


# Clusters of 2, 4 and 8 blocks, where one has little shared memory; the last of them has fewer rows, or none.
@pytest.mark.parametrize(("dtype", "layout"), FORMS, ids=["-".join(form) for form in FORMS])
@pytest.mark.parametrize("text", ("n20c16h9w8+res", "n41c8h7w7", "n33c8h15w15+res", "n7c24h22w9"))
def test_batch_norm_in_clusters(module, text: str, dtype: str, layout: str):
    module.set_device(9, 0, 132, 34 << 10, 8)
    problem = BatchNormProblem.parse(text).replace(dtype=dtype, layout=layout)
    check_accuracy(lambda g: batch_norm_sample(problem, g))


@pytest.mark.parametrize("text", ("n9c16h7w7+res", "n4c16h8w8+res"))
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_batch_norm_goes_back_another_way_than_it_came(module, text: str, layout: str):
    """On chip or not, aligned or not is decided in each pass; the mask between the two is the same."""
    sample = batch_norm_sample(BatchNormProblem.parse(text).replace(layout=layout))
    grad = torch.randn(sample(reference).shape)
    grad = grad.to(memory_format=torch.channels_last) if layout == "nhwc" else grad
    right = sample.evaluate(CF, grad)
    leaves = {name: t.detach().requires_grad_() for name, t in sample.tensors.items()}
    for there, back, arrange in ((H100, NO_CHIP, None), (NO_CHIP, H100, None), (H100, H100, offset)):
        module.set_device(*there)
        y = sample(CF, **leaves)
        module.set_device(*back)
        grads = torch.autograd.grad(y, list(leaves.values()), arrange(grad) if arrange else grad)
        for name, value in zip(leaves, grads, strict=True):
            torch.testing.assert_close(value, right[f"gradient of {name}"], rtol=1e-5, atol=1e-5)


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
    if sample.op == "batch_norm_relu":
        module.set_device(*NO_CHIP)  # or it needs no workspace
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


@pytest.mark.parametrize(
    ("problem", "forward", "backward"),
    (
        # n, c, pixels, channels_last; ResNet-50's batch norms of 256 images in bfloat16, and CIFAR's of 512
        ((256, 2048, 49, "bf16", False), "batch_norm_on_chip", "batch_norm_on_chip"),
        ((256, 2048, 49, "bf16", True), "batch_norm_on_chip", "batch_norm_on_chip"),
        ((256, 1024, 196, "bf16", False), "batch_norm_on_chip", "batch_norm_on_chip"),
        ((256, 64, 12544, "bf16", True), "batch_norm_by_pixels", "batch_norm_by_pixels"),
        ((256, 64, 12544, "bf16", False), "batch_norm_by_planes", "batch_norm_by_planes"),
        ((4096, 512, 49, "f32", False), "batch_norm_by_images", "batch_norm_by_images"),
    ),
)  # fmt: skip
def test_plans_of_batch_norms(problem, forward: str, backward: str):
    for work, kernel in (("forward", forward), ("backward", backward), ("evaluation", "batch_norm_by_")):
        plan = _C.plan_batch_norm_cuda(*problem, work)
        assert plan.startswith(f"{work} of n{problem[0]}c{problem[1]} with {problem[2]} pixels"), plan
        assert f" -> {kernel}" in plan and "sm_90 with 132" in plan, plan
        assert ("on_chip" in plan) == ("0 bytes of workspace" in plan.split(", ")), plan
    old = _C.plan_batch_norm_cuda(*problem, "forward", 8, 0, 108, 163 << 10)
    assert "on_chip" not in old or "in 1 block," in old, "clusters before sm_90"


def test_plans_are_printed_as_they_are_used():
    code = """
import emulated, torch, convkit.functional as CF
with emulated.installed():
    x = torch.randn(2, 8, 6, 6)
    CF.batch_norm_relu(CF.conv2d(x, torch.randn(8, 1, 3, 3), groups=8), None, None, training=True)
    CF.conv2d(x, torch.randn(8, 1, 3, 3), groups=8)
"""
    environment = {**os.environ, "CONVKIT_PRINT_PLAN": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, (emulated.ROOT, emulated.ROOT / "tests"))])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    printed = [line for line in done.stderr.splitlines() if line.startswith("convkit: ")]
    assert len(printed) == 2, done.stderr
    assert printed[0].startswith("convkit: fprop n2c8h6w6k8r3s3") and "-> depthwise_nchw_3x3u1" in printed[0]
    assert printed[1].startswith("convkit: forward of n2c8 with 16 pixels, f32 nchw -> batch_norm_on_chip")


def test_wrong_plans_are_refused():
    with pytest.raises(ValueError, match="dtype: got 'f8'; accepts f64, f32, bf16, f16"):
        _C.plan_batch_norm_cuda(1, 8, 4, "f8", True)
    with pytest.raises(ValueError, match="work: got 'sideways'; accepts forward, backward, evaluation, evaluation_b"):
        _C.plan_batch_norm_cuda(1, 8, 4, "f32", True, "sideways")
    with pytest.raises(ValueError, match="got 1, 0, 4; accepts integers of at least 1"):
        _C.plan_batch_norm_cuda(1, 0, 4, "f32", True)


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
