"""What convkit says a network is made of, against numbers worked out by hand and by the networks' sources."""

import json

import pytest
import torch
from cli_checks import run
from rich.console import Console
from torch import nn

import convkit.nn
from convkit.lab import LabError, models
from convkit.lab.models.describe import undrawn


@pytest.mark.parametrize("conv2d", [nn.Conv2d, convkit.nn.Conv2d])
@pytest.mark.parametrize(("stride", "output", "im2col"), [(1, (4, 224, 224), 81.0), (2, (4, 112, 112), 20.25)])
def test_four_filters_of_nine_by_nine(conv2d, stride, output, im2col):
    (layer,) = models.layers(conv2d(1, 4, 9, stride, 4), (1, 224, 224))
    assert layer.output_shape == output and layer.im2col == im2col
    assert layer.parameters == 328 and layer.formula == "4·1·9·9 + 4"
    assert layer.multiply_adds == 4 * output[1] * output[2] * 81
    assert layer.kind == ("conv 9×9" if stride == 1 else "conv 9×9 /2")


def test_layers_of_simplenet_by_hand():
    conv1, pool1, conv2, pool2, fc1, output = models.layers(models.build("simplenet"))
    assert pool1.kind == pool2.kind == "MaxPool2d" and pool1.parameters == pool2.multiply_adds == 0
    assert (pool1.output_shape, pool2.output_shape) == ((20, 12, 12), (50, 4, 4))
    assert (conv1.formula, conv2.formula) == ("20·1·5·5 + 20", "50·20·5·5 + 50")
    assert (fc1.formula, output.formula) == ("256·800 + 256", "10·256 + 10")
    assert [layer.output_shape for layer in (conv1, conv2, fc1, output)] == [(20, 24, 24), (50, 8, 8), (256,), (10,)]
    assert conv1.multiply_adds == 20 * 24 * 24 * 25 and conv2.multiply_adds == 50 * 8 * 8 * 20 * 25
    assert conv1.im2col == pytest.approx(25 * 24 * 24 / 28**2) and fc1.im2col is None


def test_kinds_of_layers():
    model = nn.Sequential(
        nn.Conv2d(4, 8, (1, 3), stride=(1, 2), groups=2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 2, 2, 2),
        nn.Flatten(),
        nn.Linear(2 * 20 * 8, 3),
    )
    found = models.layers(model, (4, 12, 13))
    kinds = ["conv in 2 groups 1×3 /1×2", "depthwise 3×3", "GroupNorm", "transposed 2×2 /2", "Flatten", "Linear"]
    assert [layer.kind for layer in found] == kinds
    assert [layer.multiply_adds for layer in found] == [8 * 12 * 6 * 6, 8 * 10 * 4 * 9, 0, 8 * 10 * 4 * 2 * 4, 0, 960]
    assert [layer.formula for layer in found][:3] == ["8·2·1·3 + 8", "8·1·3·3 + 8", "8 + 8"]


@pytest.mark.parametrize(
    ("name", "millions", "digits"),
    [
        ("cifar_baseline", 322.6, 1),
        ("cifar_mobilenet", 58.4, 1),
        ("inception_v4", 12_300, -2),
        ("mobilenet_v1", 569, 0),
        ("resnet50", 4_089, 0),
    ],
)
def test_multiply_adds_of_the_sources(name, millions, digits):
    assert round(models.multiply_adds(undrawn(models.MODELS[name])) / 1e6, digits) == millions


@pytest.mark.parametrize("name", ["cifar_mobilenet", "shrunk_resnet", "googlenet", "logistic_filters"])
def test_both_backends_are_described_alike_and_completely(name):
    ours, theirs = (models.layers(undrawn(models.MODELS[name], backend=backend)) for backend in models.BACKENDS)
    assert ours == theirs
    assert sum(layer.parameters for layer in ours) == models.count_parameters(undrawn(models.MODELS[name]))
    uncalled = [layer.name for layer in ours if not layer.output_shape]
    assert all(layer.startswith("aux") for layer in uncalled) and bool(uncalled) == (name == "googlenet")


def test_the_network_itself_is_left_alone():
    model = models.build("shrunk_resnet").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    text = str(model)
    models.layers(model)
    assert model.training and str(model) == text
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model(torch.rand(2, 3, 32, 32)).sum().backward()


def test_shared_layers_count_once():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    first, second = models.layers(nn.Sequential(layer, layer), (3, 8, 8))
    assert (first.parameters, second.parameters) == (84, 0) and first.multiply_adds == second.multiply_adds


def test_wrong_pictures():
    with pytest.raises(LabError, match=r"input_shape: \w*AlexNet does not take pictures of 3×20×20: "):
        models.layers(undrawn(models.MODELS["alexnet"]), (3, 20, 20))
    with pytest.raises(LabError, match=r"input_shape: a Linear does not say which pictures it takes; give \(C, H, W\)"):
        models.layers(nn.Linear(3, 4))


def test_describe_prints_a_table_and_returns_its_rows():
    console = Console(width=120)
    with console.capture() as capture:
        found = models.describe(models.build("simple_cnn_bn"), console=console)
    lines = capture.get().splitlines()
    assert any("trunk.conv1" in line and "12·3·5·5 + 12" in line and "19.1×" in line for line in lines)
    assert any("all" in line and "115,270" in line and "1,190,328" in line for line in lines)
    assert len(found) == 9


def test_models_lists_the_registry(capsys):
    status, out, _ = run(capsys, "models")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(models.MODELS) <= set(lines)
    assert "233,196" in lines["simplenet"] and " 2.10 " in lines["simplenet"] and "0.79 %" in lines["simplenet"]
    assert " 322.64 " in lines["cifar_baseline"] and "TMLSS" in lines["cifar_baseline"]


def test_models_takes_a_pattern_and_gives_json(capsys):
    status, out, _ = run(capsys, "models", "Cifar-ResNet?0", "--json")
    found = json.loads(out)
    assert status == 0 and [one["name"] for one in found] == ["cifar_resnet20"]
    assert found[0]["parameters"] == 269_722 and found[0]["multiply_adds"] == 40_551_040
    assert found[0]["input_shape"] == [3, 32, 32] and "norm" in found[0]["options"]
    assert "8.75 %" in found[0]["claimed"] and "1512.03385" in found[0]["source"]


def test_describe_command(capsys):
    status, out, _ = run(capsys, "describe", "lenet5")
    assert status == 0 and "120·16·5·5 + 120" in out and "61,706" in out
    status, out, _ = run(capsys, "describe", "fc64", "--input", "3x32x32", "--json")
    found = json.loads(out)
    assert status == 0 and found["input_shape"] == [3, 32, 32]
    assert [layer["formula"] for layer in found["layers"]] == ["64·3072 + 64", "10·64 + 10"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "resnet19"], "unknown network 'resnet19': did you mean resnet18?"),
        (["models", "x*"], "unknown network 'x*'"),
        (["describe"], "Missing argument 'name'"),
        (["describe", "vgg17"], "did you mean vgg1"),
        (["describe", "vgg16", "--input", "3x224"], "--input: got '3x224'; accepts channels, height and width"),
        (["describe", "fc64", "--input", "0x28x28"], "--input: got '0x28x28'"),
        (["describe", "lenet5", "--input", "1x40x40"], "size must be one of 28, 32, got 40"),
        (["describe", "inception_v4", "--input", "3x32x32"], "does not take pictures of 3×32×32"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 2 and err.startswith("convkit: ") and err.count("\n") == 1 and message in err
