"""Made-up results of a benchmark run, for tests of what is made from them."""

import dataclasses
import random

import bench_checks

from convkit.bench.problems import BatchNormProblem, ConvProblem
from convkit.bench.results import Ceilings, Failure, Results, Row, Timing

MACHINE = dataclasses.replace(bench_checks.MACHINE, cpu="Made-up <Processor> & Sons")
SETTINGS = bench_checks.SETTINGS
CEILINGS = Ceilings(40e9, 120e9, {"f32": 420e9})
PEERS = ("torch/nchw", "torch/nhwc", "compile/nhwc", "im2col/nchw")


def timing(median: float) -> Timing:
    return Timing(tuple(median * (1 + 0.02 * (i - 2)) for i in range(5)))


def layer(
    name: str, problem: ConvProblem | BatchNormProblem, pass_: str, ratio: float = 1.2, dtype: str = "f32"
) -> Row:
    """A row in which convkit takes twice its floor in nhwc, more in nchw, and the best peer ``ratio`` times that."""
    if isinstance(problem, ConvProblem):
        family, flops, moved = "depthwise" if problem.is_depthwise else "dense", problem.flops, problem.bytes
    else:
        family, flops, moved = "batch-norm", 6 * problem.n * problem.c * problem.h * problem.w, problem.forward_bytes
    floor = CEILINGS.floor(flops, moved, dtype) or 1e-4
    own = 2 * floor
    times = {"convkit/nchw": timing(1.3 * own), "convkit/nhwc": timing(own)}
    times |= {peer: timing(own * ratio * (1 + 0.5 * i)) for i, peer in enumerate(PEERS)}
    text = str(problem).replace("_nchw", "")
    errors = {"convkit/nchw": 3e-7, "convkit/nhwc": 2e-7}
    return Row(family, family, name, text, pass_, dtype, flops, moved, floor, times, errors)


def network(name: str, ratio: float = 1.1) -> Row:
    times = {
        "convkit/nchw": timing(0.1),
        "torch/nchw": timing(0.1 * ratio),
        "compile/nchw": Failure("RuntimeError: no"),
    }
    memory = {"convkit/nchw": 123 << 20, "torch/nchw": 456 << 20}
    return Row("nets", "nets", name, "32x3x32x32", "training", "f32", None, None, None, times, images=32, memory=memory)


def results(rows: list[Row], **machine: object) -> Results:
    return Results(dataclasses.replace(MACHINE, **machine), SETTINGS, CEILINGS, rows)


def many(count: int = 50) -> list[Row]:
    """Three rows a layer, of all families, with failures and a network."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        c = 2 ** draw.randint(3, 9)
        size = draw.choice((7, 14, 28, 56))
        ratio = draw.lognormvariate(0.1, 0.5)
        if number % 5 == 4:
            problem = BatchNormProblem(8, c, size, size, residual=number % 2 == 0)
            passes = ("forward", "backward", "evaluation")
        else:
            groups = c if number % 3 == 2 else 1
            problem = ConvProblem(8, c, size, size, c, 3, 3, (1, 1), (1,) * 4, (1, 1), groups)
            passes = ("fprop", "dgrad", "wgrad")
        for pass_ in passes:
            row = layer(f"layer_{number}", problem, pass_, ratio * draw.lognormvariate(0, 0.2))
            if number % 7 == 0:
                row.times["compile/nhwc"] = Failure("BackendCompilerFailed: <no> | compiler")
            rows.append(row)
    return [*rows, network("resnet18"), network("simplenet", 0.8)]
