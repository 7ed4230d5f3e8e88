"""Times without timing: see measure_checks.Clock."""

import pytest
from machines import MACHINE
from measure_checks import CEILINGS, Clock

import convkit.bench.roofline
import convkit.bench.timing
import convkit.measure


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    idle = type("Usage", (), {"read": lambda self: (0.0, 0.0)})
    monkeypatch.setattr(convkit.measure, "_measure", clock.measure)
    monkeypatch.setattr(convkit.bench.timing, "machine", lambda device: MACHINE)
    monkeypatch.setattr(convkit.bench.timing, "Usage", idle)
    monkeypatch.setattr(convkit.bench.roofline, "ceilings", lambda *args, **kwargs: CEILINGS)
    monkeypatch.setattr(convkit.bench.timing, "rotation_bytes", lambda device: 0)
    return clock
