"""The operators as torch.library, torch.compile and torch.export see them."""

import pytest
import torch
from kernel_checks import LAYOUTS, Sample, small_samples
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import convkit.functional as CF
from convkit import batching, reference

ops = torch.ops.convkit


class Record(TorchDispatchMode):
    """The convkit operators called inside, with all of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "convkit":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def operator_calls(dtype: str = "f32", layout: str = "nchw") -> dict[str, tuple]:
    """What the small samples come to as calls of operators, forward, backward and backward of backward, by name."""
    calls, seen = {}, set()
    for name, sample in small_samples(dtype, layout).items():
        leaves = {key: t.detach().requires_grad_() for key, t in sample.tensors.items()}
        with Record() as record:
            y = sample(CF, **leaves)
            grads = torch.autograd.grad((y**2).sum(), list(leaves.values()), create_graph=True)
            torch.autograd.grad(sum((g**2).sum() for g in grads), list(leaves.values()), allow_unused=True)
        for i, (function, args) in enumerate(record.calls):
            kind = str([tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in (function, *args)])
            if kind in seen:
                continue
            seen.add(kind)
            calls[f"{name} {i} {function._schema.name.split('::')[1]}"] = function, args
    return calls


CALLS = operator_calls()
FAKE = FakeTensorMode()


def is_part_of(name: str, operator: str) -> bool:
    return name.split(" ")[-1] == operator


def test_every_operator_is_covered():
    declared = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "convkit::" in name
    }
    assert {name.split(" ")[-1] for name in CALLS} == declared


def detached(args, requires_grad: bool):
    def one(t):
        if not isinstance(t, torch.Tensor):
            return t
        return t.detach().clone().requires_grad_(requires_grad and t.is_floating_point())

    return tuple(one(t) for t in args)


# One call of each operator through the whole opcheck, which compiles it, forward and backward, with dynamic shapes.
FIRST = {name.split(" ")[-1]: name for name in reversed(CALLS)}
MORE = (
    "conv2d relu 0 conv2d",
    "conv2d epilogue 0 conv2d",
    "conv2d one-sided 0 conv2d",
    "batch_norm_relu training residual 0 batch_norm_relu",
)


@pytest.mark.parametrize("name", [*FIRST.values(), *MORE])
def test_opcheck(name: str):
    function, args = CALLS[name]
    mutates = function._schema.is_mutable
    torch.library.opcheck(function, detached(args, requires_grad=not mutates))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_without_compiling(name: str):
    function, args = CALLS[name]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(function, detached(args, requires_grad=False), test_utils=tests)


def outputs(result) -> list[torch.Tensor]:
    return [t for t in (result if isinstance(result, tuple | list) else [result]) if t is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_kernels_know_shape_and_strides(layout: str):
    for name, (function, args) in CALLS.items():
        if not function._schema.is_mutable:
            arrange = LAYOUTS[layout]
            check_fake(name, function, [arrange(t.detach()) if is_images(t) else t for t in args])


def is_floating(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_images(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_fake_kernels_know_dtypes(dtype: torch.dtype):
    """Parameters and statistics of batch norm stay float32."""
    for name, (function, args) in CALLS.items():
        if not function._schema.is_mutable:
            lower = is_images if "batch_norm" in name else is_floating
            check_fake(name, function, [t.detach().to(dtype) if lower(t) else t for t in args])


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_fake_kernels_in_float64(layout: str):
    for name, (function, args) in operator_calls("f64", layout).items():
        if not function._schema.is_mutable:
            check_fake(name, function, detached(args, requires_grad=False))


def check_fake(name: str, function, args) -> None:
    if is_part_of(name, "batch_norm_relu_grad") and args[6] is not None:
        # The mask is in memory order: only the layout that it was made for fits.
        if not args[1].is_contiguous() or not args[1].stride() == args[0].stride():
            return
    real = outputs(function(*args))
    with FAKE as mode:
        faked = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args]
        fake = outputs(function(*faked))
    assert len(fake) == len(real)
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device), name


def test_meta_tensors():
    x, w = torch.randn(2, 4, 9, 8, device="meta"), torch.randn(6, 4, 3, 3, device="meta")
    y = CF.conv2d(x, w, padding=((0, 1), (2, 3)), stride=2)
    assert y.device.type == "meta" and y.shape == (2, 6, 4, 6)


COMPILED = (
    "conv2d relu",
    "conv2d epilogue",
    "conv2d same",
    "conv2d unbatched",
    "conv_transpose2d output_padding",
    "separable_conv2d",
    "batch_norm_relu training residual",
    "batch_norm_relu eval",
    "max_pool2d relu",
    "max_pool2d ceil_mode",
    "im2col",
    "col2im",
)


def run(call, sample: Sample, create_graph: bool = False) -> list[torch.Tensor]:
    """Output, gradients, buffers of `call(tensors, buffers)`."""
    tensors = {key: t.detach().clone().requires_grad_() for key, t in sample.tensors.items()}
    buffers = {key: t.clone() for key, t in sample.buffers.items()}
    y = call(tensors, buffers)
    grads = torch.autograd.grad((y**2).sum(), list(tensors.values()))
    return [y.detach(), *grads, *buffers.values()]


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("name", COMPILED)
def test_compile(name: str, layout: str):
    """fullgraph, dynamic shapes: the numbers and strides of eager mode, for two batch sizes out of one compilation."""
    sample = small_samples("f32", layout)[name]

    def call(tensors, buffers):
        return getattr(CF, sample.op)(**tensors, **buffers, **sample.options)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    batched = [key for key in ("input", "residual") if key in sample.tensors and "unbatched" not in name]
    bigger = {key: torch.cat([sample.tensors[key]] * 2) for key in batched}
    for one in (sample, Sample(sample.op, sample.tensors | bigger, sample.options, sample.buffers)):
        for ours, right in zip(run(compiled, one), run(call, one), strict=True):
            assert torch.equal(ours, right)
            assert ours.stride() == right.stride()


def test_compile_with_inductor():
    """A block of a network, through the default backend, which also plans layouts of its own."""
    torch._dynamo.reset()
    x = torch.randn(2, 4, 8, 8)
    w, p = torch.randn(4, 1, 3, 3, requires_grad=True), torch.randn(4, 4, 1, 1, requires_grad=True)

    def block(x, w, p, mean, var):
        y = CF.conv2d(x, w, padding=1, groups=4)
        y = CF.batch_norm_relu(CF.conv2d(y, p), mean, var, training=True, residual=x)
        return y.mean((2, 3)).square().sum()

    def run(function):
        mean, var = torch.zeros(4), torch.ones(4)
        loss = function(x, w, p, mean, var)
        return [loss.detach(), *torch.autograd.grad(loss, (w, p)), mean, var]

    for ours, right in zip(run(torch.compile(block, fullgraph=True)), run(block), strict=True):
        torch.testing.assert_close(ours, right)


class Module(torch.nn.Module):
    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self.sample = sample
        for key, t in sample.buffers.items():
            self.register_buffer(key, t.clone())

    def forward(self, tensors):
        return getattr(CF, self.sample.op)(**tensors, **dict(self.named_buffers()), **self.sample.options)


@pytest.mark.parametrize("name", COMPILED)
def test_export(name: str):
    sample = small_samples("f32")[name]
    tensors = {key: t.detach() for key, t in sample.tensors.items()}
    program = torch.export.export(Module(sample), (tensors,))
    assert any("convkit" in str(node.target) for node in program.graph.nodes)
    exported, eager = program.module(), Module(sample)
    assert torch.equal(exported(tensors), eager(tensors))
    for key, value in eager.named_buffers():
        assert torch.equal(dict(exported.named_buffers())[key], value), key


def test_export_with_a_dynamic_batch():
    module = torch.nn.Module()
    weight = torch.randn(6, 4, 3, 3)
    module.forward = lambda x: CF.conv2d(x, weight, padding=1, activation="relu")
    program = torch.export.export(
        module, (torch.randn(2, 4, 8, 8),), dynamic_shapes=({0: torch.export.Dim("n", max=64)},)
    )
    x = torch.randn(5, 4, 8, 8)
    assert torch.equal(program.module()(x), module(x))


def transformed(sample: Sample, module):
    """The sum of squares of the sample's output, as a function of its tensors."""
    names = list(sample.tensors)

    def loss(*values):
        buffers = {key: t.clone() for key, t in sample.buffers.items()}
        tensors = dict(zip(names, values, strict=True))
        return getattr(module, sample.op)(**tensors, **buffers, **sample.options).square().sum()

    return loss, tuple(t.detach() for t in sample.tensors.values())


