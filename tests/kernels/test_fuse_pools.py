"""convkit.fuse: which max pools and ReLUs are computed as one, and that nothing else changes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from swap_checks import assert_close, assert_same_behaviour, build, conv, images, row
from torch import nn

import convkit
import convkit.nn as cnn


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are too small to share among threads, and what is tested is not how they compute."""
    torch.set_num_threads(1)


def pools(module: nn.Module) -> list[tuple[str | None, str | None]]:
    """Names of the pools, and of the ReLUs next to them, that are rewritten in a module's own forward."""
    fusion = vars(module).get("_convkit_fusion")
    return [] if fusion is None else [(site.pool, site.relu) for site in fusion.poolings]


class Pooled(nn.Module):
    """conv - whatever ``end(module, output, x)`` does."""

    def __init__(self, end):
        super().__init__()
        self.conv, self.pool = conv(3, 3), nn.MaxPool2d(3, 2, 1)
        self.relu, self.relu_in_place = nn.ReLU(), nn.ReLU(inplace=True)
        self.end = end

    def forward(self, x):
        return self.end(self, self.conv(x), x)


POOLED = {
    "relu, pool": (lambda m, y, x: m.pool(m.relu(y)), [("pool", "relu")]),
    "relu in place, pool": (lambda m, y, x: m.pool(m.relu_in_place(y)), [("pool", "relu_in_place")]),
    "pool, relu": (lambda m, y, x: m.relu(m.pool(y)), [("pool", "relu")]),
    "pool, relu in place": (lambda m, y, x: m.pool(y).relu_(), [("pool", None)]),
    "F.relu, pool": (lambda m, y, x: m.pool(F.relu(y)), [("pool", None)]),
    "relu, F.max_pool2d": (lambda m, y, x: F.max_pool2d(torch.relu(y), 2), [(None, None)]),
    "F.max_pool2d alone": (lambda m, y, x: F.max_pool2d(y, (3, 2), 1, padding=1, ceil_mode=True), [(None, None)]),
    "torch.max_pool2d": (lambda m, y, x: torch.max_pool2d(y, 2, 2).relu(), [(None, None)]),
    "both sides": (lambda m, y, x: m.relu(m.pool(m.relu_in_place(y))), [("pool", "relu_in_place"), ("pool", "relu")]),
    "relu of the input": (lambda m, y, x: m.pool(m.relu(x)), [("pool", "relu")]),
    "twice": (lambda m, y, x: m.pool(m.relu(m.pool(y.relu()))), [("pool", None), ("pool", "relu")]),
}  # fmt: skip


def added_to(m, y, x):
    z = m.relu(y)
    y += 1
    return m.pool(z) + y.sum()


POOLED_ALONE = {
    "relu used twice": lambda m, y, x: m.pool(z := m.relu(y)).sum() + z,
    "pool used twice": lambda m, y, x: m.relu(z := m.pool(y)) + z,
    "relu in place of what is used": lambda m, y, x: m.pool(m.relu_in_place(y)).sum() + y,
    "relu in place of the input": lambda m, y, x: m.pool(m.relu_in_place(x)).sum() + x,
    "its input changes in between": added_to,
    "no relu": lambda m, y, x: m.pool(y).abs(),
    "indices": lambda m, y, x: F.max_pool2d(m.relu(y), 2, return_indices=True)[0],
}


def assert_pools_alike(model: nn.Module, reference: nn.Module) -> None:
    for seed in (1, 2):
        assert_same_behaviour(model, reference, images(seed=seed))
    x = images(torch.float32)
    assert_close(model.float()(x), reference.float()(x), torch.float32)
    exact = copy.deepcopy(reference.double())
    exact.conv = model.double().conv  # PyTorch's rounds differently from machine to machine; the pools don't round
    assert torch.equal(model(images()[0]), exact(images()[0]))


@pytest.mark.parametrize(("end", "expected"), POOLED.values(), ids=POOLED)
def test_fuses_pools(end, expected):
    model = build(lambda: Pooled(end))
    reference = copy.deepcopy(model)
    convkit.swap(model)
    assert pools(model) == expected
    assert_pools_alike(model, reference)
    assert_pools_alike(copy.deepcopy(model), reference)
    convkit.unswap(model)
    assert type(model) is Pooled and type(model.pool) is nn.MaxPool2d


@pytest.mark.parametrize("end", POOLED_ALONE.values(), ids=POOLED_ALONE)
def test_pools_without_a_relu(end):
    model = build(lambda: Pooled(end))
    reference = copy.deepcopy(model)
    convkit.swap(model)
    assert pools(model) == []
    assert type(model.pool) is cnn.MaxPool2d
    x, y = images().requires_grad_(), images().requires_grad_()
    for one, other in zip((model, reference), (x, y), strict=True):
        one(other + 0).sum().backward()
    assert_close(x.grad, y.grad)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv(3, 4), conv(4, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return F.relu(F.max_pool2d(self.conv2(x), 3, 2)).flatten(1)


def test_functions_alone():
    model = build(Functional)
    reference = copy.deepcopy(model)
    report = convkit.swap(model)
    assert len(report) == 2 and pools(model) == [(None, None), (None, None)]
    assert_same_behaviour(model, reference, images())
    again = pickle.loads(pickle.dumps(model))
    assert pools(again) == pools(model)
    assert_same_behaviour(again, reference, images())
    compiled = (torch.compile(one, backend="aot_eager") for one in (model, reference))
    assert_same_behaviour(*compiled, images())
    convkit.unswap(model)
    assert type(model) is Functional
    assert_same_behaviour(model, reference, images())


def test_a_pool_in_a_sequential_follows_what_changes():
    model = nn.Sequential(conv(3, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.MaxPool2d(2, return_indices=False))
    model = build(lambda: model)
    reference = copy.deepcopy(model)
    report = convkit.swap(model)
    assert row(report, "2").replaced_by == "convkit.nn.MaxPool2d, with ReLU in the model's forward"
    assert row(report, "3").replaced_by == "convkit.nn.MaxPool2d"
    assert "fused: 2 + 1" in model.extra_repr()
    reference[0] = model[0]  # what follows is exact, but for two convolutions
    for change in (
        lambda m: setattr(m[2], "stride", 1),
        lambda m: setattr(m[2], "ceil_mode", True),
        lambda m: m[1].register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda m: setattr(m, "1", nn.Sigmoid()),
    ):
        change(model), change(reference)
        assert torch.equal(model(images()), reference(images()))


def test_pools_that_are_left():
    class Own(nn.MaxPool2d):
        pass

    model = nn.ModuleList([nn.MaxPool2d(2, return_indices=True), Own(2), cnn.MaxPool2d(2), nn.MaxPool2d(2)])
    report = convkit.swap(model, exclude="3")
    assert "indices" in row(report, "0").reason and "subclass" in row(report, "1").reason
    assert row(report, "2").reason == "convkit's own already" and row(report, "3").reason == "excluded"
    assert type(model[3]) is nn.MaxPool2d


def test_a_swapped_pool_takes_what_there_is_no_kernel_for():
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    convkit.swap(model)
    whole = torch.randint(-9, 9, (1, 2, 6, 6))
    assert torch.equal(model(whole), nn.MaxPool2d(2)(whole.relu()))
    assert model(torch.randn(1, 2, 6, 6, device="meta")).shape == (1, 2, 3, 3)
