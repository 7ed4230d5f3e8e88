"""What only a GPU can show: captures, streams, other devices, memory, offsets beyond 2^31 elements, bits that repeat.

That the kernels are right is shown over the whole table of problems by tests/kernels, whose `backend` is "cuda" there.
`make gpu-report` runs all of it, and `test_every_kernel` under compute-sanitizer too.
"""

import emulated
import pytest
import torch
from kernel_checks import (
    Sample,
    batch_norm_sample,
    check_accuracy,
    col2im_sample,
    conv_sample,
    im2col_sample,
    place,
    separable_sample,
    set_device,
    transpose_sample,
)
from test_torch_library import operator_calls

import convkit
import convkit.functional as CF
from convkit import reference
from convkit.bench.problems import DTYPES, BatchNormProblem, ConvProblem

WHY_NOT = emulated.why_no_gpu()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

GPU = torch.device("cuda")
FORMS = [("f32", "nchw"), ("f32", "nhwc"), ("bf16", "nchw"), ("bf16", "nhwc"), ("f16", "nhwc"), ("f64", "nhwc")]


@pytest.fixture(autouse=True)
def _in_float32():
    set_device(GPU)
    with emulated.full_float32():
        yield
    set_device(torch.device("cpu"))


def conv(text: str, dtype: str, layout: str) -> ConvProblem:
    return ConvProblem.parse(text).replace(dtype=dtype, layout=layout)


def norm(text: str, dtype: str, layout: str) -> BatchNormProblem:
    return BatchNormProblem.parse(text).replace(dtype=dtype, layout=layout)


# A call for each kernel, and for the paths through it.
KERNELS = {
    **{
        f"depthwise {r}x{r} stride {u}": lambda g, *form, r=r, u=u: conv_sample(
            conv(f"n2c24h17w19k24r{r}s{r}u{u}p{r // 2}g24", *form), g, True, "relu", scale=True, residual=True
        )
        for r in (3, 5, 7)
        for u in (1, 2)
    },
    "depthwise of large planes": lambda g, *form: conv_sample(conv("n1c8h90w88k8r3s3p1g8", *form), g),
    "depthwise generic": lambda g, *form: conv_sample(
        conv("n2c10h11w10k20r3s2u3x2p1d2g10", *form), g, scale=True, residual=True
    ),
    "dense 3x3": lambda g, *form: conv_sample(
        conv("n2c64h9w10k72r3s3p1", *form), g, True, "relu", scale=True, residual=True
    ),
    "dense 3x3 stride 2": lambda g, *form: conv_sample(conv("n2c32h12w12k64r3s3u2p1", *form), g),
    "dense 1x1": lambda g, *form: conv_sample(conv("n3c64h7w7k128r1s1", *form), g, residual=True),
    "dense of three channels": lambda g, *form: conv_sample(conv("n2c3h20w20k32r7s7u2p3", *form), g),
    "dense of one channel": lambda g, *form: conv_sample(conv("n2c1h12w12k20r5s5", *form), g),
    "dense grouped": lambda g, *form: conv_sample(conv("n2c64h6w6k64r3s3p1g4", *form), g),
    "dense of odd sizes": lambda g, *form: conv_sample(
        conv("n2c17h7w6k19r3s3p1d2", *form), g, True, "relu", scale=True, residual=True
    ),
    "dense transposed": lambda g, *form: transpose_sample(conv("n2c32h8w8k32r3s3u2p1", *form), g),
    "separable": lambda g, *form: separable_sample(conv("n2c24h9w9k24r3s3p1g24", *form), 40, g),
    "batch norm": lambda g, *form: batch_norm_sample(norm("n4c64h14w14", *form), g),
    "batch norm with a residual": lambda g, *form: batch_norm_sample(norm("n4c40h7w7+res", *form), g),
    "batch norm of odd sizes": lambda g, *form: batch_norm_sample(norm("n3c17h5w5+res", *form), g),
    "batch norm too large for the chip": lambda g, *form: batch_norm_sample(norm("n9c8h112w113", *form), g),
    "batch norm of large odd planes": lambda g, *form: batch_norm_sample(norm("n9c8h113w113+res", *form), g),
    "batch norm of planes in images": lambda g, *form: batch_norm_sample(norm("n5c16h7w7+res", *form), g),
    "batch norm in evaluation": lambda g, *form: batch_norm_sample(norm("n4c64h8w8+res", *form), g, training=False),
    "im2col": lambda g, *form: im2col_sample(conv("n2c5h9w8k1r3s3p1", *form), g),
    "col2im": lambda g, *form: col2im_sample(conv("n2c5h9w8k1r3s3p1", *form), g),
}
kernels = pytest.mark.parametrize("name", KERNELS)
forms = pytest.mark.parametrize(("dtype", "layout"), FORMS, ids=["-".join(form) for form in FORMS])


