"""Winograd's method: right at every edge of its tiles, within its error bound, and taken only where it may be.

Its errors are larger than a direct sum's, so test_numeric.py (at most twice PyTorch's error) switches it off. The rule
here is the one that convkit.backends documents: the norm of the error at most 1e-5 of the norm of the result, beside
what a 16-bit result is rounded by.
"""

import dataclasses
import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from kernel_checks import Sample, conv_sample, offset, transpose_sample

import convkit
import convkit.functional as CF
from convkit import _C, reference
from convkit.bench.problems import ConvProblem

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-5 + 2**-8, torch.float16: 1e-5 + 2**-11}
LAYOUTS = ("nchw", "nhwc")
PASSES = ("fprop", "dgrad", "wgrad")
TAPS = (2, 3, 4, 5)
STRIDED = ("r3s3u2", "r4s4u2", "r5s5u2", "r7s7u2", "r9s9u2", "r5s5u4", "r8s8u4", "r11s11u4", "r16s16u4", "r20s20u4")


@pytest.fixture
def everywhere():
    """Also where it would be slower: for problems small enough to test all edges."""
    before = _C.set_winograd(2)
    yield
    _C.set_winograd(before)


def parse(text: str, layout: str = "nhwc", dtype: str = "f32") -> ConvProblem:
    return ConvProblem.parse(text).replace(dtype=dtype, layout=layout)


def error_norms(sample: Sample, seed: int = 0) -> dict[str, float]:
    """Norm of the difference from float64 by the norm of the result, for the output and every gradient."""
    exact = sample.map(torch.Tensor.double)
    linear = (exact.before_relu or (lambda s: s(reference)))(exact)
    grad = torch.randn(linear.shape, generator=torch.Generator().manual_seed(seed)).to(sample.tensors["input"].dtype)
    if sample.before_relu:  # where rounding alone decides on the side of the ReLU, no gradient
        grad = grad.masked_fill(linear.abs() < 1e-4 * linear.abs().max(), 0)
    grad = grad.contiguous(memory_format=torch.channels_last) if _is_channels_last(sample) else grad
    ours, right = sample.evaluate(CF, grad), exact.evaluate(reference, grad.double())
    # The sum may be negative, and the ReLU of it zero.
    norms = {name: value.norm().item() for name, value in right.items()} | {"output": linear.norm().item()}
    if "scale" in exact.tensors:  # its gradient is a sum of terms of either sign, which chance may bring close to zero
        bare = {name: exact.tensors[name] for name in ("input", "weight")}
        terms = grad.double() * dataclasses.replace(exact, tensors=bare, options=exact.options | {"activation": None})(
            reference
        )
        terms = terms[linear > 0] if sample.before_relu else terms
        norms["gradient of scale"] = max(norms["gradient of scale"], terms.norm().item())
    return {
        name: (ours[name].double() - value).norm().item() / max(norms[name], 1e-30) for name, value in right.items()
    }


