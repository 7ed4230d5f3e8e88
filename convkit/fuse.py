"""One module's forward, rewritten so that batch norm, sum and ReLU are one operator, and max pool and ReLU another.

The forward is recorded with torch.fx (Reed et al., "torch.fx", 2021), its children staying calls by name, the record
is rewritten, and the generated function runs in place of the forward while what was recorded still holds
(:meth:`Fusion.holds`). In evaluation without gradients, a convolution that feeds the batch norm joins them. A record
shows only operators. What else a forward may do, and a record would lose or freeze (branches on the mode, random
numbers, stored attributes, ``with`` blocks), is looked for, and such a forward is left.
"""

import copy
import enum
import functools
import inspect
import itertools
import linecache
import math
import operator
import pickle
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

import convkit.functional as CF
import convkit.nn as cnn
from convkit.ops import compute_dtype, out_size

__all__ = ["FUSION", "ORIGINAL", "Fusion", "Pooling", "Site", "fuse", "fused_class", "mentions_pool"]

# What a swap leaves on an instance: the class it had, and, on the owner of fused layers, a Fusion.
ORIGINAL = "_convkit_original"
FUSION = "_convkit_fusion"


def _writer(name: str) -> Callable[[Any, Any], Any]:
    """operator.iadd and the like, as a function that generated code calls: it would write ``x += y``, which gives the
    name x, too, another value where x is a number."""

    def write(x: Any, y: Any) -> Any:
        return getattr(operator, name)(x, y)

    write.__name__ = name
    return write


_WRITERS = {name: _writer(name) for name in "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor".split()}
_RELUS = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_"}
_RELUS_IN_PLACE = {torch.relu_, nn.functional.relu_, "relu_"}
_POOLS = {torch.max_pool2d, nn.functional.max_pool2d}
_SUMS = {torch.add, operator.add, _WRITERS["iadd"], "add", "add_"}
_SUMS_IN_PLACE = {_WRITERS["iadd"], "add_"}
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Site:
    """One place of a forward where a batch norm, perhaps a sum, and a ReLU follow each other; names of submodules."""

    norm: str
    relu: str | None  # None: a function
    residual: bool


@dataclass(frozen=True)
class Pooling:
    """One place of a forward where a max pool and a ReLU follow each other, or a function pools; submodules' names."""

    pool: str | None  # None: a function
    relu: str | None  # None: a function, or none at all


@dataclass(frozen=True)
class Fusion:
    """A rewritten forward and what it rests on. Bound to no module, so that copies of a module can share it."""

    parameters: tuple[str, ...]  # those of the forward without a default; it was recorded with exactly these
    sites: tuple[Site, ...]
    children: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]  # plain attributes of the module, which recording has turned to constants
    run: Callable[..., Any] | None  # run(module, *parameters); None in a pickle, which cannot hold generated code
    poolings: tuple[Pooling, ...] = ()

    def holds(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether ``run`` does what the original forward would do now, with these arguments."""
        return (
            self.run is not None
            and len(args) + len(kwargs) == len(self.parameters)
            and all(name in self.parameters[len(args) :] for name in kwargs)
            # None is not what was recorded, and a forward that is being recorded by others should look as it was.
            and not any(value is None or isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
            and _children(module) == self.children
            and all(_same(getattr(module, name, Fusion), value) for name, value in self.constants)
            and not _listened_to()
            and all(
                _is_plain(_submodule(module, site.norm), nn.BatchNorm2d)
                and (site.relu is None or _is_plain(_submodule(module, site.relu), nn.ReLU))
                for site in self.sites
            )
            and all(
                (site.pool is None or _is_plain_pool(_submodule(module, site.pool)))
                and (site.relu is None or _is_plain(_submodule(module, site.relu), nn.ReLU))
                for site in self.poolings
            )
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Fusion":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Fusion, (self.parameters, self.sites, self.children, self.constants, None, self.poolings)


@functools.cache
def fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class that runs the module's Fusion while it holds."""

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fusion = self.__dict__.get(FUSION)  # absent in what the class makes of itself: a slice of an nn.Sequential
        if fusion is not None and fusion.holds(self, args, kwargs):
            return fusion.run(self, *args, **kwargs)
        return original.forward(self, *args, **kwargs)

    def extra_repr(self: nn.Module) -> str:
        fusion = vars(self).get(FUSION)
        norms, pools = (fusion.sites, fusion.poolings) if fusion else ((), ())
        sites = [(site.norm, "residual" * site.residual, site.relu or "relu") for site in norms]
        sites += [(site.pool or "max_pool2d", site.relu) for site in pools]
        fused = ", ".join(" + ".join(filter(None, site)) for site in sites)
        return ", ".join(filter(None, (original.extra_repr(self), fused and f"fused: {fused}")))

    def reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        # Made by a function, the class could not be found by name; the original one can, wherever it could before.
        _, _, *state = object.__reduce_ex__(self, max(int(protocol), 2))
        return _revive, (original,), *state

    def setstate(self: nn.Module, state: dict[str, Any]) -> None:
        original.__setstate__(self, state)
        fusion = vars(self).get(FUSION)
        if fusion is not None and fusion.run is None:
            norms = {_submodule(self, site.norm) for site in fusion.sites} - {None}
            pools = {_submodule(self, site.pool) for site in fusion.poolings if site.pool} - {None}
            functions = any(site.pool is None for site in fusion.poolings)
            vars(self)[FUSION] = fuse(self, norms, "its forward", pools, functions)[0] or fusion

    body = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce_ex,
        "__setstate__": setstate,
        "extra_repr": extra_repr,
        "forward": forward,
    }
    return types.new_class(f"Fused{original.__name__}", (original,), exec_body=lambda space: space.update(body))


