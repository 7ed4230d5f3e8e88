"""The numeric tests once more for every other instruction set that this machine has: it is chosen once, at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convkit import _C

OTHERS = [isa for isa in _C.available_isas() if isa != _C.isa()]


# PyTorch is held to the same instructions, as its errors are the measure: without fused multiply-adds every product is
# rounded, its own too.
PYTORCH = {
    "generic": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def run(isa: str, *command: str) -> subprocess.CompletedProcess:
    """One thread: the work is split among threads in the same way for every instruction set."""
    changed = os.environ | PYTORCH.get(isa, {}) | {"CONVKIT_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=changed, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", OTHERS)
def test_numeric(isa: str):
    tests = [str(Path(__file__).with_name(name)) for name in ("test_numeric.py", "test_winograd.py")]
    # Those two differ in the products of bfloat16 alone.
    bf16_apart = {isa, _C.isa()} == {"avx512", "avx512_bf16"}
    chosen = "not cuda and (conv2d or layouts) and not separable" if bf16_apart else "not cuda"
    options = ("-k", chosen, "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider")
    done = run(isa, "-m", "pytest", *tests, *options)
    assert done.returncode == 0, f"CONVKIT_ISA={isa}\n{done.stdout[-20000:]}\n{done.stderr[-5000:]}"


@pytest.mark.parametrize("isa", _C.available_isas())
def test_the_variable_chooses(isa: str):
    done = run(isa, "-c", "import convkit; from convkit import _C; print(_C.isa())")
    assert done.stdout.strip() == isa, done.stderr


@pytest.mark.parametrize("isa", _C.available_isas())
def test_bf16_is_multiplied_in_pairs(isa: str):
    """By every kernel of dense convolutions, for a problem of the table at least; and where it is slow, by none."""
    done = run(isa, "-c", PLANS)
    right = ["outer", "planes", "pointwise", "rows"] if isa == "avx512_bf16" else []
    assert done.stdout.split() == right, done.stderr


@pytest.mark.parametrize("isa", _C.available_isas())
def test_groups_of_few_channels_meet_every_tile(isa: str):
    """The kernel for them has a tile for each width of a group, 4, 8 and 16, and for some counts of pixels."""
    done = run(isa, "-c", GROUPED)
    tiles = (4, 7, 8, 14) if isa.startswith("avx512") else (4, 7, 8)
    wanted = {
        f"{which}:{stride}:{width}:{tile}"
        for which in ("fprop", "dgrad")
        for stride in (1, 2)
        for width in (4, 8, 16)
        for tile in tiles
        if not (which == "dgrad" and stride == 2 and tile == 7)  # its tiles begin where a source does
    }
    assert wanted <= set(done.stdout.split()), done.stderr


GROUPED = """
from convkit import _C
from convkit.bench.problems import TEST_PROBLEMS
for p in TEST_PROBLEMS:
    for which in ("fprop", "dgrad"):
        plan = _C.plan(str(p.replace(dtype="f32", layout="nhwc")), which).partition(" -> ")[2]
        if plan.startswith("grouped_"):
            tile = plan.split(",")[0].split("_")[-1].partition("x")[0]
            print(which, p.stride[0], p.c // p.groups, tile, sep=":")
"""


PLANS = """
from convkit import _C
from convkit.bench.problems import TEST_PROBLEMS
problems = [p.replace(dtype="bf16", layout=layout) for p in TEST_PROBLEMS for layout in ("nchw", "nhwc")]
plans = [_C.plan(str(p), which).partition(" -> ")[2] for p in problems for which in ("fprop", "dgrad", "wgrad")]
print(*sorted({plan.partition("_")[0] for plan in plans if " in pairs" in plan}))
"""


def test_generic_is_always_there():
    assert "generic" in _C.available_isas()
    assert _C.isa() in _C.available_isas()


@pytest.mark.parametrize("isa", ("", "avx1024", "AVX2 "))
def test_an_unknown_instruction_set_is_refused(isa: str):
    done = run(isa, "-c", "import convkit")
    if not isa:  # as if it were not set
        assert done.returncode == 0, done.stderr
        return
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, "imported, or crashed"
    assert "CONVKIT_ISA" in last and isa in last and all(name in last for name in _C.available_isas()), last
