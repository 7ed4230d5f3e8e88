"""Random problems over all options: hypothesis draws them, and shrinks one that fails to the smallest that does."""

from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_checks import (
    AFFINES,
    LAYOUTS,
    Sample,
    batch_norm_sample,
    check_accuracy,
    col2im_sample,
    conv_sample,
    expanded,
    expanded_pixels,
    im2col_sample,
    separable_sample,
    transpose_sample,
)

import convkit.functional as CF
from convkit import reference
from convkit.bench.problems import BatchNormProblem, ConvProblem

# A float64 convolution must be right to the last bit (kernel_checks.on_grid): that finds more than a bound on an error.
dtypes = st.sampled_from(("f64", "f64", "f32", "bf16", "f16"))
layouts = st.sampled_from(("nchw", "nhwc"))
arrangements = st.sampled_from([*LAYOUTS.values(), None, None])
pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
activations = st.sampled_from((None, "relu"))


@st.composite
def conv_problems(draw, depthwise: bool = False, symmetric: bool = False) -> ConvProblem:
    groups = draw(st.sampled_from((1, 1, 1, 2, 3, 7, 16))) if not depthwise else draw(st.integers(1, 40))
    channels = 1 if depthwise else draw(st.integers(1, 40 // groups + 1))
    filters = draw(st.integers(1, 3 if depthwise else 40 // groups + 1))
    r, s = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    dilation = draw(pairs)
    if symmetric:
        vertical, horizontal = draw(st.integers(0, 7)), draw(st.integers(0, 7))
        padding = vertical, vertical, horizontal, horizontal
    else:
        padding = draw(st.tuples(*[st.integers(0, 7)] * 4))
    reach = dilation[0] * (r - 1) + 1, dilation[1] * (s - 1) + 1
    h = draw(st.integers(max(1, reach[0] - padding[0] - padding[1]), reach[0] + 12))
    w = draw(st.integers(max(1, reach[1] - padding[2] - padding[3]), reach[1] + 20))
    n, stride = draw(st.integers(1, 4)), draw(pairs)
    problem = ConvProblem(
        *(n, groups * channels, h, w, groups * filters, r, s),
        stride,
        padding,
        dilation,
        groups,
        draw(dtypes),
        draw(layouts),
    )
    assume(problem.flops < 30e6)
    return problem


def arranged(sample: Sample, arrangement, which) -> Sample:
    """The sample with some of its tensors laid out in another way."""
    if arrangement is None:
        return sample
    names = list(sample.tensors)
    chosen = {name: arrangement(sample.tensors[name]) for name, flag in zip(names, which, strict=False) if flag}
    return Sample(sample.op, sample.tensors | chosen, sample.options, sample.buffers, sample.before_relu)


flags = st.tuples(*[st.booleans()] * 5)


@given(conv_problems(), *[st.booleans()] * 3, activations, arrangements, flags, arrangements)
def test_conv2d(problem, bias, scale, residual, activation, arrangement, which, grad_arrangement):
    check_accuracy(
        lambda g: arranged(conv_sample(problem, g, bias, activation, scale, residual), arrangement, which),
        grad_arrangement,
    )


@given(conv_problems(symmetric=True), st.booleans(), arrangements, flags, st.data())
def test_conv_transpose2d(problem, bias, arrangement, which, data):
    most = [max(u, d) - 1 for u, d in zip(problem.stride, problem.dilation, strict=True)]
    output_padding = tuple(data.draw(st.integers(0, size)) for size in most)

    def make(g) -> Sample:
        sample = transpose_sample(problem, g, bias)
        sample.options["output_padding"] = output_padding
        return arranged(sample, arrangement, which)

    n, _, p, q = problem.output_shape
    top, _, left, _ = problem.padding
    sizes = [
        (size - 1) * u - 2 * pad + d * (k - 1) + extra + 1
        for size, u, pad, d, k, extra in zip(
            (p, q), problem.stride, (top, left), problem.dilation, (problem.r, problem.s), output_padding, strict=True
        )
    ]
    assume(min(sizes) > 0)
    check_accuracy(make)


@given(
    conv_problems(depthwise=True),
    st.integers(1, 40),
    st.sets(st.sampled_from(AFFINES)),
    activations,
    activations,
    arrangements,
    flags,
    st.booleans(),
)
def test_separable_conv2d(problem, filters, affines, inner, outer, arrangement, which, gradients):
    names = tuple(name for name in AFFINES if name in affines)
    if problem.torch_dtype.itemsize == 2 and inner and gradients:
        names = (*(name for name in names if not name.startswith("depthwise")), "depthwise_shift")

    def make(g) -> Sample:
        return arranged(separable_sample(problem, filters, g, names, inner, outer), arrangement, which)

    check_accuracy(make, gradients=gradients)


batch_norm_problems = st.builds(
    BatchNormProblem,
    st.integers(1, 6),
    st.integers(1, 70),
    st.integers(1, 12),
    st.integers(1, 20),
    dtypes,
    layouts,
    st.booleans(),
)


@given(batch_norm_problems, *[st.booleans()] * 4, arrangements, flags)
def test_batch_norm_relu(problem, training, affine, tracking, mixed, arrangement, which):
    # Few different values in a channel leave a gradient that is nothing but rounding, PyTorch's and ours.
    values = {expanded_pixels: problem.n, expanded: problem.h * problem.w}.get(arrangement if which[0] else None)
    assume(not training or (values or problem.n * problem.h * problem.w) > 3)
    mixed = mixed and problem.torch_dtype.itemsize == 2

    def make(g) -> Sample:
        sample = batch_norm_sample(problem, g, training, affine, tracking or not training, mixed)
        return arranged(sample, arrangement, which)

    check_accuracy(make)


@given(conv_problems(symmetric=True), arrangements, st.booleans())
def test_columns(problem, arrangement, unfold):
    problem = problem.replace(n=min(problem.n, 2), c=min(problem.c, 4), groups=1)
    make = im2col_sample if unfold else col2im_sample
    check_accuracy(lambda g: arranged(make(problem, g), arrangement, (True,)))


@given(
    st.integers(1, 2),
    st.integers(1, 9),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(("same", "valid")),
    st.booleans(),
)
def test_padding_by_name(n, c, size, kernel, dilation, padding, batched):
    if padding == "valid":
        assume(all(a > d * (k - 1) for a, d, k in zip(size, dilation, kernel, strict=True)))
    x, w = torch.randn(n, c, *size, dtype=torch.float64), torch.randn(3, c, *kernel, dtype=torch.float64)
    options: dict[str, Any] = {"padding": padding, "dilation": dilation}
    x = x if batched else x[0]
    torch.testing.assert_close(CF.conv2d(x, w, **options), reference.conv2d(x, w, **options))


@given(conv_problems().filter(lambda problem: problem.dtype == "f64"), st.data())
def test_adjoints(problem, data):
    """<grad, conv(x, w)>, <input_grad(grad, w), x> and <weight_grad(grad, x), w> are one number, exactly."""
    sample = conv_sample(problem, torch.Generator().manual_seed(data.draw(st.integers(0, 99))), bias=False)
    x, w = (t.detach().requires_grad_() for t in sample.tensors.values())
    y = sample(CF, input=x, weight=w)
    grad = torch.randint(-8, 9, y.shape, dtype=torch.float64)
    gx, gw = torch.autograd.grad(y, (x, w), grad)
    product = (y * grad).sum()
    assert product == (gx * x).sum() == (gw * w).sum()