@pytest.mark.parametrize("name", COMPILED)
def test_torch_func_grad(name: str):
    sample = small_samples("f64")[name]
    (ours, tensors), (theirs, _) = transformed(sample, CF), transformed(sample, reference)
    every = tuple(range(len(tensors)))

    def second(loss):
        return lambda *values: sum(g.square().sum() for g in torch.func.grad(loss, every)(*values))

    for a, b in ((ours, theirs), (second(ours), second(theirs))):
        torch.testing.assert_close(torch.func.grad(a, every)(*tensors), torch.func.grad(b, every)(*tensors))


def mapped(sample: Sample, names: tuple[str, ...], module, derivatives: int) -> tuple[torch.Tensor, ...]:
    """Three calls in one, by torch.func.vmap over some tensors: of the operator, or its first or second gradient.

    The second tensors are twice the first, and the third are one less. Calls also return their running statistics.
    """

    def call(*values):
        # Running statistics are of each if the input is.
        zero = values[0].detach().sum() * 0 if "input" in names and sample.options.get("training") else 0
        buffers = {key: t + zero for key, t in sample.buffers.items()}
        tensors = dict(zip(sample.tensors, values, strict=True))
        return getattr(module, sample.op)(**tensors, **buffers, **sample.options), *(
            t.detach() for t in buffers.values()
        )

    def gradient(function):
        every = tuple(range(len(sample.tensors)))
        return torch.func.grad(lambda *values: sum(t.square().sum() for t in function(*values)), every)

    function = call
    for _ in range(derivatives):
        function = gradient(function)
    return torch.func.vmap(function, tuple(0 if name in names else None for name in sample.tensors))(
        *(torch.stack((t, 2 * t, t - 1)) if name in names else t for name, t in sample.tensors.items())
    )