def draw(name: str, dtype: str, layout: str, seed: int = 0) -> tuple[Sample, torch.Tensor]:
    """A sample, and a gradient of its output."""
    generator = torch.Generator().manual_seed(seed)
    sample = KERNELS[name](generator, dtype, layout)
    y = sample(reference)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return sample, grad.contiguous(memory_format=torch.channels_last) if layout == "nhwc" and y.dim() == 4 else grad


@forms
@kernels
def test_every_kernel(name: str, dtype: str, layout: str):
    check_accuracy(lambda g: KERNELS[name](g, dtype, layout))


@forms
@kernels
def test_the_same_bits_again(name: str, dtype: str, layout: str):
    sample, grad = draw(name, dtype, layout)
    sample, grad = sample.map(place), place(grad)
    first = sample.evaluate(CF, grad)
    for key, value in sample.evaluate(CF, grad).items():
        assert torch.equal(value, first[key]), key


def test_the_same_bits_again_where_sums_are_long():
    for text in ("n64c64h28w28k64r3s3p1g64", "n16c64h28w28k64r3s3p1", "n64c32h14w14k32r1s1"):
        for layout in ("nchw", "nhwc"):
            x, w, _, grad = conv(text, "bf16", layout).tensors(device="cuda")
            problem = conv(text, "bf16", layout)
            geometry = problem.stride, problem.padding, problem.dilation, problem.groups, layout == "nhwc"
            kernel = problem.k, problem.r, problem.s
            results = [torch.ops.convkit.conv2d_weight_grad(grad, x, kernel, *geometry) for _ in range(3)]
            assert all(torch.equal(results[0], other) for other in results), text
    x, _, w, b, grad = norm("n64c64h56w56", "bf16", "nhwc").tensors(device="cuda")
    results = [torch.ops.convkit.batch_norm_relu(x, None, w, b, None, None, 1e-5, False) for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@forms
@kernels
def test_captured_in_a_graph_and_replayed(name: str, dtype: str, layout: str):
    """Forward and backward, then with other numbers in the same memory."""
    (sample, grad), other = (draw(name, dtype, layout, seed) for seed in range(2))
    static, static_grad = sample.map(place), place(grad)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        static.evaluate(CF, static_grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = static.evaluate(CF, static_grad)
    for values, upstream in (other, (sample, grad)):
        for key, t in [*static.tensors.items(), *static.buffers.items()]:
            t.copy_((values.tensors | values.buffers)[key])
        static_grad.copy_(upstream)
        for value in captured.values():
            if value.is_floating_point():
                value.fill_(float("nan"))  # nothing of the last run may pass for this one's
        graph.replay()
        torch.cuda.synchronize()
        eager = values.map(place).evaluate(CF, place(upstream))
        for key, value in eager.items():
            assert torch.equal(captured[key], value), key


@kernels
def test_runs_on_the_current_stream(name: str):
    """Its input is written late, on that stream: any other would read what was there before."""
    sample, grad = draw(name, "f32", "nhwc")
    sources, late, grad = sample.map(place), sample.map(place), place(grad)
    expected = sources.evaluate(CF, grad)
    for t in late.tensors.values():
        t.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        for key, t in late.tensors.items():
            t.copy_(sources.tensors[key])
        found = late.evaluate(CF, grad)
    stream.synchronize()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@kernels
def test_runs_on_the_device_of_its_tensors(name: str):
    sample, grad = draw(name, "f32", "nchw")
    with torch.cuda.device(0):
        found = sample.map(lambda t: t.to("cuda:1")).evaluate(CF, grad.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    for key, value in sample.map(place).evaluate(CF, place(grad)).items():
        assert found[key].device == torch.device("cuda:1"), key
        torch.testing.assert_close(found[key].cpu(), value.cpu(), msg=key)


def test_tensors_of_two_devices():
    x, w, b = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3), torch.randn(6)
    calls = {
        "weight: got a tensor on cpu; accepts the device of the input, cuda:0": lambda: CF.conv2d(x.to(GPU), w),
        "weight: got a tensor on cuda:0; accepts the device of the input, cpu": lambda: CF.conv2d(x, w.to(GPU)),
        "bias: got a tensor on cpu": lambda: CF.conv2d(x.to(GPU), w.to(GPU), b),
        "residual: got a tensor on cpu": lambda: CF.batch_norm_relu(x.to(GPU), None, None, training=True, residual=x),
        "mean: got a tensor on cpu": lambda: CF.batch_norm_relu(x.to(GPU), torch.zeros(4), torch.ones(4)),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("name", [name for name in operator_calls("f32", "nhwc")])
def test_opcheck(name: str):
    function, args = operator_calls_on_gpu()[name]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(function, args, test_utils=tests)


_calls: dict[str, tuple] = {}


def operator_calls_on_gpu() -> dict[str, tuple]:
    if not _calls:
        for name, (function, args) in operator_calls("f32", "nhwc").items():
            moved = tuple(place(a.detach()) if isinstance(a, torch.Tensor) else a for a in args)
            _calls[name] = function, moved
    return _calls


def test_compile_with_inductor():
    """Inductor plans the layouts and reuses the memory of a block's tensors."""
    torch._dynamo.reset()
    x = torch.randn(4, 8, 8, 8, device=GPU)
    w, p = (torch.randn(8, c, r, r, device=GPU, requires_grad=True) for c, r in ((1, 3), (8, 1)))

    def block(x, w, p, mean, var):
        y = CF.conv2d(x, w, padding=1, groups=8)
        y = CF.batch_norm_relu(CF.conv2d(y, p), mean, var, training=True, residual=x)
        return y.mean((2, 3)).square().sum()

    def run(function):
        mean, var = torch.zeros(8, device=GPU), torch.ones(8, device=GPU)
        loss = function(x, w, p, mean, var)
        return [loss.detach(), *torch.autograd.grad(loss, (w, p)), mean, var]

    for ours, right in zip(run(torch.compile(block, fullgraph=True)), run(block), strict=True):
        torch.testing.assert_close(ours, right)


def test_explain_names_the_kernels_of_a_model():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).to(GPU)
    found = convkit.explain(model, torch.randn(4, 8, 16, 16, device=GPU), budget_s=0.01)
    assert [list(row.plans) for row in found.measured] == [["fprop", "wgrad"], ["forward", "backward"]]
    assert "multiprocessors" in str(found) and found.machine.gpu


def test_autocast():
    x, w = torch.randn(2, 8, 6, 6, device=GPU), torch.randn(8, 8, 3, 3, device=GPU, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = CF.conv2d(x, w, padding=1)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32


def test_no_memory_is_left_behind():
    def work():
        for name in KERNELS:
            sample, grad = draw(name, "bf16", "nhwc")
            sample.map(place).evaluate(CF, place(grad))

    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        work()
    assert torch.cuda.memory_allocated() == before


def test_workspace_is_on_the_stream_that_uses_it():
    """Two streams at once, each with sums that need a workspace: neither may be given the other's too early."""
    problem = conv("n32c64h28w28k64r3s3p1g64", "bf16", "nhwc")
    x, _, _, grad = problem.tensors(device="cuda")
    geometry = problem.stride, problem.padding, problem.dilation, problem.groups, True
    right = torch.ops.convkit.conv2d_weight_grad(grad, x, (64, 3, 3), *geometry)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 2]):
            results.append(torch.ops.convkit.conv2d_weight_grad(grad, x, (64, 3, 3), *geometry))
    torch.cuda.synchronize()
    assert all(torch.equal(result, right) for result in results)


# ---- more than 2^31 elements ---------------------------------------------------------------------------------------

NEEDED = 40 << 30
FREE = torch.cuda.mem_get_info()[0] if WHY_NOT is None else 0
big = pytest.mark.skipif(FREE < NEEDED, reason=f"needs {NEEDED >> 30} GiB of free GPU memory, there are {FREE >> 30}")
IMAGES = 33  # of 2^26 elements: 2^31 and one image more


@pytest.fixture
def freed():
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def many(c: int, h: int, w: int, layout: str, dtype: str = "f16") -> torch.Tensor:
    """Images of 2^26 elements, made one after the other so that nothing larger than the tensor is needed."""
    x = torch.empty(IMAGES, c, h, w, dtype=DTYPES[dtype], device=GPU)
    x = x.to(memory_format=torch.channels_last) if layout == "nhwc" else x
    generator = torch.Generator(GPU).manual_seed(0)
    for image in x:
        image.copy_(torch.randn(c, h, w, device=GPU, generator=generator))
    return x


@big
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize(
    ("groups", "r"), ((64, 3), (1, 1), (1, 3), (64, 4)), ids=("depthwise", "1x1", "3x3", "generic depthwise")
)
def test_convolution_beyond_2_31_elements(freed, groups: int, r: int, layout: str):
    x = many(64, 1024, 1024, layout)
    w = torch.randn(64, 64 // groups, r, r, device=GPU, dtype=x.dtype) / 8
    pad = (r // 2,) * 4 if r % 2 else (1, 2, 1, 2)
    geometry = (1, 1), pad, (1, 1), groups
    y = torch.ops.convkit.conv2d(x, w, None, *geometry, None)
    for image in (0, IMAGES - 1):
        one = torch.ops.convkit.conv2d(x[image : image + 1], w, None, *geometry, None)
        torch.testing.assert_close(y[image : image + 1], one, rtol=1e-2, atol=1e-2)
    del one
    gx = torch.ops.convkit.conv2d_input_grad(y, w, (1024, 1024), *geometry, layout == "nhwc")
    one = torch.ops.convkit.conv2d_input_grad(y[-1:], w, (1024, 1024), *geometry, layout == "nhwc")
    torch.testing.assert_close(gx[-1:], one, rtol=1e-2, atol=1e-2)
    del gx, one
    y.div_(1024)  # or sums of 2^25 products leave float16
    whole = torch.ops.convkit.conv2d_weight_grad(y, x, (64, r, r), *geometry, layout == "nhwc").double()
    parts = sum(
        torch.ops.convkit.conv2d_weight_grad(
            y[i : i + 11], x[i : i + 11], (64, r, r), *geometry, layout == "nhwc"
        ).double()
        for i in range(0, IMAGES, 11)
    )
    torch.testing.assert_close(whole, parts, rtol=2e-2, atol=2e-2 * parts.abs().max().item())


@big
@pytest.mark.parametrize(("c", "h", "w"), ((64, 1024, 1024), (4096, 127, 129)), ids=("whole vectors", "odd planes"))
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_batch_norm_beyond_2_31_elements(freed, layout: str, c: int, h: int, w: int):
    x = many(c, h, w, layout)
    x[-1] += 1  # the last image counts
    mean = sum(image.double().sum((1, 2)) for image in x) / (IMAGES * h * w)
    y, batch_mean, batch_var, _ = torch.ops.convkit.batch_norm_relu(x, None, None, None, None, None, 1e-5, False)
    torch.testing.assert_close(batch_mean.double(), mean, rtol=1e-4, atol=1e-5)
    scale = (batch_var + 1e-5).rsqrt().view(-1, 1, 1)
    for image in (0, IMAGES - 1):
        right = ((x[image].float() - batch_mean.view(-1, 1, 1)) * scale).relu()
        torch.testing.assert_close(y[image].float(), right, rtol=1e-2, atol=1e-2)
    gx, _, _, gb = torch.ops.convkit.batch_norm_relu_grad(
        y, x, None, torch.zeros(c, device=GPU), batch_mean, batch_var, None, 1e-5, True, [True, False, False, True]
    )
    sums = sum(image.double().sum((1, 2)) for image in y)
    torch.testing.assert_close(gb.double(), sums, rtol=1e-3, atol=1.0)
    assert gx[-1].isfinite().all() and gx[-1].abs().max() > 0


@big
def test_im2col_beyond_2_31_elements(freed):
    x = torch.randn(4, 64, 1024, 1024, device=GPU, dtype=torch.float16)
    columns = CF.im2col(x, 3, padding=1)
    assert columns.numel() > 2**31
    assert torch.equal(columns[-1:], CF.im2col(x[-1:], 3, padding=1))
    back = CF.col2im(columns, (1024, 1024), 3, padding=1)
    torch.testing.assert_close(back[-1:], CF.col2im(columns[-1:], (1024, 1024), 3, padding=1))
