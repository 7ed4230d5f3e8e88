"""Whole networks: training steps and inference, with convkit's kernels swapped in and without.

A network is a function without arguments, known by ``module:function``, that returns a module taking images and
giving one tensor. It is imported when it is measured, so that the kernels need nothing of what it needs.
"""

from __future__ import annotations

import copy
import ctypes
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import convkit
from convkit.bench import BenchError
from convkit.bench.problems import LAYOUTS
from convkit.bench.results import OWN, Failure
from convkit.bench.suites import Net
from convkit.bench.timing import Arena, carve, carved_elements, short

__all__ = ["NET_PEERS", "build", "factory", "peak_bytes", "prepare"]

NET_PEERS = ("torch", "compile")

# So small that a network never learns its batches by heart: the gradients of one that has are denormal numbers, with
# which a CPU counts ten times slower, whatever the kernels.
LEARNING_RATE = 1e-6


def factory(text: str) -> Callable[[], nn.Module]:
    """The function called ``module:function``, from the current folder too. BenchError if there is none."""
    module, _, name = text.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module of the user's may raise anything
        raise BenchError(f"network {text}: cannot be imported: {short(error)}") from None
    if not callable(found):
        raise BenchError(f"network {text}: is no function but {type(found).__name__}")
    return found


def build(net: Net, device: str) -> dict[str, nn.Module]:
    """The network as ``torch`` and as ``convkit``, with the same parameters."""
    make = factory(net.factory)
    try:
        two_forms = "backend" in inspect.signature(make).parameters
    except ValueError:
        two_forms = False
    torch.manual_seed(0)
    original = (make(backend="torch") if two_forms else make()).to(device)
    if two_forms:  # the lab's: they say themselves how they are best built on convkit
        own = make(backend=OWN).to(device)
        own.load_state_dict(original.state_dict())
    else:
        own = copy.deepcopy(original)
        convkit.swap(own)
    return {"torch": original, OWN: own}


def prepare(
    net: Net, pass_: str, dtype: str, keys: Sequence[str], arena: Arena
) -> tuple[dict[str, list[Callable] | Failure], dict[str, float], int]:
    """Everybody's steps, their errors (of inference) and the floating-point operations of one.

    Parameters are float32 (float64 for that), 16-bit types come by autocast. A training step is zero_grad, forward,
    cross-entropy, backward and SGD; where the output is not (N, classes), the mean of its squares is the loss.
    """
    device = arena.device
    networks = build(net, device)
    wide = torch.float64 if dtype == "f64" else torch.float32
    autocast = {"bf16": torch.bfloat16, "f16": torch.float16}.get(dtype)
    stretches = arena.stretches(carved_elements([net.shape], wide), at_most=16)
    labels = torch.randint(1 << 30, (net.shape[0],), generator=torch.Generator().manual_seed(0)).to(device)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer | None, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(optimizer is not None):
            with torch.autocast(device, autocast, enabled=autocast is not None):
                output = model(images)
                if not isinstance(output, Tensor):
                    raise TypeError(f"the network returned {type(output).__name__}; accepts one tensor")
                if optimizer is None:
                    return output
                classify = output.dim() == 2
                loss = F.cross_entropy(output, labels % output.shape[1]) if classify else output.square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return loss

    steps: dict[str, list[Callable] | Failure] = {}
    errors: dict[str, float] = {}
    flops = 0
    for key in keys:
        who, _, layout = key.partition("/")
        try:
            model = copy.deepcopy(networks[OWN if who == OWN else "torch"]).to(wide)
            model = model.to(memory_format=LAYOUTS[layout]).train(pass_ == "training")
            optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE) if pass_ == "training" else None
            batches = [carve(stretch, [net.shape], layout == "nhwc")[0] for stretch in stretches]
            if who == "torch" and not flops:
                flops = count_flops(partial(step, model, optimizer, batches[0]))
            if who == "compile":
                torch._dynamo.reset()
                model = torch.compile(model, dynamic=False)
            if pass_ == "inference":
                errors[key] = _error(model, networks["torch"], partial(step, model, None), batches[0])
            steps[key] = [partial(step, model, optimizer, images) for images in batches]
        except Exception as error:
            steps[key] = Failure(short(error))
    return steps, errors, flops


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of PyTorch's convolutions and matrix products in a step."""
    backward = {torch.ops.aten.convolution_backward: _backward_flops}
    with FlopCounterMode(display=False, custom_mapping=backward) as counter:
        step()
    return counter.get_total_flops()


def _backward_flops(
    grad: Sequence[int],
    input: Sequence[int],
    weight: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: Sequence[bool],
    out_shape: Any = None,
) -> int:
    """As many a gradient as the convolution itself has. The counter's own formula takes grouped ones for dense."""
    return 2 * math.prod(input if transposed else grad) * math.prod(weight[1:]) * sum(wanted[:2])


def _error(model: nn.Module, original: nn.Module, step: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """The largest difference from float64 of the output for four images, as a share of its largest value."""
    images = images[:4]
    with torch.no_grad():
        expected = copy.deepcopy(original).double().eval()(images.double())
    result = step(images).double()
    if not bool(result.isfinite().all()):
        raise ArithmeticError("the output has values that are not finite")
    return float((result - expected).abs().max() / expected.abs().max())


def peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """The most memory that a step takes on top of what was taken before it; None where that cannot be known.

    On a GPU what PyTorch's allocator gave out; on a CPU what the process occupied, the kernels' own memory included.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Freed memory that the C library keeps would be taken again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: proc(5)
        before = _resident("VmRSS")
    except (OSError, AttributeError, KeyError):  # not Linux, not glibc
        return None
    step()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    """VmRSS, the memory that the process occupies, or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) << 10