def _revive(original: type[nn.Module]) -> nn.Module:
    return object.__new__(fused_class(original))


def _batch_norm_relu(norm: nn.BatchNorm2d, input: Tensor) -> Tensor:
    return cnn.BatchNormReLU2d.forward(norm, input)


def _batch_norm_add_relu(norm: nn.BatchNorm2d, input: Tensor, residual: Tensor, in_place: bool) -> Tensor:
    if _is_like(residual, input, input.shape):
        return cnn.BatchNormReLU2d.forward(norm, input, residual)
    # A sum that broadcasts or promotes can only be met at run time. It is PyTorch's to do, as before.
    output = norm(input)
    return torch.relu(output.add_(residual) if in_place else output + residual)


def _conv_batch_norm_relu(conv: nn.Conv2d, norm: nn.BatchNorm2d, input: Tensor) -> Tensor:
    if _joins(conv, norm, input):
        return _joined(conv, norm, input, None)
    return _batch_norm_relu(norm, conv(input))


def _conv_batch_norm_add_relu(
    conv: nn.Conv2d, norm: nn.BatchNorm2d, input: Tensor, residual: Tensor, in_place: bool
) -> Tensor:
    if _joins(conv, norm, input, residual) and _is_like(residual, input, _output_shape(conv, input)):
        return _joined(conv, norm, input, residual)
    return _batch_norm_add_relu(norm, conv(input), residual, in_place)


_FUSED = {_batch_norm_relu, _batch_norm_add_relu, _conv_batch_norm_relu, _conv_batch_norm_add_relu}


def _is_like(residual: Any, input: Tensor, shape: tuple[int, ...]) -> bool:
    alike = isinstance(residual, Tensor) and residual.shape == shape
    return alike and residual.dtype == input.dtype and residual.device == input.device


def _output_shape(conv: nn.Conv2d, input: Tensor) -> tuple[int, ...]:
    if conv.padding_mode == "zeros":
        padding = CF._four_sided(conv.padding, conv.kernel_size, conv.stride, conv.dilation, "conv2d")
    else:
        left, right, *height = conv._reversed_padding_repeated_twice
        padding = *height, left, right
    size = out_size(input.shape[2:], padding, conv.kernel_size, conv.stride, conv.dilation)
    return input.shape[0], conv.out_channels, *size


