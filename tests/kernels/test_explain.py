"""convkit.explain: every layer of a model with its work, and a model that nothing has happened to."""

import copy
import importlib
import json
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from measure_checks import CEILINGS
from swap_checks import build, fused, images
from test_swap import MODELS, BasicBlock, Generator, ResNet, conv
from torch import nn

import convkit
import convkit.bench.roofline
import convkit.bench.timing
import convkit.measure
import convkit.nn as cnn
from convkit import cli
from convkit.bench.problems import BatchNormProblem, ConvProblem
from convkit.bench.results import Failure
from convkit.bench.timing import interleave
from convkit.measure import Seconds, Task


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def row(explanation, name):
    (found,) = (row for row in explanation if row.name == name)
    return found


# ---------------------------------------------------------------- what it says


def test_rows_of_a_resnet(clock):
    model = build(ResNet)
    found = convkit.explain(model, images())
    assert [row.name for row in found] == [
        name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))
    ]
    first, norm, last = row(found, "conv1"), row(found, "bn1"), row(found, "layers.1.bn2")
    assert first.problem == "n4c3h12w12k4r3s3u1p1d1g1_f64_nchw" and first.calls == 1
    assert list(first.plans) == ["fprop", "wgrad"]  # images have no gradient
    assert list(row(found, "layers.0.conv1").plans) == ["fprop", "dgrad", "wgrad"]
    assert first.plans["fprop"] == convkit._C.plan(first.problem, "fprop").partition(" -> ")[2]
    assert first.kernels[0] == first.plans["fprop"].split(",")[0]
    assert norm.problem == "n4c4h12w12_f64_nchw" and norm.kernels == (f"batch_norm_relu_{convkit._C.isa()}",)
    assert last.problem == "n4c6h6w6_f64_nchw+res"
    problem = ConvProblem.parse(first.problem)
    floor = max(problem.flops / 1e10, problem.bytes / 1e9)
    assert first.floor == {"forward": floor, "backward": floor} and CEILINGS.flops_per_s["f64"] == 1e10
    assert row(found, "layers.0.conv1").floor["backward"] == 2 * row(found, "layers.0.conv1").floor["forward"]
    assert norm.floor["backward"] == BatchNormProblem.parse(norm.problem).backward_bytes / 1e9
    assert "returned before a ReLU" in row(found, "layers.1.downsample.1").reason
    assert sum(row.share for row in found.measured) == pytest.approx(1)
    assert found.totals["torch"] == {"forward": pytest.approx(18 * 2e-3), "backward": pytest.approx(18 * 2e-3)}
    assert first.ratio == 2 and found.slower == ()
    # Two layers of the same problem are timed once.
    assert len(clock.tasks) == len(set(clock.tasks)) < len(found.measured)


def test_plans_for_a_gpu_that_is_not_there(monkeypatch):
    module = importlib.import_module("convkit.explain")
    monkeypatch.setattr(module, "_gpu", lambda device: (9, 0, 132, 227 << 10))
    problem = ConvProblem.parse("n32c64h28w28k64r3s3p1g64_bf16_nhwc")
    plans = module._plans(Task("conv2d", problem, (("bias", False),), ("input", "weight"), "cuda:0"))
    assert list(plans) == ["fprop", "dgrad", "wgrad"]
    assert plans["wgrad"] == convkit._C.plan_cuda(str(problem), "wgrad").partition(" -> ")[2]
    assert all(plan.startswith("depthwise_nhwc_3x3u1, ") for plan in plans.values())

    norm = BatchNormProblem.parse("n256c2048h7w7_bf16_nhwc+res")
    for training, gradients, names in (
        (True, ("input", "weight"), ["forward", "backward"]),
        (False, ("input",), ["forward", "backward"]),
        (False, (), ["forward"]),
    ):
        options = ("affine", True), ("parameters", "f32"), ("training", training)
        plans = module._plans(Task("batch_norm_relu", norm, options, gradients, "cuda:0"))
        assert list(plans) == names
        kernel = "batch_norm_on_chip, " if training else "batch_norm_by_pixels"
        assert all(plan.startswith(kernel) for plan in plans.values()), plans


