"""The layers of `convkit bench` under pytest-benchmark: one group a layer and pass, its peers beside one another.

    pytest benchmarks/ --benchmark-only -k "r50_3x3_64 and fprop"
    pytest benchmarks/ --benchmark-only -k "depthwise and not native" --benchmark-autosave

`convkit bench` is the better instrument: there the candidates take turns, so that what else the machine does falls on
all alike. This one has pytest-benchmark's statistics, histograms and comparisons of saved runs.
"""

import itertools

import pytest
import torch

from convkit.bench import peers, suites
from convkit.bench.problems import LAYOUTS
from convkit.bench.timing import Arena, carve, carved_elements, heap_kept, rotation_bytes

CASES = suites.cases(suites=("dense", "depthwise", "batch-norm"))
PARAMETERS = [
    pytest.param(case, key, id=f"{case.suite}-{case.name}-{case.pass_}-{key.replace('/', '-')}")
    for case in CASES
    for key in peers.keys(case.problem, tuple(LAYOUTS), peers.PEERS)
]


@pytest.fixture(scope="module")
def arena():
    return Arena(torch.float32, "cpu", rotation_bytes("cpu"))


@pytest.mark.benchmark(min_rounds=5, max_time=0.25, warmup=True, warmup_iterations=2, disable_gc=True)
@pytest.mark.parametrize(("case", "key"), PARAMETERS)
def test_layer(benchmark, arena, case, key):
    who, _, layout = key.partition("/")
    problem, shapes = case.problem.replace(layout=layout), peers.operands(case.problem, case.pass_)
    stretches = arena.stretches(carved_elements(shapes, problem.torch_dtype))
    sets = [carve(stretch, shapes, layout == "nhwc") for stretch in stretches]
    benchmark.group = f"{case.name} {case.pass_}"
    benchmark.extra_info |= {"problem": case.text, "flops": case.flops, "bytes": case.bytes}
    with torch.no_grad(), heap_kept():
        function = peers.prepare(who, problem, case.pass_, sets[0])
        error = peers.error(function, problem, case.pass_, sets[0])
        assert error < 1e-4, f"{key} is wrong: {error:.0e} of the largest value"
        following = itertools.cycle(sets)
        benchmark(lambda: function(*next(following)))
