"""First and second derivatives in float64 by finite differences, what is computed for whom, and what is kept for it."""

import dataclasses
import itertools

import pytest
import torch
from kernel_checks import (
    Calls,
    Sample,
    batch_norm_sample,
    conv_sample,
    place,
    separable_sample,
    set_device,
    small_samples,
    transpose_sample,
)

import convkit.functional as CF
from convkit import reference
from convkit.bench.problems import BatchNormProblem, ConvProblem

SAMPLES = small_samples()


@pytest.fixture(autouse=True)
def _one_thread():
    """Finite differences are thousands of tiny calls: waking a second thread takes longer than they do."""
    torch.set_num_threads(1)


@pytest.fixture
def _everywhere(backend):
    set_device(backend)
    yield
    set_device(torch.device("cpu"))


def differentiable(sample: Sample):
    """The sample as a function of its tensors, and these, asking for gradients.

    A little is added to every value: on the grid of sixteenths a sum could be exactly zero, and ReLU has a kink there.
    """
    names = list(sample.tensors)
    tensors = [place(t.detach() + 0.01 * torch.rand_like(t)) for t in sample.tensors.values()]
    sample = sample.map(place)
    return (lambda *values: sample(CF, **dict(zip(names, values, strict=True)))), [t.requires_grad_() for t in tensors]


@pytest.mark.usefixtures("_everywhere")
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("name", SAMPLES)
def test_gradcheck(name: str, layout: str):
    function, tensors = differentiable(small_samples("f64", layout)[name])
    assert torch.autograd.gradcheck(function, tensors, fast_mode=layout == "nhwc", check_batched_grad=False)


@pytest.mark.usefixtures("_everywhere")
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("name", SAMPLES)
def test_gradgradcheck(name: str, layout: str):
    function, tensors = differentiable(small_samples("f64", layout)[name])
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize(
    "sample",
    (
        conv_sample(ConvProblem.parse("n2c2h3w3k2r2s2p1x0_f64"), activation="relu"),
        conv_sample(ConvProblem.parse("n1c2h3w3k2r2s2p1x0_f64"), activation="relu", scale=True, residual=True),
        transpose_sample(ConvProblem.parse("n1c2h4w3k2r2s3u2x1_f64")),
        batch_norm_sample(BatchNormProblem.parse("n2c2h2w2_f64+res")),
    ),
    ids=lambda sample: " ".join((sample.op, *sample.tensors)),
)
def test_gradgradcheck_of_every_entry(sample: Sample):
    """The fast mode above looks at a random combination of entries; some entry by entry."""
    function, tensors = differentiable(sample)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("name", SAMPLES)
def test_second_derivatives_agree_with_pytorch(name: str):
    """The gradient of a function of the first gradients, with respect to everything, the upstream gradient included."""
    sample = SAMPLES[name]
    names = list(sample.tensors)
    grad = None

    def second(module):
        nonlocal grad
        leaves = [t.detach().clone().requires_grad_() for t in sample.tensors.values()]
        y = sample(module, **dict(zip(names, leaves, strict=True)))
        if grad is None:
            grad = torch.randn_like(y)
        upstream = grad.clone().requires_grad_()
        first = torch.autograd.grad(y, leaves, upstream, create_graph=True)
        # Powers, so that no gradient stays linear in anything.
        total = sum((g**2 * torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in first)
        return torch.autograd.grad(total, [*leaves, upstream], allow_unused=True)

    ours, theirs = second(CF), second(reference)
    for which, a, b in zip([*names, "grad"], ours, theirs, strict=True):
        if a is None or b is None:
            # One may know that a gradient is zero where the other computes zeros.
            assert all(t is None or not t.any() for t in (a, b)), which
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, b.abs().max().item()), msg=which)