def test_prints_as_a_table(clock):
    clock.times = lambda task: (1e-3, 0.5e-3) if "k8r1" in str(task.problem) else (1e-3, 3e-3)
    found = convkit.explain(build(ResNet), images())
    lines = str(found).splitlines()
    assert [word for word in lines[0].split() if "-" not in word] == ["forward,", "ms", "backward,", "ms"]
    assert lines[1].split()[:6] == ["layer", "problem", "calls", "floor", "convkit", "PyTorch"]
    start = lines[1].index("problem")
    assert all(line[start] == "n" for line in lines[2:22] if "left:" not in line)
    assert lines[23].startswith("all measured")
    text = " ".join(lines)
    assert "PyTorch is still faster in 2 of 18, by 2.000 ms together" in text
    assert "layers.2.conv3 (1.000 ms against 2.000 ms)" in text and "only_faster=True" in text
    assert [row.name for row in found.slower] == ["layers.2.conv3", "layers.2.conv_skip"]
    assert "Plans:" in lines and any(line.startswith("  wgrad  outer_") for line in lines)


def test_to_dict_is_json(clock):
    found = convkit.explain(build(ResNet), images())
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["schema"] == 1 and plain["training"] and plain["machine"]["cpu"] == "Some CPU"
    assert [row["name"] for row in plain["rows"]] == [row.name for row in found]
    assert plain["rows"][0]["convkit"] == {"forward": 1e-3, "backward": 1e-3} and plain["rows"][0]["ratio"] == 2
    assert plain["totals"]["convkit"]["forward"] == pytest.approx(18e-3)


def test_evaluation_is_forward_alone(clock):
    found = convkit.explain(build(ResNet).eval(), images())
    assert all(list(row.convkit) == ["forward"] for row in found.measured)
    assert all(not task.gradients for task in clock.tasks) and "backward" not in str(found).split("Plans")[0]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_layer_that_swap_serves(clock, make):
    """Every task is computed with both, and their results and gradients compared (measure_checks)."""
    for training in (True, False):
        found = convkit.explain(build(make).train(training), images())
        served = {row.name for row in convkit.swap(build(make)).replaced}
        assert {row.name for row in found.measured} == served


def test_gradients_are_those_that_are_asked_for(clock):
    model = build(lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5), conv(5, 6)))
    model[3].requires_grad_(False)
    convkit.explain(model, images())
    both = ("input", "weight")
    assert [task.gradients for task in clock.tasks] == [("weight",), both, ("input",), both]
    clock.tasks.clear()
    convkit.explain(model[:1], images().requires_grad_())
    assert clock.tasks[0].gradients == both
    with torch.no_grad():  # of the caller: the model is in training mode
        convkit.explain(model[:1], images())
    assert clock.tasks[1].gradients == ("weight",)


