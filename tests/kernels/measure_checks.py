"""Made-up times for the tests of convkit.explain and of only_faster: nothing is timed, but every function is called."""

from collections.abc import Callable

import torch

import convkit.bench.timing
import convkit.measure
from convkit.bench.results import Ceilings
from convkit.measure import PASSES, Seconds, Task

CEILINGS = Ceilings(copy_bytes_per_s=1e9, copy_in_cache_bytes_per_s=None, flops_per_s={"f32": 1e10, "f64": 1e10})


class Clock:
    """Stands in for the timing: convkit takes 1 ms a pass and PyTorch 2 ms, or what ``times`` says of a task."""

    def __init__(self) -> None:
        self.times: Callable[[Task], tuple[float, float]] = lambda task: (1e-3, 2e-3)
        self.tasks: list[Task] = []

    def measure(self, task: Task, *_) -> Seconds:
        self.tasks.append(task)
        arena = convkit.bench.timing.Arena(task.problem.torch_dtype, "cpu", 0)
        functions, parameters = convkit.measure._functions(task)
        tensors = convkit.measure._sets(task, arena)[0]
        both = {}
        for who, function in functions.items():
            found = [convkit.measure._forward(task, function, parameters, *tensors)()]
            if task.gradients:
                found += convkit.measure._backward(task, function, parameters, *tensors)()
            both[who] = [tensor.detach() for tensor in found]
        exact = task.problem.torch_dtype == torch.float64
        tolerance = dict(rtol=1e-9, atol=1e-9) if exact else dict(rtol=5e-2, atol=5e-2)
        torch.testing.assert_close(both["convkit"], both["torch"], **tolerance)
        passes = PASSES if task.gradients else PASSES[:1]
        ours, theirs = self.times(task)
        return Seconds(dict.fromkeys(passes, ours), dict.fromkeys(passes, theirs), {})
