"""convkit.swap: a swapped model must be the model, in everything but who computes."""

import copy
import gc
import io
import pickle
import re
import sys
import weakref
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from swap_checks import assert_close, assert_same_behaviour, build, fused, images, row
from torch import nn
from torch.nn.utils import parametrizations, prune

import convkit
import convkit.nn as cnn
from convkit.swap import Row


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are too small to share among threads, and what is tested is not how they compute."""
    torch.set_num_threads(1)


# ---------------------------------------------------------------- models, small, in the manner of well-known ones


def conv(inputs, outputs, size=3, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """torchvision's: one ReLU module used twice, the sum in place."""

    def __init__(self, inputs=4, outputs=4, stride=1):
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """Functional ReLUs, a batch norm on both sides of the sum."""

    def __init__(self, inputs, middle, outputs, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, middle, 1), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = conv(middle, middle, 3, stride), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = conv(middle, outputs, 1), nn.BatchNorm2d(outputs)
        self.conv_skip, self.bn_skip = conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out)).relu()
        return torch.relu(self.bn_skip(self.conv_skip(x)) + self.bn3(self.conv3(out)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 4), nn.BatchNorm2d(4, momentum=None), nn.ReLU()
        self.layers = nn.Sequential(BasicBlock(), BasicBlock(4, 6, 2), Bottleneck(6, 4, 8, 2))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.layers(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class ConvNormActivation(nn.Sequential):
    def __init__(self, inputs, outputs, size=3, stride=1, groups=1):
        super().__init__(conv(inputs, outputs, size, stride, groups), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def mobile_net():
    depthwise_separable = [
        nn.Sequential(OrderedDict(depthwise=ConvNormActivation(4, 4, groups=4), pointwise=ConvNormActivation(4, 4, 1)))
        for _ in range(2)
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    return nn.Sequential(ConvNormActivation(3, 4, stride=2), *depthwise_separable, *head)


def vgg():
    features = []
    for inputs, outputs in [(3, 4), (4, 6)]:
        features += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(True), nn.MaxPool2d(2)]
    return nn.Sequential(OrderedDict(features=nn.Sequential(*features), flat=nn.Flatten(), fc=nn.Linear(54, 5)))


class DenseNet(nn.Module):
    """Batch norm before the convolution, a ModuleList, concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 2 * i) for i in range(3))
        self.convs = nn.ModuleList(conv(4 + 2 * i, 2) for i in range(3))
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        x = self.stem(x)
        for norm, convolution in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, convolution(F.relu(norm(x)))], 1)
        return self.fc(x.mean((2, 3)))


class Generator(nn.Module):
    """Upwards, as in a GAN: transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.out = nn.ConvTranspose2d(4, 1, 3, stride=2)

    def forward(self, x):
        return torch.tanh(self.out(self.up(x), output_size=(4 * x.shape[2] + 2, 4 * x.shape[3] + 1)))


MODELS = {
    "resnet": ResNet,
    "mobilenet": mobile_net,
    "vgg": vgg,
    "densenet": DenseNet,
    "generator": Generator,
}


# ---------------------------------------------------------------- the same results


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_results(make, dtype):
    model = build(make, dtype)
    reference = copy.deepcopy(model)
    report = convkit.swap(model)
    assert all(row.replaced_by for row in report if "Conv" in row.kind)
    assert_same_behaviour(model, reference, images(dtype), dtype=dtype)
    assert list(model.state_dict()) == list(reference.state_dict())


def test_report():
    report = convkit.swap(build(ResNet))
    assert len(report) == 20 and len(report.replaced) == 18 and len(report.left) == 2
    assert row(report, "conv1") == Row("conv1", "Conv2d", "convkit.nn.Conv2d")
    assert row(report, "bn1").replaced_by == "BatchNormReLU2d, in the model's forward"
    assert row(report, "layers.1.bn2").replaced_by == "BatchNormReLU2d, with residual, in the forward of layers.1"
    assert "returned before a ReLU" in row(report, "layers.1.downsample.1").reason
    assert row(report, "layers.2.bn_skip").replaced_by and "fused" in row(report, "layers.2.bn3").reason
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "replaced", "by,", "or", "why", "not"]
    assert {line.index("BatchNorm2d") for line in lines if "BatchNorm2d" in line} == {lines[0].index("kind")}
    assert lines[-1] == "18 of 20 layers replaced" and len(lines) == 22


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_unswap_is_exact(make):
    model = build(make)
    before = [(module, type(module), dict(vars(module)), list(vars(module))) for module in model.modules()]
    text = repr(model)
    convkit.swap(model)
    model(images())
    convkit.unswap(model)
    assert [module for module, *_ in before] == list(model.modules())
    for module, kind, attributes, order in before:
        assert type(module) is kind and list(vars(module)) == order
        assert all(vars(module)[name] is value for name, value in attributes.items())
    assert repr(model) == text
    convkit.unswap(model)
    assert repr(model) == text


def test_swapping_twice_is_swapping_once():
    model = build(ResNet)
    reference = copy.deepcopy(model)
    reports = [convkit.swap(model), convkit.swap(model)]
    assert str(reports[0]) == str(reports[1])
    assert_same_behaviour(model, reference, images())
    convkit.unswap(model)
    assert repr(model) == repr(reference)


@pytest.mark.parametrize("function", [convkit.swap, convkit.unswap])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, but got list"):
        function([nn.Conv2d(1, 1, 1)])


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(3)])
def test_the_model_is_the_layer(layer):
    reference = copy.deepcopy(layer)
    report = convkit.swap(layer)
    assert "(the model)" in str(report) and len(report) == 1
    assert_same_behaviour(layer.double(), reference.double(), images())
    convkit.unswap(layer)
    assert type(layer) is type(reference) and list(vars(layer)) == list(vars(reference))