def test_layouts_and_autocast(clock):
    model = build(lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU()), torch.float32)
    x = images(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = convkit.explain(model, x)
    assert [row.problem for row in found] == ["n4c3h12w12k4r3s3u1p1d1g1_bf16_nchw", "n4c4h12w12_bf16_nchw"]
    model.to(memory_format=torch.channels_last)
    clock.tasks.clear()
    convkit.explain(model, x)
    assert str(clock.tasks[0].problem).endswith("nhwc") and ("input_layout", "nchw") in clock.tasks[0].options
    clock.tasks.clear()
    convkit.explain(model, x.to(memory_format=torch.channels_last))
    assert clock.tasks[0].options == (("bias", False),)


LAYERS = {
    "same": lambda: nn.Conv2d(3, 4, (2, 4), padding="same"),
    "reflect": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=(2, 1), padding_mode="reflect"),
    "circular_same": lambda: nn.Conv2d(3, 4, (2, 4), padding="same", padding_mode="circular"),
    "groups": lambda: nn.Conv2d(3, 6, 3, dilation=2, groups=3),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
    "transposed_groups": lambda: nn.ConvTranspose2d(3, 6, (2, 3), stride=(3, 2), dilation=(2, 1), groups=3),
    "activation": lambda: cnn.Conv2d(3, 4, 3, activation="relu"),
    "separable": lambda: cnn.SeparableConv2d(3, 4, 3, padding=1, depthwise_activation="relu"),
    "norm": lambda: cnn.BatchNormReLU2d(3, affine=False),
    "untracked": lambda: cnn.BatchNormReLU2d(3, track_running_stats=False),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers(clock, make):
    for training in (True, False):
        layer = build(make).train(training)
        found = convkit.explain(layer, images().requires_grad_())
        assert found.measured == found.rows and len(found) == (2 if "Separable" in str(type(layer)) else 1), str(found)
        one = found.rows[-1]
        size = (ConvProblem if "k" in one.problem else BatchNormProblem).parse(one.problem)
        shape = list(layer(images()).shape)
        if isinstance(layer, nn.ConvTranspose2d):
            assert list(size.input_shape) == shape and list(one.plans)[0] == "dgrad"
        else:
            assert list(size.output_shape if isinstance(size, ConvProblem) else size.shape) == shape


def test_an_image_without_a_batch(clock):
    found = convkit.explain(conv(3, 4).double(), images()[0])
    assert found.rows[0].problem.startswith("n1c3h12w12k4")


def test_convkits_own_residual(clock):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = cnn.BatchNormReLU2d(3)

        def forward(self, x):
            return self.norm(x, x * 2)

    assert convkit.explain(Block().double(), images()).rows[0].problem == "n4c3h12w12_f64_nchw+res"


# ---------------------------------------------------------------- who is called how often


class Loop(nn.Module):
    """A layer called twice with one size and once with another, one known by two names, one never called."""

    def __init__(self):
        super().__init__()
        self.step = conv(3, 3)
        self.alias = self.step
        self.other = conv(3, 2)
        self.unused = conv(3, 3)

    def forward(self, x):
        x = self.step(self.step(x))
        return self.other(self.step(F.max_pool2d(x, 2)))


def test_calls(clock):
    found = convkit.explain(build(Loop).eval(), images())
    several = [row for row in found if row.name == "step = alias"]
    assert [(row.calls, row.convkit["forward"]) for row in several] == [(2, 2e-3), (1, 1e-3)]
    assert [row.problem[:10] for row in several] == ["n4c3h12w12", "n4c3h6w6k3"]
    assert row(found, "unused").reason == "not called with this example_input" and row(found, "unused").calls == 0
    assert row(found, "other").share == 0.25


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 4)

    def forward(self, batch, scale=1, *, mask=None):
        x = batch["image"] if isinstance(batch, dict) else batch
        return self.conv(x * scale if mask is None else x * mask)


def test_inputs(clock):
    model = build(Named)
    for example in (images(), (images(), 2), {"batch": images(), "mask": images()}, ({"image": images()},)):
        assert convkit.explain(model, example).rows[0].calls == 1
    with pytest.raises(TypeError, match="a tuple of the forward's positional arguments.*got list"):
        convkit.explain(model, [images()])
    with pytest.raises(TypeError, match="must be a torch.nn.Module, but got str"):
        convkit.explain("model", images())


def test_layers_that_are_not_served(clock):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(2), nn.Conv1d(4, 2, 1)).double()
    found = convkit.explain(model, images())
    assert row(found, "1").reason == "left: followed by 2 (Tanh) and not by a ReLU in the model's forward"
    assert row(found, "4").reason == "left: not a 2-D convolution" and "Conv1d: left" in str(found)
    found = convkit.explain(nn.Linear(3, 3), torch.randn(2, 3))
    assert len(found) == 0 and "No layer was measured." in str(found) and found.ceilings is None


def test_what_cannot_be_a_problem_is_said(clock):
    found = convkit.explain(conv(3, 4).double(), images()[:0])
    assert found.rows[0].reason == "not measured: n must be at least 1, but got 0"
    up = nn.ConvTranspose2d(3, 4, 3, padding=1, output_padding=1, dilation=2).double()
    assert "no convolution leads from" in convkit.explain(up, images()).rows[0].reason


