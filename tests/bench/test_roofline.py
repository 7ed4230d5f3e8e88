"""The ceilings are measured at all; how high they are is the machine's business."""

import torch

from convkit.bench import roofline
from convkit.bench.timing import Arena


def test_ceilings(monkeypatch):
    monkeypatch.setattr(roofline, "MATRIX", {"cpu": (32, 1)})
    monkeypatch.setattr(roofline, "COPIES", {"cpu": (1,)})
    with torch.no_grad():
        found = roofline.ceilings("cpu", ["f32", "bf16"], Arena(torch.float32, "cpu", 4 << 20), budget_s=0)
    assert found.copy_bytes_per_s > 0 and set(found.flops_per_s) == {"f32", "bf16"}
    assert min(found.flops_per_s.values()) > 0
    assert found.copy_in_cache_bytes_per_s is None or found.copy_in_cache_bytes_per_s > 0


def test_a_dtype_that_cannot_be_multiplied_has_no_ceiling(monkeypatch):
    monkeypatch.setattr(roofline, "COPIES", {"cpu": (1,)})

    def fails():
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(roofline, "_products", lambda device, dtype: {"mm": (1.0, fails)})
    assert roofline.ceilings("cpu", ["f16"], Arena(torch.float32, "cpu", 4 << 20), budget_s=0).flops_per_s == {}
