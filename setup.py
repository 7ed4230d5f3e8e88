"""Builds convkit._C: checks that what the build needs is there, then lets CMake and Ninja do the work.

CMakeLists.txt describes the build. It needs setuptools, cmake, ninja, a C++ compiler, Python's headers, and the torch
(2.11 or newer) that convkit will run with. The environment: MAX_JOBS (compilers at a time; unset: as many as the cores
and the free memory allow), CXX, CUDA_HOME, FORCE_CUDA and TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
OLDEST_CMAKE = (3, 24)
OLDEST_SETUPTOOLS = 77  # the first that knows pyproject's license = "BSD-3-Clause"
GB = 1e9
JOB_MEMORY = 2.5 * GB  # bytes that one compiler may take: torch's headers at -O3 stay below it, nvcc's back end too
LEAST_MEMORY = 1.0 * GB  # bytes below which not even one finishes
PIP = f"{sys.executable} -m pip install"
OUT_OF_MEMORY = re.compile(
    r"error: Killed signal|: out of memory allocating|virtual memory exhausted|Cannot allocate memory|Killed$",
    re.MULTILINE,
)


class BuildError(SystemExit):
    """Ends the build with one line that says what is wrong and what to type."""

    def __init__(self, message: str):
        super().__init__(f"convkit: {message}")


# ------------------------------------------------------------------------------------------------- what the build needs
def torch_version() -> str:
    """The version of this Python's torch, by its metadata; "unknown" for one that has none."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def check_torch() -> None:
    """There is a torch in this Python, and it is new enough. Not imported: that takes seconds, and CMake does it."""
    if importlib.util.find_spec("torch") is None:
        raise BuildError(
            "no torch to build against (an isolated build never has one): install the torch you want, then type: "
            "pip install setuptools cmake ninja && pip install --no-build-isolation ."
        )
    version = torch_version()
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(f'torch {version} is too old, {oldest} or newer is needed: type: {PIP} -U "torch>={oldest}"')