# ---------------------------------------------------------------- what stays


def test_an_optimizer_made_before_stays_valid():
    model = build(ResNet)
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, reference)]
    for step in range(4):
        (convkit.unswap if step == 3 else convkit.swap)(model)
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(m(images(seed=step)), torch.arange(4)).backward()
            optimizer.step()
    assert_close(model.state_dict(), reference.state_dict())


def test_flags_hooks_aliases_and_identity_stay():
    model = build(ResNet)
    model.layers[0].eval()
    model.conv1.weight.requires_grad_(False)
    model.alias = model.layers[0].conv1
    parameters, modules = list(model.parameters()), list(model.modules())
    calls = []
    for module in (model.conv1, model.layers[1], model.layers[1].conv2):
        module.register_forward_hook(lambda module, inputs, output: calls.append((module, output)))
        module.register_forward_pre_hook(lambda module, inputs: calls.append((module, inputs)))
        module.register_full_backward_hook(lambda module, *gradients: calls.append((module, gradients)))
    reference = copy.deepcopy(model)
    report = convkit.swap(model)
    assert row(report, "layers.0.conv1 = alias").replaced_by
    assert model.alias is model.layers[0].conv1
    assert list(model.modules()) == modules
    assert all(mine is other for mine, other in zip(model.parameters(), parameters, strict=True))
    assert not model.layers[0].training and not model.layers[0].bn1.training and model.layers[1].training
    assert not model.conv1.weight.requires_grad
    model(images()).sum().backward()
    ours = [(type(module).__mro__[1], values) for module, values in calls]
    calls.clear()
    reference(images()).sum().backward()
    assert len(ours) == len(calls) == 8  # conv1 has no gradient to tell of
    for (_, mine), (_, other) in zip(ours, calls, strict=True):
        assert_close(mine, other)


def test_authors_own_convkit_modules_stay():
    model = nn.Sequential(cnn.Conv2d(3, 4, 3), cnn.BatchNormReLU2d(4), nn.Conv2d(4, 4, 3), cnn.SeparableConv2d(4, 4, 3))
    report = convkit.swap(model)
    assert [row.reason for row in report.left] == ["convkit's own already"] * 4 and len(report.replaced) == 1
    convkit.unswap(model)
    kinds = [cnn.Conv2d, cnn.BatchNormReLU2d, nn.Conv2d, cnn.SeparableConv2d]
    assert [type(module) for module in model] == kinds and type(model[3].depthwise) is cnn.Conv2d


