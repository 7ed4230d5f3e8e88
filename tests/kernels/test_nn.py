"""convkit.nn against torch.nn: the same constructor, values, gradients, buffers, names and errors."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import convkit.nn as cnn


def outcome(module, *inputs, **kwargs):
    """Output, gradients of inputs and parameters, and buffers after one forward and backward with a fixed weighting."""
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    output = module(*inputs, **kwargs)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    parameters = [parameter.grad for parameter in module.parameters()]
    return [output.detach(), *(value.grad for value in inputs), *parameters, *module.buffers()]


def assert_alike(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def pair(ours, theirs, *args, seed=0, **kwargs):
    """The two modules made with the same random numbers, in float64."""
    made = []
    for kind in (theirs, ours):
        torch.manual_seed(seed)
        made.append(kind(*args, **kwargs, dtype=torch.float64))
    assert [name for name, _ in made[0].named_parameters()] == [name for name, _ in made[1].named_parameters()]
    for one, other in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(one, other)
    return made


def image(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CONVOLUTIONS = {
    "plain": dict(),
    "stride_bias": dict(stride=2, padding=1, bias=False),
    "rectangular": dict(kernel_size=(3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    "same": dict(padding="same", dilation=2),
    "same_even_kernel": dict(kernel_size=(4, 2), padding="same"),
    "valid": dict(padding="valid", stride=3),
    "groups": dict(groups=2, padding=1),
    "depthwise": dict(groups=4, padding=1),
    "reflect": dict(padding=2, padding_mode="reflect"),
    "replicate": dict(padding=(1, 2), padding_mode="replicate", stride=2),
    "circular": dict(padding="same", padding_mode="circular", groups=2),
}


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("shape", [(2, 4, 9, 8), (4, 9, 8)], ids=["batch", "single"])
def test_conv2d(options, shape):
    theirs, ours = pair(cnn.Conv2d, nn.Conv2d, 4, 8, **{"kernel_size": 3} | options)
    assert_alike(outcome(ours, image(*shape)), outcome(theirs, image(*shape)))
    assert repr(ours) == repr(theirs)


def test_conv2d_activation():
    theirs, ours = pair(cnn.Conv2d, nn.Conv2d, 4, 6, 3, padding=1)
    ours.activation = "relu"
    assert_alike(outcome(ours, image(2, 4, 5, 5)), outcome(nn.Sequential(theirs, nn.ReLU()), image(2, 4, 5, 5)))
    assert "activation=relu" in repr(cnn.Conv2d(1, 1, 1, activation="relu"))
    with pytest.raises(ValueError, match="activation.*'gelu'"):
        cnn.Conv2d(4, 6, 3, activation="gelu")


TRANSPOSED = {
    "plain": dict(),
    "stride": dict(stride=2, padding=1, output_padding=1, bias=False),
    "rectangular": dict(kernel_size=(3, 2), stride=(3, 2), padding=(0, 1), dilation=(1, 2), output_padding=(2, 1)),
    "groups": dict(groups=2, stride=2),
}


@pytest.mark.parametrize("options", TRANSPOSED.values(), ids=TRANSPOSED)
@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (4, 5, 6)], ids=["batch", "single"])
def test_conv_transpose2d(options, shape):
    theirs, ours = pair(cnn.ConvTranspose2d, nn.ConvTranspose2d, 4, 6, **{"kernel_size": 3} | options)
    assert_alike(outcome(ours, image(*shape)), outcome(theirs, image(*shape)))
    assert repr(ours) == repr(theirs)


def test_conv_transpose2d_output_size():
    theirs, ours = pair(cnn.ConvTranspose2d, nn.ConvTranspose2d, 3, 2, 3, stride=3)
    sizes = {"output_size": [12, 14]}
    assert_alike(outcome(ours, image(1, 3, 4, 4), **sizes), outcome(theirs, image(1, 3, 4, 4), **sizes))
    for module in (theirs, ours):
        with pytest.raises(ValueError, match="output size"):
            module(image(1, 3, 4, 4), [1, 1])


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_batch_norm_relu(momentum, affine, tracked, residual):
    options = dict(momentum=momentum, affine=affine, track_running_stats=tracked, eps=1e-3)
    theirs, ours = pair(cnn.BatchNormReLU2d, nn.BatchNorm2d, 3, **options)
    assert repr(ours) == repr(theirs).replace("BatchNorm2d", "BatchNormReLU2d")

    for step, training in enumerate([True, True, False, True, False]):
        ours.train(training)
        theirs.train(training)
        inputs = [image(4, 3, 5, 4, seed=2 * step + number).requires_grad_() for number in range(1 + residual)]
        output = ours(*inputs)
        expected = torch.relu(theirs(inputs[0]) + sum(inputs[1:]))
        weights = image(*output.shape, seed=100)
        mine = torch.autograd.grad((output * weights).sum(), [*inputs, *ours.parameters()])
        wanted = torch.autograd.grad((expected * weights).sum(), [*inputs, *theirs.parameters()])
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert_alike([output, *mine, *ours.buffers()], [expected, *wanted, *theirs.buffers()])


def test_batch_norm_relu_without_one_of_the_parameters_or_the_count():
    for change in (dict(bias=None), dict(num_batches_tracked=None), dict(running_mean=None, running_var=None)):
        theirs, ours = pair(cnn.BatchNormReLU2d, nn.BatchNorm2d, 3)
        for module in (theirs, ours):
            for name, value in change.items():
                setattr(module, name, value)
        for training in (True, False):
            theirs.train(training)
            ours.train(training)
            x = image(2, 3, 4, 4)
            assert_alike([ours(x), *ours.buffers()], [theirs(x).relu(), *theirs.buffers()])


@pytest.mark.parametrize(
    ("shapes", "errors"),
    [
        ([(3, 4, 4)], ValueError),
        ([(2, 3, 4)], ValueError),
        ([(1, 3, 1, 1)], ValueError),
        ([(2, 4, 4, 4)], (RuntimeError, ValueError)),
        ([(2, 3, 4, 4), (2, 3, 4, 1)], (RuntimeError, ValueError)),
    ],
    ids=["3-D", "no-height", "one-value-per-channel", "channels", "residual"],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_relu_rejects_and_changes_nothing(shapes, errors, momentum):
    module = cnn.BatchNormReLU2d(3, momentum=momentum, dtype=torch.float64)
    module(image(2, 3, 4, 4))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(errors):
        module(*(image(*shape) for shape in shapes))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


SEPARABLE = {
    "plain": dict(),
    "strided": dict(stride=2, padding=1, bias=False),
    "rectangular": dict(kernel_size=(3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)),
    "multiplier": dict(padding=1, depth_multiplier=3),
    "same": dict(padding="same", depthwise_bias=True),
    "reflect": dict(padding=1, padding_mode="reflect"),
    "activations": dict(activation="relu", depthwise_activation="relu", depthwise_bias=True),
}


def separable_and_its_pair(options):
    torch.manual_seed(0)
    ours = cnn.SeparableConv2d(4, 6, **{"kernel_size": 3} | options, dtype=torch.float64)
    theirs = nn.Sequential()
    for name in ("depthwise", "pointwise"):
        child = getattr(ours, name)
        arguments = {key: getattr(child, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
        sizes = child.in_channels, child.out_channels, child.kernel_size
        theirs.add_module(name, nn.Conv2d(*sizes, bias=child.bias is not None, **arguments, dtype=torch.float64))
        if child.activation:
            theirs.add_module(f"{name}_activation", nn.ReLU())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("options", SEPARABLE.values(), ids=SEPARABLE)
@pytest.mark.parametrize("shape", [(2, 4, 7, 6), (4, 7, 6)], ids=["batch", "single"])
def test_separable(options, shape):
    ours, theirs = separable_and_its_pair(options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_alike(outcome(ours, image(*shape)), outcome(theirs, image(*shape)))
    with torch.no_grad():
        assert_alike([ours(image(*shape))], [theirs(image(*shape))])


def test_separable_calls_its_children_where_that_shows():
    ours, theirs = separable_and_its_pair(SEPARABLE["activations"])
    seen = []
    ours.depthwise.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_alike([ours(image(2, 4, 7, 6))], [theirs(image(2, 4, 7, 6))])
    assert_alike(seen, [theirs[1](theirs[0](image(2, 4, 7, 6)))])

    ours, theirs = separable_and_its_pair({})
    for module in (ours, theirs):
        prune.l1_unstructured(module.pointwise, "weight", amount=0.5)
        with torch.no_grad():  # a pruned weight is computed when the module is called
            module.pointwise.weight_orig.mul_(2)
    assert_alike([ours(image(2, 4, 7, 6))], [theirs(image(2, 4, 7, 6))])

    ours, theirs = separable_and_its_pair({})
    for module in (ours, theirs):
        module.pointwise = nn.Identity()
    assert_alike([ours(image(2, 4, 7, 6))], [theirs(image(2, 4, 7, 6))])


def test_separable_errors():
    with pytest.raises(ValueError, match="depth_multiplier must be at least 1, but got 0"):
        cnn.SeparableConv2d(4, 4, 3, depth_multiplier=0)
    with pytest.raises(ValueError, match="activation"):
        cnn.SeparableConv2d(4, 4, 3, depthwise_activation="tanh")


MODULES = {
    "conv": lambda: cnn.Conv2d(4, 4, 3, padding=1, activation="relu"),
    "transposed": lambda: cnn.ConvTranspose2d(4, 4, 3),
    "norm": lambda: cnn.BatchNormReLU2d(4),
    "separable": lambda: cnn.SeparableConv2d(4, 4, 3, activation="relu"),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_copies_casts_and_compiles(make):
    module = make()
    x = image(2, 4, 6, 6).float()
    expected = copy.deepcopy(module)(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), expected, rtol=0, atol=0)
    wide = copy.deepcopy(module).double()(x.double())
    torch.testing.assert_close(wide.float(), expected, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)
