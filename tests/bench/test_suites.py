"""Which rows a command asks for."""

import collections

import pytest

from convkit.bench import BenchError, suites
from convkit.bench.problems import BatchNormProblem, ConvProblem


def test_the_layers_are_all_there():
    found = suites.layers()
    assert collections.Counter(layer.suite for layer in found) == {"dense": 24, "depthwise": 14, "batch-norm": 18}
    by_name = {layer.name: layer for layer in found}
    assert len(by_name) == len(found)
    assert str(by_name["r50_stem"].problem) == "n8c3h224w224k64r7s7u2p3d1g1_f32_nchw"
    assert str(by_name["dw5s2_96_112"].problem) == "n4c96h112w112k96r5s5u2p2d1g96_f32_nchw"
    assert str(by_name["bn_64_56+res"].problem) == "n8c64h56w56_f32_nchw+res"
    assert by_name["lenet_1_20"].suite == "dense", "one channel is one group like any other"
    assert all(layer.source for layer in found)


def test_a_gpu_has_batches_of_its_own():
    assert {layer.name: layer.problem.n for layer in suites.layers("cuda")}["r50_stem"] == 256


def test_cases():
    found = suites.cases(suites=["dense"], filter="r50_3x3_*", passes=["fprop", "wgrad"], dtypes=["f32", "bf16"])
    assert len(found) == 5 * 2 * 2
    assert {case.pass_ for case in found} == {"fprop", "wgrad"}
    first = found[0]
    assert first.text == "n8c64h56w56k64r3s3u1p1d1g1_f32" and first.layouts == ("nchw", "nhwc")
    assert ConvProblem.parse(first.text) == first.problem
    assert first.flops == 2 * 8 * 56 * 56 * 64 * 64 * 9 and first.bytes == first.problem.bytes
    assert len({case.key for case in found}) == len(found)


def test_batch_norm_cases():
    plain, backward, _, added, *_ = suites.cases(suites=["batch-norm"], filter="bn_64_56*")
    n = 8 * 64 * 56 * 56
    assert (plain.bytes, backward.bytes, added.bytes) == (8 * n, 12 * n, 12 * n)
    assert (plain.flops, added.flops) == (6 * n, 7 * n)
    assert added.text == "n8c64h56w56_f32+res" and BatchNormProblem.parse(added.text) == added.problem


def test_net_cases():
    found = suites.cases(suites=["nets"])
    assert [case.pass_ for case in found] == ["training", "inference"] * 4
    assert found[0].text == "32x3x32x32" and found[0].flops is None


def test_quick_is_less_of_everything():
    quick, whole = suites.cases(quick=True), suites.cases()
    assert {case.family for case in quick} == {case.family for case in whole}
    assert len(quick) < len(whole) / 3
    assert {case.key[:2] for case in quick} <= {case.key[:2] for case in whole}


def test_problems_of_ones_own():
    found = suites.cases(suites=(), problems=["n1c4h5w6k8r3s3", "n2c8h4w4k8r3s3g8_bf16_nhwc", "n1c2h3w4+res"])
    assert [case.family for case in found] == ["dense"] * 3 + ["depthwise"] * 3 + ["batch-norm"] * 3
    assert found[0].layouts == ("nchw", "nhwc") and found[0].dtype == "f32"
    assert found[3].layouts == ("nhwc",) and found[3].dtype == "bf16"
    assert found[6].problem.residual


def test_tf32_is_float32_with_other_products():
    (case,) = suites.cases(suites=["dense"], filter="r50_stem", passes=["fprop"], dtypes=["tf32"])
    assert case.dtype == "tf32" and case.problem.dtype == "f32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problems": ["n1c4h5w6k8r3"]}, "expected 's' (filter width) and a number, but got 'the end'"),
        ({"problems": ["n1c4h5w6k8r3s3_f31"]}, "dtype 'f31' is not known; accepted: f64, f32, bf16, f16"),
        ({"problems": ["n1c4h5w6k8r9s9"]}, "the filter is larger than the padded input"),
        ({"problems": ["n1c4h5"]}, "expected 'w' (width) and a number"),
        ({"problems": [""]}, "expected 'n' (images) and a number"),
        ({"problems": ["r50_stem"]}, "expected 'n' (images) and a number, but got 'r50_stem'"),
        ({"models": ["resnet"]}, "accepts module:function@NxCxHxW"),
        ({"models": ["a:b@1x2"]}, "got '1x2' after @; accepts four sizes"),
        ({"models": ["a:b@1x0x2x2"]}, "accepts four sizes"),
        ({"filter": "r51*"}, "nothing to measure"),
        ({"passes": ["fprop"], "suites": ["nets"]}, "nothing to measure: no fprop of nets"),
    ],
)
def test_what_cannot_be_measured(options, message):
    with pytest.raises(BenchError) as raised:
        suites.cases(**options)
    assert message in str(raised.value)


def test_words():
    assert suites.words("--x", None, ("a", "b"), ("b",)) == ("b",)
    assert suites.words("--x", "b, a,b", ("a", "b"), ()) == ("b", "a")
    assert suites.words("--x", "all,a", ("a", "b"), (), all=("a", "b")) == ("a", "b")
    with pytest.raises(BenchError, match="--x: got 'c'; accepts a, b, all, or several with commas"):
        suites.words("--x", "a,c", ("a", "b"), (), all=("a", "b"))
