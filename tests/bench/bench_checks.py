"""Made-up results, for tests that measure nothing."""

from __future__ import annotations

from machines import MACHINE

from convkit.bench.results import Ceilings, Results, Row, Settings, Timing

SETTINGS = Settings(
    device="cpu",
    threads=2,
    layouts=("nhwc", "nchw"),
    peers=("torch",),
    in_cache=False,
    budget_s=0.1,
    min_rounds=3,
    rotation_bytes=1 << 20,
)
CEILINGS = Ceilings(copy_bytes_per_s=1e10, copy_in_cache_bytes_per_s=1e11, flops_per_s={"f32": 1e11})


def row(name: str = "a", pass_: str = "fprop", **times: float) -> Row:
    """A row with one sample of each of ``convkit_nhwc=2e-3, torch_nchw=1e-3 …``, and a floor of 1 ms."""
    return Row(
        suite="dense",
        family="dense",
        name=name,
        problem="n1c4h4w4k4r1s1u1p0d1g1_f32",
        pass_=pass_,
        dtype="f32",
        flops=100_000_000,
        bytes=1000,
        floor_s=1e-3,
        times={key.replace("_", "/"): Timing((seconds,)) for key, seconds in times.items()},
        errors={"convkit/nhwc": 2e-7},
        others=0.0,
        steal=0.0,
    )


def results(*rows: Row) -> Results:
    return Results(MACHINE, SETTINGS, CEILINGS, list(rows))
