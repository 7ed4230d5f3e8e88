"""Loads the native module `convkit._C`, or says in one line why it can't be loaded and what to type.

`import torch` comes first: it brings the libraries that the module is linked to, wherever convkit itself lies. Before
the module is loaded its file is searched for the line that CMakeLists.txt writes into it, which names the torch that it
was built against. A module of another torch may load and then crash, so asking the module itself would be too late.
"""

from __future__ import annotations

import importlib.machinery
import mmap
import re
import sys
from pathlib import Path
from types import ModuleType

_MARKER = re.compile(rb"convkit [^ \n]+ built with torch ([^ \n]+)\n")


def _rebuild_command(package: Path) -> str:
    """What to type to build the module anew: in the source folder where that is where convkit lies, else from one."""
    if (package.parent / "CMakeLists.txt").exists():
        return f"{sys.executable} -m pip install --no-build-isolation --no-deps -e {package.parent}"
    pip = f"{sys.executable} -m pip install --no-build-isolation --no-deps --force-reinstall"
    return f"{pip} . (in convkit's source folder)"


def built_with_torch(module: Path) -> str | None:
    """The version of the torch that the native module in a file was built against; None if the file doesn't say."""
    with module.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = _MARKER.search(content)
        return found[1].decode() if found else None


def find_module(package: Path) -> Path | None:
    """The file of `_C` that this Python can load from the folder `package`."""
    paths = (package / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def load(package: Path = Path(__file__).parent) -> ModuleType:
    """Imports torch, then `convkit._C`, and returns it. `package` is the folder of convkit's Python files.

    Raises ImportError, with one line of what is wrong and what to type, where torch is missing, the module has not been
    built or was built for another Python, or it was built against another torch than the one that was just imported.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"convkit needs PyTorch: type: {sys.executable} -m pip install torch") from None

    rebuild = _rebuild_command(package)
    path = find_module(package)
    if path is None:
        others = sorted(other.name for other in package.glob("_C.*.so"))
        why = f"is not built for this Python, only as {', '.join(others)}" if others else "has not been built"
        raise ImportError(f"convkit's native module {why}: type: {rebuild}")
    built_with = built_with_torch(path)
    if built_with != torch.__version__:
        raise ImportError(
            f"convkit was built against torch {built_with or 'of an unknown version'}, and this is torch "
            f"{torch.__version__}: type: {rebuild}"
        )
    try:
        import convkit._C as module
    except ImportError as error:
        # Another build with the same version string (a nightly, one from source) lacks a function that was linked.
        if "undefined symbol" not in str(error):
            raise
        symbol = str(error).rpartition("undefined symbol: ")[2]
        raise ImportError(
            f"convkit was built against another build of torch {torch.__version__} (this one lacks {symbol}): "
            f"type: {rebuild}"
        ) from None
    return module
