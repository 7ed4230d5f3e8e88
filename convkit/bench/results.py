"""What a run of the benchmarks measured: the JSON file, and the ratios, floors and means read off it.

The file is one object; all times are in seconds, and keys of times are ``who/layout``::

    {"schema": 1,
     "machine": {"date", "cpu", "isa", "cores", "threads", "l2_bytes", "llc_bytes", "clock_mhz", "gpu", "driver",
                 "gpu_clock_mhz", "memory_clock_mhz", "system", "python", "torch", "convkit", "revision", "native",
                 "load_average", "others"},
     "settings": {"device", "threads", "layouts", "peers", "in_cache", "budget_s", "min_rounds",
                  "rotation_bytes"},
     "ceilings": {"copy_bytes_per_s", "copy_in_cache_bytes_per_s", "flops_per_s": {"f32": …}},
     "rows": [{"suite", "family", "name", "problem", "pass", "dtype", "flops", "bytes", "floor_s", "images",
               "errors": {"convkit/nhwc": 3e-7, …},
               "memory": {"convkit/nhwc": 1048576, …},
               "times": {"convkit/nhwc": {"samples": […], "median", "iqr"}, "compile/nhwc": {"failed": "message"}, …},
               "sets", "others", "steal"}, …]}

A row is one pass of one problem in one dtype, with everyone in every layout: its problem's text form has no layout.
``images`` and ``memory`` are those of whole networks. What could not be found out is null.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convkit.bench import BenchError

__all__ = ["Ceilings", "Failure", "Machine", "Results", "Row", "Settings", "Summary", "Timing", "geometric_mean"]

SCHEMA = 1
OWN = "convkit"


@dataclass(frozen=True)
class Timing:
    """Seconds of single calls, in the order in which they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def iqr(self) -> float:
        """The spread: third quartile minus first; 0 of a single sample."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    @property
    def jumps(self) -> float:
        """Share of samples that took half as long again as the median, and more: something else ran in between."""
        return sum(sample > 1.5 * self.median for sample in self.samples) / len(self.samples)


@dataclass(frozen=True)
class Failure:
    """Why there is no time."""

    message: str


@dataclass(frozen=True)
class Machine:
    """What the times hold for. ``others`` is the number of cores that other programs kept busy just before the run."""

    date: str
    cpu: str
    isa: str
    cores: int
    threads: int
    l2_bytes: int | None
    llc_bytes: int | None
    clock_mhz: float | None
    gpu: str | None
    driver: str | None
    gpu_clock_mhz: float | None
    memory_clock_mhz: float | None
    system: str
    python: str
    torch: str
    convkit: str
    revision: str | None
    native: str
    """The first digits of the SHA-256 of the native module: tells builds of one revision apart."""
    load_average: float | None
    others: float | None

    def differences(self, other: Machine) -> list[str]:
        """Where the two are not the same machine and software, as ``name: this one, other one``."""
        passing = {"date", "clock_mhz", "gpu_clock_mhz", "memory_clock_mhz", "load_average", "others"}
        return _differences(self, other, passing)


@dataclass(frozen=True)
class Settings:
    """How it was measured."""

    device: str
    threads: int
    layouts: tuple[str, ...]
    """Of convkit; every peer is measured in all of its own."""
    peers: tuple[str, ...]
    in_cache: bool
    budget_s: float
    """Seconds of calls for each candidate, and at least ``min_rounds`` calls."""
    min_rounds: int
    rotation_bytes: int
    """The memory over which successive calls move on; 0 if all use the same."""

    def differences(self, other: Settings) -> list[str]:
        return _differences(self, other)


def _differences(one: Any, other: Any, passing: Iterable[str] = ()) -> list[str]:
    names = [f.name for f in dataclasses.fields(one) if f.name not in passing]
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in names]
    return [f"{name}: {a}, {b}" for name, a, b in pairs if a != b]


@dataclass(frozen=True)
class Ceilings:
    """The best that this machine was seen to do, at the start of the run."""

    copy_bytes_per_s: float
    """Of a copy from memory: bytes read and written."""
    copy_in_cache_bytes_per_s: float | None
    flops_per_s: Mapping[str, float]
    """By dtype."""

    def floor(self, flops: int, bytes: int, dtype: str, *, in_cache: bool = False) -> float | None:
        """Seconds in which nothing can be done here that takes so many flops and must move so many bytes."""
        copy = self.copy_in_cache_bytes_per_s if in_cache else self.copy_bytes_per_s
        rate = self.flops_per_s.get(dtype)
        return max(flops / rate, bytes / copy) if rate and copy else None


@dataclass(frozen=True)
class Row:
    """One pass of one problem (or network) in one dtype: everybody's times. ``pass`` in JSON is ``pass_`` here."""

    suite: str
    family: str
    """What the means are taken over: dense, depthwise, batch-norm, nets."""
    name: str
    problem: str
    pass_: str
    """fprop, dgrad, wgrad; forward, backward, evaluation (batch norm); training, inference (networks)."""
    dtype: str
    flops: int | None
    bytes: int | None
    floor_s: float | None
    times: Mapping[str, Timing | Failure]
    errors: Mapping[str, float] = field(default_factory=dict)
    """The largest difference from float64, as a share of the largest value of the float64 result."""
    images: int | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    """Peak bytes that one step takes on top of parameters and batch."""
    sets: int = 1
    """Stretches of memory that the calls moved on over."""
    others: float | None = None
    """Cores that other programs kept busy meanwhile, and ``steal`` those that the host took away; None: unknown."""
    steal: float | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows measurements of the same thing."""
        return self.family, self.name, self.problem, self.pass_, self.dtype

    def seconds(self, who: str) -> float | None:
        """The median of ``convkit/nhwc`` or another key; None if it failed or was not measured."""
        timing = self.times.get(who)
        return timing.median if isinstance(timing, Timing) else None

    @property
    def layouts(self) -> list[str]:
        """Those in which convkit was to be measured."""
        return [key.partition("/")[2] for key in self.times if key.startswith(OWN + "/")]

    def best_peer(self, layout: str | None = None) -> str | None:
        """The key of the fastest that is not convkit, at one layout or at any; None if there is none."""
        peers = [key for key in self.times if not key.startswith(OWN + "/") and self.seconds(key) is not None]
        peers = [key for key in peers if layout is None or key.endswith("/" + layout)]
        return min(peers, key=self.seconds, default=None)

    def ratio(self, layout: str, *, same_layout: bool = False) -> float | None:
        """How many times faster convkit at this layout is than the best peer at any (or the same) layout."""
        peer, own = self.best_peer(layout if same_layout else None), self.seconds(f"{OWN}/{layout}")
        return self.seconds(peer) / own if peer and own else None

    def floor_fraction(self, layout: str) -> float | None:
        """Share of what the machine can do at best that convkit reaches at this layout."""
        own = self.seconds(f"{OWN}/{layout}")
        return self.floor_s / own if self.floor_s and own else None

    def images_per_s(self, who: str) -> float | None:
        seconds = self.seconds(who)
        return self.images / seconds if self.images and seconds else None

    def disturbed(self, machine: Machine) -> str | None:
        """What says that something else used the machine meanwhile; None if nothing does."""
        timings = {key: timing for key, timing in self.times.items() if isinstance(timing, Timing)}
        # One sample of a few may be anything.
        jumping = [key for key, t in timings.items() if t.jumps > 0.1 and t.jumps * len(t.samples) > 1.5]
        return disturbance(self.others, self.steal, machine.cores, machine.threads) or (
            f"times of {', '.join(jumping)} jump" if jumping else None
        )


def disturbance(others: float | None, steal: float | None, cores: int, threads: int) -> str | None:
    """Whether so many cores kept busy by others (or taken by the host) disturb a measurement with `threads` threads.

    Cores that the measurement leaves free may work a quarter of the time: further in, they take memory bandwidth and
    clock away from it.
    """
    if others is not None and others > max(0.1, 0.25 * (cores - threads)):
        return f"other programs kept {others:.1f} of {cores} cores busy"
    if steal is not None and steal > 0.03 * cores:
        return f"the host took {steal:.1f} of {cores} cores away"
    return None


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


@dataclass(frozen=True)
class Summary:
    """convkit against its best peer over the rows of one family, dtype, pass and layout of convkit."""

    family: str
    dtype: str
    pass_: str
    layout: str
    rows: int
    any_layout: float
    """Geometric mean of the ratios to the best peer at any layout."""
    same_layout: float | None
    worst: float
    """The smallest ratio to the best peer at any layout, and the name of its row."""
    worst_name: str


@dataclass
class Results:
    """A whole run. ``rows`` grows while it is measured."""

    machine: Machine
    settings: Settings
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)

    def summaries(self) -> list[Summary]:
        """Geometric means, in the order of the rows; rows without a ratio are left out."""
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            for layout in row.layouts:
                if row.ratio(layout) is not None:
                    groups.setdefault((row.family, row.dtype, row.pass_, layout), []).append(row)
        found = []
        for group, rows in groups.items():
            layout = group[-1]
            same = [row.ratio(layout, same_layout=True) for row in rows]
            worst = min(rows, key=lambda row, layout=layout: row.ratio(layout))
            found.append(
                Summary(
                    *group,
                    rows=len(rows),
                    any_layout=geometric_mean(row.ratio(layout) for row in rows),
                    same_layout=geometric_mean(same) if all(same) else None,
                    worst=worst.ratio(layout),
                    worst_name=worst.name,
                )
            )
        return found

    def disturbances(self) -> list[str]:
        """One line a disturbance: the machine before the run, then each row during which it was busy."""
        machine = self.machine
        before = disturbance(machine.others, None, machine.cores, machine.threads)
        lines = [f"before the run: {before}"] if before else []
        return lines + [f"{row.name} {row.pass_}: {why}" for row in self.rows if (why := row.disturbed(machine))]

    def to_json(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            plain = {f.name.rstrip("_"): getattr(row, f.name) for f in dataclasses.fields(row)}
            plain["times"] = {key: _timing_to_json(timing) for key, timing in row.times.items()}
            rows.append(plain)
        parts = {name: dataclasses.asdict(getattr(self, name)) for name in ("machine", "settings", "ceilings")}
        return {"schema": SCHEMA, **parts, "rows": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Results:
        """Of what `to_json` gave. ValueError, KeyError or TypeError for anything else."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"schema is {found!r}, this version reads {SCHEMA}")
        settings = dict(data["settings"])
        settings |= {name: tuple(settings[name]) for name in ("layouts", "peers")}
        rows = []
        for plain in data["rows"]:
            plain = {("pass_" if name == "pass" else name): value for name, value in plain.items()}
            plain["times"] = {key: _timing_from_json(timing) for key, timing in plain["times"].items()}
            rows.append(Row(**plain))
        return cls(Machine(**data["machine"]), Settings(**settings), Ceilings(**data["ceilings"]), rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all: a reader, or a crash, never meets half of it."""
        path = Path(path)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as new:
            try:
                text = json.dumps(self.to_json(), indent=1, allow_nan=False)
                # Hundreds of samples a row: on a line of their own, a third of the file is saved.
                new.write(re.sub(r"\[\n[\s\d.,e+-]+\]", lambda numbers: "".join(numbers[0].split()), text) + "\n")
                new.flush()
                os.fsync(new.fileno())
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(new.name, 0o666 & ~umask)
                os.replace(new.name, path)
            except BaseException:
                Path(new.name).unlink(missing_ok=True)
                raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """BenchError names the file and says what is wrong with it."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise BenchError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise BenchError(f"{path}: not a result of `convkit bench --json`: {what}") from None


def _timing_to_json(timing: Timing | Failure) -> dict[str, Any]:
    if isinstance(timing, Failure):
        return {"failed": timing.message}
    return {
        "samples": list(timing.samples),
        "median": round(timing.median, 9),
        "iqr": round(timing.iqr, 9),
    }


def _timing_from_json(plain: Mapping[str, Any]) -> Timing | Failure:
    if "failed" in plain:
        return Failure(str(plain["failed"]))
    samples = tuple(float(sample) for sample in plain["samples"])
    if not samples or not all(math.isfinite(sample) and sample > 0 for sample in samples):
        raise ValueError("times must be samples above 0")
    return Timing(samples)