def test_a_failure_is_said(clock, monkeypatch):
    monkeypatch.setattr(convkit.measure, "_measure", lambda *_: Seconds({}, {"forward": 1}, {"convkit": "Oops: no"}))
    found = convkit.explain(conv(3, 4), images(torch.float32))
    assert found.rows[0].reason == "not measured: convkit: Oops: no" and found.measured == ()


# ---------------------------------------------------------------- the model is as it was


class Restless(nn.Module):
    """A forward that changes all it can reach."""

    def __init__(self):
        super().__init__()
        self.block = BasicBlock(3, 3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))
        self.seen, self.log, self.fail = 0, [], False

    def forward(self, x):
        self.steps += 1
        self.seen += 1
        self.log.append(x.shape)
        self.new = x
        self.block.relu.train(False)
        self.block.conv1.weight.data.mul_(2)
        x += random.random() + numpy.random.rand()
        loss = (self.block.conv2(x) ** 2).sum()
        if loss.requires_grad:
            loss.backward()
        x = self.dropout(self.block(x))
        if self.fail:
            raise RuntimeError("the model's own")
        return x


def everything(model):
    return {
        name: (dict(vars(m)), {k: copy.copy(v) for k, v in vars(m).items() if isinstance(v, (dict, list))})
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_untouched(clock, fail, swapped, training):
    model = build(Restless).train(training)
    model.block.bn1.eval()
    model.block.conv1.register_forward_hook(lambda *args: None)
    model(images()).sum()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3)
    if swapped:
        convkit.swap(model)
        assert fused(model.block)
    model.fail = fail
    x = images()
    before, values = everything(model), copy.deepcopy(model.state_dict())
    gradients = [parameter.grad for parameter in model.parameters()]
    luck = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    kinds = [type(m) for m in model.modules()]
    if fail:
        with pytest.raises(RuntimeError, match="the model's own") as caught:
            convkit.explain(model, x)
        assert caught.value.__notes__ == ["(convkit called the model with an input of 4x3x12x12 float64 on cpu)"]
    else:
        assert len(convkit.explain(model, x).measured) == (5 if training else 4)  # conv2 with and without gradients
    after = everything(model)
    assert [type(m) for m in model.modules()] == kinds
    for name, (attributes, contents) in before.items():
        assert list(after[name][0]) == list(attributes)
        assert all(after[name][0][key] is value for key, value in attributes.items()), name
        assert after[name][1] == contents
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    assert all(p.grad is grad and (grad == 3).all() for p, grad in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(x, images())
    assert torch.equal(torch.get_rng_state(), luck[0]) and random.getstate() == luck[1]
    assert numpy.random.get_state()[1].tolist() == luck[2]


def test_a_graph_made_before_stays_valid(clock):
    model = build(ResNet)
    model.conv1.weight.data.add_(0)
    loss = model(images()).square().sum()
    convkit.explain(model, images())
    loss.backward()


def test_a_swapped_model_is_measured_the_same(clock):
    model = build(ResNet)
    plain = convkit.explain(model, images())
    convkit.swap(model, exclude="layers.0.*")
    assert convkit.explain(model, images()).rows == plain.rows and fused(model) == ["bn1"]


def test_a_compiled_model(clock):
    model = torch.compile(build(BasicBlock), backend="eager")
    model(images(channels=4))
    found = convkit.explain(model, images(channels=4))
    assert [row.calls for row in found] == [1] * 4 and found.rows[0].name == "_orig_mod.conv1"


def test_lazy_layers_stay_lazy(clock):
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="not initialized yet.*call it once"):
        convkit.explain(model, images())
    assert type(model[0]) is nn.LazyConv2d


def test_inference_mode(clock):
    with torch.inference_mode():
        found = convkit.explain(build(Generator).eval(), images())
    assert len(found.measured) == 3


# ---------------------------------------------------------------- timing it


