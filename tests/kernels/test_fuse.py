"""convkit.fuse: which batch norms, sums and ReLUs are computed as one, and that nothing else changes."""

import copy
import pickle
import random
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import Calls
from swap_checks import assert_close, assert_same_behaviour, build, conv, fused, images, row
from torch import nn
from torch.utils.checkpoint import checkpoint

import convkit
import convkit.nn as cnn


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are too small to share among threads, and what is tested is not how they compute."""
    torch.set_num_threads(1)


# ---------------------------------------------------------------- what is fused


class Ends(nn.Module):
    """conv - batch norm - whatever ``end(module, normalized, x)`` does."""

    def __init__(self, end):
        super().__init__()
        self.conv, self.bn, self.relu = conv(3, 3), nn.BatchNorm2d(3), nn.ReLU()
        self.relu_in_place = nn.ReLU(inplace=True)
        self.other = nn.BatchNorm2d(3)
        self.row = nn.Parameter(torch.linspace(-1, 1, 12))
        self.end = end

    def forward(self, x):
        return self.end(self, self.bn(self.conv(x)), x)


def in_place(y, x):
    y += x
    return y


FUSED = {
    "module": lambda m, y, x: m.relu(y),
    "module_in_place": lambda m, y, x: m.relu_in_place(y),
    "F.relu": lambda m, y, x: F.relu(y),
    "F.relu in place": lambda m, y, x: F.relu(y, inplace=True),
    "F.relu_": lambda m, y, x: F.relu_(y),
    "torch.relu": lambda m, y, x: torch.relu(input=y),
    "torch.relu_": lambda m, y, x: torch.relu_(y),
    "Tensor.relu": lambda m, y, x: y.relu(),
    "Tensor.relu_": lambda m, y, x: y.relu_(),
    "sum": lambda m, y, x: m.relu(y + x),
    "sum_other_way": lambda m, y, x: F.relu(x + y),
    "sum_in_place": lambda m, y, x: m.relu_in_place(in_place(y, x)),
    "torch.add": lambda m, y, x: torch.relu(torch.add(x, y)),
    "torch.add by name": lambda m, y, x: torch.relu(torch.add(input=y, other=x)),
    "Tensor.add": lambda m, y, x: x.add(y).relu(),
    "Tensor.add_": lambda m, y, x: y.add_(x).relu_(),
    "residual_computed_after": lambda m, y, x: m.relu(y + torch.sigmoid(x)),
    "parameter": lambda m, y, x: m.relu(y + m.row),
    "used_after": lambda m, y, x: m.relu(y) * 2 + x,
    "norm_on_both_sides": lambda m, y, x: m.relu(m.other(m.conv(x)) + y),
    "norm_on_both_sides_in_place": lambda m, y, x: m.relu(in_place(y, m.other(x))),
    "smaller_residual": lambda m, y, x: m.relu(y + x[:, :1]),
    "smaller_residual_in_place": lambda m, y, x: m.relu(in_place(y, x.mean((2, 3), keepdim=True))),
    "larger_residual": lambda m, y, x: m.relu(y + torch.stack([x, -x])),
    "residual_of_other_dtype": lambda m, y, x: m.relu(y + x.float()),
    "residual_of_other_dtype_in_place": lambda m, y, x: m.relu(in_place(y, x.half())),
    "number_as_residual": lambda m, y, x: m.relu(y + x.shape[0]),
    "values_written_to": lambda m, y, x: writes_to_an_alias(m, y, x),
    "residual_is_input": lambda m, y, x: m.relu(m.other(x) + x) + y,
}


@pytest.mark.parametrize("end", FUSED.values(), ids=FUSED)
def test_fuses(end):
    model = build(lambda: Ends(end))
    reference = copy.deepcopy(model)
    report = convkit.swap(model)
    assert len(fused(model)) == 1
    (name,) = fused(model)
    assert row(report, name).replaced_by
    assert_same_behaviour(model, reference, images())
    convkit.swap(model.float())
    assert_same_behaviour(model, reference.float(), images(torch.float32), dtype=torch.float32)


class Block(nn.Module):
    """conv - batch norm - ReLU - conv - batch norm - sum - ReLU, the residual through a convolution of its own."""

    def __init__(self, **options):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1, **options), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, 2, padding=1, groups=2, **options), nn.BatchNorm2d(8)
        self.down = nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return self.relu(y)


def calls(model, x):
    with Calls() as called:
        model(x)
    return {name: called.names.count(name) for name in ("conv2d", "batch_norm_relu")}


JOINED, SEPARATE = {"conv2d": 3, "batch_norm_relu": 0}, {"conv2d": 3, "batch_norm_relu": 2}


def swapped_block(dtype=torch.float64, **options):
    """The block, swapped, and as it was; in evaluation, with running statistics that are not the initial ones."""
    model = build(lambda: Block(**options), dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    reference = copy.deepcopy(model.eval())
    convkit.swap(model)
    assert fused(model) == ["bn", "bn2"]
    return model, reference


@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("padding_mode", ("zeros", "reflect", "circular"))
def test_evaluation_without_gradients_is_one_operator_a_convolution(bias, padding_mode):
    for dtype in (torch.float64, torch.float32):
        model, reference = swapped_block(dtype, bias=bias, padding_mode=padding_mode)
        x = images(dtype)
        for make in (torch.no_grad, torch.inference_mode):
            with make():
                assert calls(model, x) == JOINED
                assert_close(model(x), reference(x), dtype)
        assert calls(model, x) == SEPARATE
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        assert calls(model, x) == JOINED
        assert calls(model, x.requires_grad_()) == SEPARATE


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("mixed", (False, True), ids=("", "float32 norms"))
def test_16_bit_evaluation_without_gradients(dtype, mixed):
    """One rounding instead of several: not further from float64 than the original."""
    model, reference = (net.to(dtype) for net in swapped_block(torch.float32))
    if mixed:
        for net in (model, reference):
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.float()
    x = images(dtype)
    right = copy.deepcopy(reference).double()
    with torch.no_grad():
        assert calls(model, x) == JOINED
        y = model(x)
        error, before = ((z.double() - right(x.double())).norm() for z in (y, reference(x)))
    assert y.dtype == dtype and error <= 1.1 * before


def replaced(model):
    model.conv = nn.Conv2d(3, 6, 3, padding=1).double()


SEPARATING = {
    "training": lambda m: m.train(),
    "training of a batch norm": lambda m: (m.bn.train(), m.bn2.train()),
    "no running statistics": lambda m: [
        setattr(norm, name, None) for norm in (m.bn, m.bn2) for name in ("running_mean", "running_var")
    ],
    "hooks": lambda m: [n.register_forward_hook(lambda *args: None) for n in (m.conv, m.conv2)],
    "an activation": lambda m: [setattr(n, "activation", "relu") for n in (m.conv, m.conv2)],
    "a forward of its own": lambda m: [setattr(n, "forward", n.forward) for n in (m.conv, m.conv2)],
}


@pytest.mark.parametrize("change", SEPARATING.values(), ids=SEPARATING)
def test_what_needs_the_layers_one_by_one_gets_them(change):
    model, _ = swapped_block()
    change(model)
    with torch.no_grad():
        assert calls(model, images()) == SEPARATE


def test_a_convolution_that_is_not_convkits_stays():
    model, reference = swapped_block()
    replaced(model), replaced(reference)
    reference.conv.load_state_dict(model.conv.state_dict())
    with torch.no_grad():
        assert calls(model, images()) == {"conv2d": 2, "batch_norm_relu": 1}
        assert_close(model(images()), reference(images()))


def test_autocast_keeps_the_dtypes():
    model, reference = swapped_block(torch.float32)
    x = images(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert calls(model, x) == SEPARATE
        assert model(x).dtype == reference(x).dtype


def test_refused_as_before():
    """An input, an eps or a size that one of the layers refuses, with the same message."""
    for change in (
        lambda m: setattr(m.bn, "eps", float("nan")),
        lambda m: setattr(m.conv, "weight", nn.Parameter(torch.randn(5, 3, 3, 3).double())),
        lambda m: setattr(m, "bn", nn.BatchNorm2d(7).double().eval()),
        lambda m: setattr(m, "conv2", cnn.Conv2d(6, 8, 3, 3).double()),
    ):
        messages = []
        for joins in (False, True):
            model, _ = swapped_block()
            change(model)
            with torch.set_grad_enabled(not joins), pytest.raises((RuntimeError, ValueError)) as error:
                model(images())
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_an_input_that_something_else_may_change_is_read_before():
    class Writes(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.writes = conv(3, 3), nn.BatchNorm2d(3), Writes()

        def forward(self, x):
            y = self.bn(self.conv(x))
            return F.relu(y + self.writes(x))

    model = build(Between).eval()
    reference = copy.deepcopy(model)
    convkit.swap(model)
    assert fused(model) == ["bn"]
    with torch.no_grad():
        assert calls(model, images()) == {"conv2d": 1, "batch_norm_relu": 1}
        assert_close(model(images()), reference(images()))


def stored(m, y, x):
    m.kept = y
    return m.relu(y)


def counted(m, y, x):
    m.calls += 1
    return m.relu(y)


def appended(m, y, x):
    m.log.append(y)
    return m.relu(y)


def without_gradient(m, y, x):
    with torch.no_grad():
        y = m.relu(y)
    return y


def wide(m, y, x):
    with torch.autocast("cpu", enabled=False):
        y = m.relu(y)
    return y


def kept_name(m, y, x):
    m.relu_in_place(y)
    return y


def changed_input(m, y, x):
    z = m.other(x)
    x.mul_(2)
    return F.relu(z) + y


def called_again(m, y, x):
    z, kept = m.other(m.conv(x)), m.other(y)
    return F.relu(z) - kept


def changed_residual(m, y, x):
    x = x * 1
    total = y + x
    x.mul_(2)
    return F.relu(total)


def writes_to_an_alias(m, y, x):
    x = x * 1
    kept = x
    x += 1
    x /= 2
    x **= 2
    size = kept.shape[0]
    other = size
    other *= 2
    return F.relu(y) + kept * size + other


def sets_data(m, y, x):
    x.data = x.data * 2
    return F.relu(y) + x


def swapped_sum(m, y, x):
    x = x * 1
    x += y
    return F.relu(x)


LEFT = {
    "nothing": (lambda m, y, x: y, "its output is returned before a ReLU in the model's forward"),
    "returned_sum": (lambda m, y, x: y + x, "the sum after it is returned before a ReLU"),
    "two_uses": (lambda m, y, x: m.relu(y) + y, "its output is used 2 times"),
    "two_uses_of_sum": (lambda m, y, x: [m.relu(z) + z for z in [y + x]][0], "the sum after it is used 2 times"),
    "relu_by_side_effect": (kept_name, "its output is used 2 times"),
    "added_to_itself": (lambda m, y, x: m.relu(y + y), "not one of two tensors"),
    "number": (lambda m, y, x: m.relu(y + 1), "not one of two tensors"),
    "alpha": (lambda m, y, x: m.relu(torch.add(y, x, alpha=2)), "not one of two tensors"),
    "difference": (lambda m, y, x: m.relu(y - x), "followed by sub and not by a ReLU"),
    "added_in_place_to": (swapped_sum, "added in place to another tensor"),
    "relu6": (lambda m, y, x: F.relu6(y), "followed by relu6 and not"),
    "module": (lambda m, y, x: m.conv(y), r"followed by conv \(Conv2d\) and not"),
    "input_changed": (changed_input, "something else happens before the ReLU"),
    "called_again": (called_again, "it is called again before the ReLU"),
    "residual_changed": (changed_residual, "something else happens between the sum and the ReLU"),
    "dropout": (lambda m, y, x: F.dropout(m.relu(y), 0.3, m.training), "not the same in training and in evaluation"),
    "branch_on_mode": (lambda m, y, x: m.relu(y) if m.training else y, "not the same in training and in evaluation"),
    "branch_on_gradients": (lambda m, y, x: m.relu(y) if torch.is_grad_enabled() else y, "with and without gradients"),
    "branch_on_data": (lambda m, y, x: m.relu(y) if x.sum() > 0 else y, "TraceError"),
    "branch_on_shape": (lambda m, y, x: m.relu(y) if len(x) > 1 else y, "cannot be recorded"),
    "branch_on_type": (lambda m, y, x: m.relu(y) if isinstance(x, torch.Tensor) else y, "asks for the type"),
    "random": (lambda m, y, x: m.relu(y) if random.random() < 2 else y, "draws random numbers"),
    "random_torch": (lambda m, y, x: m.relu(y) * (torch.rand(()).item() < 2), "draws random numbers"),
    "constant": (lambda m, y, x: m.relu(y) * torch.arange(3.0).view(3, 1, 1), "makes tensors of its own"),
    "branch_on_type_of_attribute": (
        lambda m, y, x: m.relu(y) if isinstance(x.shape, tuple) else y,
        "asks for the type",
    ),
    "sets_data": (sets_data, "sets .data of a value"),
    "stores": (stored, "changes attributes"),
    "counts": (counted, "changes attributes"),
    "appends": (appended, "changes attributes"),
    "no_grad": (without_gradient, "switches gradients, autocast"),
    "autocast": (wide, "switches gradients, autocast"),
    "checkpoint": (lambda m, y, x: checkpoint(m.relu, y, use_reentrant=False), "checkpoint|used 2 times|not by a ReLU"),
    "checkpoint_function": (lambda m, y, x: checkpoint(lambda v: m.relu(v), y, use_reentrant=False), "checkpoint"),
    "checkpoint_reentrant": (lambda m, y, x: checkpoint(lambda v: m.relu(v), y, use_reentrant=True), "cannot be rec"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("end", "reason"), LEFT.values(), ids=LEFT)
def test_leaves_and_says_why(end, reason):
    model = build(lambda: Ends(end))
    model.calls, model.log = 0, []
    reference = copy.deepcopy(model)
    state = torch.get_rng_state(), random.getstate()
    report = convkit.swap(model)
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()
    assert type(model) is Ends and type(model.conv) is cnn.Conv2d
    assert any(re.search(reason, row.reason) for row in report.left), report
    assert list(vars(model)) == list(vars(reference)) and model.calls == 0 and model.log == []
    results = []
    for m in (model, reference):
        torch.manual_seed(0)
        results.append(m(images()).detach())
    assert_close(*results)


class Program(nn.Module):
    """Runs steps (operation, which value, which other value), counted back from the newest; in place or not."""

    def __init__(self, steps, results):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.conv, self.relu, self.relu_in_place = conv(3, 3), nn.ReLU(), nn.ReLU(inplace=True)
        self.steps, self.results = steps, results

    def forward(self, x):
        values = [x * 1]
        for operation, first, second in self.steps:
            x, y = (values[max(len(values) - 1 - back, 0)] for back in (first, second))
            if operation == "sum_in_place":
                x += y
            values.append(STEPS[operation](self, x, y))
        return [values[max(len(values) - 1 - back, 0)] for back in self.results]


STEPS = {
    "conv": lambda m, x, y: m.conv(x),
    "norm0": lambda m, x, y: m.norms[0](x),
    "norm1": lambda m, x, y: m.norms[1](x),
    "norm2": lambda m, x, y: m.norms[2](x),
    "relu": lambda m, x, y: m.relu(x),
    "relu_in_place": lambda m, x, y: m.relu_in_place(x),
    "relu_function": lambda m, x, y: F.relu(x),
    "sum": lambda m, x, y: x + y,
    "sum_in_place": lambda m, x, y: x,
    "double": lambda m, x, y: x.mul_(2),
    "view": lambda m, x, y: x.view_as(y),
}


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(list(STEPS)), st.sampled_from([0, 0, 0, 1, 2, 3]), st.integers(0, 4)), max_size=12
    ),
    results=st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_any_program_gives_the_same(steps, results):
    model = build(lambda: Program(steps, results))
    reference = copy.deepcopy(model)
    convkit.swap(model)
    with torch.no_grad():  # writing in place to what a gradient needs is an error, also before the swap
        for training in (True, True, False):
            outputs = [m.train(training)(images()[:2, :, :4, :4]) for m in (model, reference)]
            assert_close(*outputs)
            assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


# ---------------------------------------------------------------- other shapes of models


class Untraceable(nn.Module):
    """A forward that branches on data, over parts that can be recorded."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 3), nn.BatchNorm2d(3))
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.features(x)
        return F.relu(self.bn(x)) if x.sum() < 1e9 else x


