"""Bitwise the same: again, with any number of threads, and from any thread."""

import threading

import pytest
import torch
from kernel_checks import (
    Sample,
    batch_norm_sample,
    col2im_sample,
    conv_sample,
    im2col_sample,
    max_pool_sample,
    separable_sample,
    transpose_sample,
)

from convkit import functional as CF
from convkit.bench.problems import (
    TEST_BATCH_NORM_PROBLEMS,
    TEST_MAX_POOL_PROBLEMS,
    TEST_PROBLEMS,
    BatchNormProblem,
    ConvProblem,
)

CONVOLUTIONS = (
    "n3c17h13w12k33r3s3p1",
    "n2c64h14w14k48r1s1",
    "n9c3h16w15k20r5s5u2p2",
    "n1c24h9w9k36r3s3p2d2g3",
    "n4c40h14w13k40r3s3u2p1g40",
    "n33c6h4w4k8r3s3p1",
    "n1c1h40w40k1r7s7p3",
)


def samples(dtype: str, layout: str) -> dict[str, Sample]:
    """Large enough for several tasks of every kernel, so that the sums could be split in more than one way."""
    form = {"dtype": dtype, "layout": layout}
    problems = {text: ConvProblem.parse(text).replace(**form) for text in CONVOLUTIONS}
    made = {
        f"conv2d {text}": conv_sample(problem, activation="relu", scale=True, residual=True)
        for text, problem in problems.items()
    }
    made |= {
        f"conv_transpose2d {text}": transpose_sample(problem)
        for text, problem in problems.items()
        if problem.transposed_output_padding
    }
    depthwise = problems["n4c40h14w13k40r3s3u2p1g40"]
    made["separable_conv2d"] = separable_sample(depthwise, 24)
    for text in ("n8c40h14w13", "n64c70h2w2", "n2c3h61w60+res", "n1c1h100w99+res"):
        for training in (False, True):
            problem = BatchNormProblem.parse(text).replace(**form)
            made[f"batch_norm_relu {text} {training}"] = batch_norm_sample(problem, training=training)
    for number, problem in enumerate(TEST_MAX_POOL_PROBLEMS):
        activation = (None, "relu")[number % 2]
        made[f"max_pool2d {problem}"] = max_pool_sample(problem.replace(**form), activation=activation)
    made["im2col"] = im2col_sample(problems["n9c3h16w15k20r5s5u2p2"])
    made["col2im"] = col2im_sample(problems["n9c3h16w15k20r5s5u2p2"])
    return made


FORMS = [("f64", "nchw"), ("f32", "nchw"), ("f32", "nhwc"), ("bf16", "nhwc"), ("f16", "nchw")]


def results(sample: Sample, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        without_grad = sample()
    return sample.evaluate(CF, grad) | {"output without gradients": without_grad}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], what: str) -> None:
    for name, value in a.items():
        assert torch.equal(value, b[name]), f"{what}: {name} differs by {(value - b[name]).abs().max().item():.3g}"


@pytest.mark.parametrize(("dtype", "layout"), FORMS, ids="-".join)
def test_again_and_with_any_number_of_threads(dtype: str, layout: str):
    for name, sample in samples(dtype, layout).items():
        grad = torch.randn_like(sample())
        first = results(sample, grad)
        for threads in (2, 1, 3, 5):
            torch.set_num_threads(threads)
            for _ in range(2):
                assert_same(first, results(sample, grad), f"{name}, {threads} threads")


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_the_table_with_one_thread_and_with_three(layout: str):
    for number, problem in enumerate(TEST_PROBLEMS):
        made = [conv_sample(problem.replace(layout=layout))]
        if problem.is_depthwise:
            made.append(separable_sample(problem.replace(layout=layout), 17))
        if number < len(TEST_BATCH_NORM_PROBLEMS):
            norm = TEST_BATCH_NORM_PROBLEMS[number].replace(layout=layout, residual=number % 2 == 0)
            made += [batch_norm_sample(norm, training=training) for training in (False, True)]
        for sample in made:
            torch.set_num_threads(1)
            grad = torch.randn_like(sample())
            alone = results(sample, grad)
            torch.set_num_threads(3)
            assert_same(alone, results(sample, grad), str(sample))


def test_from_several_threads_at_once():
    """As in a server, or in the autograd engine with several devices: calls share nothing."""
    made = list(samples("f32", "nhwc").items())
    grads = [torch.randn_like(sample()) for _, sample in made]
    right = [results(sample, grad) for (_, sample), grad in zip(made, grads, strict=True)]
    failures: list[BaseException] = []

    def work(start: int) -> None:
        try:
            for step in range(2 * len(made)):
                i = (start + step) % len(made)
                assert_same(right[i], results(made[i][1], grads[i]), made[i][0])
        except BaseException as error:  # noqa: BLE001 (an assertion of another thread would be lost)
            failures.append(error)

    workers = [threading.Thread(target=work, args=(5 * number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures[0]


def test_inputs_are_left_alone():
    for name, sample in samples("f32", "nhwc").items():
        before = {key: value.clone() for key, value in sample.tensors.items()}
        results(sample, torch.randn_like(sample()))
        for key, value in before.items():
            assert torch.equal(sample.tensors[key], value), f"{name}: {key} was written to"


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("dtype", ("f64", "f32", "bf16", "f16"))
def test_a_large_batch_is_its_images(dtype: str, layout: str):
    """Results that no cache holds are written past the caches, in whole lines; those of one image are not."""
    form = {"dtype": dtype, "layout": layout}
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format

    def both(function, *tensors: torch.Tensor) -> None:
        tensors = [t.contiguous(memory_format=memory_format).requires_grad_() for t in tensors]
        y = function(*tensors)
        grad = torch.randn_like(y)
        results = y, *torch.autograd.grad(y, tensors, grad)
        i = y.shape[0] - 2
        alone = [t.detach()[i : i + 1].clone(memory_format=memory_format).requires_grad_() for t in tensors]
        y = function(*alone)
        for all_images, image in zip(results, (y, *torch.autograd.grad(y, alone, grad[i : i + 1])), strict=True):
            assert torch.equal(all_images[i : i + 1], image)

    torch.set_num_threads(1)
    for text in (
        "n41c64h28w30k64r3s3p1g64",
        "n41c64h28w30k64r5s5u2p2g64",
        "n41c32h28w32k64r1s1",
        "n41c3h28w32k64r3s3p1",
    ):
        x, weight, *_ = ConvProblem.parse(text).replace(**form).tensors()
        problem = ConvProblem.parse(text)
        both(lambda x, w=weight, p=problem: CF.conv2d(x, w, None, p.stride, p.torch_padding, p.dilation, p.groups), x)
    for text in ("n41c64h28w30+res", "n21c2048h7w7+res", "n21c2048h7w7"):
        x, residual, weight, bias, _ = BatchNormProblem.parse(text).replace(**form).tensors()
        mean, var = torch.zeros_like(weight), torch.ones_like(weight)
        images = [x] if residual is None else [x, residual]
        both(lambda x, r=None, m=mean, v=var, w=weight, b=bias: CF.batch_norm_relu(x, m, v, w, b, residual=r), *images)