def test_third_derivative():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for module in (CF, reference):
        y = module.conv2d(x, w, padding=1) ** 2
        (gx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (gw,) = torch.autograd.grad((gx**2).sum(), w, create_graph=True)
        (third,) = torch.autograd.grad((gw**2).sum(), x)
        if module is CF:
            ours = third
    torch.testing.assert_close(ours, third, rtol=1e-10, atol=1e-9)


def subsets(names):
    return [subset for size in range(1, len(names) + 1) for subset in itertools.combinations(names, size)]


def backward_calls(sample: Sample, wanted: tuple[str, ...]) -> Calls:
    """Runs the sample with gradients asked for `wanted` only, and records the backward pass."""
    tensors = {name: t.detach().requires_grad_(name in wanted) for name, t in sample.tensors.items()}
    y = sample(CF, **tensors)
    with Calls() as calls:
        y.backward(torch.randn_like(y))
    for name, t in tensors.items():
        assert (t.grad is not None) == (name in wanted), name
    return calls


CONV = conv_sample(ConvProblem.parse("n2c3h5w4k4r3s3p1"), scale=True, residual=True)
TRANSPOSE = transpose_sample(ConvProblem.parse("n2c3h5w4k4r3s3p1"))


@pytest.mark.parametrize("activation", (None, "relu"))
@pytest.mark.parametrize("wanted", subsets(("input", "weight", "bias", "scale", "residual")), ids="+".join)
def test_conv2d_computes_what_is_asked(wanted, activation):
    sample = dataclasses.replace(CONV, options=CONV.options | {"activation": activation})
    # The scale's takes the convolution without it; the residual's is what is there already.
    operators = {"input": ["conv2d_input_grad"], "weight": ["conv2d_weight_grad"], "bias": ["channel_sum"]}
    operators |= {"scale": ["conv2d", "channel_sum"], "residual": []}
    assert backward_calls(sample, wanted).names == sorted(itertools.chain.from_iterable(map(operators.get, wanted)))


@pytest.mark.parametrize("wanted", subsets(("input", "weight", "bias")), ids="+".join)
def test_conv_transpose2d_computes_what_is_asked(wanted):
    operators = {"input": "conv2d", "weight": "conv2d_weight_grad", "bias": "channel_sum"}
    assert backward_calls(TRANSPOSE, wanted).names == sorted(operators[name] for name in wanted)


@pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))
@pytest.mark.parametrize("wanted", subsets(("input", "residual", "weight", "bias")), ids="+".join)
def test_batch_norm_relu_computes_what_is_asked(wanted, training):
    sample = batch_norm_sample(BatchNormProblem.parse("n2c3h3w4+res"), training=training)
    ((name, arguments),) = backward_calls(sample, wanted).calls
    assert name == "batch_norm_relu_grad"
    assert list(arguments[-1]) == [n in wanted for n in ("input", "residual", "weight", "bias")]


@pytest.mark.parametrize(
    "wanted", [("input",), ("depthwise_weight",), ("pointwise_weight",), ("scale",), ("shift",), ("depthwise_scale",)]
)
def test_separable_conv2d_gives_only_what_is_asked(wanted):
    calls = backward_calls(separable_sample(ConvProblem.parse("n2c3h5w4k3r3s3p1g3"), 4), wanted)
    grads = calls.names.count("conv2d_input_grad") + calls.names.count("conv2d_weight_grad")
    # Through the pointwise convolution, then that of the depthwise one: never more than two, none for the last affine.
    most = {"input": 2, "depthwise_weight": 2, "pointwise_weight": 1, "scale": 0, "shift": 0, "depthwise_scale": 1}
    assert grads == most[wanted[0]], calls.names


def test_separable_conv2d_is_one_call_without_gradients():
    sample = separable_sample(ConvProblem.parse("n2c3h5w4k3r3s3p1g3"), 4)
    with torch.no_grad(), Calls() as calls:
        sample()
    assert calls.names == ["separable_conv2d"]


@pytest.mark.parametrize("name", SAMPLES)
def test_no_graph_where_no_gradient_is_needed(name: str):
    y = SAMPLES[name]()
    assert not y.requires_grad and y.grad_fn is None
    with torch.no_grad():
        tensors = {key: t.detach().requires_grad_() for key, t in SAMPLES[name].tensors.items()}
        assert not SAMPLES[name](CF, **tensors).requires_grad


def kept_bytes(sample: Sample) -> int:
    """Bytes of the distinct storages that the backward pass of the sample keeps alive."""
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    tensors = {name: t.detach().requires_grad_() for name, t in sample.tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sample(CF, **tensors)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ("f32", "bf16"))
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("residual", (False, True), ids=("", "residual"))
def test_batch_norm_relu_keeps_its_input_and_little_else(dtype, layout, residual):
    problem = BatchNormProblem(4, 32, 16, 16, dtype, layout, residual)
    x_bytes = 4 * 32 * 16 * 16 * problem.torch_dtype.itemsize
    per_channel = 16 * 8 * 32
    assert kept_bytes(batch_norm_sample(problem)) <= x_bytes + (4 * 32 * 16 * 16 // 8 if residual else 0) + per_channel


def test_conv2d_keeps_nothing_twice():
    sample = conv_sample(ConvProblem.parse("n2c8h16w16k8r3s3p1"))
    x, w = (sample.tensors[name] for name in ("input", "weight"))
    assert kept_bytes(sample) <= x.nbytes + w.nbytes + 64


@pytest.mark.parametrize(
    "name", ("conv2d", "batch_norm_relu training residual", "separable_conv2d", "conv_transpose2d")
)
def test_backward_twice(name: str):
    """Nothing that the backward pass needs is consumed by it."""
    sample = SAMPLES[name]
    tensors = {key: t.detach().requires_grad_() for key, t in sample.tensors.items()}
    y = sample(CF, **tensors)
    first = torch.autograd.grad(y.sum(), list(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(y.sum(), list(tensors.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_input_changed_in_place_is_noticed():
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3, requires_grad=True)
    y = CF.conv2d(x, w)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
