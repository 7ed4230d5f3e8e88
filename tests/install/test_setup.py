"""setup.py: one line for each thing that a build can lack, and a number of jobs that fits the machine."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GB = 10**9


def load_setup():
    spec = importlib.util.spec_from_file_location("convkit_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()


def complaint(function, *arguments) -> str:
    """The one line with which `function` ends the build."""
    with pytest.raises(setup.BuildError) as error:
        function(*arguments)
    message = str(error.value)
    assert message.startswith("convkit: ") and "\n" not in message
    assert "type" in message, "says what to type"
    return message


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare_path(tmp_path, monkeypatch):
    """A machine with no program at all, neither on PATH nor beside Python."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(setup.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def test_no_torch(monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    message = complaint(setup.check_torch)
    assert "no torch" in message and "isolated" in message and "pip install --no-build-isolation ." in message


def test_old_torch(monkeypatch):
    monkeypatch.setattr(setup, "torch_version", lambda: "2.10.1+cu126")
    message = complaint(setup.check_torch)
    assert "2.10.1+cu126" in message and '"torch>=2.11"' in message


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0", "2.14.0.dev20260101+cu130", "unknown"])
def test_new_torch(monkeypatch, version):
    monkeypatch.setattr(setup, "torch_version", lambda: version)
    setup.check_torch()


@pytest.mark.parametrize("tool", ["cmake", "ninja"])
def test_no_tool(bare_path, tool):
    assert f"no {tool} found" in complaint(setup.find_tool, tool)
    path = program(bare_path / tool, "")
    assert setup.find_tool(tool) == str(path), "beside Python it is found without an activated environment"


def test_cmake_too_old_or_broken(tmp_path):
    assert "3.18" in complaint(setup.check_cmake, str(program(tmp_path / "old", "echo cmake version 3.18.4")))
    assert "does not run" in complaint(setup.check_cmake, str(program(tmp_path / "broken", "exit 1")))
    setup.check_cmake(str(program(tmp_path / "new", "echo cmake version 3.24.0")))


def test_no_compiler(bare_path, monkeypatch):
    assert "no C++ compiler" in complaint(setup.check_compiler)
    program(bare_path / "clang++", "")
    setup.check_compiler()
    monkeypatch.setenv("CXX", "icpx -O1")
    assert "'icpx -O1'" in complaint(setup.check_compiler)
    monkeypatch.setenv("CXX", "clang++ -stdlib=libc++")
    setup.check_compiler()


def test_no_python_headers(bare_path):
    message = complaint(setup.check_python_headers)
    version = "{}.{}".format(*sys.version_info)
    assert "Python.h" in message and f"python{version}-dev" in message


@pytest.mark.parametrize(
    "max_jobs, cores, memory, jobs",
    [
        (None, 16, 128 * GB, 16),
        (None, 16, 20 * GB, 8),
        (None, 2, 24 * GB, 2),
        (None, 64, 4 * GB, 1),
        (None, 8, 1.2 * GB, 1),
        ("3", 16, 128 * GB, 3),
        ("7", 2, 0.5 * GB, 7),
        ("", 4, 128 * GB, 4),
    ],
)
def test_job_count(max_jobs, cores, memory, jobs):
    environment = {} if max_jobs is None else {"MAX_JOBS": max_jobs}
    assert setup.job_count(environment, cores, memory) == jobs


def test_too_little_memory():
    message = complaint(setup.job_count, {}, 4, 0.4 * GB)
    assert "0.4 GB" in message and "MAX_JOBS=1" in message


@pytest.mark.parametrize("max_jobs", ["0", "-2", "all", "1.5"])
def test_max_jobs_must_be_a_number(max_jobs):
    assert repr(max_jobs) in complaint(setup.job_count, {"MAX_JOBS": max_jobs}, 4, 64 * GB)


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


MEMINFO = "MemTotal:       32000000 kB\nMemFree:         1000000 kB\nMemAvailable:   16000000 kB"


def test_memory_of_a_plain_machine(tmp_path):
    assert setup.available_memory(machine(tmp_path, {"proc/meminfo": MEMINFO})) == 16_000_000 * 1024


def test_memory_within_a_cgroup_2(tmp_path):
    """The tightest of the folders above counts, and idle file pages are free."""
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/box/inner",
        "sys/fs/cgroup/box/memory.max": str(6 * GB),
        "sys/fs/cgroup/box/memory.current": str(5 * GB),
        "sys/fs/cgroup/box/memory.stat": f"anon 12\nfile {4 * GB}\ninactive_file {3 * GB}\nactive_file 7",
        "sys/fs/cgroup/box/inner/memory.max": "max",
        "sys/fs/cgroup/box/inner/memory.current": str(2 * GB),
    }
    assert setup.available_memory(machine(tmp_path, files)) == 4 * GB


def test_memory_within_a_cgroup_1(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpuacct,cpu:/\n4:memory:/box",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GB),
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(3 * GB),
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": str(GB),
        "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 5\ntotal_inactive_file {GB // 2}",
    }
    assert setup.available_memory(machine(tmp_path, files)) == 2 * GB + GB // 2


def test_cores_within_a_cgroup(tmp_path, monkeypatch):
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda process: set(range(8)))
    assert setup.available_cores(tmp_path) == 8
    second = machine(tmp_path / "2", {"proc/self/cgroup": "0::/box", "sys/fs/cgroup/box/cpu.max": "350000 100000"})
    assert setup.available_cores(second) == 3
    free = machine(tmp_path / "3", {"proc/self/cgroup": "0::/box", "sys/fs/cgroup/box/cpu.max": "max 100000"})
    assert setup.available_cores(free) == 8
    quota = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    first = machine(tmp_path / "1", {"proc/self/cgroup": "5:cpuacct,cpu:/", **quota})
    assert setup.available_cores(first) == 1, "half a core still runs one compiler"


@pytest.mark.parametrize(
    "output, said",
    [
        ("g++: fatal error: Killed signal terminated program cc1plus", "MAX_JOBS=1"),
        ("virtual memory exhausted: Cannot allocate memory", "MAX_JOBS=1"),
        ("a.cpp:3:1: error: 'x' was not declared", "'x' was not declared"),
        (
            "CMake Error at CMakeLists.txt:9 (message):\n  no nvcc: set\n  CUDA_HOME\n\n\n-- Stopped\n",
            "no nvcc: set CUDA_HOME",
        ),
        ("nothing that looks familiar", "see the lines above"),
    ],
)
def test_a_failed_step_ends_with_one_line(capfd, output, said):
    command = [sys.executable, "-c", f"import sys; print({output!r}); sys.exit(1)"]
    with pytest.raises(setup.BuildError) as error:
        setup.run(command, "the compilation")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert output.splitlines()[0] in capfd.readouterr().out, "the whole output is passed on"


def test_no_traceback_from_the_command_line(tmp_path):
    """The whole way: setup.py stops before CMake, with the one line last."""
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CXX": "/no/such/compiler"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("convkit: CXX is '/no/such/compiler'")


def test_python_headers_are_found_here():
    setup.check_python_headers()
    assert Path(sysconfig.get_path("include"), "Python.h").exists()
