"""A machine that no test has measured on, for made-up results."""

from convkit.bench.results import Machine

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
