"""The native module as it was built: one OpenMP runtime, nothing that ties it to this machine, its own description."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convkit
from convkit import _load, info

MODULE = _load.find_module(Path(convkit.__file__).parent)


def python(code: str) -> str:
    """What `code` prints in a fresh process: pytest's plugins and other tests have imported much in this one."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_one_openmp_runtime():
    """torch's, in a process that has run a kernel on several threads: a second one would mean threads of two pools."""
    printed = python(
        "import torch, convkit.functional as CF\n"
        "CF.conv2d(torch.ones(8, 8, 32, 32), torch.ones(8, 8, 3, 3))\n"
        "from convkit.info import openmp_libraries\n"
        "print('\\n'.join(openmp_libraries()))"
    )
    assert len(printed.split()) == 1, printed


def test_import_brings_no_lab():
    heavy = "matplotlib", "rich", "typer", "sklearn", "mlxtend", "convkit.lab"
    assert python(f"import sys, convkit\nprint([name for name in {heavy} if name in sys.modules])").strip() == "[]"


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf here")
def test_it_links_to_nothing_of_this_machine():
    dynamic = subprocess.run(["readelf", "-dW", MODULE], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed, "the OpenMP calls are answered by what it brings"
    assert not [name for name in needed if re.match(r"lib(gomp|omp|iomp5|cudart)", name)]
    paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
    assert paths == ["$ORIGIN/../torch/lib"]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump here")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86's registers")
def test_wide_registers_only_in_the_code_of_their_instruction_set():
    """The module must start, and pick its kernels, on any x86-64: a template of the standard library that was compiled
    for AVX-512 and then called from plain code would stop an older processor."""
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", MODULE], check=True, capture_output=True, text=True)
    function, strangers = "", set()
    for line in code.stdout.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        elif "%zmm" in line and "avx512" not in function or "%ymm" in line and "avx" not in function:
            strangers.add(function)
        elif re.search(r"\bv(dpbf16|cvtne)", line) and not re.search(r"(rows|outer|planes)_tile", function):
            strangers.add(function)  # AVX512-BF16: many a processor with AVX-512 has not
    assert not strangers


def test_built_against_this_torch():
    assert _load.built_with_torch(MODULE) == torch.__version__


def test_info():
    """`python -m convkit.info` shows every fact of build_info() and what is in force."""
    printed = subprocess.run([sys.executable, "-m", "convkit.info"], check=True, capture_output=True, text=True).stdout
    lines = dict(re.findall(r"^  (\S[^\n]*?) {2,}(.*)$", printed, re.MULTILINE))
    assert lines["convkit"].startswith(convkit.__version__)
    assert lines["torch"] == torch.__version__
    assert lines["instruction set"].startswith(convkit._C.isa())
    assert lines["OpenMP"].startswith("/")
    for name in info.facts()["built"]:
        assert name.replace("_", " ") in lines
