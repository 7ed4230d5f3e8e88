"""The convolutions on tensor cores: tiles, their edges, float32's two precisions, strided gradients, few channels."""

import itertools

import emulated
import pytest
import torch
from kernel_checks import check_accuracy, conv_sample, separable_sample

import convkit.functional as CF
from convkit import _C, reference
from convkit.bench.problems import ConvProblem

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

PASSES = ("fprop", "dgrad", "wgrad")
ALL_TILES = {"256x128", "128x128", "256x64", "128x64", "64x64", "128x32", "64x128"}


@pytest.fixture(scope="module", autouse=True)
def module():
    """One multiprocessor, which is busy so soon that the large tiles pay."""
    with emulated.installed() as module:
        module.set_device(9, 0, 1, 227 << 10)
        yield module
        module.set_device(9, 0, 132, 227 << 10)


def problem_of(text: str, dtype: str = "bf16", layout: str = "nhwc") -> ConvProblem:
    return ConvProblem.parse(text).replace(dtype=dtype, layout=layout)


def plan(problem: ConvProblem, pass_: str) -> str:
    with emulated.full_float32():
        return _C.plan_cuda(str(problem), pass_, 9, 0, 1)


# Pixels, filters and channels just below, at and above the tiles; several tiles in both directions, stages left over.
TILES = (
    "n1c64h16w16k128r1s1",
    "n1c72h15w17k136r1s1",
    "n1c40h20w20k70r3s3p1",
    "n1c24h9w9k30r3s3p1",
    "n1c64h12w12k64r3s3u2p1",
    "n1c3h30w31k40r3s3p1",
    "n1c64h8w8k128r1s1",
    "n1c64h8w8k256r1s1",
)


@pytest.mark.parametrize("dtype", ("f32", "bf16", "f16"))
@pytest.mark.parametrize("text", TILES)
def test_tiles(text: str, dtype: str):
    layout = "nchw" if dtype == "f16" else "nhwc"
    # The input gradient's sums leave the tiles as those of a convolution without a residual do.
    problem = problem_of(text, dtype, layout)
    check_accuracy(lambda g: conv_sample(problem, g, activation="relu", scale=True, residual=True))


def test_the_problems_have_all_tiles():
    plans = {p: [plan(problem_of(text, d), p) for text in TILES for d in ("bf16", "f32")] for p in PASSES}
    for passes in (("fprop", "dgrad"), ("wgrad",)):
        lines = list(itertools.chain.from_iterable(plans[p] for p in passes))
        assert {tile for tile in ALL_TILES if any(f"sm80_{tile}x" in line for line in lines)} == ALL_TILES
    assert any("granules of 8" in line for line in plans["fprop"])
    assert any("granules of 4" in line for line in plans["wgrad"])


# Phases of the input gradient: strides that the dilation shares a factor with, larger than the filter, of both axes,
# pixels that no tap meets; groups, and their channels padded each for itself.
@pytest.mark.parametrize("layout", ("nhwc", "nchw"))
@pytest.mark.parametrize(
    "text",
    (
        "n2c16h9w11k8r3s3u2p1",
        "n1c8h13w12k8r3s3u2x4p3d2x2",
        "n1c8h9w10k16r1s1u3",
        "n1c8h7w9k8r2s4u4p1x0x2x1",
        "n1c16h10w9k24r5s3u3x1p2d3x1g2",
        "n2c12h6w7k20r3s3u2p1g4",
        "n1c6h6w6k9r3s3p1g3",
        "n3c20h5w5k12r3s3p1",
        "n1c4h12w9k8r7s5u2p3",
    ),
)
def test_phases_groups_and_few_channels(text: str, layout: str):
    for dtype in ("f32", "bf16"):
        assert "sm80_" in plan(problem_of(text, dtype, layout), "dgrad")
        check_accuracy(lambda g, d=dtype: conv_sample(problem_of(text, d, layout), g, residual=d == "f32"))


def test_strides_of_too_many_phases_are_left_to_the_generic_kernel():
    problem = problem_of("n1c6h11w12k7r3s3u5x4p1")
    assert "simt" in plan(problem, "dgrad") and "sm80_" in plan(problem, "fprop")
    check_accuracy(lambda g: conv_sample(problem, g))


@pytest.mark.parametrize("layout", ("nhwc", "nchw"))
def test_tf32(layout: str):
    """Within the error of operands that are rounded to tf32; and beyond that of float32, or it would not be tf32."""
    for text in ("n2c16h9w10k24r3s3p1", "n1c3h12w12k20r5s5u2p2", "n2c12h7w7k12r3s3u2p1g3"):
        sample = conv_sample(problem_of(text, "f32", layout), torch.Generator().manual_seed(0), bias=False)
        exact, absolute = sample.map(torch.Tensor.double), sample.map(lambda t: t.double().abs())
        with emulated.full_float32(False):
            got = sample.evaluate(CF)
        with emulated.full_float32():
            full = sample.evaluate(CF)
        right, most = exact.evaluate(reference), absolute.evaluate(reference)
        for name, value in got.items():
            # Each operand is off by 2^-11 of itself at most; sums in float32 add their own, far smaller.
            bound = (2 * 2.0**-11 + 2.0**-18) * most[name]
            assert ((value - right[name]).abs() <= bound).all(), name
            assert (value - right[name]).abs().max() > 8 * (full[name] - right[name]).abs().max(), name


@pytest.mark.parametrize(
    ("set_precision", "found"),
    (
        (lambda b: None, "_tf32"),
        (lambda b: setattr(b.cudnn, "allow_tf32", False), "_3xtf32"),
        (lambda b: setattr(b.cudnn.conv, "fp32_precision", "ieee"), "_3xtf32"),
        (lambda b: (setattr(b.cudnn.conv, "fp32_precision", "none"), setattr(b, "fp32_precision", "tf32")), "_tf32"),
    ),
    ids=("default", "allow_tf32", "fp32_precision", "inherited"),
)
def test_pytorchs_switches_decide_about_float32(set_precision, found: str):
    backends = torch.backends
    before = backends.fp32_precision
    try:
        with emulated.full_float32(False):
            set_precision(backends)
            assert found in _C.plan_cuda("n8c64h14w14k64r3s3u1p1d1g1_f32_nhwc")
    finally:
        backends.fp32_precision = before
        backends.cudnn.allow_tf32 = False  # as the module's fixture has it


@pytest.mark.parametrize("dtype", ("f32", "bf16"))
def test_separable_tiles(dtype: str):
    """Several row and column tiles, depth that ends inside a stage, padded channels, both layouts."""
    for text, filters, layout in (
        ("n2c40h9w9k40r3s3p1g40", 70, "nhwc"),
        ("n1c24h11w12k24r5s5u2p2g24", 136, "nhwc"),
        ("n1c19h8w9k19r3s3p1d2g19", 30, "nchw"),
    ):
        problem = problem_of(text, dtype, layout)
        check_accuracy(lambda g, p=problem, k=filters: separable_sample(p, k, g), gradients=False)


def test_the_same_bits_again(module):
    for dtype in ("bf16", "f32"):
        sample = conv_sample(problem_of("n4c16h16w16k24r3s3u2p1", dtype), torch.Generator().manual_seed(0))
        with emulated.full_float32(False):
            first = sample.evaluate(CF)
            for name, value in sample.evaluate(CF).items():
                assert torch.equal(value, first[name]), name
