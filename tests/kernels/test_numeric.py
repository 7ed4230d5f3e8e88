"""Every operator, forward and all gradients, over the table of problems: at most twice PyTorch's error.

On the CPU, with the CUDA kernels run by the emulator, and on a GPU where there is one: `backend` in tests/conftest.py.
Winograd's method is switched off: its larger error has a bound of its own, in test_winograd.py.
One thread: that any number of threads gives the same bits is shown over the same table by test_repeatable.py, and
test_isa.py runs this file again for every other instruction set of the machine.
"""

import dataclasses
import itertools
import zlib

import pytest
import torch
from kernel_checks import (
    LAYOUTS,
    batch_norm_sample,
    check_accuracy,
    col2im_sample,
    conv_sample,
    im2col_sample,
    place,
    separable_sample,
    set_device,
    small_samples,
    transpose_sample,
)

import convkit
from convkit import reference
from convkit.bench.problems import TEST_BATCH_NORM_PROBLEMS, TEST_PROBLEMS, ConvProblem

DTYPES = ("f64", "f32", "bf16", "f16")
FORMS = [{"dtype": dtype, "layout": layout} for dtype, layout in itertools.product(DTYPES, ("nchw", "nhwc"))]
REVERSIBLE = [problem for problem in TEST_PROBLEMS if problem.transposed_output_padding is not None]
DEPTHWISE = [problem for problem in TEST_PROBLEMS if problem.is_depthwise and problem.c > 1]
# im2col and col2im have no tiles: a few filters, strides, paddings are enough.
COLUMNS = [problem for problem in TEST_PROBLEMS if problem.torch_padding is not None and problem.groups == 1][::4]


@pytest.fixture(autouse=True)
def _everywhere_direct(backend):
    torch.set_num_threads(1)
    set_device(backend)
    with convkit.set_winograd(False):
        yield
    set_device(torch.device("cpu"))


def dice(problem: object, sides: int) -> int:
    """A number below `sides` that depends on nothing but the problem: spreads options over the table."""
    return zlib.crc32(str(problem).encode()) % sides


def check_all(checks) -> None:
    """Runs all of them and reports every failure, not the first only."""
    failures = []
    for check in checks:
        try:
            check()
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("problem", TEST_PROBLEMS, ids=str)
def test_conv2d(problem: ConvProblem):
    bias, activation = dice(problem, 4) != 0, (None, "relu")[dice(problem, 3) == 0]
    check_all(
        lambda p=p, e=e: check_accuracy(lambda g: conv_sample(p, g, bias, activation, **e))
        for p, e in with_epilogues(problem)
    )


