"""The registry of networks: exact counts, key names, the contract of features/embed/head, and both backends alike."""

import pytest
import torch
import torch.nn.functional as F

import convkit.nn
from convkit.lab import LabError, models

COUNTS = {
    "fc64": 50_890,
    "fc256_fc256": 269_322,
    "simplenet": 233_196,
    "lenet5": 61_706,
    "cifar_baseline": 7_790_794,
    "cifar_mobilenet": 1_165_962,
    "resnet18": 11_689_512,
}
LAYERS = {
    "lenet5": ["conv1", "conv2", "conv3", "fc1", "output"],
    "fc64": ["fc1", "output"],
    "fc256_fc256": ["fc1", "fc2", "output"],
    "simplenet": ["conv1", "conv2", "fc1", "output"],
}


@pytest.mark.parametrize("backend", models.BACKENDS)
@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_parameters_and_keys_are_exact(name, backend):
    model = models.build(name, backend=backend)
    assert models.count_parameters(model) == COUNTS[name]
    keys = [key for key, _ in model.named_parameters()]
    if name in LAYERS:
        assert keys == [f"{layer}.{kind}" for layer in LAYERS[name] for kind in ("weight", "bias")]
        assert keys == list(model.state_dict())


def test_resnet_has_the_keys_of_published_weights():
    keys = set(models.build("resnet18").state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer4.1.bn2.bias", "fc.bias"} <= keys
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.num_batches_tracked"} <= keys
    assert "layer1.0.downsample.0.weight" not in keys and len(keys) == 122


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_contract(name):
    entry = models.entry(name)
    model = entry.builder(num_classes=7, backend="torch").eval()
    x = torch.rand(3, *entry.input_shape)
    embedded = model.embed(x)
    assert embedded.shape == (3, model.head.in_features)
    assert model.features(x).shape[0] == 3
    torch.testing.assert_close(model(x), model.head(embedded), rtol=0, atol=0)
    assert model(x).shape == (3, 7)
    assert entry.title and entry.source and entry.claimed


def test_simplenet_uses_the_backend_it_was_asked_for():
    assert type(models.build("simplenet").conv1) is convkit.nn.Conv2d
    assert isinstance(models.build("simplenet", backend="torch").conv1, torch.nn.Conv2d)
    assert not isinstance(models.build("simplenet", backend="torch").conv1, convkit.nn.Conv2d)
    assert models.build("simplenet", backend="torch").features(torch.rand(2, 1, 28, 28)).shape == (2, 50, 4, 4)


def test_normalisation_is_the_first_layer_and_follows_the_dtype():
    model = models.build("fc64", backend="torch")
    x = torch.rand(2, 1, 28, 28)
    by_hand = ((x - 0.1307) / 0.3081).flatten(1)
    torch.testing.assert_close(model(x), model.output(F.relu(model.fc1(by_hand))), rtol=1e-5, atol=1e-5)
    assert model.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", sorted(LAYERS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_one_step_is_the_same_with_both_backends(name, dtype, tolerance, few):
    images, labels = next(few.train.batches(19))
    torch.testing.assert_close(*_steps(name, images.to(dtype), labels), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "size"), [("cifar_baseline", 16), ("cifar_mobilenet", 16), ("resnet18", 64)])
def test_one_step_of_a_network_that_is_swapped(name, size):
    images = torch.rand(3, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(*_steps(name, images, torch.tensor([0, 3, 9])), rtol=1e-8, atol=1e-10)


def _steps(name, images, labels):
    """Logits, gradients and state after a step of SGD, with each backend."""
    results = []
    for backend in models.BACKENDS:
        torch.manual_seed(3)
        model = models.build(name, backend=backend).to(images.dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        logits = model(images)
        F.cross_entropy(logits, labels).backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        optimizer.step()
        results.append((logits, gradients, model.state_dict()))
    return results


def test_names_are_forgiving_and_unknown_ones_get_the_nearest():
    assert models.entry("FC256-FC256").name == "fc256_fc256"
    with pytest.raises(LabError, match="unknown network 'simplnet': did you mean simplenet"):
        models.build("simplnet")


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_unknown_backend(name):
    with pytest.raises(ValueError, match="backend must be one of 'convkit', 'torch', got 'cudnn'"):
        models.build(name, backend="cudnn")


def test_unknown_activation_of_the_torch_convolution():
    with pytest.raises(ValueError, match="activation must be None or 'relu', got 'gelu'"):
        models.TorchConv2d(1, 2, 3, activation="gelu")
