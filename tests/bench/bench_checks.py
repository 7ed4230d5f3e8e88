"""Made-up results, for tests that measure nothing."""

from __future__ import annotations

from convkit.bench.results import Ceilings, Machine, Results, Row, Settings, Timing

MACHINE = Machine(
    date="2026-01-02T03:04:05+00:00",
    cpu="Some CPU",
    isa="avx2",
    cores=2,
    threads=2,
    l2_bytes=1 << 20,
    llc_bytes=None,
    clock_mhz=3000.0,
    gpu=None,
    driver=None,
    gpu_clock_mhz=None,
    memory_clock_mhz=None,
    system="Linux",
    python="3.11.7",
    torch="2.13.0",
    convkit="0.1.0",
    revision="0123456789ab",
    native="ba9876543210",
    load_average=0.1,
    others=0.0,
)
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
