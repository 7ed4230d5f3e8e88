"""Every .cu compiles with nvcc for sm_80 and sm_90a without a warning, and no hot kernel spills registers.

A compilation takes up to a minute, so what nvcc said is kept in build/nvcc until a source, or nvcc, changes.
"""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHES = {"sm_80": "arch=compute_80,code=sm_80", "sm_90a": "arch=compute_90a,code=sm_90a"}
_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
NVCC = shutil.which("nvcc", path=os.pathsep.join([f"{_HOME}/bin", os.environ.get("PATH", "")]))

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc in PATH or CUDA_HOME")

# Kernels that may spill, by a pattern of their demangled name, and why.
ALLOWED = {
    r"depthwise_nhwc_wgrad<double, 7,": "98 sums in float64 are 196 registers; float64 is for checking gradients",
    r"product<Separable<": "the generic way to a separable convolution: its left operand is a sum of its own",
    r"(sums_by_columns|on_chip)<.*double>": "float64 is for checking gradients",
}


def compile_with_nvcc(source: Path, folder: Path) -> str:
    """What nvcc and ptxas say about a source, for all architectures. Fails where they say more than facts."""
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xcompiler=-Wall"]
    flags += ["-I", str(ROOT / "csrc"), "-Xptxas=-v", "--threads", "2", "-c", str(source), "-o", os.devnull]
    flags += [flag for arch in ARCHES.values() for flag in ("-gencode", arch)]
    used = [source, *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.h"), *source.parent.glob("*.cuh")]
    digest = hashlib.sha256(subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout)
    for text in (*(path.read_text() for path in sorted(used)), *flags):
        digest.update(text.encode())
    log = folder / f"{source.stem}-{digest.hexdigest()[:16]}.log"
    if not log.exists():
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([NVCC, *flags], capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-10000:]
        for old in folder.glob(f"{source.stem}-*.log"):
            old.unlink()
        log.write_text(said)
    return log.read_text()


def kernels(log: str):
    """(architecture, mangled name, bytes of stack, of spill stores, of spill loads, registers) of each kernel."""
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    for name, arch, *numbers in entry.findall(log):
        yield arch, name, *map(int, numbers)


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt", path=str(Path(NVCC).parent))
    if tool is None:
        return names
    out = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"convkit::cuda::|\(anonymous namespace\)::", "", line) for line in out.splitlines()]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings_and_spills(source: Path):
    log = compile_with_nvcc(source, ROOT / "build" / "nvcc")
    assert "warning" not in log.lower(), log[-5000:]
    found = list(kernels(log))
    if "__global__" not in source.read_text():
        assert not found
        return
    assert {arch for arch, *_ in found} == set(ARCHES)
    bad = []
    for (arch, _, stack, stores, loads, registers), name in zip(found, demangled([k[1] for k in found]), strict=True):
        if stores + loads + stack and not any(re.search(pattern, name) for pattern in ALLOWED):
            bad.append(f"{arch} {name[:120]}: {registers} registers, {stack}, {stores}, {loads} bytes of stack, spills")
    assert not bad, "\n".join(bad)


def test_what_may_spill_exists():
    """An entry that no kernel matches has outlived its kernel."""
    names = demangled([k[1] for source in SOURCES for k in kernels(compile_with_nvcc(source, ROOT / "build" / "nvcc"))])
    for pattern in ALLOWED:
        assert any(re.search(pattern, name) for name in names), pattern
