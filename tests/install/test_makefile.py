"""The Makefile looks before it downloads: one line for a machine that lacks something."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


@pytest.fixture
def clone(tmp_path) -> Path:
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    return tmp_path


def make(clone: Path, prelude: str, **environment: str) -> str:
    """The last line of `make build` with a Python that runs `prelude` first. It must fail before it makes a .venv."""
    pretender = clone / "pretender"
    pretender.write_text(
        f"#!{sys.executable}\nimport sys\ncode = sys.argv[sys.argv.index('-c') + 1]\n{prelude}\nexec(code)\n"
    )
    pretender.chmod(0o755)
    result = subprocess.run(
        [shutil.which("make"), "build", f"PYTHON={pretender}"],
        cwd=clone,
        env={**os.environ, "MAKEFLAGS": "", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert not (clone / ".venv").exists()
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1 and lines[0].startswith("convkit: ") and "type: " in lines[0], result.stderr
    return lines[0]


def test_old_python(clone):
    assert "is Python 3.9, 3.11 or newer is needed" in make(clone, "sys.version_info = (3, 9, 2, 'final', 0)")


def test_no_venv(clone):
    assert "has no venv module" in make(clone, "sys.modules['ensurepip'] = None")


def test_no_compiler(clone):
    assert "no C++ compiler found (/no/such/compiler)" in make(clone, "", CXX="/no/such/compiler")


def test_no_headers(clone):
    message = make(clone, "import sysconfig; sysconfig.get_path = lambda name: '/no/such/folder'")
    assert "no /no/such/folder/Python.h" in message


def test_help_is_what_make_alone_prints(clone):
    printed = subprocess.run(["make"], cwd=clone, check=True, capture_output=True, text=True).stdout
    for target in ("demo", "bench", "test", "lint", "build", "clean"):
        assert f"make {target}" in printed
