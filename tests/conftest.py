"""Set-up of every test: repeatable random numbers, how many problems hypothesis draws, Ctrl-C, where kernels run."""

import contextlib
import os
import signal

# What a shell starts in the background ignores Ctrl-C, and so would all that tests of it start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch starts its threads: waiting ones sleep. They would spin, and on a busy machine hold up the one that they
# wait for, thousands of times in tests as small as these.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import emulated  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

with contextlib.suppress(ModuleNotFoundError):  # `make gpu-report` takes an interpreter as it is
    from hypothesis import HealthCheck, settings

    # The same problems in every run; HYPOTHESIS_PROFILE=explore looks for new ones, for as long as one cares to wait.
    _common = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("repeatable", max_examples=100, derandomize=True, **_common)
    settings.register_profile("explore", max_examples=2000, print_blob=True, **_common)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _repeatable():
    """Every test starts from the same random numbers and leaves the number of threads as it found it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=("cpu", "cuda_emulated", pytest.param("cuda", marks=pytest.mark.cuda)))
def backend(request):
    """Runs a module's tests on the CPU, with the CUDA kernels on the host (tests/emulated.py), and on a GPU.

    The value is the device of convkit's tensors. The emulator's operators take the place of the CPU's meanwhile.
    On a GPU as in the emulator float32 is multiplied in full, not in tf32.
    """
    if request.param == "cpu":
        yield torch.device("cpu")
    elif request.param == "cuda":
        if why := emulated.why_no_gpu():
            pytest.skip(why)
        with emulated.full_float32():
            yield torch.device("cuda")
    else:
        if why := emulated.why_not():
            pytest.skip(why)
        with emulated.installed():
            yield torch.device("cpu")
