"""The registry of networks: exact counts, published key names, the contract, options, and both backends alike."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import convkit.nn
from convkit.fuse import FUSION
from convkit.lab import LabError, models
from convkit.lab.models.course import filters
from convkit.lab.models.describe import undrawn

COUNTS = {
    # digits
    "fc64": 50_890,
    "fc256_fc256": 269_322,
    "simplenet": 233_196,
    "lenet5": 61_706,
    # courses
    "logistic": 30_730,
    "logistic_filters": 30_730,
    "mlp5": 1_335_060,
    "cifar_cnn": 52_202,
    "simple_cnn": 115_198,
    "simple_cnn_bn": 115_270,
    # the chain on CIFAR-10
    "cifar_baseline": 7_790_794,
    "cifar_mobilenet": 1_165_962,
    # ImageNet
    "alexnet": 61_100_840,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "googlenet": 13_004_888,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "se_resnet18": 11_778_592,
    "se_resnet50": 28_088_024,
    "densenet121": 7_978_856,
    "inception_v4": 42_679_816,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
    "efficientnet_b0": 5_288_548,
    # CIFAR-10
    "cifar_vgg16": 14_728_266,
    "cifar_resnet18": 11_173_962,
    "cifar_se_resnet18": 11_263_042,
    "cifar_preact_resnet18": 11_172_170,
    "cifar_resnet20": 269_722,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "cifar_preact_resnet110": 1_727_962,
    "shrunk_resnet": 175_258,
    "cifar_densenet": 1_000_618,
    "cifar_mobilenet_v1": 3_217_226,
    "cifar_mobilenet_v2": 2_296_922,
    "cifar_efficientnet_b0": 3_599_686,
    # rotations
    "rotation_nin": 1_411_140,
}
LAYERS = {
    "fc64": ["fc1", "output"],
    "fc256_fc256": ["fc1", "fc2", "output"],
    "simplenet": ["conv1", "conv2", "fc1", "output"],
    "lenet5": ["conv1", "conv2", "conv3", "fc1", "output"],
}
# Side of the smallest picture on which every batch norm still sees several values; the others take their own size.
SMALL = {
    "alexnet": 63,
    "vgg16": 32,
    "vgg16_bn": 32,
    "vgg19": 32,
    "vgg19_bn": 32,
    "googlenet": 64,
    "inception_v4": 107,
    "densenet121": 64,
    "mobilenet_v1": 64,
    "mobilenet_v2": 64,
    "efficientnet_b0": 64,
    "cifar_baseline": 16,
    "cifar_mobilenet": 16,
    "cifar_vgg16": 32,
    "rotation_nin": 16,
    **{name: 64 for name in COUNTS if name.startswith(("resnet", "se_resnet"))},
    **{name: 16 for name in COUNTS if name.startswith("cifar_") and "net" in name and "mobilenet" not in name},
    "cifar_mobilenet_v1": 32,
    "cifar_mobilenet_v2": 16,
}
# Dense layers as wide as the published ones would cost seconds and show nothing more.
OPTIONS = {name: {"hidden": 32} for name in ("alexnet", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn")}
LARGE = ("resnet101", "resnet152", "inception_v4")
NAMES = sorted(models.MODELS)


def having(option):
    return [name for name in NAMES if option in models.MODELS[name].options]


def bare(name, **options):
    """The network on the meta device, its norms, that take PyTorch milliseconds each there, left out."""
    model = undrawn(models.MODELS[name], **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.forward = lambda x: x
    return model


def pictures(name, count=3, dtype=torch.float64, channels=None):
    shape = models.MODELS[name].input_shape
    side = SMALL.get(name, shape[1])
    return torch.rand(count, channels or shape[0], side, side, dtype=dtype, generator=torch.manual_seed(1))


# ---------------------------------------------------------------- counts and keys


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_exact(name):
    model = undrawn(models.MODELS[name])
    assert models.count_parameters(model) == COUNTS[name]
    assert f"{COUNTS[name]:,}" in inspect.getdoc(models.MODELS[name].builder)
    keys = [key for key, _ in model.named_parameters()]
    if name in LAYERS:
        assert keys == [f"{layer}.{kind}" for layer in LAYERS[name] for kind in ("weight", "bias")]
        assert keys == list(model.state_dict())


def test_every_count_is_of_a_network():
    assert sorted(COUNTS) == NAMES


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("shrunk_resnet", {"blocks": (1, 1, 1)}, 78_042),
        ("shrunk_resnet", {"width": 64, "blocks": (2, 2, 2, 2)}, COUNTS["cifar_resnet18"]),
        ("googlenet", {"aux_logits": False}, 6_624_904),
        ("vgg16", {"norm": "batch"}, COUNTS["vgg16_bn"]),
        ("simple_cnn", {"norm": "batch"}, COUNTS["simple_cnn_bn"]),
        ("logistic_filters", {"learnable": True}, COUNTS["logistic_filters"] + 12 * 25),
        # conv without bias and batch norm together have twice the biases; convolution with bias alone has one
        ("cifar_baseline", {"norm": "none"}, COUNTS["cifar_baseline"] - sum((64, 128, 128, 128, 256, 256, 256)) - 1600),
        ("cifar_baseline", {"norm": "group"}, COUNTS["cifar_baseline"]),
        ("cifar_resnet20", {"num_classes": 100}, COUNTS["cifar_resnet20"] + 90 * 65),
        ("fc64", {"channels": 3, "size": 32}, COUNTS["fc64"] + 64 * (3072 - 784)),
    ],
)
def test_parameters_with_options(name, options, count):
    assert models.count_parameters(undrawn(models.MODELS[name], **options)) == count


def torchvision_keys():
    networks, norm = {}, ("weight", "bias", "running_mean", "running_var")
    for line in (Path(__file__).parent / "torchvision_keys.txt").read_text().splitlines():
        if line.startswith("["):
            keys = networks[line.strip("[]")] = []
        elif " norm " in line:
            key, _, size = line.split()
            keys += [(f"{key}.{kind}", (int(size),)) for kind in norm] + [(f"{key}.num_batches_tracked", ())]
        elif not line.startswith("#"):
            key, shape = line.split()
            keys.append((key, tuple(map(int, shape.split("x")))))
    return networks


TORCHVISION = torchvision_keys()


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_names_and_shapes_are_those_of_published_weights(name):
    model = bare(name)
    assert [(key, tuple(value.shape)) for key, value in model.state_dict().items()] == TORCHVISION[name]
    weights = {key: torch.empty(shape, device="meta") for key, shape in TORCHVISION[name]}
    model.load_state_dict(weights, strict=True, assign=True)
    assert {"torchvision"} <= set(models.MODELS[name].source.split("; "))


def test_every_network_after_torchvision_is_held_against_it():
    assert sorted(n for n, e in models.MODELS.items() if "torchvision" in e.source) == sorted(TORCHVISION)


def test_the_published_densenet_has_older_names():
    model = bare("densenet121")
    old = {}
    for key, shape in TORCHVISION["densenet121"]:
        if not key.endswith("num_batches_tracked"):
            for kind in ("norm", "conv") if "denselayer" in key else ():
                key = key.replace(f".{kind}1.", f".{kind}.1.").replace(f".{kind}2.", f".{kind}.2.")
            old[key] = torch.empty(shape, device="meta")
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert "features.denseblock4.denselayer16.conv.2.weight" in old
    model.load_state_dict(old, strict=True, assign=True)


# ---------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    entry = models.entry(name)
    model = bare(name, num_classes=7)
    assert model.input_shape == entry.input_shape and isinstance(model, models.Network)
    x = torch.empty(2, *entry.input_shape, device="meta")
    embedded = model.embed(x)
    assert embedded.shape == (2, model.head.in_features) and model.features(x).shape[0] == 2
    assert model(x).shape == model.head(embedded).shape == (2, 7)
    assert any(isinstance(module, models.Normalize) for module in model.modules())
    new = model.replace_head(5)
    assert new is model.head and new.weight.device.type == "meta" and model(x).shape == (2, 5)
    assert entry.title and entry.source and list(model.state_dict()) == list(bare(name).state_dict())


@pytest.mark.parametrize("name", having("channels"))
def test_grey_pictures(name):
    model = bare(name, channels=1)
    channels, *sides = models.MODELS[name].input_shape
    assert model.input_shape == (1, *sides)
    assert model(torch.empty(2, 1, *sides, device="meta")).shape[0] == 2


@pytest.mark.parametrize("name", having("size"))
def test_larger_pictures(name):
    model = bare(name, channels=2, size=32 if name == "lenet5" else 40)
    assert model(torch.empty(2, *model.input_shape, device="meta")).shape == (2, 10)


def test_normalisation_is_the_first_layer_and_follows_the_dtype():
    model = models.build("fc64", backend="torch")
    x = torch.rand(2, 1, 28, 28)
    by_hand = ((x - 0.1307) / 0.3081).flatten(1)
    torch.testing.assert_close(model(x), model.output(F.relu(model.fc1(by_hand))), rtol=1e-5, atol=1e-5)
    assert model.double()(x.double()).dtype == torch.float64
    assert models.Normalize.of(3).mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert models.Normalize.of(2)(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)).flatten().tolist() == [-1.0, 1.0]


def test_simplenet_uses_the_backend_it_was_asked_for():
    assert type(models.build("simplenet").conv1) is convkit.nn.Conv2d
    assert isinstance(models.build("simplenet", backend="torch").conv1, torch.nn.Conv2d)
    assert not isinstance(models.build("simplenet", backend="torch").conv1, convkit.nn.Conv2d)
    assert models.build("simplenet", backend="torch").features(torch.rand(2, 1, 28, 28)).shape == (2, 50, 4, 4)


@pytest.mark.parametrize("name", NAMES)
def test_convkit_does_the_convolutions_and_the_norms_before_a_relu(name):
    model = undrawn(models.MODELS[name], backend="convkit")
    assert all(isinstance(m, convkit.nn.Conv2d) for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert not any(isinstance(m, convkit.nn.Conv2d) for m in bare(name).modules())
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    fused = sum(len(vars(m)[FUSION].sites) for m in model.modules() if FUSION in vars(m))
    # Without a ReLU after them: those of projections, and those before SiLU, ReLU6, or squeeze and excitation.
    projections = sum("downsample.1.weight" in key for key in model.state_dict())
    if (
        name not in ("mobilenet_v2", "cifar_mobilenet_v2", "efficientnet_b0", "cifar_efficientnet_b0")
        and "se_" not in name
    ):
        assert fused == norms - projections


# ---------------------------------------------------------------- both backends


def steps(name, images, labels, **options):
    """Logits, gradients and state after a step of SGD, with each backend."""
    results = []
    for backend in models.BACKENDS:
        torch.manual_seed(3)
        model = models.build(name, backend=backend, **options).to(images.dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        torch.manual_seed(4)  # for dropout
        outputs = model.training_logits(images) if hasattr(model, "training_logits") else [(model(images), 1.0)]
        sum(weight * F.cross_entropy(logits, labels) for logits, weight in outputs).backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        optimizer.step()
        logits = {str(i): logits.detach() for i, (logits, _) in enumerate(outputs)}
        results.append((logits, gradients, {key: value.double() for key, value in model.state_dict().items()}))
    return results


def assert_same_step(ours, theirs, tolerance):
    """Relative to the largest value of each tensor; or, for gradients that are zero but for rounding, of all."""
    for mine, other in zip(ours, theirs, strict=True):
        assert list(mine) == list(other)
        largest = {key: value.abs().max().item() for key, value in other.items()}
        for key, value in other.items():
            error = (mine[key] - value).abs().max().item()
            assert error <= tolerance * max(largest[key], 1e-3 * max(largest.values())), (key, error, largest[key])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in NAMES])
def test_one_step_is_the_same_with_both_backends(name):
    ours, theirs = steps(name, pictures(name), torch.tensor([0, 3, 2]), **OPTIONS.get(name, {}))
    assert_same_step(ours, theirs, 1e-8)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_one_step_in_single_precision_on_digits(name, few):
    images, labels = next(few.train.batches(19))
    assert_same_step(*steps(name, images, labels), 1e-4)


@pytest.mark.parametrize("norm", models.NORMS)
@pytest.mark.parametrize("name", ["cifar_mobilenet", "shrunk_resnet", "simple_cnn"])
def test_one_step_with_every_norm(name, norm):
    assert_same_step(*steps(name, pictures(name), torch.tensor([0, 3, 2]), norm=norm), 1e-8)


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("name", ["lenet5", "simple_cnn_bn"])
def test_one_step_with_every_activation(name, activation):
    assert_same_step(*steps(name, pictures(name), torch.tensor([0, 3, 2]), activation=activation), 1e-8)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("name", having("norm"))
def test_norms(name):
    for norm in models.NORMS:
        model = bare(name, norm=norm)
        kinds = {"batch": "BatchNorm2d", "instance": "InstanceNorm2d", "group": "GroupNorm"}
        found = {type(m).__name__ for m in model.modules()} & set(kinds.values())
        assert found == ({kinds[norm]} if norm in kinds else set())
        if norm == "none":  # what would have had one has a bias
            convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
            assert sum(m.bias is None for m in convolutions) == 0 or "preact" in name
    with pytest.raises(models.OptionError, match="norm must be one of 'batch', .*'none', got 'layer'"):
        models.build(name, norm="layer")


@pytest.mark.parametrize("name", having("activation"))
def test_activations(name):
    for kind, module in models.ACTIVATIONS.items():
        model = bare(name, activation=kind)
        found = {type(m) for m in model.modules()} & set(models.ACTIVATIONS.values())
        assert found == {module}
    with pytest.raises(models.OptionError, match="activation must be one of 'relu', 'sigmoid', 'tanh', got 'gelu'"):
        models.build(name, activation="gelu")


def test_group_norm_has_groups_that_divide():
    for channels, groups in ((64, 32), (16, 8), (12, 2), (6, 1), (5, 1), (1, 1)):
        norm = models.network.norm2d("group", channels)
        assert norm.num_groups == groups
        norm(torch.rand(2, channels, 3, 3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"activation": "tanh"}, "resnet18 has no option 'activation'; it has num_classes, channels, norm"),
        ("googlenet", {"norm": "batch"}, "googlenet has no option 'norm'; it has num_classes, aux_logits"),
        ("fc64", {"classes": 3}, "fc64 has no option 'classes'; it has num_classes"),
        ("lenet5", {"size": 30}, "size must be one of 28, 32, got 30"),
        ("simplenet", {"size": 15}, "size must be a whole number of at least 16, got 15"),
        ("fc64", {"channels": 0}, "channels must be a whole number of at least 1, got 0"),
        ("fc64", {"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        ("resnet18", {"num_classes": 2.5}, "num_classes must be a whole number of at least 1, got 2.5"),
        ("vgg16", {"hidden": 0}, "hidden must be a whole number of at least 1, got 0"),
        ("vgg16", {"dropout": 1.5}, "dropout must be a number from 0 to 1, got 1.5"),
        ("efficientnet_b0", {"stochastic_depth": -1}, "stochastic_depth must be a number from 0 to 1, got -1"),
        ("shrunk_resnet", {"width": 0}, "width must be a whole number of at least 1, got 0"),
        ("shrunk_resnet", {"blocks": 2}, "blocks must be a sequence of whole numbers, .* got 2"),
        ("shrunk_resnet", {"blocks": (2, 0)}, r"blocks\[1\] must be a whole number of at least 1, got 0"),
        ("rotation_nin", {"blocks": 2}, "blocks must be a whole number of at least 3, got 2"),
        ("logistic_filters", {"sigma": 0}, "sigma must be a positive number of pixels, got 0"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(models.OptionError, match=message):
        models.build(name, **options)


def test_names_are_forgiving_and_unknown_ones_get_the_nearest():
    assert models.entry("FC256-FC256").name == "fc256_fc256"
    with pytest.raises(LabError, match="unknown network 'simplnet': did you mean simplenet"):
        models.build("simplnet")


@pytest.mark.parametrize("name", NAMES)
def test_unknown_backend(name):
    with pytest.raises(ValueError, match="backend must be one of 'convkit', 'torch', got 'cudnn'"):
        undrawn(models.MODELS[name], backend="cudnn")


def test_unknown_activation_of_the_torch_convolution():
    with pytest.raises(ValueError, match="activation must be None or 'relu', got 'gelu'"):
        models.TorchConv2d(1, 2, 3, activation="gelu")


# ---------------------------------------------------------------- single networks


def test_lenet_pads_small_digits_with_black():
    torch.manual_seed(0)
    small = models.build("lenet5")
    large = models.build("lenet5", size=32)
    large.load_state_dict(small.state_dict())
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(small(x), large(F.pad(x, (2,) * 4)))


def test_filters_answer_to_what_they_are_for():
    gaussian, laplacian, horizontal, vertical = filters()
    assert gaussian.sum() == pytest.approx(1) and (gaussian > 0).all() and gaussian.argmax() == 12
    for other in (laplacian, horizontal, vertical):
        assert other.sum().item() == pytest.approx(0, abs=1e-6) and other.abs().sum() == pytest.approx(2)
    assert torch.equal(horizontal.T, vertical) and torch.equal(laplacian, laplacian.T)
    x = torch.zeros(1, 1, 20, 20)
    x[..., 10:] = 1  # an edge, bright on the right
    for backend in models.BACKENDS:
        answers = models.filter_bank(1, backend=backend)(x)[0]
        assert answers.shape == (4, 20, 20) and answers.abs().max() <= 1 + 1e-6
        assert answers[2].max() == pytest.approx(1, abs=1e-6)
        assert answers[2].argmax(1).float().mean() == pytest.approx(9, abs=1)
        assert answers[3].abs().max() < 1e-6  # nothing from above to below, at the border neither
        assert answers[1, :, 9].mean() * answers[1, :, 10].mean() < 0  # the laplacian crosses zero at the edge


@pytest.mark.parametrize("backend", models.BACKENDS)
def test_filters_are_fixed_until_they_are_made_learnable(backend):
    x, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    fixed = models.build("logistic_filters", backend=backend)
    learnable = models.build("logistic_filters", learnable=True, backend=backend)
    assert list(fixed.state_dict()) == list(learnable.state_dict()) == ["bank.weight", "output.weight", "output.bias"]
    learnable.load_state_dict(fixed.state_dict())
    torch.testing.assert_close(fixed(x), learnable(x))
    before = fixed.bank.weight.clone()
    for model, moves in ((fixed, False), (learnable, True)):
        F.cross_entropy(model(x), labels).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert torch.equal(model.bank.weight, before) != moves
    assert torch.equal(before[:4, 0], filters()) and torch.equal(before[4:8], before[:4])


def test_googlenet_has_three_classifiers_in_training():
    model = models.build("googlenet", num_classes=6, dropout=0.0, backend="torch")
    for aux in (model.aux1, model.aux2):
        aux.dropout.p = 0.0
    x = torch.rand(2, 3, 64, 64)
    outputs = model.training_logits(x)
    assert [weight for _, weight in outputs] == [1.0, 0.3, 0.3]
    assert all(logits.shape == (2, 6) for logits, _ in outputs)
    torch.testing.assert_close(outputs[0][0], model(x), rtol=1e-4, atol=1e-5)
    sum(logits.square().sum() for logits, _ in outputs[1:]).backward()
    assert model.aux1.fc2.weight.grad is not None and model.inception4a.branch1.conv.weight.grad is not None
    assert model.inception5b.branch1.conv.weight.grad is None
    model.replace_head(4)
    assert [logits.shape for logits, _ in model.training_logits(x)] == [(2, 4)] * 3
    assert len(model.eval().training_logits(x)) == 1
    without = models.build("googlenet", aux_logits=False, backend="torch")
    assert len(without.training_logits(x)) == 1 and without.replace_head(3).out_features == 3


def test_stochastic_depth_keeps_the_mean_and_drops_whole_pictures():
    from convkit.lab.models.mobile import _StochasticDepth

    layer, x = _StochasticDepth(0.25), torch.ones(4000, 2, 3, 3)
    torch.manual_seed(0)
    y = layer(x)
    assert y.mean() == pytest.approx(1, abs=0.05) and y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(y, y[:, :1, :1, :1].expand_as(y))
    assert layer.eval()(x) is x and _StochasticDepth(0.0).train()(x) is x
    assert not _StochasticDepth(1.0)(x).any()


def test_stochastic_depth_grows_block_by_block():
    depths = [m.p for m in bare("efficientnet_b0").modules() if type(m).__name__ == "_StochasticDepth"]
    assert depths == sorted(depths) and len(depths) == 9 and depths[-1] == pytest.approx(0.2 * 14 / 16)


def test_features_of_a_block_of_the_rotation_network():
    model = models.build("rotation_nin", backend="torch").eval()
    x = torch.rand(2, 3, 32, 32)
    shapes = [tuple(model.features(x, block=block).shape[1:]) for block in (1, 2, 3, 4)]
    assert shapes == [(96, 16, 16), (192, 8, 8), (192, 4, 4), (192, 4, 4)]
    torch.testing.assert_close(model.features(x, 4), model.features(x), rtol=0, atol=0)
    with pytest.raises(models.OptionError, match="block must be from 1 to 4, got 5"):
        model.features(x, 5)


def test_shortcut_without_parameters_pads_channels():
    from convkit.lab.models.resnet import _PadShortcut

    x = torch.rand(2, 3, 5, 5)
    y = _PadShortcut(4, 2)(x)
    assert y.shape == (2, 7, 3, 3) and torch.equal(y[:, 2:5], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 5:].any()