def with_epilogues(problem: ConvProblem):
    """The problem in all forms, and over these neither, one or both of scale and residual, in both layouts."""
    for i, form in enumerate(FORMS):
        which = (dice(problem, 4) + i // 2 + 2 * (i % 2)) % 4
        yield problem.replace(**form), {"scale": which % 2 == 1, "residual": which >= 2}


@pytest.mark.parametrize("problem", REVERSIBLE, ids=str)
def test_conv_transpose2d(problem: ConvProblem):
    forms = [problem.replace(**form) for form in FORMS[dice(problem, 2) :: 2]]
    check_all(lambda p=p: check_accuracy(lambda g: transpose_sample(p, g, dice(problem, 4) != 0)) for p in forms)


@pytest.mark.parametrize("problem", DEPTHWISE, ids=str)
def test_separable_conv2d(problem: ConvProblem):
    forms = [problem.replace(**form) for form in FORMS[dice(problem, 2) :: 2]]
    filters = (1, 5, 16, 33)[dice(problem, 4)]
    check_all(lambda p=p: check_accuracy(lambda g: separable_sample(p, filters, g)) for p in forms)


@pytest.mark.parametrize("problem", DEPTHWISE, ids=str)
def test_separable_conv2d_in_one_pass(problem: ConvProblem):
    """Without gradients the operator is another kernel: held against the same bound."""
    for form in FORMS:
        p = problem.replace(**form)
        check_accuracy(lambda g, p=p: separable_sample(p, (1, 5, 16, 33)[dice(problem, 4)], g), gradients=False)


@pytest.mark.parametrize("problem", COLUMNS, ids=str)
@pytest.mark.parametrize("make", (im2col_sample, col2im_sample))
def test_columns(make, problem: ConvProblem):
    forms = [problem.replace(**form) for form in FORMS]
    check_all(lambda p=p: check_accuracy(lambda g: make(p, g)) for p in forms)


@pytest.mark.parametrize("residual", (False, True), ids=("", "residual"))
@pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))
@pytest.mark.parametrize("problem", TEST_BATCH_NORM_PROBLEMS, ids=str)
def test_batch_norm_relu(problem, training: bool, residual: bool):
    forms = [problem.replace(residual=residual, **form) for form in FORMS]
    check_all(
        lambda p=p, mixed=mixed: check_accuracy(lambda g: batch_norm_sample(p, g, training, mixed=mixed))
        for p in forms
        for mixed in ((False, True) if p.torch_dtype.itemsize == 2 else (False,))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", small_samples())
def test_options(name: str, dtype: str):
    check_accuracy(lambda g: small_samples(dtype, generator=g)[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "make",
    (
        lambda g, **form: conv_sample(
            ConvProblem.parse("n2c17h7w6k18r3s3p1").replace(**form), g, scale=True, residual=True
        ),
        lambda g, **form: conv_sample(
            ConvProblem.parse("n2c18h7w6k18r3s3u2p1g18").replace(**form), g, activation="relu", residual=True
        ),
        lambda g, **form: conv_sample(ConvProblem.parse("n2c6h6w7k9r2s3p0x1x1x0d1x2g3").replace(**form), g),
        lambda g, **form: conv_sample(ConvProblem.parse("n3c8h3w3k6r1s1").replace(**form), g, residual=True),
        lambda g, **form: conv_sample(
            ConvProblem.parse("n2c1h7w7k5r5s5u2p2").replace(**form), g, scale=True, residual=True
        ),
        lambda g, **form: transpose_sample(ConvProblem.parse("n2c7h6w8k9r3s3u2p1").replace(**form), g),
        lambda g, **form: separable_sample(ConvProblem.parse("n2c9h6w5k9r3s3p1g9").replace(**form), 10, g),
        lambda g, **form: im2col_sample(ConvProblem.parse("n2c5h6w5k1r3s3p1").replace(**form), g),
    ),
    ids=("dense", "depthwise", "grouped", "1x1", "one channel", "transposed", "separable", "im2col"),
)
def test_layouts(make, layout: str):
    """Inputs and weights in the layout, then the gradient of the output."""
    arrange = LAYOUTS[layout]
    for dtype in DTYPES:
        check_accuracy(lambda g, dtype=dtype: make(g, dtype=dtype).map(arrange))
        check_accuracy(lambda g, dtype=dtype: make(g, dtype=dtype), arrange)


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("text", ("n2c17h7w6k18r3s3p1", "n2c16h7w6k16r3s3p1g16", "n3c8h3w3k6r1s1", "n2c1h7w7k5r5s5p2"))
def test_float32_scale_and_bias(text: str, layout: str):
    """Of an epilogue with a 16-bit input."""
    for dtype in ("bf16", "f16"):
        problem = ConvProblem.parse(text).replace(dtype=dtype, layout=layout)
        for residual in (False, True):
            check_accuracy(
                lambda g, p=problem, r=residual: conv_sample(p, g, True, "relu", scale=True, residual=r, mixed=True)
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_depthwise_of_more_channels_than_a_task_takes(backend, dtype: str):
    """Blocks of them must be whole lines of memory where outputs are too large for the caches. CPU only."""
    if backend.type == "cpu":
        problem = ConvProblem.parse("n1c1344h16w17k1344r7s7p3g1344").replace(dtype=dtype, layout="nhwc")
        check_accuracy(lambda g: conv_sample(problem, g))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))
def test_batch_norm_layouts(layout: str, training: bool):
    problem = TEST_BATCH_NORM_PROBLEMS[0].replace(n=3, c=18, h=4, w=5, residual=True)

    arrange = LAYOUTS[layout]
    for dtype in DTYPES:
        form = problem.replace(dtype=dtype)
        check_accuracy(lambda g, form=form: batch_norm_sample(form, g, training).map(arrange))
        check_accuracy(lambda g, form=form: batch_norm_sample(form, g, training), arrange)


@pytest.mark.parametrize("order", [*itertools.permutations(("contiguous", "channels_last", "sliced"))], ids="-".join)
def test_mixed_layouts(order):
    """Input, weight and gradient in three layouts of their own."""
    first, second, third = (LAYOUTS[name] for name in order)

    def make(g, dtype):
        sample = conv_sample(ConvProblem.parse("n2c17h5w6k16r3s3p1").replace(dtype=dtype), g)
        tensors = {"input": first(sample.tensors["input"]), "weight": second(sample.tensors["weight"])}
        return dataclasses.replace(sample, tensors=tensors)

    check_all(lambda d=d: check_accuracy(lambda g: make(g, d), third) for d in DTYPES)


def test_float64_convolution_is_exact():
    """On a grid of sixteenths there is one right answer: PyTorch's, whatever the order of the sum."""
    sample = conv_sample(ConvProblem.parse("n2c260h5w5k70r3s3p1_f64_nhwc"), torch.Generator().manual_seed(0))
    right = sample.evaluate(reference)
    for name, value in sample.map(place).evaluate(convkit.functional).items():
        assert torch.equal(value.cpu(), right[name]), name
