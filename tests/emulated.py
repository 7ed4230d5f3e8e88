"""Where the CUDA kernels can run: on a GPU, or in the emulator (csrc/cuda/emulation), whose module is built here."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock  # torch needs it, so it is there

ROOT = Path(__file__).parents[1]


def cuda_include() -> Path | None:
    """The folder of the CUDA toolkit's headers, which the emulator needs (not its compiler)."""
    folders = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    found = shutil.which("nvcc")
    folders += [Path(found).resolve().parents[1]] if found else []
    folders.append(Path("/usr/local/cuda"))
    return next((folder / "include" for folder in folders if (folder / "include/cuda_bf16.h").exists()), None)


def why_no_gpu() -> str | None:
    """Why the kernels can't run on a GPU here, or None."""
    import convkit  # noqa: F401 (loads the operators)

    if not torch.cuda.is_available():
        return "no GPU that PyTorch sees"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("convkit::conv2d", "CUDA"):
        return "this build of convkit has no CUDA kernels"
    return None


def why_not() -> str | None:
    """Why the emulator can't be built here, or None."""
    missing = [tool for tool in ("cmake", "ninja") if not _tool(tool)]
    if missing:
        return f"the emulator is built with {' and '.join(missing)}: not found"
    return None if cuda_include() else "the emulator needs the headers of the CUDA toolkit: none in CUDA_HOME"


def _tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@functools.cache
def build(target: str) -> Path:
    """Compiles what changed of a target of CMakeLists.txt: a minute or two the first time, a second after that."""
    folder = Path(os.environ.get("CONVKIT_EMULATED_BUILD") or ROOT / "build" / f"emulated-torch-{torch.__version__}")
    options = ["-G", "Ninja", "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    options += [f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", f"-Dcuda_headers={cuda_include()}"]
    make = ["--build", str(folder), "--target", target, "--parallel", os.environ.get("MAX_JOBS", "2")]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # the tests run in several processes
        commands = [make] if (folder / "build.ninja").exists() else [options, make]
        for command in commands:
            done = subprocess.run([_tool("cmake"), *command], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-5000:]
    return folder


@functools.cache
def load() -> ModuleType:
    """The emulator's module, compiled where it changed."""
    folder = build("emulated")
    path = folder / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        path = folder / "_emulated.so"
    spec = importlib.util.spec_from_file_location("_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def full_float32(full: bool = True) -> Iterator[None]:
    """PyTorch's switch for float32 convolutions on GPUs, which convkit's heed: in full, or in tf32 (its default)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = not full
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def installed() -> Iterator[ModuleType]:
    """Inside, the operators of CPU tensors are the emulator's. Fails if none of its kernels ran.

    float32 is multiplied in full, not in tf32: as on the CPU, which everything is held against.
    """
    import convkit  # noqa: F401 (the operators must be there before others take their place)

    module = load()
    before = module.counters()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Overriding a previously registered kernel"
        module.install()
    try:
        with full_float32():
            yield module
    finally:
        module.uninstall()
    assert module.counters()[0] > before, "no kernel ran in the emulator"
