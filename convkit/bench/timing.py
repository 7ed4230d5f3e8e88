"""Times that can be compared: candidates in turns, memory beyond the caches, and who else used the machine.

Candidates take turns, A B A B …, in one process, so that whatever the machine does meanwhile falls on all alike; each
successive call is given memory that none has used for longer than the caches remember (:class:`Arena`); what is
reported is the median and the spread of single calls. See Hoefler and Belli, "Scientific Benchmarking of Parallel
Computing Systems", SC 2015.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import hashlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convkit.bench.results import Failure, Machine, Timing

__all__ = [
    "Arena",
    "Usage",
    "carve",
    "carved_elements",
    "heap_kept",
    "interleave",
    "machine",
    "rotation_bytes",
    "short",
]

# Rotating over twice a cache of hundreds of megabytes, of which a virtual machine owns some unknown share, would leave
# no memory for the problem.
ROTATION_LIMIT = 512 << 20
ALIGNMENT = 256  # bytes


# ---- memory ----------------------------------------------------------------------------------------------------------


def cache_bytes() -> tuple[int | None, int | None]:
    """(all level-2 caches together, one last-level cache) of the CPU in bytes; None where Linux doesn't say."""
    levels: dict[int, dict[str, int]] = {}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level, kind, shared, size = (
                (folder / name).read_text().strip() for name in ("level", "type", "shared_cpu_list", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and (found := re.fullmatch(r"(\d+)([KMG]?)", size)):
            scale = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[found[2]]
            levels.setdefault(int(level), {})[shared] = int(found[1]) * scale
    second = sum(levels[2].values()) if 2 in levels else None
    return second, max(levels[max(levels)].values()) if levels else None


def rotation_bytes(device: str) -> int:
    """Memory over which calls move on, so that none finds its tensors in a cache: twice the last-level cache.

    On a CPU at most 512 MiB of it, and at least twice the level-2 caches.
    """
    if device == "cuda":
        return 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    second, last = cache_bytes()
    return max(2 * (second or 0), min(2 * (last or ROTATION_LIMIT), ROTATION_LIMIT))


class Arena:
    """Normally distributed numbers in one block of memory, from which every call is given the next stretch.

    One block for all problems of a dtype: filling new tensors for each would take longer than measuring.
    """

    def __init__(self, dtype: torch.dtype, device: str, size: int) -> None:
        """``size``: bytes to move on over; 0 gives every call the same stretch."""
        self.size = size
        self.dtype = dtype
        self.device = device
        self._block = torch.empty(0, dtype=dtype, device=device)

    def stretches(self, elements: int, at_most: int = 512) -> list[Tensor]:
        """1-D tensors of ``elements`` each, beside one another: as many as fill the arena, at least one.

        Later calls may overwrite nothing: treat them as constants. They are aligned to 256 bytes.
        """
        dtype = self.dtype
        step = -(-elements * dtype.itemsize // ALIGNMENT) * ALIGNMENT // dtype.itemsize
        count = max(1, min(at_most, self.size // (step * dtype.itemsize)))
        if self._block.numel() < count * step:
            wanted = max(count * step, self.size // dtype.itemsize)
            self._block = self._block.new_empty(0)  # its memory is needed
            self._block = torch.empty(wanted, dtype=dtype, device=self.device)
            # The generator's own speed would make this take seconds: a few millions, over and over.
            pattern = torch.randn(min(wanted, (4 << 20) + 37), device=self.device).to(dtype)
            for start in range(0, wanted, pattern.numel()):
                part = self._block[start : start + pattern.numel()]
                part.copy_(pattern[: part.numel()])
        return [self._block[i * step : i * step + elements] for i in range(count)]


def carve(stretch: Tensor, shapes: Sequence[Sequence[int]], channels_last: bool) -> list[Tensor]:
    """(N, C, H, W) tensors of these shapes and one layout, one after the other in ``stretch``: no copies."""
    tensors, start = [], 0
    for n, c, h, w in shapes:
        part = stretch[start : start + n * c * h * w]
        tensors.append(part.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else part.view(n, c, h, w))
        start += -(-part.numel() * part.itemsize // ALIGNMENT) * ALIGNMENT // part.itemsize
    return tensors


def carved_elements(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
    """The length of the stretch that `carve` needs."""
    step = ALIGNMENT // dtype.itemsize
    return sum(-(-n * c * h * w // step) * step for n, c, h, w in shapes)


# ---- taking turns ----------------------------------------------------------------------------------------------------


def interleave(
    candidates: Mapping[str, Callable[[], object] | Sequence[Callable[[], object]]],
    *,
    device: str = "cpu",
    budget_s: float = 0.3,
    min_rounds: int = 5,
    max_rounds: int = 1000,
) -> dict[str, Timing | Failure]:
    """Seconds of single calls of each candidate, taken in turns after two calls of each to warm up.

    Args:
        candidates: by name, a function without arguments, or a list of them, of which successive calls take the next
            one (they do the same on other memory).
        device: ``"cpu"`` times with the host's clock; ``"cuda"`` with events on the current stream, the host far
            enough ahead that its own time does not count.
        budget_s: seconds of calls after which a candidate drops out, once it has had ``min_rounds``.
        max_rounds: at most this many samples of each.

    Returns:
        By name a :class:`Timing`, or a :class:`Failure` with the first line of the exception that a call raised; the
        others go on. What a call returns is kept until its time is taken and freed before the next, which the C library
        then gives the same memory.
    """
    functions = {name: [c] if callable(c) else list(c) for name, c in candidates.items()}
    time_of = _cuda_seconds if device == "cuda" else _cpu_seconds
    samples: dict[str, list[float]] = {name: [] for name in functions}
    found: dict[str, Timing | Failure] = {}
    turn = 0

    def call(name: str) -> float | None:
        nonlocal turn
        turn += 1
        mine = functions[name]
        try:
            return time_of(mine[turn % len(mine)])
        except Exception as error:
            found[name] = Failure(short(error))
            return None

    with _collector_off(), heap_kept():
        for name in functions:
            for _ in range(2):
                if name not in found:
                    call(name)
        active = [name for name in functions if name not in found]
        while active:
            for name in list(active):
                seconds = call(name)
                mine = samples[name]
                if seconds is not None:
                    mine.append(round(max(seconds, 1e-9), 9))
                enough = len(mine) >= max_rounds or (len(mine) >= min_rounds and sum(mine) >= budget_s)
                if seconds is None or enough:
                    active.remove(name)
    return {name: found[name] if name in found else Timing(tuple(samples[name])) for name in functions}


def short(error: BaseException) -> str:
    """What an exception says, in one line of at most 200 characters."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def _cpu_seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - started
    del result  # freed outside of the time
    return seconds


def _cuda_seconds(function: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)  # cycles, about 0.5 ms: the host issues the call while the device waits
    begin.record()
    result = function()
    end.record()
    end.synchronize()
    del result
    return begin.elapsed_time(end) / 1e3


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# Of mallopt(3): parameters, and what they come to by themselves in a program with large tensors.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_USUAL = {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65536}


@contextlib.contextmanager
def heap_kept() -> Iterator[None]:
    """Freed memory stays with the process, where the C library is glibc.

    It would go back to the system now and then, depending on sizes and on what was allocated before, and the next call
    had to fault its output in again, page by page: 0.2 ms a MiB, more than many a kernel takes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        yield
        return
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    mallopt(_MMAP_MAX, 0)
    try:
        yield
    finally:
        for parameter, value in _USUAL.items():
            mallopt(parameter, value)


# ---- the machine -----------------------------------------------------------------------------------------------------


class Usage:
    """Cores kept busy by other programs, and taken away by the host, from its making to :meth:`read`."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float, float] | None:
        """(wall, all programs, stolen, this process) in seconds; None where Linux's /proc/stat is missing."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
            user, nice, system, _, _, irq, softirq, steal = (int(value) for value in fields[:8])
        except (OSError, ValueError):
            return None
        hz = os.sysconf("SC_CLK_TCK")
        own = os.times()
        total = (user + nice + system + irq + softirq) / hz
        return time.perf_counter(), total, steal / hz, own.user + own.system

    def read(self) -> tuple[float | None, float | None]:
        """(others, stolen): cores on average; (None, None) where it cannot be known. A clock tick is 10 ms."""
        end = self._now()
        if self._start is None or end is None or end[0] - self._start[0] < 0.1:
            return None, None
        wall, total, stolen, own = (b - a for a, b in zip(self._start, end, strict=True))
        return round(max(0.0, total - own) / wall, 3), round(stolen / wall, 3)


def machine(device: str = "cpu", *, look_s: float = 0.5) -> Machine:
    """Facts about the machine and the software. Sleeps ``look_s`` seconds to see what other programs do."""
    import convkit
    from convkit import _load
    from convkit.info import cpu_name, git_revision

    usage = Usage()
    time.sleep(look_s)
    others, _ = usage.read()
    second, last = cache_bytes()
    gpu = _gpu() if device == "cuda" else {}
    module = _load.load()
    return Machine(
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        cpu=cpu_name(),
        isa=module.isa(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        l2_bytes=second,
        llc_bytes=last,
        clock_mhz=_clock_mhz(),
        gpu=gpu.get("name"),
        driver=gpu.get("driver_version"),
        gpu_clock_mhz=gpu.get("clocks.sm"),
        memory_clock_mhz=gpu.get("clocks.mem"),
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        convkit=convkit.__version__,
        revision=git_revision(),
        native=hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:12],
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        others=others,
    )


def _clock_mhz() -> float | None:
    """The mean of what the cores say they run at; on a virtual machine that is the nominal clock."""
    try:
        found = re.findall(r"^cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return round(sum(map(float, found)) / len(found)) if found else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts: dict[str, Any] = {"name": f"{properties.name} (sm_{properties.major}{properties.minor})"}
    names = ("driver_version", "clocks.sm", "clocks.mem")
    uuid = f"GPU-{properties.uuid}"
    said = _output("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits")
    if said and len(values := said.split(", ")) == len(names):
        cudnn = torch.backends.cudnn.version()
        facts["driver_version"] = f"{values[0]}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
        for name, value in zip(names[1:], values[1:], strict=True):
            facts[name] = float(value) if value.replace(".", "").isdigit() else None
    return facts