def _joins(conv: nn.Conv2d, norm: nn.BatchNorm2d, input: Tensor, residual: Any = None) -> bool:
    """Whether convolution and batch norm are one affine map now, and what the two would refuse is not there.

    Gradients need what is between them, autocast gives it a dtype, hooks want to see it.
    """
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    if type(conv) is not cnn.Conv2d or conv.activation is not None or cnn.hooked(conv):
        return False
    if "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__:
        return False
    if not isinstance(input, Tensor) or input.dim() != 4 or input.device.type not in ("cpu", "cuda"):
        return False
    if torch.is_autocast_enabled(input.device.type):
        return False
    tensors = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    channels = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled():
        tensors = [input, residual, conv.weight, conv.bias, *channels]
        if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
            return False
    dtypes, shape = (input.dtype, compute_dtype(input)), conv.weight.shape[:1]
    fit = (t.dtype in dtypes and t.shape == shape and t.device == input.device for t in channels)
    return all(fit) and 0 <= norm.eps < math.inf


def _joined(conv: nn.Conv2d, norm: nn.BatchNorm2d, input: Tensor, residual: Tensor | None) -> Tensor:
    wide = compute_dtype(input)
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    centre = norm.running_mean.to(wide)
    if conv.bias is not None:
        centre = centre - conv.bias
    bias = -centre * scale if norm.bias is None else torch.addcmul(norm.bias.to(wide), centre, scale, value=-1)
    input, padding = conv._padded(input)
    return CF.conv2d(
        *(input, conv.weight, bias, conv.stride, padding, conv.dilation, conv.groups),
        activation="relu",
        scale=scale,
        residual=residual,
    )


def _max_pool_relu(pool: nn.MaxPool2d, input: Tensor) -> Tensor:
    return cnn.max_pool(input, "relu", *cnn.pool_geometry(pool))


def _children(module: nn.Module) -> tuple[str, ...]:
    """Names of the submodules that a forward may call or iterate over: the children, and what lists of them hold."""
    names: list[str] = []
    for name, child in module._modules.items():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            names += [f"{name}.{inner}" for inner in _children(child)]
        elif child is not None:
            names.append(name)
    return tuple(names)


