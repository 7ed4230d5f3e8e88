"""Every peer computes the same thing as float64, and an error that is there is seen."""

import pytest
import torch

from convkit.bench import peers, suites
from convkit.bench.timing import Arena, carve, carved_elements

PROBLEMS = (
    "n2c6h9w8k10r3s3u2p1",
    "n2c6h5w7k9r3s2p1x0d1g3",
    "n3c12h6w5k24r3s3p1g12",
    "n2c6h6w5k8r3s3p0x1x0x1",
    "n2c1h9w9k6r5s5",
    "n3c10h5w4",
    "n3c10h5w4+res",
)
TOLERANCE = {"f64": 1e-12, "f32": 3e-6, "bf16": 2e-2}


def bound(case, key):
    who, _, layout = key.partition("/")
    problem, shapes = case.problem.replace(layout=layout), peers.operands(case.problem, case.pass_)
    arena = Arena(problem.torch_dtype, "cpu", 0)
    (stretch,) = arena.stretches(carved_elements(shapes, problem.torch_dtype))
    tensors = carve(stretch, shapes, layout == "nhwc")
    return peers.prepare(who, problem, case.pass_, tensors), problem, tensors


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("text", PROBLEMS)
def test_everybody_is_right(text, dtype):
    for case in suites.cases(suites=(), problems=[text], dtypes=[dtype]):
        for key in peers.keys(case.problem, case.layouts, ("torch", "native", "im2col")):
            if key.startswith("im2col") and case.problem.torch_padding is None:
                continue
            with torch.no_grad():
                function, problem, tensors = bound(case, key)
                found = peers.error(function, problem, case.pass_, tensors)
            assert found < TOLERANCE[dtype], f"{key} {case.pass_}"
            if dtype != "f64":  # of which the reference may be the very same call
                assert found > 0, f"{key} {case.pass_}: an error of nothing was measured"


@pytest.mark.parametrize("text", ["n2c6h9w8k10r3s3p1", "n3c10h5w4+res"])
def test_what_is_wrong_is_seen(text):
    for case in suites.cases(suites=(), problems=[text]):
        with torch.no_grad():
            function, problem, tensors = bound(case, "convkit/nhwc")

            def check(wrong, function=function, problem=problem, case=case, tensors=tensors):
                return peers.error(lambda *t: wrong(function(*t)), problem, case.pass_, tensors)

            assert check(lambda y: y) < 1e-5
            assert check(lambda y: y * 1.001) > 5e-4
            assert check(lambda y: y.flip(0)) > 0.1
            with pytest.raises(ArithmeticError, match="not finite"):
                check(lambda y: y / 0)
            with pytest.raises(ArithmeticError, match="size"):
                check(lambda y: y[..., 1:])


def test_large_problems_are_looked_at_in_part():
    (case,) = suites.cases(suites=["dense"], filter="vgg_512_28", passes=["wgrad"])
    shapes = peers.operands(case.problem, case.pass_)
    tensors = [torch.zeros(1).expand(shape) for shape in shapes]
    expected, part = peers._conv_reference(case.problem, case.pass_, tensors)
    assert part(torch.zeros(case.problem.weight_shape)).shape == expected.shape
    assert 1 <= expected.shape[0] < 20


def test_who_takes_part():
    dense, depthwise, norm = (suites.parse(text) for text in ("n1c4h5w5k4r3s3", "n1c4h5w5k4r3s3g4", "n1c4h5w5"))
    everyone = peers.PEERS
    assert peers.keys(dense, ["nhwc"], everyone) == [
        "convkit/nhwc",
        "torch/nchw",
        "torch/nhwc",
        "compile/nchw",
        "compile/nhwc",
        "im2col/nchw",
    ]
    assert "native/nhwc" in peers.keys(depthwise, ["nhwc"], everyone)
    assert not [key for key in peers.keys(norm, ["nhwc"], everyone) if key[:6] in ("native", "im2col")]


def test_native_leaves_the_switch_as_it_was():
    (case,) = suites.cases(suites=(), problems=["n1c4h5w5k4r3s3g4"], passes=["fprop"])
    function, _, tensors = bound(case, "native/nchw")
    assert torch.backends.mkldnn.enabled
    function(*tensors)
    assert torch.backends.mkldnn.enabled
    with pytest.raises(RuntimeError):
        function(tensors[0][:, :1], tensors[1])
    assert torch.backends.mkldnn.enabled


def test_tf32_is_a_switch_that_is_put_back():
    before = torch.backends.cuda.matmul.allow_tf32
    with peers.precision("tf32"):
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    with peers.precision("f32"):
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.slow
def test_compiled():
    for text in ("n1c4h5w5k4r3s3p1", "n3c6h4w4+res"):
        for case in suites.cases(suites=(), problems=[text]):
            with torch.no_grad():
                function, problem, tensors = bound(case, "compile/nhwc")
                assert peers.error(function, problem, case.pass_, tensors) < 1e-5
