"""What the machine can do at best, measured: the two ceilings under which every kernel works.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures",
Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F

import convkit.functional as CF
from convkit.bench.peers import precision
from convkit.bench.problems import DTYPES
from convkit.bench.results import Ceilings, Timing
from convkit.bench.timing import Arena, cache_bytes, interleave

__all__ = ["ceilings"]

# Edge of the matrices, and images of 28 x 28 pixels for two convolutions: channels in and out, and the filter's edge.
# None is 2 x 2 to 5 x 5, where Winograd's method, which leaves out products, would show more than the machine has.
MATRIX = {"cpu": (1536, 8), "cuda": (8192, 256)}
CONVOLUTIONS = ((512, 1), (128, 7))
# MiB. On a GPU much more than its cache, which would keep what a smaller copy writes.
COPIES = {"cpu": (4, 16, 64), "cuda": (256,)}


def torch_dtype(dtype: str) -> torch.dtype:
    """That of a dtype's name in the results; tf32 is float32 with other products."""
    return DTYPES["f32" if dtype == "tf32" else dtype]


def ceilings(device: str, dtypes: Sequence[str], arena: Arena, *, budget_s: float = 0.2) -> Ceilings:
    """Measures the rate of copies from ``arena``'s memory and from cache, and of matrix products in each dtype.

    A dtype in which nothing could be multiplied is missing from the rates.
    """
    budget = {"device": device, "budget_s": budget_s}
    from_memory = _best(_copies(arena), **budget)
    second, _ = cache_bytes()
    from_cache = _best(_copies_in_cache(second), **budget) if device == "cpu" and second else None
    rates = {}
    for dtype in dtypes:
        with precision(dtype):
            rate = _best(_products(device, torch_dtype(dtype)), **budget)
        if rate is not None:
            rates[dtype] = rate
    return Ceilings(from_memory, from_cache, rates)


def _best(work: Mapping[str, tuple[float, Callable | list[Callable]]], **budget) -> float | None:
    """The highest rate, amount over time, among (amount, call) by name.

    The time is the first decile: a bound is what the machine does undisturbed, and the fastest call of all may be an
    error of the clock.
    """
    found = interleave({name: call for name, (_, call) in work.items()}, **budget)
    samples = {name: sorted(timing.samples) for name, timing in found.items() if isinstance(timing, Timing)}
    return max((work[name][0] / times[len(times) // 10] for name, times in samples.items()), default=None)


def _copies(arena: Arena) -> dict[str, tuple[float, list[Callable]]]:
    """Copies as an operator makes them, of the next stretch of memory into what the allocator gives; and into memory
    of its own."""
    work = {}
    for megabytes in COPIES[arena.device]:
        stretches = arena.stretches((megabytes << 20) // arena.dtype.itemsize)
        amount = 2 * (megabytes << 20)
        work[f"clone {megabytes}"] = amount, [stretch.clone for stretch in stretches]
        own = torch.empty_like(stretches[0])
        work[f"copy {megabytes}"] = amount, [partial(own.copy_, stretch) for stretch in stretches]
    return work


def _copies_in_cache(second: int) -> dict[str, tuple[float, Callable]]:
    """Copies between two tensors that a half, a quarter, an eighth of the level-2 caches can hold."""
    work = {}
    for share in (2, 4, 8):
        source, target = (torch.randn(second // share // 2 // 4) for _ in range(2))
        work[f"1/{share}"] = 2.0 * source.nbytes, partial(target.copy_, source)
    return work


def _products(device: str, dtype: torch.dtype) -> dict[str, tuple[float, Callable]]:
    edge, images = MATRIX[device]
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    work = {"torch.mm": (2.0 * edge**3, partial(torch.mm, a, b))}
    for channels, filter in CONVOLUTIONS:
        x = torch.randn(images, channels, 28, 28, device=device).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, filter, filter, device=device)
        weight = weight.to(dtype, memory_format=torch.channels_last)
        flops = 2.0 * images * 28 * 28 * channels**2 * filter**2
        for who, function in (("torch", F.conv2d), ("convkit", CF.conv2d)):
            work[f"{who} {channels} {filter}"] = flops, partial(function, x, weight, None, 1, filter // 2)
    return work
