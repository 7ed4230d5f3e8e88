"""convkit/_load.py: one line for each way in which the native module can be missing or be another torch's."""

import importlib.machinery
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convkit import _load

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
SOURCE = Path(_load.__file__)


def complaint(package: Path) -> str:
    with pytest.raises(ImportError) as error:
        _load.load(package)
    message = str(error.value)
    assert "\n" not in message
    assert f"type: {sys.executable} -m pip install" in message
    return message


def test_the_module_of_this_torch():
    module = _load.load()
    assert module.__name__ == "convkit._C"
    assert _load.built_with_torch(_load.find_module(SOURCE.parent)) == torch.__version__


def test_no_torch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs PyTorch" in complaint(tmp_path)


def test_not_built(tmp_path):
    message = complaint(tmp_path)
    assert "has not been built" in message and "--no-build-isolation" in message


def test_built_for_another_python(tmp_path):
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert "not built for this Python, only as _C.cpython-39-x86_64-linux-gnu.so" in complaint(tmp_path)


def test_built_against_another_torch(tmp_path):
    content = b"\x7fELF" + bytes(5000) + b"convkit 0.1.0 built with torch 2.11.0+cu126\n\0" + bytes(5000)
    (tmp_path / f"_C{SUFFIX}").write_bytes(content)
    message = complaint(tmp_path)
    assert "built against torch 2.11.0+cu126" in message and f"this is torch {torch.__version__}" in message


def test_a_file_that_does_not_say(tmp_path):
    (tmp_path / f"_C{SUFFIX}").write_bytes(bytes(5000))
    assert "of an unknown version" in complaint(tmp_path)


def test_what_to_type_in_a_source_folder(tmp_path):
    (tmp_path / "CMakeLists.txt").touch()
    assert complaint(tmp_path / "convkit").endswith(f"--no-build-isolation --no-deps -e {tmp_path}")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no c++ here")
def test_another_build_of_the_same_version(tmp_path):
    """The version string agrees and a function is missing: a nightly or a torch built from source."""
    package = tmp_path / "convkit"
    package.mkdir()
    (package / "__init__.py").write_text("from convkit import _load\n_load.load()\n")
    shutil.copy(SOURCE, package)
    (tmp_path / "module.cpp").write_text(
        f'extern const char line[]; const char line[] = "convkit 0.1.0 built with torch {torch.__version__}\\n";\n'
        'namespace at { void gone(); }\nextern "C" void* PyInit__C() { at::gone(); return nullptr; }\n'
    )
    module = package / f"_C{SUFFIX}"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", module, tmp_path / "module.cpp"], check=True)
    result = subprocess.run([sys.executable, "-c", "import convkit"], cwd=tmp_path, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: convkit was built against another build of torch")
    assert "_ZN2at4goneEv" in last and "--force-reinstall" in last