def _submodule(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def _is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    return type(module) is kind and not cnn.hooked(module) and "forward" not in module.__dict__


def _is_plain_pool(module: nn.Module | None) -> bool:
    return (_is_plain(module, nn.MaxPool2d) or _is_plain(module, cnn.MaxPool2d)) and not module.return_indices


def mentions_pool(kind: type[nn.Module]) -> bool:
    """Whether some method of a module's class calls something named max_pool2d."""
    methods = (vars(base).values() for base in kind.__mro__ if base is not nn.Module)
    codes = (method.__code__ for method in itertools.chain(*methods) if isinstance(method, types.FunctionType))
    return any("max_pool2d" in code.co_names for code in codes)


def _listened_to() -> bool:
    """Whether there are hooks on all modules of the process: they get every single call."""
    return bool(nn.modules.module._has_any_global_hook())


def _is_constant(value: Any) -> bool:
    """Whether a forward may have been decided by this value, and a change of it can be told by comparing."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_constant, value))
    if isinstance(value, dict):
        return all(map(_is_constant, value)) and all(map(_is_constant, value.values()))
    plain = (int, float, str, type(None), enum.Enum, type, torch.dtype, torch.device, torch.memory_format)
    return isinstance(value, (*plain, types.FunctionType, types.BuiltinFunctionType))


def _same(value: Any, constant: Any) -> bool:
    return type(value) is type(constant) and bool(value == constant)


# ---------------------------------------------------------------- making it


def fuse(
    module: nn.Module,
    norms: set[nn.Module],
    called: str,
    pools: Iterable[nn.Module] = (),
    functions: bool = False,
) -> tuple[Fusion | None, dict[nn.Module, str]]:
    """The fused forward of a module, or None, and why batch norms of ``norms`` were not fused in it.

    ``pools``: the max pools that may take a ReLU with them. ``functions``: replace functions that pool, too.
    """
    kind = vars(module).get(ORIGINAL, type(module))
    if kind.forward is nn.Module.forward:  # nn.ModuleList and the like: never called
        return None, {}
    try:
        parameters = _required_parameters(module, kind)
        graph, other = (_record(module, parameters, everything) for everything in (True, False))
        if graph.python_code("self").src != other.python_code("self").src:
            raise _Unrecordable("it is not the same in training and in evaluation, or with and without gradients")
        sites, left = _rewrite(graph, module, norms, called)
        poolings = _rewrite_pools(graph, module, set(pools), functions)
        if sites or poolings:
            fused_class(kind)  # made here, as a class may refuse to have subclasses
    except Exception as error:  # the forward is anybody's code, run on stand-ins for tensors: anything may come
        why = str(error).strip().partition("\n")[0] if isinstance(error, _Unrecordable) else _shortened(error)
        return None, {norm: f"{called} cannot be recorded: {why}" for norm in module.modules() if norm in norms}
    if not (sites or poolings):
        return None, left
    ignored = {*vars(nn.Module()), ORIGINAL, FUSION, "_compiled_call_impl"}
    constants = [(k, copy.deepcopy(v)) for k, v in vars(module).items() if k not in ignored and _is_constant(v)]
    run = _compiled(graph, kind)
    return Fusion(parameters, tuple(sites), _children(module), tuple(constants), run, tuple(poolings)), left


def _shortened(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".partition("\n")[0]
    return text if len(text) <= 120 else text[:117] + "..."


def _required_parameters(module: nn.Module, kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the parameters of a module's forward that a call must give; raises where a rewrite could not be kept."""
    if isinstance(module, torch.jit.ScriptModule):
        raise _Unrecordable("it is TorchScript")
    if "forward" in vars(module):
        raise _Unrecordable("it was replaced on the instance")
    if hasattr(module, "parametrizations"):
        raise _Unrecordable("the module is parametrized")
    for name in ("__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__", "__getnewargs__", "__getnewargs_ex__"):
        if getattr(kind, name, None) is not getattr(object, name, None):
            raise _Unrecordable(f"{kind.__name__} is copied or pickled in its own way ({name})")
    _, *parameters = inspect.signature(kind.forward).parameters.values()
    for parameter in parameters:
        if parameter.kind == parameter.VAR_POSITIONAL:
            raise _Unrecordable(f"it takes any number of arguments (*{parameter.name})")
        if parameter.kind == parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise _Unrecordable(f"{parameter.name} must be given by name")
    return tuple(p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD)


def _compiled(graph: fx.Graph, kind: type[nn.Module]) -> Callable[..., Any]:
    code = graph.python_code("self")
    name = f"<convkit fused forward of {kind.__qualname__}, {next(_numbers)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(True), name)  # so that tracebacks show it
    space = dict(code.globals)
    exec(compile(code.src, name, "exec"), space)
    return space["forward"]


# ---------------------------------------------------------------- recording a forward


class _Unrecordable(Exception):
    """Something in a forward that a record of it would lose."""


class _Value(fx.Proxy):
    """A value in a forward that is being recorded; stricter than torch.fx where that would record something else.

    Nothing is known about it, so a question for its type is an error: ``isinstance(x, Tensor)`` would be False, and the
    branch for something else would be recorded. ``x += y`` is recorded as that, not as ``x = x + y``.
    """

    @property
    def __class__(self) -> type:
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") == "abc":
            frame = frame.f_back
        asking = frame.f_globals.get("__name__", "")
        if asking == "torch" or not asking.startswith("torch."):
            raise _Unrecordable("it asks for the type of a value")
        return type(self)

    def __getattr__(self, name: str) -> fx.Proxy:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):  # those of fx itself
            raise _Unrecordable(f"it sets .{name} of a value")
        super().__setattr__(name, value)


class _Attribute(_Value, fx.proxy.Attribute):
    """``x.shape`` of a _Value x: a value too."""


def _recorded(write: Callable[[Any, Any], Any]) -> Callable[[_Value, Any], fx.Proxy]:
    return lambda value, other: value.tracer.create_proxy("call_function", write, (value, other), {})


for _name, _write in _WRITERS.items():
    setattr(_Value, f"__{_name}__", _recorded(_write))


