"""What gets into a wheel, with a native module of three lines in place of the real one, so that it takes seconds."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = """
cmake_minimum_required(VERSION 3.24)
project(stub LANGUAGES CXX)
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
Python_add_library(_C MODULE WITH_SOABI stub.cpp)
"""


def setup_py(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "MAX_JOBS": "1"}
    result = subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def wheel_of(folder: Path) -> zipfile.ZipFile:
    shutil.rmtree(folder / "dist", ignore_errors=True)
    setup_py(folder, "-q", "bdist_wheel")
    return zipfile.ZipFile(next((folder / "dist").glob("*.whl")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The repository as it would be cloned, but for the stub."""
    folder = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("convkit", "csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "CMakeLists.txt").write_text(STUB)
    (folder / "stub.cpp").write_text('extern "C" __attribute__((visibility("default"))) int stub() { return 0; }\n')
    return folder


@pytest.fixture(scope="module")
def wheel(folder) -> zipfile.ZipFile:
    return wheel_of(folder)


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {"convkit", f"convkit-{version(wheel)}.dist-info"}
    assert [name for name in names if name.startswith("convkit/_C.") and name.endswith(".so")]
    for part in ("__init__", "functional", "nn", "swap", "info", "cli", "explain", "bench/__init__", "lab/__init__"):
        assert f"convkit/{part}.py" in names
    package = [name for name in names if name.startswith("convkit/")]
    data = {name for name in package if not name.endswith((".py", ".so"))}  # no sources, no emulation of CUDA
    assert data == {f"convkit/bench/{name}" for name in ("layers.tsv", "report.css", "report.js")}
    assert not [name for name in package if "test" in name or "emulation" in name]


def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def version(wheel: zipfile.ZipFile) -> str:
    return metadata(wheel)["Version"]


def test_its_metadata(wheel):
    """The torch that is installed satisfies it, whichever it is: no pin, no upper bound."""
    facts = metadata(wheel)
    always = [line for line in facts.get_all("Requires-Dist") if "extra ==" not in line]
    assert always == ["torch>=2.11", "numpy"]
    assert facts["Requires-Python"] == ">=3.11"
    assert facts["License-Expression"] == "BSD-3-Clause"
    assert set(facts.get_all("Provides-Extra")) == {"lab", "test", "dev"}
    assert f'__version__ = "{facts["Version"]}"' in (ROOT / "convkit/__init__.py").read_text()


def test_a_deleted_file_does_not_come_back(folder, wheel):
    extra = folder / "convkit" / "extra.py"
    extra.touch()
    assert "convkit/extra.py" in wheel_of(folder).namelist()
    extra.unlink()
    assert "convkit/extra.py" not in wheel_of(folder).namelist()


def test_a_second_build_compiles_nothing(folder, wheel):
    assert "no work to do" in setup_py(folder, "build_ext", "--inplace")
    assert list((folder / "convkit").glob("_C.*.so")), "an editable install finds it in the source folder"
    assert "no work to do" in setup_py(folder, "build_ext", "--inplace")


def test_another_compiler_starts_anew(folder, wheel, monkeypatch):
    """CMake's cache would keep the old one without a word."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here")
    monkeypatch.setenv("CXX", compiler)
    assert "The CXX compiler identification" in setup_py(folder, "build_ext", "--inplace")
    assert "The CXX compiler identification" not in setup_py(folder, "build_ext", "--inplace")
