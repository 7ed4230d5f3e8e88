"""Turns, memory that moves on, and what is known about the machine. No test here asserts how long something took."""

import gc
import time

import pytest
import torch

from convkit.bench.results import Failure
from convkit.bench.timing import Arena, Usage, carve, carved_elements, interleave, machine, rotation_bytes, short


def test_candidates_take_turns():
    order = []
    found = interleave(
        {name: lambda name=name: order.append(name) for name in "AB"}, budget_s=0, min_rounds=3, max_rounds=3
    )
    assert "".join(order) == "AABB" + "ABABAB"
    assert [len(found[name].samples) for name in "AB"] == [3, 3]
    assert all(sample > 0 for timing in found.values() for sample in timing.samples)


def test_every_call_moves_on():
    used = []
    one, other = ([lambda i=i: used.append(i) for i in range(5)] for _ in range(2))
    interleave({"A": one, "B": other}, budget_s=0, min_rounds=5)
    assert used == [(1 + i) % 5 for i in range(14)]


def test_a_failure_is_caught_and_the_others_go_on():
    calls = iter(range(100))

    def later():
        if next(calls) == 4:
            raise MemoryError

    def broken():
        raise RuntimeError("could not create a primitive\nand a page of advice")

    found = interleave({"broken": broken, "later": later, "fine": int}, budget_s=0, min_rounds=9)
    assert found["broken"] == Failure("RuntimeError: could not create a primitive")
    assert found["later"] == Failure("MemoryError")
    assert len(found["fine"].samples) == 9


def test_ctrl_c_is_not_a_failure():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"stop": stop})
    assert gc.isenabled()


def test_a_slow_candidate_drops_out_when_its_budget_is_spent():
    found = interleave({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, budget_s=0.03, min_rounds=2)
    assert 2 <= len(found["slow"].samples) <= 4
    assert len(found["fast"].samples) == 1000


def test_the_collector_rests_meanwhile():
    seen = []
    interleave({"a": lambda: seen.append(gc.isenabled())}, budget_s=0)
    assert set(seen) == {False} and gc.isenabled()


def test_short():
    assert short(ValueError("x" * 500)) == f"ValueError: {'x' * 187}…"
    assert short(KeyError()) == "KeyError"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_stretches_of_an_arena(dtype):
    arena = Arena(dtype, "cpu", 100_000)
    stretches = arena.stretches(1000)
    step = stretches[1].data_ptr() - stretches[0].data_ptr()
    assert step >= 1000 * dtype.itemsize and step % 256 == 0
    assert len(stretches) == 100_000 // step
    assert all(len(stretch) == 1000 and stretch.dtype == dtype for stretch in stretches)
    assert not torch.equal(stretches[0], stretches[1])
    first = stretches[0].clone()
    assert torch.equal(arena.stretches(10)[0], first[:10]), "nothing is drawn anew"
    assert len(arena.stretches(10, at_most=7)) == 7
    (large,) = arena.stretches(1_000_000)
    assert large.isfinite().all() and 0.9 < large.double().std() < 1.1 and abs(large.double().mean()) < 0.1


def test_an_arena_outlives_a_problem_that_is_too_large():
    arena = Arena(torch.float32, "cpu", 1000)
    with pytest.raises(RuntimeError):
        arena.stretches(1 << 50)
    assert len(arena.stretches(10)[0]) == 10


def test_an_arena_that_stays_in_cache():
    assert len(Arena(torch.float32, "cpu", 0).stretches(8)) == 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_carving(channels_last):
    shapes = [(2, 3, 5, 4), (1, 1, 1, 1), (4, 3, 2, 2), (2, 1, 3, 3)]
    (stretch,) = Arena(torch.float32, "cpu", 0).stretches(carved_elements(shapes, torch.float32))
    tensors = carve(stretch, shapes, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert [tuple(t.shape) for t in tensors] == shapes
    for t in tensors:
        assert t.is_contiguous(memory_format=layout) and t.data_ptr() % 64 == 0
        assert t.stride() == torch.empty(t.shape).to(memory_format=layout).stride()
    ends = [t.data_ptr() + 4 * t.numel() for t in tensors]
    assert all(end <= t.data_ptr() for end, t in zip(ends[:-1], tensors[1:], strict=True))
    assert ends[-1] <= stretch.data_ptr() + 4 * len(stretch)


def test_rotation_is_bounded():
    assert 0 < rotation_bytes("cpu") <= max(512 << 20, 2 * (machine(look_s=0).l2_bytes or 0))


def test_machine_knows_threads_and_versions():
    torch.set_num_threads(1)
    facts = machine(look_s=0)
    assert facts.threads == 1 and facts.torch == torch.__version__ and facts.isa and len(facts.native) == 12
    assert facts.gpu is None and facts.others is None


def test_usage_sees_others_and_not_ourselves():
    usage = Usage()
    assert usage.read() == (None, None), "too short to tell"
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        pass
    others, stolen = usage.read()
    assert others is None or (others >= 0 and stolen >= 0)
