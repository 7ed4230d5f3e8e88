"""The text form of problems, and that the native side reads the same one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convkit import _C
from convkit.bench.problems import (
    TEST_BATCH_NORM_PROBLEMS,
    TEST_PROBLEMS,
    BatchNormProblem,
    ConvProblem,
)

sizes = st.integers(1, 300)


@st.composite
def conv_problems(draw) -> ConvProblem:
    groups = draw(st.integers(1, 20))
    r, s = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    dilation = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    h = draw(st.integers(dilation[0] * (r - 1) + 1, 100))
    w = draw(st.integers(dilation[1] * (s - 1) + 1, 100))
    return ConvProblem(
        *(draw(sizes), groups * draw(st.integers(1, 9)), h, w, groups * draw(st.integers(1, 9)), r, s),
        stride=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        padding=draw(st.tuples(*[st.integers(0, 20)] * 4)),
        dilation=dilation,
        groups=groups,
        dtype=draw(st.sampled_from(("f64", "f32", "bf16", "f16"))),
        layout=draw(st.sampled_from(("nchw", "nhwc"))),
    )


@given(conv_problems())
def test_text_form_of_a_convolution_comes_back(problem: ConvProblem):
    assert ConvProblem.parse(str(problem)) == problem


@given(sizes, sizes, sizes, sizes, st.booleans(), st.sampled_from(("f32", "bf16")), st.sampled_from(("nchw", "nhwc")))
def test_text_form_of_a_batch_norm_comes_back(n, c, h, w, residual, dtype, layout):
    problem = BatchNormProblem(n, c, h, w, dtype, layout, residual)
    assert BatchNormProblem.parse(str(problem)) == problem


@pytest.mark.parametrize(
    ("text", "full"),
    (
        ("n32c64h56w56k128r3s3u1p1d1g1_bf16_nhwc", "n32c64h56w56k128r3s3u1p1d1g1_bf16_nhwc"),
        ("n1c2h3w4k5r1s1", "n1c2h3w4k5r1s1u1p0d1g1_f32_nchw"),
        ("n1c2h7w9k4r3s3u2x1p1x2d1x3g2_f64", "n1c2h7w9k4r3s3u2x1p1x2d1x3g2_f64_nchw"),
        ("n1c2h7w9k4r3s3p0x1x0x1_nhwc", None),
        ("n1c2h7w9k4r3s3p0x1x0x1_f16_nhwc", "n1c2h7w9k4r3s3u1p0x1x0x1d1g1_f16_nhwc"),
        ("n1c2h7w9k4r3s3u2x2p1x1x1x1", "n1c2h7w9k4r3s3u2p1d1g1_f32_nchw"),
        ("n1c2h7w9k4r3s3p1x1x2x2", "n1c2h7w9k4r3s3u1p1x2d1g1_f32_nchw"),
    ),
)
def test_parts_that_may_be_left_out(text: str, full: str | None):
    if full is None:
        with pytest.raises(ValueError, match="dtype 'nhwc' is not known; accepted: f64, f32, bf16, f16"):
            ConvProblem.parse(text)
    else:
        assert str(ConvProblem.parse(text)) == full


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("", r"'n' \(images\).*the end"),
        ("32c64", r"expected 'n'.*'32c64'"),
        ("n1", r"expected 'c' \(channels\) in|expected 'c'"),
        ("n1c2h3w4k5r6", "expected 's'"),
        ("nxc2", r"character 1: expected a number after 'n'.*'xc2'"),
        ("n-1c2h3w4k5r1s1", "expected a number after 'n'.*'-1"),
        ("n1c2h3w4k5r1s1u", "expected a number after 'u'.*the end"),
        ("n1c2h3w4k5r1s1u1x2x3", "'u' .stride. takes 1 or 2 numbers, but got 3: '1x2x3'"),
        ("n1c2h3w4k5r1s1p1x2x3", "'p' .padding. takes 1 or 2 or 4 numbers, but got 3"),
        ("n1x1c2h3w4k5r1s1", "'n' .images. takes 1 numbers, but got 2"),
        ("n1c2h3w4k5r1s1g1u2", "character 17: 'u2' is left over"),
        ("n1c2h3w4k5r1s1_f8_nchw", "dtype 'f8' is not known; accepted: f64, f32, bf16, f16"),
        ("n1c2h3w4k5r1s1_f32_nhcw", "layout 'nhcw' is not known; accepted: nchw, nhwc"),
        ("n1c2h3w4k5r1s1_f32_nchw_", "left over"),
        ("n1c2h3w4k5r1s1_f32_nchw+res", r"'\+res' is left over"),
        ("n1c2h3w4k5r1s1 ", "left over"),
        ("n0c2h3w4k5r1s1", "n must be at least 1, but got 0"),
        ("n1c2h3w4k5r1s1u0", r"u \(stride\) must be at least 1, but got 0"),
        ("n1c2h3w4k5r1s1d1x0", r"d \(dilation\) must be at least 1, but got 1x0"),
        ("n1c2h3w4k4r1s1g0", r"g \(groups\) must be at least 1, but got 0"),
        ("n1c3h3w4k4r1s1g2", "c=3 is not divisible by g=2"),
        ("n1c4h3w4k5r1s1g2", "k=5 is not divisible by g=2"),
        ("n1c2h3w4k5r1s5", r"larger than the padded input along w: padded input \(3, 4\), filter \(1, 5\)"),
    ),
)
def test_a_malformed_convolution_says_which_part(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        ConvProblem.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("n1c2h3", "expected 'w'"),
        ("n1c2h3w0", "w must be at least 1, but got 0"),
        ("n1c2h3w4_f32_nchw+rse", r"'\+rse' is left over"),
        ("n1c2h3w4k5", "'k5' is left over"),
        ("n1c2h3w4_f31", "dtype 'f31'"),
    ),
)
def test_a_malformed_batch_norm_says_which_part(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        BatchNormProblem.parse(text)


def test_only_text_is_parsed():
    with pytest.raises(TypeError, match="NoneType"):
        ConvProblem.parse(None)


@pytest.mark.parametrize("text", ("", "n1", "n1c2h3w4k5r1s1u1p0d1g1", "n1c3h3w4k4r1s1u1p0d1g2_f32_nchw", "x" * 1000))
def test_the_native_side_refuses_malformed_problems(text: str):
    with pytest.raises(ValueError, match="problem"):
        _C.plan(text)


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("dtype", ("f64", "f32", "bf16", "f16"))
def test_the_native_side_has_a_plan_for_every_problem_of_the_table(dtype: str, layout: str):
    for problem in TEST_PROBLEMS:
        plan = _C.plan(str(problem.replace(dtype=dtype, layout=layout)))
        assert str(problem).split("u")[0] in plan, plan


def test_the_table_is_what_it_says():
    assert len(set(TEST_PROBLEMS)) == len(TEST_PROBLEMS)
    assert len(set(TEST_BATCH_NORM_PROBLEMS)) == len(TEST_BATCH_NORM_PROBLEMS)
    assert max(problem.flops for problem in TEST_PROBLEMS) < 20e6, "the table must stay quick"


@pytest.mark.parametrize("problem", TEST_PROBLEMS, ids=str)
def test_sizes_agree_with_pytorch(problem: ConvProblem):
    x, weight, bias, grad = problem.replace(layout="nhwc", dtype="bf16").tensors()
    top, bottom, left, right = problem.padding
    padded = torch.nn.functional.pad(x.float(), (left, right, top, bottom))
    y = torch.nn.functional.conv2d(padded, weight.float(), None, problem.stride, 0, problem.dilation, problem.groups)
    assert tuple(y.shape) == problem.output_shape == tuple(grad.shape)
    assert bias.shape == (problem.k,) and x.dtype == torch.bfloat16
    assert x.stride()[1] == 1
    assert problem.bytes == sum(t.numel() for t in (x, weight, y)) * 4
    back = problem.transposed_output_padding
    if back is not None:
        options = problem.stride, problem.torch_padding, back, problem.groups, problem.dilation
        assert torch.nn.functional.conv_transpose2d(y, weight.float(), None, *options).shape == x.shape


def test_flops_and_bytes():
    problem = ConvProblem.parse("n2c4h6w7k8r3s3p1g2_bf16_nhwc")
    assert problem.flops == 2 * (2 * 6 * 7) * 8 * 2 * 9
    assert problem.bytes == 2 * (2 * 4 * 42 + 2 * 8 * 42 + 8 * 2 * 9)
    norm = BatchNormProblem.parse("n2c4h6w7_f64_nchw+res")
    assert norm.forward_bytes == 8 * 3 * 2 * 4 * 42
    assert norm.backward_bytes == 8 * 4 * 2 * 4 * 42
    assert norm.replace(residual=False).forward_bytes == 8 * 2 * 2 * 4 * 42


@pytest.mark.parametrize("residual", (False, True))
def test_batch_norm_tensors(residual: bool):
    x, added, weight, bias, grad = BatchNormProblem(2, 3, 4, 5, "f16", "nhwc", residual).tensors()
    assert x.shape == grad.shape == (2, 3, 4, 5) and x.is_contiguous(memory_format=torch.channels_last)
    assert weight.shape == bias.shape == (3,)
    assert (added is None) == (not residual)
