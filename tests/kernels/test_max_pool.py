"""Max pooling to the last bit: values, ties, NaN, -inf and gradients as PyTorch's, for the CPU's and the GPU's kernels.

One thread: that any number of threads gives the same bits is shown by test_repeatable.py.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import LAYOUTS, max_pool_sample, place, set_device

import convkit.functional as CF
import convkit.nn as cnn
from convkit import reference
from convkit.bench.problems import TEST_MAX_POOL_PROBLEMS, MaxPoolProblem

INF, NAN = float("inf"), float("nan")
DTYPES = ("f64", "f32", "bf16", "f16")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def everywhere(backend):
    set_device(backend)
    yield
    set_device(torch.device("cpu"))


def inputs(problem: MaxPoolProblem, kind: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = problem.tensors(generator)[0]
    if kind == "random":
        return x
    few = torch.randint(-1, 2, x.shape, generator=generator).to(x)
    bad = torch.randint(0, 12, x.shape, generator=generator)
    if kind == "special":
        few[bad == 0], few[bad == 1], few[bad == 2], few[bad == 3] = NAN, INF, -INF, -0.0
    if kind == "-inf":
        few[bad > 0] = -INF
    return few


def same_bits(problem: MaxPoolProblem, x: torch.Tensor, activation: str | None, arrange=None) -> None:
    """Output and gradient against PyTorch's; 16-bit sums of overlapping windows may be closer to float64."""
    sample = max_pool_sample(problem, activation=activation)
    sample.tensors["input"] = x
    grad = torch.randn(problem.output_shape, generator=torch.Generator().manual_seed(7)).to(x.dtype)
    grad = grad.to(memory_format=problem.memory_format) if arrange is None else arrange(grad)
    ours = {name: t.cpu() for name, t in sample.map(place).evaluate(CF, place(grad)).items()}
    theirs = sample.evaluate(reference, grad)
    what = f"{problem} {activation}"
    assert torch.equal(ours["output"].nan_to_num(9), theirs["output"].nan_to_num(9)), what
    assert torch.equal(ours["output"].isnan(), theirs["output"].isnan()), what
    one, other = ours["gradient of input"], theirs["gradient of input"]
    if x.dtype.itemsize == 2:
        right = sample.map(torch.Tensor.double).evaluate(reference, grad.double())["gradient of input"]
        assert ((one - right).abs() <= (other - right).abs() + 1e-9).all(), what
    else:
        assert torch.equal(one, other), what
    with torch.no_grad():
        assert torch.equal(sample.map(place)().cpu().nan_to_num(9), ours["output"].nan_to_num(9)), (
            f"{what}, no gradient"
        )


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("problem", TEST_MAX_POOL_PROBLEMS, ids=str)
def test_table(problem: MaxPoolProblem):
    forms = itertools.product(DTYPES, ("nchw", "nhwc"))
    for (dtype, layout), kind in itertools.product(forms, ("random", "special", "-inf")):
        form = problem.replace(dtype=dtype, layout=layout)
        for activation in (None, "relu"):
            same_bits(form, inputs(form, kind), activation)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str):
    """The input in the layout, then the gradient of the output."""
    problem = MaxPoolProblem(3, 18, 7, 8, 3, 3, (2, 2), (1, 1))
    for dtype in DTYPES:
        form = problem.replace(dtype=dtype)
        same_bits(form, LAYOUTS[layout](inputs(form, "special")), "relu")
        same_bits(form, inputs(form, "special"), None, LAYOUTS[layout])


@given(
    *(st.integers(*bounds) for bounds in ((1, 3), (1, 40), (1, 14), (1, 20), (1, 5), (1, 5))),
    *[st.tuples(st.integers(1, 4), st.integers(1, 4))] * 2,
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from(("nchw", "nhwc")),
    st.sampled_from(("random", "special")),
    st.sampled_from((None, "relu")),
)
def test_random(n, c, h, w, r, s, stride, dilation, padding, ceil_mode, dtype, layout, kind, activation):
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, (r, s), strict=True)]
    padding = min(padding[0], r // 2), min(padding[1], s // 2)
    # Where a window has no tap in the image, PyTorch's gradient writes beyond it.
    least = (max(most - 2 * pad, d) for most, pad, d in zip(reach, padding, dilation, strict=True))
    h, w = map(max, (h, w), least)
    problem = MaxPoolProblem(n, c, h, w, r, s, stride, padding, dilation, ceil_mode, dtype, layout)
    x = inputs(problem, kind)
    try:
        F.max_pool2d(x, (r, s), stride, padding, dilation, ceil_mode)
    except RuntimeError:
        return
    same_bits(problem, x, activation)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_a_window_without_a_tap_in_the_image(layout: str):
    """Its taps stand left and right of the only column."""
    x = torch.randn(2, 3, 4, 1).to(memory_format=MaxPoolProblem(2, 3, 4, 1, 1, 2, (1, 1), layout=layout).memory_format)
    x = place(x).requires_grad_()
    geometry = (1, 2), 1, (0, 2), (1, 4)
    assert (CF.max_pool2d(x, *geometry) == -INF).all()
    y = CF.max_pool2d(x, *geometry, activation="relu")
    assert y.shape == (2, 3, 4, 1) and not y.any()
    y.sum().backward()
    assert not x.grad.any()


@pytest.mark.usefixtures("everywhere")
def test_the_stride_is_the_kernel_if_there_is_none():
    x = place(torch.randn(2, 3, 7, 8))
    for stride in (None, (), []):
        assert torch.equal(CF.max_pool2d(x, (3, 2), stride).cpu(), F.max_pool2d(x.cpu(), (3, 2)))


def test_keeps_a_byte_an_output():
    kept = []
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        CF.max_pool2d(x, 2, activation="relu")
    assert kept == [2 * 8 * 8 * 8]


def test_module():
    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    for options in ({}, {"stride": 2, "padding": 1}, {"ceil_mode": True, "dilation": (1, 2)}):
        ours, theirs = cnn.MaxPool2d(3, **options), torch.nn.MaxPool2d(3, **options)
        assert torch.equal(ours(x), theirs(x)) and torch.equal(ours(x[0]), theirs(x[0]))
        assert torch.equal(cnn.MaxPool2d(3, **options, activation="relu")(x), theirs(x).relu())
    assert "activation=relu" in repr(cnn.MaxPool2d(2, activation="relu"))
    whole = torch.arange(36).view(1, 1, 6, 6)
    assert torch.equal(cnn.MaxPool2d(2)(whole), torch.nn.MaxPool2d(2)(whole))
    for one, other in zip(
        cnn.MaxPool2d(2, return_indices=True)(x), torch.nn.MaxPool2d(2, return_indices=True)(x), strict=True
    ):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="activation.*'gelu'"):
        cnn.MaxPool2d(2, activation="gelu")
    with pytest.raises(ValueError, match="return_indices.*True"):
        cnn.MaxPool2d(2, return_indices=True, activation="relu")
