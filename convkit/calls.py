"""What the layers of a model are called with: one forward pass, watched, of which the model keeps nothing.

Used by :func:`convkit.explain` and :func:`convkit.swap`. The work that a layer does is decided by the shapes, dtypes
and layouts that reach it, and by which gradients will be asked of it; neither is written in the model.
"""

import contextlib
import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from convkit import fuse
from convkit.ops import is_channels_last

__all__ = ["Call", "record", "same_luck", "untouched"]


@dataclass(frozen=True)
class Call:
    """What decides the work of one call of a layer: of its first argument, and of what is asked for later."""

    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: torch.dtype
    """In which the layer computes: the input's, or that of the autocast region it was called in."""
    channels_last: bool
    device: torch.device
    input_grad: bool
    parameter_grads: bool
    tensors: int
    """Arguments that were tensors: two where convkit.nn.BatchNormReLU2d adds a residual."""


def record(model: nn.Module, layers: Iterable[nn.Module], example_input: Any) -> dict[nn.Module, list[Call]]:
    """Calls the model once and returns the calls of each layer, in their order; [] for a layer that was not called.

    In training mode gradients are enabled, otherwise not. Afterwards model and input are as they were.

    Args:
        model: not swapped.
        layers: of the model; called with a tensor as first argument, in an image format.
        example_input: a tensor; a tuple of positional arguments; or a dict of keyword arguments. What the forward
            takes as one tuple or dict is given inside a tuple: ``({"image": x},)``.

    Raises:
        TypeError: example_input is none of these. ValueError: a layer is not initialized yet.
        What the model raises, with a note of the input's shapes.
    """
    arguments, keywords = _arguments(example_input)
    if any(map(nn.parameter.is_lazy, model.parameters())):
        raise ValueError("model has layers that are not initialized yet (lazy): call it once, then try again")
    calls: dict[nn.Module, list[Call]] = {layer: [] for layer in layers}

    def listen(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if values and isinstance(output, Tensor):
            calls[layer].append(_call(layer, values, output))

    with untouched(model), torch.inference_mode(False), torch.set_grad_enabled(model.training), _eager():
        handles = [layer.register_forward_hook(listen, prepend=True, with_kwargs=True) for layer in calls]
        try:
            # Copies: a forward may work in place.
            args, kwargs = _pytree.tree_map_only(Tensor, Tensor.clone, (arguments, keywords))
            model(*args, **kwargs)
        except Exception as error:
            error.add_note(f"(convkit called the model with {_described((arguments, keywords))})")
            raise
        finally:
            for handle in handles:
                handle.remove()
    return calls


def _call(layer: nn.Module, values: list[Tensor], output: Tensor) -> Call:
    input, dtype = values[0], values[0].dtype
    device = input.device.type
    takes_any = isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.MaxPool2d))
    autocast = not takes_any and torch.is_autocast_enabled(device)
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    gradients = torch.is_grad_enabled()
    return Call(
        tuple(input.shape),
        tuple(output.shape),
        dtype,
        input.dim() == 4 and is_channels_last(input),
        input.device,
        gradients and input.requires_grad,
        gradients and any(parameter.requires_grad for parameter in layer.parameters()),
        len(values),
    )


def _arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping) and all(isinstance(name, str) for name in example_input):
        return (), dict(example_input)
    raise TypeError(
        "example_input must be a tensor, a tuple of the forward's positional arguments or a dict of its keyword "
        f"arguments, but got {type(example_input).__name__}; wrap what the forward takes as one argument in a tuple"
    )


def _described(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    tensors = [leaf for leaf in _pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    shapes = ", ".join(f"{'x'.join(map(str, t.shape)) or 'scalar'} {str(t.dtype)[6:]} on {t.device}" for t in tensors)
    return f"an input of {shapes}" if tensors else "an input without tensors"


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Compiled parts run as they were written: hooks that came later would not be called in them."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def same_luck() -> Iterator[None]:
    """Random states are afterwards what they were before."""
    luck = fuse.random_states()
    cuda_luck = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        fuse.set_random_states(luck)
        if cuda_luck:
            torch.cuda.set_rng_state_all(cuda_luck)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever the model's forward does to it within, and to the random states, is undone afterwards.

    Attributes of all modules, contents of dicts, lists and sets among them, hooks, flags, parameters, buffers and
    gradients are the same objects as before, with the same values.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    contents = [
        (value, copy.copy(value))
        for _, values in attributes
        for value in values.values()
        if isinstance(value, (dict, list, set))
    ]
    tensors = [(tensor.data, tensor.detach().clone()) for tensor in _tensors(model)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with same_luck():
            yield
    finally:
        for module, values in attributes:
            now = vars(module)
            for name in [name for name in now if name not in values]:
                del now[name]
            now.update(values)
        for container, content in contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        # By way of .data: version counters count what happened since, and here nothing did.
        for tensor, value in tensors:
            if not torch.equal(tensor, value):
                tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _tensors(model: nn.Module) -> list[Tensor]:
    every = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    # Tensors of inference mode cannot be written to outside of it.
    return [tensor for tensor in every.values() if not (nn.parameter.is_lazy(tensor) or tensor.is_inference())]
