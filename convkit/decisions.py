"""What was measured on this machine, kept between processes in one JSON file, ``decisions.json``.

The folder is ``$XDG_CACHE_HOME/convkit`` (``~/.cache/convkit``; ``~/Library/Caches/convkit`` on macOS), or the one that
the environment variable ``CONVKIT_CACHE`` names; nothing is kept where that is set and empty. Times hold for one
processor, instruction set, number of threads, and versions of PyTorch and of convkit's native module: others are kept
beside them. Writers take turns at a lock, add to what is there and replace the file whole. A file that cannot be read
or written is a warning: the layers are then measured again the next time.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import convkit
from convkit import _load
from convkit.info import cpu_name
from convkit.measure import Seconds, Task

__all__ = ["folder", "recall", "remember"]

SCHEMA = 1


def folder() -> Path | None:
    """Where the file lies or would lie; None if nothing is to be kept."""
    if (chosen := os.environ.get("CONVKIT_CACHE")) is not None:
        return Path(chosen).expanduser() if chosen else None
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "convkit"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: relative paths are to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "convkit"


def recall(tasks: Iterable[Task]) -> dict[Task, Seconds]:
    """Those of the tasks that have been measured with this machine and software."""
    file = _file()
    if file is None:
        return {}
    try:
        known = _read(file)
    except (OSError, ValueError) as error:
        _warn(f"{file} cannot be read, so layers are measured anew: {error}")
        return {}
    found = {}
    for task in tasks:
        seconds = _from_json(known.get(_environment(task.device), {}).get(str(task)))
        if seconds is not None:
            found[task] = seconds
    return found


def remember(measured: Mapping[Task, Seconds]) -> None:
    """Adds times to the file."""
    file = _file()
    if file is None or not measured:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _lock(file.with_suffix(".lock")):
            try:
                known = _read(file)
            except ValueError:  # kept, as it may be anything: CONVKIT_CACHE is the user's to set
                os.replace(file, file.with_suffix(".json.unreadable"))
                known = {}
            for task, seconds in measured.items():
                known.setdefault(_environment(task.device), {})[str(task)] = _to_json(seconds)
            _write(file, {"schema": SCHEMA, "decisions": known})
    except OSError as error:
        _warn(f"{file} cannot be written, so layers will be measured again next time: {error}")


def _file() -> Path | None:
    place = folder()
    return None if place is None else place / "decisions.json"


def _warn(message: str) -> None:
    warnings.warn(f"convkit: {message} (CONVKIT_CACHE sets the folder)", stacklevel=6)  # the caller of swap


def _environment(device: str) -> str:
    """What times hold for."""
    module = _load.load()
    where = torch.device(device)
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        processor = f"{properties.name} sm_{properties.major}{properties.minor}, cuDNN {torch.backends.cudnn.version()}"
    else:
        processor = f"{cpu_name()}, {module.isa()}, threads={torch.get_num_threads()}"
    return f"{processor}; torch {torch.__version__}; convkit {convkit.__version__} {_build(module.__file__)}"


@functools.cache
def _build(path: str) -> str:
    """Tells builds of one version apart."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The decisions in the file, by environment; ValueError if it is not such a file."""
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):  # writing will say what is wrong
        return {}
    data = json.loads(text)
    known = data.get("decisions") if isinstance(data, dict) and data.get("schema") == SCHEMA else None
    if not isinstance(known, dict) or not all(isinstance(tasks, dict) for tasks in known.values()):
        raise ValueError(f"it holds no decisions of schema {SCHEMA}")
    return known


def _write(file: Path, data: dict[str, Any]) -> None:
    new = file.with_suffix(".json.new")  # whoever holds the lock is the only writer
    new.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(new, file)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _to_json(seconds: Seconds) -> dict[str, Any]:
    times = {
        who: {name: round(value, 9) for name, value in each.items()}
        for who, each in (("convkit", seconds.convkit), ("torch", seconds.torch))
    }
    return {**times, "failures": dict(seconds.failures)}


def _from_json(plain: Any) -> Seconds | None:
    try:
        convkit_times, torch_times = (
            {name: float(value) for name, value in plain[who].items()} for who in ("convkit", "torch")
        )
        failures = {str(who): str(message) for who, message in plain["failures"].items()}
    except (TypeError, ValueError, KeyError, AttributeError):
        return None
    values = (*convkit_times.values(), *torch_times.values())
    return Seconds(convkit_times, torch_times, failures) if all(map(math.isfinite, values)) else None