def copied_by_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "old_pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    "torch_save": copied_by_torch_save,
    "twice": lambda model: copied_by_torch_save(copy.deepcopy(copied_by_torch_save(model))),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_is_swapped_and_independent(make_copy):
    model = build(ResNet)
    reference = copy.deepcopy(model)
    convkit.swap(model)
    model(images())
    reference(images())
    other = make_copy(model)
    assert fused(other) == ["bn1"] and fused(other.layers[0]) == ["bn1", "bn2"]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(3)
    assert_same_behaviour(other, reference, images())
    assert other._convkit_fusion.holds(other, (images(),), {})
    convkit.unswap(other)
    assert fused(model) == ["bn1"] and repr(other) == repr(reference)
    assert_same_behaviour(other, reference, images())


def test_shallow_copies_use_what_they_hold():
    """nn.DataParallel makes its replicas so: each must call its own children."""
    model = build(BasicBlock)
    reference = copy.deepcopy(model)
    convkit.swap(model)
    replica = model._replicate_for_data_parallel()
    other = copy.deepcopy(reference)
    for name, child in other.named_children():
        setattr(replica, name, child)
    for tensor in other.parameters():
        tensor.data.mul_(2)
    assert_close(replica(images(channels=4)), copy.deepcopy(other)(images(channels=4)))


def test_a_swapped_model_is_freed_at_once():
    model = build(ResNet)
    convkit.swap(model)
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(model.layers[0].bn1.weight)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_state_dicts_go_both_ways():
    model, other = build(ResNet), build(ResNet)
    for tensor in other.parameters():
        nn.init.normal_(tensor, std=0.2)
    convkit.swap(model)
    assert model.load_state_dict(other.state_dict()) == other.load_state_dict(model.state_dict())
    assert_same_behaviour(model, other, images())


def test_moving_and_casting_after_the_swap():
    model = build(ResNet)
    reference = copy.deepcopy(model)
    convkit.swap(model)
    assert_same_behaviour(model.float(), reference.float(), images(torch.float32), dtype=torch.float32)
    model.to(memory_format=torch.channels_last)
    assert_same_behaviour(
        model, reference, images(torch.float32).to(memory_format=torch.channels_last), dtype=torch.float32
    )
    assert model.to("meta")(images(torch.float32).to("meta")).shape == (4, 5)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_autocast(make):
    model = build(make, torch.float32)
    reference = copy.deepcopy(model)
    convkit.swap(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = model(images(torch.float32)), reference(images(torch.float32))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    ours.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_compiles():
    model = build(ResNet, torch.float32)
    reference = copy.deepcopy(model)
    convkit.swap(model)
    model.bn1.momentum = reference.bn1.momentum = 0.1  # None needs the value of a tensor, as it does in PyTorch
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        for m in (model, reference):
            m.train(training)
        outputs = [m(images(torch.float32)) for m in (compiled, reference)]
        for output in outputs:
            output.square().sum().backward()
        assert_close(*outputs, torch.float32)
    with torch.no_grad():
        assert_close(*(m(images(torch.float32)) for m in (compiled, reference)), torch.float32)
    gradients = [[parameter.grad for parameter in m.parameters()] for m in (model, reference)]
    assert_close(*gradients, torch.float32)
    assert_close(dict(model.named_buffers()), dict(reference.named_buffers()), torch.float32)


def test_is_recorded_by_others_as_it_was():
    model = build(BasicBlock)
    graphs = [str(torch.fx.symbolic_trace(model).graph)]
    convkit.swap(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, cnn.Conv2d) or super().is_leaf_module(module, name)

    graphs.append(str(Tracer().trace(model)))
    assert graphs[0] == graphs[1]


# ---------------------------------------------------------------- which layers are left


class ConvOfMine(nn.Conv2d):
    pass


def with_forward(layer):
    layer.forward = lambda x: x
    return layer


OTHER_LAYERS = {
    "conv1d": (lambda: nn.Conv1d(3, 3, 1), "not a 2-D convolution"),
    "conv3d": (lambda: nn.Conv3d(3, 3, 1), "not a 2-D convolution"),
    "transposed3d": (lambda: nn.ConvTranspose3d(3, 3, 1), "not a 2-D convolution"),
    "norm1d": (lambda: nn.BatchNorm1d(3), r"not a batch norm over \(N, C, H, W\)"),
    "sync": (lambda: nn.SyncBatchNorm(3), "between processes"),
    "lazy": (lambda: nn.LazyConv2d(3, 3), "not initialized yet"),
    "lazy_norm": (lambda: nn.LazyBatchNorm2d(), "not initialized yet"),
    "subclass": (lambda: ConvOfMine(3, 3, 1), r"test_swap\.ConvOfMine is a subclass with code of its own"),
    "quantization": (lambda: torch.ao.nn.qat.Conv2d(3, 3, 1, qconfig=QCONFIG), "subclass with code of its own"),
    "complex": (lambda: nn.Conv2d(3, 3, 1, dtype=torch.complex64), "weight has dtype torch.complex64; served: torch.f"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), "parametrized"),
    "forward": (lambda: with_forward(nn.Conv2d(3, 3, 1)), "replaced on the instance"),
    "norm_forward": (lambda: with_forward(nn.BatchNorm2d(3)), "replaced on the instance"),
    "norm_alone": (lambda: nn.BatchNorm2d(3), "followed by 2 .Conv2d. and not by a ReLU in the model's forward"),
}
QCONFIG = torch.ao.quantization.get_default_qat_qconfig()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "reason"), OTHER_LAYERS.values(), ids=OTHER_LAYERS)
def test_left_layers(make, reason):
    layer = make()
    kind, attributes = type(layer), list(vars(layer))
    report = convkit.swap(nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.Conv2d(3, 3, 1), nn.Linear(2, 2)))
    assert len(report) == 3
    assert row(report, "1").kind == kind.__name__ and re.search(reason, row(report, "1").reason), report
    assert type(layer) is kind and list(vars(layer)) == attributes