def find_tool(name: str) -> str:
    """The path of cmake or ninja: beside this Python (its environment need not be activated), else on PATH."""
    folders = [str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    tool = shutil.which(name, path=os.pathsep.join(folders))
    if tool is None:
        raise BuildError(f"no {name} found: type: {PIP} {name}")
    return tool


def check_cmake(cmake: str) -> None:
    """cmake runs (the one beside Python is a script that needs its package) and is new enough."""
    answer = subprocess.run([cmake, "--version"], capture_output=True, text=True)
    found = re.search(r"cmake version (\d+)\.(\d+)", answer.stdout)
    if answer.returncode or not found:
        raise BuildError(f"{cmake} does not run: type: {PIP} --force-reinstall cmake")
    if (int(found[1]), int(found[2])) < OLDEST_CMAKE:
        oldest = ".".join(map(str, OLDEST_CMAKE))
        raise BuildError(f"{cmake} is {found[1]}.{found[2]}, {oldest} or newer is needed: type: {PIP} -U cmake")


def check_compiler() -> None:
    """CXX names a compiler, or there is one under a usual name."""
    named = os.environ.get("CXX", "")
    if named:
        if shutil.which(shlex.split(named)[0]) is None:
            raise BuildError(
                f"CXX is {named!r}, and there is no such program: name a C++20 compiler: type: export CXX=g++"
            )
    elif not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise BuildError("no C++ compiler found: type: apt-get install g++ (dnf install gcc-c++), or name one in CXX")


def check_python_headers() -> None:
    """Python.h is there: Debian and Fedora put it into a package of its own."""
    folders = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    if not any(Path(folder, "Python.h").exists() for folder in folders):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise BuildError(
            f"the headers of Python {version} are missing (no {folders.pop()}/Python.h): type: "
            f"apt-get install python{version}-dev (dnf install python{version}-devel)"
        )


# ----------------------------------------------------------------------------------------- how many compilers at a time
def read_number(path: Path) -> float | None:
    """The number in a file of /proc or /sys; None where there is no file, or it says "max"."""
    try:
        return float(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def cgroup_folders(controller: str, root: Path = Path("/")) -> list[Path]:
    """The folders of /sys/fs/cgroup that limit this process, versions 1 and 2, its own and those above."""
    folders = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = top / path.lstrip("/")
        folders += [folder for folder in (own, *own.parents) if folder == top or top in folder.parents]
    return folders


def idle_file_pages(cgroup: Path) -> int:
    """Bytes of a cgroup's page cache that count as used, and are given up when memory is wanted."""
    try:
        text = (cgroup / "memory.stat").read_text()
    except OSError:
        return 0
    found = re.findall(r"^(?:total_)?inactive_file (\d+)$", text, re.MULTILINE)  # total_: those below too, in version 1
    return max(map(int, found), default=0)


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that new processes can take: of the machine, and within every cgroup that holds this process."""
    available = float("inf")
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
        available = int(found[1]) * 1024 if found else available
    except OSError:
        pass
    for folder in cgroup_folders("memory", root):
        for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, used = (read_number(folder / name) for name in names)
            if limit is not None and used is not None:
                available = min(available, limit - used + idle_file_pages(folder))
    return max(available, 0.0)


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, and the quota of every cgroup that holds it."""
    cores = float(len(os.sched_getaffinity(0)))
    for folder in cgroup_folders("cpu", root):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            quota, period = read_number(folder / "cpu.cfs_quota_us"), read_number(folder / "cpu.cfs_period_us")
        if quota not in (None, "max") and period is not None and float(quota) > 0:
            cores = min(cores, float(quota) / float(period))
    return max(1, int(cores))


def job_count(environment: dict[str, str], cores: int, memory: float) -> int:
    """How many compilers run at a time: MAX_JOBS where it is set, else what cores and free memory (bytes) allow."""
    wanted = environment.get("MAX_JOBS", "").strip()
    if wanted:
        if not re.fullmatch(r"[1-9]\d*", wanted):
            raise BuildError(f"MAX_JOBS is {wanted!r}, and is a number from 1: type MAX_JOBS=1 before the command")
        return int(wanted)
    if memory < LEAST_MEMORY:
        raise BuildError(
            f"{memory / GB:.1f} GB of memory are free and one compiler takes up to {JOB_MEMORY / GB:.1f} GB: "
            "free some, or try all the same: type MAX_JOBS=1 before the command"
        )
    return max(1, min(cores, int(memory / JOB_MEMORY)))


# ------------------------------------------------------------------------------------------------------------ the build
def first_complaint(output: str) -> str:
    """The first error that CMake or a compiler reports, on one line."""
    cmake = re.search(r"^CMake Error[^\n]*\n+((?:  [^\n]*\n)+)", output, re.MULTILINE)
    if cmake:
        return " ".join(cmake[1].split())
    compiler = re.search(r"^.*\berror\b: .*$", output, re.MULTILINE)
    return compiler[0].strip() if compiler else "see the lines above"


def run(command: list[str], what: str) -> None:
    """Runs a step, passes its output on as it comes, and ends the build with one last line where it fails."""
    output = []
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, **pipe) as process:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            output.append(line)
    if process.returncode == 0:
        return
    if process.returncode == -signal.SIGKILL or OUT_OF_MEMORY.search("".join(output)):
        raise BuildError("the compiler ran out of memory: type MAX_JOBS=1 before the command")
    raise BuildError(f"{what} failed: {first_complaint(''.join(output))}")


def configured_with(environment: dict[str, str]) -> dict[str, str]:
    """What CMake's cache holds on to: another value of any of these needs a new one."""
    names = "CXX CXXFLAGS LDFLAGS CUDAFLAGS CUDA_HOME FORCE_CUDA TORCH_CUDA_ARCH_LIST".split()
    torch = importlib.util.find_spec("torch").origin
    return {"python": sys.executable, "torch": torch, **{name: environment.get(name, "") for name in names}}


class BuildWithCMake(build_ext):
    """build_ext for the one extension: `pip install .`, `pip install -e .` and wheels all come here."""

    def build_extension(self, ext: setuptools.Extension) -> None:
        check_torch()
        check_compiler()
        check_python_headers()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        check_cmake(cmake)
        jobs = job_count(dict(os.environ), available_cores(), available_memory())

        # In the source folder, so that a second build compiles only what changed; one for each Python and torch.
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch_version()}"
        folder.mkdir(parents=True, exist_ok=True)
        stamp, now = folder / "configured_with.json", json.dumps(configured_with(dict(os.environ)), indent=1)
        fresh = [] if stamp.exists() and stamp.read_text() == now else ["--fresh"]
        stamp.unlink(missing_ok=True)
        run(
            [cmake, *fresh, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), f"-DCMAKE_MAKE_PROGRAM={ninja}"]
            + [f"-DPython_EXECUTABLE={sys.executable}"],
            "CMake",
        )
        stamp.write_text(now)
        print(f"convkit: compiling with {jobs} job{'s' * (jobs > 1)} (MAX_JOBS changes it)", flush=True)
        run([cmake, "--build", str(folder), "--parallel", str(jobs)], "the compilation")

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)


class Build(build):
    """build, from an empty folder: a Python file that was deleted since the last build would get into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class DistInfo(dist_info):
    """The first thing that pip asks for. Without torch the build can't succeed, and here it fails before pip has
    downloaded the gigabytes of torch that convkit's requirements name."""

    def run(self) -> None:
        check_torch()
        super().run()


if __name__ == "__main__":
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise BuildError(
            f"setuptools {setuptools.__version__} is too old, {OLDEST_SETUPTOOLS} or newer is needed: "
            f"type: {PIP} -U setuptools"
        )
    setuptools.setup(
        ext_modules=[setuptools.Extension("convkit._C", sources=[])],
        cmdclass={"build": Build, "build_ext": BuildWithCMake, "dist_info": DistInfo},
    )