@pytest.fixture
def no_vmap_fallback():
    """PyTorch's loop over what is mapped, for operators without a rule, raises."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("how", ("groups", "calls"))
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("name", small_samples("f64"))
def test_vmap(name: str, layout: str, how: str, monkeypatch, no_vmap_fallback):
    monkeypatch.setattr(batching, "LARGE", 0 if how == "calls" else 1 << 24)
    sample = small_samples("f64", layout)[name]
    for names in {*((name,) for name in sample.tensors), tuple(sample.tensors)}:
        for derivatives in range(3):
            ours, theirs = (mapped(sample, names, module, derivatives) for module in (CF, reference))
            torch.testing.assert_close(ours, theirs)


def test_vmap_over_vmap():
    """Over images of their own (any dimension) and filters of their own, in both orders."""
    x, w = torch.randn(4, 2, 3, 3, 6, 5, dtype=torch.float64), torch.randn(6, 4, 3, 3, 3, dtype=torch.float64)

    def nested(module):
        def call(x, w):
            return module.conv2d(x, w, stride=2, padding=1, activation="relu")

        def inner(x, w):
            return torch.func.vmap(call, (1, None))(x, w)

        def outer(x, w):
            return torch.func.vmap(call, (None, 1), 2)(x, w)

        return torch.func.vmap(inner, (0, 1))(x, w), torch.func.vmap(outer, (0, None))(x[:, :, 0], w)

    torch.testing.assert_close(nested(CF), nested(reference))


def test_vmap_of_nothing_is_refused():
    w = torch.randn(4, 3, 3, 3)
    for images, filters in (((0, 2, 3, 6, 6), None), ((0, 2, 3, 6, 6), 0)):
        weight = w if filters is None else w.expand(0, 4, 3, 3, 3)
        with pytest.raises(NotImplementedError, match="got a dimension of size 0 to map"):
            torch.func.vmap(CF.conv2d, (0, filters))(torch.randn(images), weight)


def test_vmap_of_training_with_the_same_running_statistics_for_all_is_refused():
    x, mean, var = torch.randn(3, 2, 4, 5, 5), torch.zeros(4), torch.ones(4)
    with pytest.raises(RuntimeError, match="running_mean: got one tensor for all that vmap maps.*accepts one for each"):
        torch.func.vmap(lambda x: CF.batch_norm_relu(x, mean, var, training=True))(x)
    assert not mean.any() and (var == 1).all()


def test_gradients_of_each_image():
    """torch.func.vmap over torch.func.grad, as for differential privacy."""
    x, w, b = (torch.randn(size, dtype=torch.float64) for size in ((3, 4, 8, 8), (6, 4, 3, 3), (6,)))

    def loss(module):
        def of(weight, bias, image):
            y = module.conv2d(image.unsqueeze(0), weight, bias, padding=1, activation="relu")
            return module.max_pool2d(y, 2).square().sum()

        return of

    ours, theirs = (
        torch.func.vmap(torch.func.grad(loss(module), (0, 1)), (None, None, 0))(w, b, x) for module in (CF, reference)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", COMPILED)
def test_forward_mode_is_refused(name: str):
    """It would be wrong to go on: the tangent would be lost."""
    sample = small_samples("f64")[name]
    loss, tensors = transformed(sample, CF)
    message = f"convkit.{sample.op}: got a tangent; accepts reverse-mode differentiation only"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(loss, tensors, tensors)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        duals = [torch.autograd.forward_ad.make_dual(t, t) for t in tensors]
        loss(*duals)


@pytest.mark.parametrize("op", sorted({sample.op for sample in small_samples("f64").values()}))
def test_compiled_autograd(op: str):
    """A backward pass that is traced as a whole; one trace must not serve other strides, paddings or arguments."""
    torch._dynamo.reset()

    def grads(one: Sample, compiled: bool) -> list[torch.Tensor | None]:
        tensors = {key: t.detach().clone().requires_grad_() for key, t in one.tensors.items()}
        buffers = {key: t.clone() for key, t in one.buffers.items()}
        loss = getattr(CF, one.op)(**tensors, **buffers, **one.options).square().sum()
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", dynamic=False)):
                loss.backward()
        else:
            loss.backward()
        return [t.grad for t in tensors.values()]

    for one in (sample for sample in small_samples("f64").values() if sample.op == op):
        for ours, right in zip(grads(one, True), grads(one, False), strict=True):
            torch.testing.assert_close(ours, right)
