"""`python -m convkit.info`: what a bug report should begin with."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from pathlib import Path

import numpy
import torch

import convkit
from convkit import _load


def openmp_libraries() -> list[str]:
    """The OpenMP libraries mapped into this process, as paths: torch's alone, if all is well. Empty without a /proc."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\b\S*", maps)))


def cpu_name() -> str:
    """The processor as Linux calls it, else as Python does."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def git_revision() -> str | None:
    """Revision of the checkout that convkit was imported from, None if it is no checkout; with a + if files that make
    the package differ from it."""
    root = Path(convkit.__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:  # not a repository that merely surrounds it
            package = "convkit", "csrc", "CMakeLists.txt", "setup.py"
            changed = git("status", "--porcelain", "--untracked-files=no", "--", *package)
            return git("rev-parse", "HEAD") + ("+" if changed else "")
    return None


def facts() -> dict[str, dict[str, object]]:
    """How convkit was built and what it runs on: {"built": {name: value}, "running": {name: value}}."""
    module = _load.load()
    running = {
        "convkit": f"{convkit.__version__} in {Path(convkit.__file__).parent}",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.platform()}, {' '.join(platform.libc_ver())}",
        "processor": cpu_name(),
        "instruction set": f"{module.isa()} in force, {', '.join(module.available_isas())} available",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "OpenMP": ", ".join(openmp_libraries()) or "none mapped",
        "CUDA devices": "none",
    }
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        running["CUDA devices"] = ", ".join(f"{device.name} (sm_{device.major}{device.minor})" for device in devices)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LD_PRELOAD", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
    for name in sorted(os.environ):
        if name.startswith("CONVKIT_") or name in names:
            running[name] = os.environ[name]
    return {"built": dict(module.build_info()), "running": running}


def text() -> str:
    """`facts()` as lines to paste into a report, without a trailing newline."""
    lines = []
    for title, section in facts().items():
        lines.append(title)
        for name, value in section.items():
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            lines.append(f"  {name.replace('_', ' '):<16} {shown or 'none'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(text())