class _Tracer(fx.Tracer):
    """Records the forward of one module, everything below it staying a call by name."""

    def __init__(self, parameters: tuple[str, ...]) -> None:
        super().__init__()
        self.forward_parameters = parameters
        self.context = _context()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_args_for_root(self, root_fn: Callable[..., Any], *_: Any, **__: Any) -> tuple[Any, list[Any]]:
        # Parameters with a default keep it: fx would make them values, of which "is None" is always False.
        values = [self.create_proxy("placeholder", name, (), {}) for name in self.forward_parameters]
        return root_fn, [self.root, *values]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            raise _Unrecordable("it switches gradients, autocast or saved-tensor hooks (checkpoint) inside")
        return super().create_node(*args, **kwargs)


class _NoWrites(TorchDispatchMode):
    """What a forward does to tensors that it was not given is not recorded but done: a step counted in a buffer would
    count the recordings, and stand still in the rewritten forward."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.is_mutable:
            raise _Unrecordable("it writes to a tensor that it was not given")
        return function(*args, **(kwargs or {}))


def _context() -> tuple[Any, ...]:
    """What a ``with`` may change around an operator and a record of the operators does not show."""
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, hooks


def _record(module: nn.Module, parameters: tuple[str, ...], everything: bool) -> fx.Graph:
    """The graph of a module's forward, with training, gradients and autocast all on or all off."""
    kind = vars(module).get(ORIGINAL, type(module))
    # A stand-in that shares all that is in the module: a forward that stores something stores it there.
    shadow = object.__new__(kind)
    for name, value in vars(module).items():
        vars(shadow)[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    vars(shadow)["training"] = everything
    before, luck = _identities(shadow), random_states()
    enabled = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    try:
        for device in ("cpu", "cuda"):
            torch.set_autocast_enabled(device, everything)
        with torch.set_grad_enabled(everything), _NoWrites():
            graph = _Tracer(parameters).trace(shadow)
    finally:
        for device, was in zip(("cpu", "cuda"), enabled, strict=True):
            torch.set_autocast_enabled(device, was)
        lucky = random_states() != luck
        if lucky:
            set_random_states(luck)
    if lucky:
        raise _Unrecordable("it draws random numbers")
    if any(name.startswith("_tensor_constant") for name in vars(shadow)):
        raise _Unrecordable("it makes tensors of its own, which a record would freeze")
    if _identities(shadow) != before:
        raise _Unrecordable("it changes attributes of the module")
    return graph


def _identities(module: nn.Module) -> dict[str, Any]:
    def content(value: Any) -> Any:
        kind = type(value)  # not isinstance, as a _Value may have been stored
        if issubclass(kind, dict):
            return [id(item) for item in (*value, *value.values())]
        return [id(item) for item in value] if issubclass(kind, (list, set)) else id(value)

    return {name: content(value) for name, value in vars(module).items()}


def random_states() -> bytes:
    """The states of the generators of Python, PyTorch (CPU) and, where it is loaded, NumPy."""
    numpy = sys.modules.get("numpy")
    return pickle.dumps(
        (random.getstate(), bytes(torch.get_rng_state().tolist()), None if numpy is None else numpy.random.get_state())
    )


def set_random_states(states: bytes) -> None:
    python, torch_bytes, numpy = pickle.loads(states)
    random.setstate(python)
    torch.set_rng_state(torch.frombuffer(bytearray(torch_bytes), dtype=torch.uint8))
    if numpy is not None:
        sys.modules["numpy"].random.set_state(numpy)


# ---------------------------------------------------------------- rewriting the record


def _rewrite(
    graph: fx.Graph, module: nn.Module, norms: set[nn.Module], called: str
) -> tuple[list[Site], dict[nn.Module, str]]:
    """Replace each batch norm, sum and ReLU by one call where that changes nothing; also why it was not done."""
    sites: list[Site] = []
    left: dict[nn.Module, str] = {}
    for node in list(graph.nodes):
        norm = module.get_submodule(node.target) if node.op == "call_module" else None
        if norm in norms:
            found = _find(node, module)
            if isinstance(found, str):
                left.setdefault(norm, f"{found} in {called}")
            else:
                sites.append(_replace(graph, module, node, *found))
    return sites, left


def _find(norm: fx.Node, module: nn.Module) -> str | tuple[fx.Node | None, fx.Node]:
    """The sum (or None) and the ReLU that follow a batch norm, or why they cannot be taken with it."""
    if len(norm.all_input_nodes) != 1 or len(norm.args) + len(norm.kwargs) != 1:
        return "it is called with more than its input"
    if len(norm.users) != 1:
        return f"its output is used {len(norm.users)} times"
    (relu,) = norm.users
    total = None
    if relu.op in ("call_function", "call_method") and relu.target in _SUMS:
        total = relu
        if len(total.all_input_nodes) != 2 or not {"input", "other"}.issuperset(total.kwargs):
            return "it goes into a sum that is not one of two tensors"
        (residual,) = (node for node in total.all_input_nodes if node is not norm)
        if total.target in _SUMS_IN_PLACE and total.args[0] is not norm:
            return "it is added in place to another tensor"
        if len(total.users) != 1:
            return f"the sum after it is used {len(total.users)} times"
        (relu,) = total.users
        if total.next is not relu:
            return "something else happens between the sum and the ReLU"
    if relu.op == "output":
        return f"{'the sum after it' if total else 'its output'} is returned before a ReLU"
    if relu.target in _FUSED:
        return "it is added to a batch norm that is fused"
    if not _is_relu(relu, module):
        what = relu.target if isinstance(relu.target, str) else getattr(relu.target, "__name__", str(relu.target))
        kind = f" ({type(module.get_submodule(what)).__name__})" if relu.op == "call_module" else ""
        if kind == " (ReLU)":
            return f"the ReLU after it, {what}, has hooks or a forward of its own"
        return f"followed by {what}{kind} and not by a ReLU"
    # The batch norm moves to where the ReLU is: nothing between may touch its running statistics, or write to its
    # input, under whichever name. What a convolution returned and only the batch norm took has no other name.
    between = [node for node in _between(norm, relu) if node is not total]
    if any(_contains(node, module, module.get_submodule(norm.target)) for node in between):
        return "it is called again before the ReLU"
    (source,) = norm.all_input_nodes
    if between and not (len(source.users) == 1 and _is_convolution(source, module)):
        return "something else happens before the ReLU, and its input may change by that"
    return total, relu


def _is_relu(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return _is_plain(module.get_submodule(node.target), nn.ReLU)
    return node.op in ("call_function", "call_method") and node.target in _RELUS and len(node.all_input_nodes) == 1


def _between(start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    while (start := start.next) is not end:
        yield start


def _is_convolution(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(_submodule(module, node.target), _ConvNd)
    return node.op == "call_function" and node.target in (nn.functional.conv2d, nn.functional.conv_transpose2d)


def _contains(node: fx.Node, module: nn.Module, layer: nn.Module) -> bool:
    """Whether the node calls a submodule that is or has ``layer``, or gets ``layer`` for a fused call."""
    if node.op not in ("call_module", "get_attr"):
        return False
    child = _submodule(module, node.target)
    return child is not None and any(inner is layer for inner in child.modules())


def _source_convolution(norm: fx.Node, relu: fx.Node, module: nn.Module) -> fx.Node | None:
    """The convolution that nothing but the batch norm takes, if it can move with it to where the ReLU is."""
    (conv,) = norm.all_input_nodes
    layer = _submodule(module, conv.target) if conv.op == "call_module" else None
    if not isinstance(layer, nn.Conv2d) or len(conv.users) != 1 or len(conv.args) + len(conv.kwargs) != 1:
        return None
    if len(conv.all_input_nodes) != 1:
        return None
    # Others may change the layer, or its input: not what a fused operator returned and only the convolution took.
    others = [node for node in _between(conv, relu) if node not in (norm, *norm.users)]
    (source,) = conv.all_input_nodes
    if others and not (source.target in _FUSED and len(source.users) == 1):
        return None
    return None if any(_contains(node, module, layer) for node in others) else conv


def _replace(graph: fx.Graph, module: nn.Module, norm: fx.Node, total: fx.Node | None, relu: fx.Node) -> Site:
    conv = _source_convolution(norm, relu, module)
    with graph.inserting_before(relu):
        layers = [graph.create_node("get_attr", node.target) for node in (conv, norm) if node is not None]
        args = (*layers, *(conv or norm).all_input_nodes)
        if total is None:
            fused = graph.call_function(_conv_batch_norm_relu if conv else _batch_norm_relu, args)
        else:
            (residual,) = (node for node in total.all_input_nodes if node is not norm)
            args = (*args, residual, total.target in _SUMS_IN_PLACE)
            fused = graph.call_function(_conv_batch_norm_add_relu if conv else _batch_norm_add_relu, args)
    relu.replace_all_uses_with(fused)
    for node in (relu, total, norm, conv):
        if node is not None:
            graph.erase_node(node)
    return Site(norm.target, relu.target if relu.op == "call_module" else None, total is not None)


def _rewrite_pools(graph: fx.Graph, module: nn.Module, pools: set[nn.Module], functions: bool) -> list[Pooling]:
    """Replace each max pool with a ReLU next to it, and each function that pools, where that changes nothing."""
    found: list[Pooling] = []
    for node in list(graph.nodes):
        if node.op == "call_module":
            pool = module.get_submodule(node.target)
            if pool not in pools or not _is_plain_pool(pool) or len(node.args) != 1 or node.kwargs:
                continue
            function = None
        elif functions and (function := _as_pool_function(node)):
            pool = None
        else:
            continue
        before, after = _relu_before(node, module), _relu_after(node, module)
        relu = before or after
        if pool is not None and relu is None:
            continue  # the module alone does it
        source = before.all_input_nodes[0] if before else node.all_input_nodes[0]
        with graph.inserting_before(node):
            if pool is not None:
                fused = graph.call_function(_max_pool_relu, (graph.create_node("get_attr", node.target), source))
            else:
                fused = graph.call_function(cnn.max_pool, (source, "relu" if relu else None), function)
        (after or node).replace_all_uses_with(fused)
        for old in (after, node, before):
            if old is not None:
                graph.erase_node(old)
        name = relu.target if relu is not None and relu.op == "call_module" else None
        found.append(Pooling(node.target if pool is not None else None, name))
        if before and after:
            found.append(Pooling(found[-1].pool, after.target if after.op == "call_module" else None))
    return found


def _as_pool_function(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a max pool called as a function, by name and without its input; None if it is something else."""
    if node.op != "call_function" or node.target not in _POOLS:
        return None
    names = ["input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"]
    arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
    values = [value for name, value in arguments.items() if name != "input"]
    if len(node.all_input_nodes) != 1 or arguments.pop("return_indices", False) or not all(map(_is_constant, values)):
        return None
    return {name: value for name, value in arguments.items() if name != "input"}


def _relu_before(pool: fx.Node, module: nn.Module) -> fx.Node | None:
    """The ReLU whose output only this pool sees, and nothing but the ReLU's input is left to see."""
    (relu,) = pool.all_input_nodes
    if not _is_relu(relu, module) or len(relu.users) != 1:
        return None
    (source,) = relu.all_input_nodes
    # The ReLU moves to where the pool is: nothing between may write to its input. And one in place changes its input:
    # who else could see that? What a convolution returned and only the ReLU took has no other name.
    in_place = _is_in_place(relu, module)
    if len(source.users) == 1 and _is_convolution(source, module):
        seen = source.op == "call_module" and cnn.hooked(module.get_submodule(source.target))
        return None if in_place and seen else relu
    return relu if relu.next is pool and not in_place else None


def _relu_after(pool: fx.Node, module: nn.Module) -> fx.Node | None:
    (user,) = pool.users if len(pool.users) == 1 else (None,)
    return user if user is not None and _is_relu(user, module) else None


def _is_in_place(relu: fx.Node, module: nn.Module) -> bool:
    if relu.op == "call_module":
        return module.get_submodule(relu.target).inplace
    return relu.target in _RELUS_IN_PLACE or relu.kwargs.get("inplace", False) or len(relu.args) > 1
