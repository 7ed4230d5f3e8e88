"""The pytest-benchmark suites run; what they measure is not looked at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_suites_run():
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--benchmark-disable"]
    command += ["-p", "no:cacheprovider", "-k", "(cifar_512 or dw3_512_4 or bn_512_4) and (convkit or torch)"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:]
    assert " passed" in ended.stdout and "failed" not in ended.stdout