def test_device_without_a_kernel(monkeypatch):
    swap = sys.modules["convkit.swap"]  # convkit.swap is the function
    assert swap._has_kernel("conv2d", "cpu") and swap._has_kernel("batch_norm_relu", "meta")
    assert not swap._has_kernel("conv2d", "xla")
    monkeypatch.setattr(swap, "_has_kernel", lambda name, device: name != "conv_transpose2d")
    report = convkit.swap(build(Generator))
    assert [row.name for row in report.left] == ["up.0", "out"]
    assert row(report, "out").reason == "weight is on cpu, for which this build has no conv_transpose2d kernel"


def test_old_weight_norm_and_pruning():
    """Both compute the weight in a hook before the call, on a plain nn.Conv2d."""

    def make():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        torch.nn.utils.weight_norm(model[0])
        prune.l1_unstructured(model[3], "weight", 0.5)
        return model

    with pytest.warns(FutureWarning):
        model, reference = build(make), build(make)
    assert len(convkit.swap(model).replaced) == 3
    assert_same_behaviour(model, reference, images())


def test_exclude():
    model = build(ResNet)
    report = convkit.swap(model, exclude=["layers.[12].*", "bn1"])
    assert {row.name for row in report.replaced} == {
        "conv1",
        "layers.0.conv1",
        "layers.0.bn1",
        "layers.0.conv2",
        "layers.0.bn2",
    }
    assert row(report, "bn1").reason == "excluded" and type(model) is ResNet
    report = convkit.swap(model, exclude="bn1")
    assert len(report.replaced) == 17


def test_unswap_says_what_is_in_its_way():
    model = build(ResNet)
    convkit.swap(model)
    before = repr(model)
    parametrizations.weight_norm(model.layers[0].conv2)
    for function in (convkit.unswap, convkit.swap):
        with pytest.raises(RuntimeError, match=r"layers\.0\.conv2 was a Conv2d.*remove_parametrizations"):
            function(model)
    torch.nn.utils.parametrize.remove_parametrizations(model.layers[0].conv2, "weight")
    assert repr(model) == before
    convkit.unswap(model)
    assert not any("_convkit" in name for module in model.modules() for name in vars(module))