def _is_channels_last(sample: Sample) -> bool:
    x = sample.tensors["input"]
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def assert_within_bound(*samples: Sample) -> None:
    worst = [(error, name, sample) for sample in samples for name, error in error_norms(sample).items()]
    bad = [line for line in worst if not line[0] <= BOUND[line[2].tensors["input"].dtype]]
    assert not bad, "\n".join(f"{name} of {sample}: {error:.2g}" for error, name, sample in bad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("height", range(1, 15))
def test_image_sizes(everywhere, height: int, taps: int, layout: str):
    """Every number of rows and columns that a last tile can have, with and without padding."""
    for width, padding in itertools.product((1, 2, 3, 4, 5, 7, 8, 9, 13, 14), (0, 1)):
        if min(height, width) + 2 * padding >= taps:
            bias, activation = (height + width) % 2 == 0, (None, "relu")[width % 2]
            scale, residual = (height + padding) % 2 == 0, (height + width) % 3 > 0
            problem = parse(f"n2c5h{height}w{width}k6r{taps}s{taps}p{padding}", layout)
            assert "winograd" in _C.plan(str(problem), "fprop")
            sample = conv_sample(problem, None, bias, activation, scale, residual)
            assert_within_bound(sample)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("filters", STRIDED)
def test_image_sizes_with_a_stride(everywhere, filters: str, layout: str):
    """Edges within the pixels that a filter steps over, and padding that is not a multiple of the stride."""
    taps = parse(f"n1c1h64w64k1{filters}").r
    paddings = (0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 1, 0, 2), (4, 5, 7, 6), (9, 9, 9, 9)
    for size, padding in itertools.product((1, 2, 7, 8, 15, 16, 17, 22), paddings):
        height, width = size, 24 - size
        if height + padding[0] + padding[1] >= taps and width + padding[2] + padding[3] >= taps:
            problem = parse(f"n2c3h{height}w{width}k6{filters}p{'x'.join(map(str, padding))}", layout)
            assert "phases" in _C.plan(str(problem), "fprop")
            assert_within_bound(
                conv_sample(problem, None, size % 2 == 0, (None, "relu")[size % 2], size % 3 == 0, size % 3 > 0)
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("filters", ("r4s4u2p1", "r7s7u2p3", "r11s11u4p2"))
@pytest.mark.parametrize("channels", (1, 2, 4, 5, 7, 9, 15, 16, 17, 20, 24, 31, 32, 33, 52, 70))
def test_channels_with_a_stride(everywhere, channels: int, filters: str, layout: str):
    """Counts around those of which the pixels that a filter steps over come together, and their remainders."""
    problem = parse(f"n2c{channels}h13w10k20{filters}", layout)
    assert_within_bound(conv_sample(problem, activation="relu", residual=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("channels", (1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 80, 130))
def test_channels_and_filters(everywhere, channels: int, taps: int, layout: str):
    """Counts around the widths of vectors and of blocks of 64, of either."""
    for text in (f"n1c{channels}h6w7k20r{taps}s{taps}p1", f"n3c20h5w9k{channels}r{taps}s{taps}p1"):
        problem = parse(text, layout)
        assert_within_bound(
            conv_sample(problem, activation="relu", scale=True, residual=True), conv_sample(problem, bias=False)
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", ("0x1x1x0", "2x0x0x1", "1x2x0x2", "2", "3x1x1x4", "0x5x6x0", "7"))
def test_padding(everywhere, padding: str, layout: str):
    """One-sided, and so wide that whole tiles see nothing but zeros."""
    for size, taps in itertools.product(("h9w6", "h4w11"), TAPS):
        assert_within_bound(conv_sample(parse(f"n2c9{size}k10r{taps}s{taps}p{padding}", layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
@pytest.mark.parametrize(
    "text", ("n2c40h9w7k34r3s3p1g2", "n3c51h6w5k60r5s5p2g3", "n2c140h7w6k132r3s3p1g2", "n5c40h12w12k100r5s5g2")
)
def test_groups(everywhere, text: str, dtype: str, layout: str):
    """Of fewer and of more channels than a block, with every part of the epilogue, and transposed."""
    problem = parse(text, layout, dtype)
    assert all("winograd" in _C.plan(str(problem), which) for which in PASSES)
    assert_within_bound(conv_sample(problem, activation="relu", scale=True, residual=True), transpose_sample(problem))


@pytest.mark.parametrize("tiles", range(1, 40))
def test_numbers_of_tiles(everywhere, tiles: int):
    """Around the rows of the register tiles, and the tiles that a weight gradient sums at once."""
    assert_within_bound(
        conv_sample(parse(f"n{tiles}c17h4w3k18r3s3p1")),
        conv_sample(parse(f"n{tiles}c17h5w4k18r5s5p1")),
        conv_sample(parse(f"n{tiles}c5h8w6k18r4s4u2p1")),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transposed(everywhere, layout: str):
    texts = "n2c9h8w7k10r5s5p2", "n2c9h8w7k10r3s3p1", "n1c20h3w9k33r3s3p0x1", "n2c5h6w6k7r3s3p2", "n3c9h8w7k10r5s5"
    strided = "n2c9h8w7k10r4s4u2p1", "n2c40h9w8k7r7s7u2p3", "n2c3h20w17k10r11s11u4p2", "n2c20h12w9k5r6s6u2"
    for text in texts + strided:
        assert_within_bound(transpose_sample(parse(text, layout)))


SPREAD = ("n5c20h12w12k50r5s5", "n3c70h9w13k130r5s5", "n2c17h14w14k9r5s5p1x0x0x1", "n4c33h6w5k20r3s3")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ("f32", "bf16", "f16"))
@pytest.mark.parametrize("text", SPREAD)
def test_input_gradients_by_tiles_of_the_gradient(everywhere, text: str, dtype: str, layout: str):
    """Where images without full padding have fewer of these; of one image or several a task, of several blocks."""
    problem = parse(text, layout, dtype)
    assert "spread" in _C.plan(str(problem), "dgrad")
    assert_within_bound(conv_sample(problem))


def test_input_gradients_of_long_images_are_gathered(everywhere):
    """The sums of an image would not stay in a cache."""
    plan = _C.plan(str(parse("n1c20h6w9999k50r5s5")), "dgrad")
    assert "winograd" in plan and "spread" not in plan


@pytest.mark.parametrize("arrange", (torch.Tensor.contiguous, lambda t: t.to(memory_format=torch.channels_last)))
def test_weights_in_any_layout(everywhere, arrange):
    """Whatever the layout of the input; a weight may also have no dense layout at all."""
    for filters in (*(f"r{taps}s{taps}" for taps in TAPS), "r4s4u2", "r7s7u2"):
        sample = conv_sample(parse(f"n2c36h7w6k40{filters}p1", "nchw"))
        for weight in (arrange(sample.tensors["weight"]), sample.tensors["weight"].mT.contiguous().mT):
            assert_within_bound(dataclasses.replace(sample, tensors=sample.tensors | {"weight": weight}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ("bf16", "f16"))
@pytest.mark.parametrize(
    "text",
    (
        "n3c17h9w6k70r3s3p1",
        "n2c70h3w13k5r3s3p0x2x1x0",
        "n1c330h5w5k325r3s3p1",
        "n3c17h9w12k70r4s4p1",
        "n3c17h19w16k70r7s7u2p3",
        "n3c3h25w26k70r11s11u4p2",
    ),
)
def test_16_bit_types(everywhere, text: str, dtype: str, layout: str):
    """Edges of tiles, of vectors and of blocks, weights of every kind, filters transformed by block."""
    sample = conv_sample(parse(text, layout, dtype), activation="relu")
    weight = sample.tensors["weight"]
    for moved in (weight, weight.contiguous(), weight.mT.contiguous().mT):
        assert_within_bound(dataclasses.replace(sample, tensors=sample.tensors | {"weight": moved}))


def test_unaligned_tensors(everywhere):
    # An output large enough to be streamed past the caches.
    sample = conv_sample(parse("n40c32h8w8k32r3s3p1"), residual=True)
    moved = {name: offset(sample.tensors[name]) for name in ("input", "residual")}
    assert_within_bound(sample, dataclasses.replace(sample, tensors=sample.tensors | moved))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "text",
    ("n2c64h28w28k64r3s3p1", "n3c256h14w14k256r3s3p1", "n4c512h7w7k512r3s3p1", "n2c3h224w224k64r11s11u4p2"),
)
def test_the_bound_up_to_512_channels(text: str, layout: str):
    """As the plan takes it by itself; an error of 2e-6 would be twice what is documented as usual."""
    problem = parse(text, layout)
    assert all("winograd" in _C.plan(str(problem), which) for which in PASSES)
    errors = error_norms(conv_sample(problem))
    assert all(error <= 2e-6 for error in errors.values()), errors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "text",
    (
        "n128c20h12w12k50r5s5",
        "n8c64h27w27k192r5s5p2",
        "n4c256h14w14k256r5s5p2",
        "n4c256h14w14k256r4s4p1",
        "n2c3h112w112k64r7s7u2p3",
    ),
)
def test_the_bound_of_tiles_of_8x8(everywhere, text: str, layout: str):
    problem = parse(text, layout)
    assert all("winograd" in _C.plan(str(problem), which) for which in PASSES)
    errors = error_norms(conv_sample(problem))
    assert all(error <= 8e-6 for error in errors.values()), errors


def test_against_the_direct_kernel_where_the_source_comes_in_several_chunks():
    """More tiles and filters than float64 would be quick for. Both are within the bound, so twice it lies between."""
    problem = parse("n33c320h16w16k320r3s3p1")
    assert "winograd" in _C.plan(str(problem), "fprop")
    sample = conv_sample(problem)
    with torch.no_grad():
        fast = sample()
        with convkit.set_winograd(False):
            direct = sample()
    assert not torch.equal(fast, direct)
    assert (fast - direct).norm() <= 2e-6 * direct.norm()


# ---- where it is taken -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(
    "text",
    (
        "n8c64h56w56k64r3s3p1",
        "n8c128h28w28k128r3s3p1",
        "n16c256h14w14k256r3s3p1",
        "n16c512h7w7k512r3s3p1",
        "n64c512h4w4k512r3s3p1",
        "n64c64h32w32k64r3s3p1",
        "n8c64h32w32k64r4s4",
        "n8c3h224w224k64r7s7u2p3",
        "n8c3h224w224k64r11s11u4p2",
        "n8c32h64w64k64r5s5u2p2",
    ),
)
def test_taken_for_large_layers(text: str, which: str):
    problem = parse(text)
    for layout, dtype in itertools.product(LAYOUTS, ("f32", "bf16", "f16")):
        # Where bf16 is multiplied in pairs, transforming many filters for few tiles costs more than the products saved,
        # and so does sorting the pixels that a stride steps over.
        if dtype != "bf16" or _C.isa() != "avx512_bf16" or not ("h7w7" in text or problem.stride[0] > 1):
            assert "winograd" in _C.plan(str(parse(text, layout, dtype)), which)
        with convkit.set_winograd(False):
            assert "winograd" not in _C.plan(str(parse(text, layout, dtype)), which)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(
    "text",
    (
        "n8c64h56w56k64r3s3u3p1",
        "n8c64h56w56k64r5s5u3p1",
        "n8c64h56w56k64r3s3u2x1p1",
        "n8c64h56w56k64r2s2u2",
        "n8c64h56w56k64r11s11u2p1",
        "n8c64h56w56k64r3s3p2d2",
        "n8c64h56w56k64r3s3p1g8",
        "n8c64h56w56k64r4s4u2p1g2",
        "n8c64h56w56k64r3s3p1g64",
        "n8c64h56w56k64r7s7p3",
        "n8c64h56w56k64r5s3p2x1",
        "n8c64h56w56k64r3s1p1x0",
        "n8c64h56w56k64r1s1",
    ),
)
def test_not_defined_for_other_filters(everywhere, text: str, which: str):
    assert "winograd" not in _C.plan(str(parse(text)), which)


@pytest.mark.parametrize("which", PASSES)
def test_never_for_float64(everywhere, which: str):
    assert "winograd" not in _C.plan(str(parse("n8c64h56w56k64r3s3p1", dtype="f64")), which)


@pytest.mark.parametrize(
    "text",
    (
        "n1c64h4w4k64r3s3p1",
        "n64c3h32w32k64r3s3p1",
        "n8c4h32w32k4r3s3p1",
        "n2c17h9w9k33r3s3p1",
        "n16c256h28w28k256r3s3u2p1",
        "n64c512h4w4k512r4s4u2p1",
    ),
)
def test_not_where_it_is_slower(text: str):
    """Few channels: the transforms cost more than they save. Few pixels: the filters' transforms do."""
    for which in PASSES:
        assert "winograd" not in _C.plan(str(parse(text)), which)


def test_the_same_choice_for_any_number_of_threads():
    for text in ("n1c32h40w40k32r3s3p1", "n1c64h9w9k64r3s3p1", "n2c128h8w8k512r3s3p1", "n1c512h14w14k512r3s3p1"):
        for which in PASSES:
            plans = {"winograd" in _C.plan(str(parse(text)), which, threads) for threads in (1, 2, 7, 64)}
            assert len(plans) == 1, f"{text} {which}"


# ---- repeatable ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    (
        "n5c64h13w17k70r3s3p1",  # shared filters, several parts of a weight gradient
        "n2c330h9w9k325r3s3p1",  # filters transformed by block
        "n7c20h12w12k70r5s5",  # input gradients of whole images, some of them of one task
        "n3c20h33w28k70r7s7u2p3",
        "n3c40h13w17k70r3s3p1g2",
    ),
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
def test_bitwise_the_same_with_any_number_of_threads(everywhere, text: str, dtype: str, layout: str):
    sample = conv_sample(parse(text, layout, dtype), activation="relu", scale=True, residual=True)
    grad = torch.randn_like(sample())
    first = sample.evaluate(CF, grad)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for name, value in sample.evaluate(CF, grad).items():
            assert torch.equal(value, first[name]), f"{name}, {threads} threads"


# ---- the switch ------------------------------------------------------------------------------------------------------


@pytest.fixture
def enabled():
    before = _C.set_winograd(1)
    yield
    _C.set_winograd(before)


def test_switch(enabled):
    assert convkit.winograd_enabled()
    with convkit.set_winograd(False):
        assert not convkit.winograd_enabled()
        with convkit.set_winograd(True):
            assert convkit.winograd_enabled()
        assert not convkit.winograd_enabled()
    assert convkit.winograd_enabled()
    convkit.set_winograd(False)
    assert not convkit.winograd_enabled()
    convkit.set_winograd(True)
    assert convkit.winograd_enabled()


def test_switch_is_put_back_after_an_error(enabled):
    with pytest.raises(ZeroDivisionError), convkit.set_winograd(False):
        raise ZeroDivisionError
    assert convkit.winograd_enabled()


def test_switch_holds_in_a_backward_pass_and_in_other_threads(enabled):
    sample = conv_sample(parse("n2c64h28w28k64r3s3p1"))
    with convkit.set_winograd(False):
        direct = sample.evaluate(CF)
        found = []
        thread = threading.Thread(target=lambda: found.append(convkit.winograd_enabled()))
        thread.start()
        thread.join()
    assert found == [False]
    for name, value in sample.evaluate(CF).items():
        assert torch.equal(value, direct[name]) == (name == "gradient of bias"), name


@pytest.mark.parametrize("bad", (None, 1, "off"))
def test_switch_accepts_a_bool_only(enabled, bad):
    with pytest.raises(TypeError, match=r"convkit\.set_winograd: enabled: got .*; accepts True and False"):
        convkit.set_winograd(bad)
    assert convkit.winograd_enabled()


def with_variable(value: str | None) -> subprocess.CompletedProcess:
    environment = {name: text for name, text in os.environ.items() if name != "CONVKIT_WINOGRAD"}
    environment |= {} if value is None else {"CONVKIT_WINOGRAD": value}
    code = "import convkit; print(convkit.winograd_enabled())"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("value", "answer"), ((None, "True"), ("", "True"), ("1", "True"), ("0", "False")))
def test_variable(value, answer: str):
    done = with_variable(value)
    assert done.stdout.strip() == answer, done.stderr


def test_variable_with_another_value():
    done = with_variable("maybe")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "CONVKIT_WINOGRAD: got 'maybe'; accepts 0" in last, done.stderr


# ---- NaN and infinity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_bad_pixel_spoils_its_tiles_and_no_others(everywhere, bad: float, layout: str):
    """Every output that it reaches in PyTorch is no longer finite, and those of tiles that don't see it are right."""
    sample = conv_sample(parse("n2c20h12w12k18r3s3p1", layout))
    right = sample()
    sample.tensors["input"][1, 3, 5, 6] = bad
    y = sample()
    assert not y[1, :, 4:7, 5:8].isfinite().any()
    # Outputs 4 to 7 by 4 to 7 are a tile, made of the pixels 3 to 8 by 3 to 8; its neighbours' end at 4 or begin at 7.
    assert torch.equal(y[0], right[0])
    y[1, :, 4:8, 4:8] = right[1, :, 4:8, 4:8]
    assert torch.equal(y[1], right[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_filter_or_bias_spoils_its_channel_only(everywhere, layout: str):
    sample = conv_sample(parse("n2c20h9w9k18r3s3p1", layout))
    right = sample()
    for name in ("weight", "bias"):
        value = sample.tensors[name].clone(memory_format=torch.preserve_format)
        value[7] = float("nan")
        y = sample(**{name: value})
        assert y[:, 7].isnan().all()
        y[:, 7] = right[:, 7]
        assert torch.equal(y, right), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_gradient_spoils_its_filter_only(everywhere, layout: str):
    sample = conv_sample(parse("n2c20h9w9k18r3s3p1", layout))
    grad = torch.randn_like(sample())
    right = sample.evaluate(CF, grad)["gradient of weight"]
    grad[1, 7, 4, 4] = float("nan")
    weight = sample.evaluate(CF, grad)["gradient of weight"]
    assert weight[7].isnan().all()
    weight[7] = right[7]
    assert torch.equal(weight, right)


def test_relu_lets_nan_through(everywhere):
    sample = conv_sample(parse("n1c4h6w6k5r3s3p1"), activation="relu")
    sample.tensors["bias"][2] = float("nan")
    assert sample()[:, 2].isnan().all()