def test_neighbours_in_a_sequential_fuse_whatever_is_around():
    model = build(Untraceable)
    reference = copy.deepcopy(model)
    report = convkit.swap(model)
    assert fused(model) == [] and fused(model.features) == ["1"]
    assert row(report, "features.4").reason == "its output is returned before a ReLU in the forward of features"
    assert "the model's forward cannot be recorded: TraceError" in row(report, "bn").reason
    assert_same_behaviour(model, reference, images())


class Iterates(nn.Module):
    """Walks through a Sequential that is never called, and a ModuleDict."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU())
        self.more = nn.ModuleDict({"norm": nn.BatchNorm2d(3), "act": nn.ReLU()})

    def forward(self, x):
        for module in [*self.features, *self.more.values()]:
            x = module(x)
        return x


def test_layers_called_from_further_up():
    model = build(Iterates)
    reference = copy.deepcopy(model)
    report = convkit.swap(model)
    assert fused(model) == ["features.1", "more.norm"] and fused(model.features) == ["1"]
    assert row(report, "features.1").replaced_by == "BatchNormReLU2d, in the model's forward"
    assert_same_behaviour(model, reference, images())
    for change in (lambda m: m.features.append(nn.Tanh()), lambda m: m.more.update({"next": nn.Tanh()})):
        change(model)
        change(reference)
        assert_same_behaviour(model, reference, images())
        convkit.swap(model)
        assert_same_behaviour(model, reference, images())


class Shares(nn.Module):
    """One batch norm at two places, only one of them before a ReLU, and one batch norm called twice."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.BatchNorm2d(3)
        self.twice = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(self.a(x)) - self.b(2 * x)
        return self.relu(self.twice(self.relu(self.twice(x)) + x) + x)