def test_really_timed(monkeypatch):
    for module in (convkit.measure, convkit.bench.timing):
        monkeypatch.setattr(module, "rotation_bytes", lambda device: 1 << 20)
    layer = build(lambda: nn.Sequential(conv(2, 2), nn.BatchNorm2d(2), nn.ReLU()), torch.float32)
    luck = torch.get_rng_state()
    found = convkit.explain(layer, images(torch.float32, channels=2), budget_s=0.001)
    assert torch.equal(torch.get_rng_state(), luck)
    for one in found:
        assert one.reason is None
        assert all(0 < value < 60 for times in (one.convkit, one.torch, one.floor) for value in times.values())
        assert list(one.convkit) == list(one.torch) == list(one.floor) == ["forward", "backward"]


def test_one_that_fails_does_not_stop_the_other(monkeypatch):
    monkeypatch.setattr(convkit.measure, "rotation_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(convkit.bench.roofline, "ceilings", lambda *args, **kwargs: CEILINGS)

    def refuse(*args, **kwargs):
        raise RuntimeError("not today\nnor tomorrow")

    monkeypatch.setattr(convkit.functional, "conv2d", refuse)
    layer = conv(2, 2).requires_grad_(False)
    one = convkit.explain(layer, images(torch.float32, channels=2), budget_s=0.001).rows[0]
    assert one.reason == "not measured: convkit: RuntimeError: not today"
    assert isinstance(interleave({"a": refuse})["a"], Failure)


# ---------------------------------------------------------------- the command


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", *arguments])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_command(clock, capsys, tmp_path):
    model = "convkit.lab.models:simplenet"
    status, out, err = run(capsys, model, "--input", "2x1x28x28", "--json", str(tmp_path / "x.json"))
    assert status == 0 and err == "" and "n2c1h28w28k20r5s5u1p0d1g1_f32_nchw" in out and "backward, ms" in out
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["Conv2d", "MaxPool2d"] * 2
    assert rows[1]["problem"] == "n2c20h24w24r2s2u2p0d1_f32_nchw" and rows[1]["plans"]
    status, out, _ = run(
        capsys, model, "--input", "2x1x28x28", "--dtype", "bf16", "--layout", "nhwc", "--eval", "--threads", "1"
    )
    assert status == 0 and "k50r5s5u1p0d1g1_bf16_nhwc" in out and "backward" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuchmodule:thing", "--input", "1x3"], "nosuchmodule:thing: cannot be imported"),
        (["convkit.lab.models:nothing", "--input", "1x3"], "no attribute 'nothing'"),
        (["convkit.lab.models", "--input", "1x3"], "accepts the like of convkit.lab.models:simplenet"),
        (["convkit.lab.models:build", "--input", "1x3"], "build() failed: TypeError"),
        (["os:getcwd", "--input", "1x3"], "gave a str, not a torch.nn.Module"),
        (["convkit.lab.models:simplenet"], "--input"),
        (["convkit.lab.models:simplenet", "--input", "8x"], "got '8x'; accepts sizes"),
        (["convkit.lab.models:simplenet", "--input", "0x1x28x28"], "sizes of at least 1"),
        (["convkit.lab.models:simplenet", "--input", "8x3x28x28"], "does not take 8x3x28x28: RuntimeError"),
        (["convkit.lab.models:simplenet", "--input", "1x28", "--input", "2"], "does not take 1x28 and 2: TypeError"),
        (["convkit.lab.models:simplenet", "--input", "2x1x28x28", "--dtype", "f8"], "accepts f64, f32, bf16, f16"),
        (["convkit.lab.models:simplenet", "--input", "2x1x28x28", "--layout", "chwn"], "accepts nchw, nhwc"),
        (["convkit.lab.models:simplenet", "--input", "2x1x28x28", "--device", "tpu"], "accepts cpu, cuda"),
        (["convkit.lab.models:simplenet", "--input", "2x1x28x28", "--json", "/no/such/x.json"], "no folder /no/such"),
        (["convkit.lab.models:simplenet", "--input", "9" * 30], "--input: "),
    ],
)
def test_wrong_input_is_one_line_and_status_2(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == "" and err.startswith("convkit: ") and err.count("\n") == 1 and message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    status, _, err = run(capsys, "convkit.lab.models:simplenet", "--input", "2x1x28x28", "--device", "cuda")
    assert status == 2 and "no GPU here" in err