def test_shared_batch_norms():
    model = build(Shares)
    reference = copy.deepcopy(model)
    report = convkit.swap(model)
    assert len(report) == 2 and row(report, "a = b").replaced_by
    assert len(fused(model)) == 3
    assert_same_behaviour(model, reference, images())


class Options(nn.Module):
    """A forward with a parameter that may be left away, and one that may be None."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x, skip, scale=None, *, negate=False):
        x = self.bn(x)
        if skip is not None:
            x = x + skip
        x = F.relu(x)
        if scale is not None:
            x = x * scale
        return -x if negate else x


@pytest.mark.parametrize(
    ("args", "kwargs", "fast"),
    [
        ([images(seed=2)], {}, True),
        ([], {"skip": images(seed=2)}, True),
        ([None], {}, False),
        ([], {"skip": None}, False),
        ([images(seed=2)], {"scale": 3}, False),
        ([images(seed=2), 3], {"negate": True}, False),
    ],
)
def test_optional_arguments(args, kwargs, fast):
    model = build(Options)
    reference = copy.deepcopy(model)
    convkit.swap(model)
    assert fused(model) == ["bn"]
    assert model._convkit_fusion.holds(model, (images(), *args), kwargs) is fast
    for other in (model, pickle.loads(pickle.dumps(model))):
        assert_close(other(images(), *args, **kwargs), copy.deepcopy(reference)(images(), *args, **kwargs))
    with pytest.raises(TypeError, match="skip"):
        model(images())


class Various(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, *values):
        return F.relu(self.bn(values[0]))


class NeedsAName(Various):
    def forward(self, *, x):
        return F.relu(self.bn(x))


class HasNoSubclasses(Various):
    def forward(self, x):
        return F.relu(self.bn(x))

    def __init_subclass__(cls):
        raise TypeError("final")


class CopiesItself(Various):
    def forward(self, x):
        return F.relu(self.bn(x))

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Various, r"takes any number of arguments \(\*values\)"),
        (NeedsAName, "x must be given by name"),
        (HasNoSubclasses, "TypeError: final"),
        (CopiesItself, r"copied or pickled in its own way \(__deepcopy__\)"),
        (lambda: torch.fx.symbolic_trace(Untraceable().features), r"own way \(__reduce__\)|own way \(__deepcopy__\)"),
    ],
)
def test_forwards_that_cannot_be_rewritten(make, reason):
    model = make()
    report = convkit.swap(model)
    assert not fused(model) and any(re.search(f"cannot be recorded: .*{reason}", row.reason) for row in report.left)


class Counting(nn.Module):
    """Its forward writes to a buffer, in one of several ways; recorded, it would count the recordings and then stop."""

    def __init__(self, count):
        super().__init__()
        self.bn, self.count = nn.BatchNorm2d(3), count
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x):
        self.count(self)
        return F.relu(self.bn(x))


COUNTS = {
    "in_place": lambda self: self.calls.add_(1),
    "a_part": lambda self: self.calls[1].add_(1),
    "data": lambda self: self.calls.data.mul_(2).add_(1),
    "a_childs": lambda self: self.bn.num_batches_tracked.add_(1),
    "out": lambda self: torch.add(self.calls, 1, out=self.calls),
}


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_writes_to_buffers_go_on(count):
    model = build(lambda: Counting(count))
    reference = copy.deepcopy(model)
    report = convkit.swap(model)
    assert not fused(model) and "it writes to a tensor that it was not given" in row(report, "bn").reason
    assert_close(model.state_dict(), reference.state_dict())
    assert_same_behaviour(model, reference, images())


def test_forward_on_the_instance_is_kept():
    model = build(lambda: Ends(FUSED["sum"]))
    model.forward = lambda x: x + 1
    report = convkit.swap(model)
    assert "it was replaced on the instance" in row(report, "bn").reason
    assert torch.equal(model(images()), images() + 1)


# ---------------------------------------------------------------- hooks, and changes after the swap


def outputs(values):
    return lambda module, inputs, output: values.append(output.clone())


@pytest.mark.parametrize("name", ["bn", "relu"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_what_would_be_fused(name, when):
    model = build(lambda: Ends(FUSED["sum"]))
    reference = copy.deepcopy(model)
    seen, expected = [], []
    if when == "before":
        getattr(model, name).register_forward_hook(outputs(seen))
    report = convkit.swap(model)
    if when == "after":
        getattr(model, name).register_forward_hook(outputs(seen))
    else:
        assert "hooks" in row(report, "bn").reason and type(model) is Ends
    getattr(reference, name).register_forward_hook(outputs(expected))
    assert_same_behaviour(model, reference, images())
    assert len(seen) == len(expected) == 4  # two steps of training, two evaluations
    assert_close(seen, expected)


def test_hooks_on_every_module_see_every_module():
    model = build(lambda: Ends(FUSED["sum"]))
    convkit.swap(model)
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    model(images())
    handle.remove()
    assert called == [model.conv, model.bn, model.relu, model]
    model(images())
    assert len(called) == 4


class Configured(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = conv(3, 3), nn.BatchNorm2d(3), nn.ReLU()
        self.scale, self.sizes, self.function, self.extra = 1.0, [1, 2], torch.sigmoid, None
        self.tail = nn.Sequential(nn.Tanh())

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x))) * self.scale
        if self.extra is not None:
            y = self.extra(y)
        return self.function(self.tail(y)) * sum(self.sizes)

    def features(self, x):
        return self.bn(self.conv(x))


def halve(module, inputs):
    return inputs[0] / 2


CHANGES = {
    "number": lambda m: setattr(m, "scale", 2.0),
    "kind_of_number": lambda m: setattr(m, "scale", True),
    "list": lambda m: m.sizes.append(3),
    "function": lambda m: setattr(m, "function", torch.tanh),
    "none_to_module": lambda m: setattr(m, "extra", nn.Softplus()),
    "tail": lambda m: m.tail.append(nn.Sigmoid()),
    "conv": lambda m: setattr(m, "conv", nn.Conv2d(3, 3, 1, dtype=torch.float64)),
    "activation": lambda m: setattr(m, "relu", nn.GELU()),
    "norm": lambda m: setattr(m, "bn", nn.GroupNorm(1, 3, dtype=torch.float64)),
    "no_norm": lambda m: setattr(m, "bn", nn.Identity()),
    "norm_of_convkit": lambda m: setattr(m, "bn", cnn.BatchNormReLU2d(3, dtype=torch.float64)),
    "forward_of_norm": lambda m: setattr(m.bn, "forward", torch.exp),
    "forward_of_relu": lambda m: setattr(m.relu, "forward", torch.exp),
    "statistics": lambda m: m.bn.reset_running_stats() or setattr(m.bn, "momentum", None),
    "hook": lambda m: m.bn.register_forward_pre_hook(halve),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_after_the_swap_are_honoured(change):
    model = build(Configured)
    reference = copy.deepcopy(model)
    convkit.swap(model)
    assert fused(model) == ["bn"]
    for m in (model, reference):
        torch.manual_seed(0)
        change(m)
    assert_same_behaviour(copy.deepcopy(model), copy.deepcopy(reference), images())
    assert_same_behaviour(pickle.loads(pickle.dumps(model)), copy.deepcopy(reference), images())
    convkit.swap(model)
    assert_same_behaviour(model, reference, images())


def test_calls_around_the_forward_see_the_layers_as_they_were():
    model = build(Configured)
    reference = copy.deepcopy(model)
    convkit.swap(model)
    assert_close(model.features(images()), reference.features(images()))
    assert_close(model.bn(images()), reference.bn(images()))
    assert (model.features(images()) < 0).any()


def test_slices_of_a_fused_sequential():
    model = build(lambda: nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)))
    reference = copy.deepcopy(model)
    convkit.swap(model)
    for part in (slice(0, 2), slice(1, 3), slice(0, 4)):
        assert_same_behaviour(model[part], reference[part], images())
    pickle.loads(pickle.dumps(model[:2]))
    del model[2], reference[2]
    assert_same_behaviour(model, reference, images())


def test_rejected_input_changes_nothing():
    model = build(lambda: Ends(FUSED["module"]))
    model.conv = nn.Identity()
    convkit.swap(model)
    before = copy.deepcopy(model.state_dict())
    for shape, error in [
        ((4, 12, 12), ValueError),
        ((2, 5, 4, 4), (RuntimeError, ValueError)),
        ((1, 3, 1, 1), ValueError),
    ]:
        with pytest.raises(error):
            model(torch.ones(shape, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
