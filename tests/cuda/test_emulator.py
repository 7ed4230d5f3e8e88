"""The emulator itself: right kernels give right results, and every planted error is reported with its place."""

import re
from pathlib import Path

import emulated
import pytest
import torch

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

SOURCE = Path(__file__).with_name("planted.cu").read_text().splitlines()


def planted(name: str, x: torch.Tensor, y: torch.Tensor, n: int = 0) -> torch.Tensor:
    emulated.load().planted(name, x.data_ptr(), x.nbytes, y.data_ptr(), y.nbytes, n)
    return y


def line_of(text: str) -> int:
    (number,) = (i + 1 for i, line in enumerate(SOURCE) if text in line)
    return number


def test_threads_shared_memory_shuffles_and_votes():
    x, y = torch.randn(1000), torch.empty(1000)
    x = torch.cat([x, torch.zeros(24)])
    planted("exchange", x, y, 1000)
    blocks = x.view(4, 256)
    sums = blocks.flip(1).reshape(4, 8, 32).sum(2).repeat_interleave(32, dim=1)
    right = sums + 1000 * (blocks > 0).sum(1, keepdim=True)
    right = right + 0.5 * (torch.arange(256) % 3 == 0)
    torch.testing.assert_close(y, right.flatten()[:1000])


def test_syncwarp_orders_a_warp():
    x, y = torch.randn(32), torch.empty(32)
    assert torch.equal(planted("with_syncwarp", x, y), x.view(16, 2).flip(1).flatten())


def test_asynchronous_copies():
    x, y = torch.randn(32), torch.empty(8)
    pairs = x.view(8, 4)[:, :2].sum(1).view(4, 2).flip(1).flatten()
    torch.testing.assert_close(planted("copy_async", x, y), pairs)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("f16", "bf16"))
def test_matrix_instructions(dtype: torch.dtype):
    a, b, y = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.empty(16, 8)
    planted(f"matrix_{'f16' if dtype == torch.float16 else 'bf16'}", torch.cat([a.flatten(), b.flatten()]), y)
    torch.testing.assert_close(y, (a.double() @ b.double()).float(), rtol=1e-6, atol=1e-6)


def test_tf32_matrix_instruction():
    a, b, y = torch.randn(16, 8), torch.randn(8, 8), torch.empty(16, 8)
    planted("matrix_tf32", torch.cat([a.flatten(), b.flatten()]), y)

    def rounded(t):  # to ten bits of fraction, ties away from zero
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()

    torch.testing.assert_close(y, (rounded(a) @ rounded(b)).float(), rtol=1e-6, atol=1e-6)


def test_clusters_and_distributed_shared_memory():
    x, y = torch.randn(64), torch.empty(64)
    total = x.view(2, 32).sum(0)
    torch.testing.assert_close(planted("cluster_sum", x, y), torch.cat([total, total]))


@pytest.mark.parametrize(
    ("name", "what", "thread", "line"),
    (
        ("read_beyond", "a read of 4 bytes out of bounds: 4 bytes beyond the end of x (32 bytes)", 7, "i + (i == 7)"),
        ("write_beyond", "a write of 4 bytes out of bounds: 4 bytes before the beginning of y", 5, "i == 5 ? -1"),
        ("write_input", "a write to x, which is only read", 0, "void write_input"),
        ("misaligned", "a read of 16 bytes that is not aligned", 0, "void misaligned"),
        ("shared_beyond", "a write of 4 bytes at byte 128 of shared memory, which has 128", 3, "s[32] = 0"),
        ("shared_unwritten", "a read of shared memory that nothing in this block has written", 9, None),
        ("read_after_write_race", "a read of shared memory that block (0, 0, 0), thread (0, 0, 0) has wr", 32, None),
        ("write_after_read_race", "shared memory that block (0, 0, 0), thread (58, 0, 0) has read", 62, "s[5] = other"),
        ("missing_syncwarp", "a read of shared memory that nothing in this block has written", 0, None),
        ("barrier_not_reached", "__syncthreads() is not reached by all threads: 63 wait in it, 1 have ended", 0, None),
        ("barrier_in_two_places", "threads of one warp wait in different barriers: planted.cu:", 1, None),
        ("shuffle_without_a_lane", "__shfl_xor_sync is not reached by all threads: 31 wait in it, 1 have end", 0, None),
        ("copy_without_wait", "a read of shared memory that a cp.async is still copying to", 0, None),
        ("copy_without_barrier", "a read of shared memory that", 0, None),
        ("cluster_race", "a read of shared memory that", 31, None),
    ),
)  # fmt: skip
def test_planted_error(name: str, what: str, thread: int, line: str | None):
    x = torch.randn(8 if "beyond" in name and "shared" not in name else 64)
    y = torch.empty(x.numel())
    with pytest.raises(RuntimeError) as caught:
        planted(name, x, y)
    message = str(caught.value)
    assert what in message, message
    assert f"; block (0, 0, 0), thread ({thread}, 0, 0), at planted.cu:" in message, message
    assert {"cluster_race": "cluster_sum<false>"}.get(name, name) in message.rpartition(" in ")[2], message
    if line is not None:
        found = re.findall(r"at planted\.cu:(\d+)", message)
        assert int(found[-1]) == line_of(line), message


@pytest.mark.parametrize(
    ("name", "what"),
    (
        ("cluster_late_race", "(0, 0, 0), thread (31, 0, 0) has written since the last barrier; block (1, 0, 0)"),
        ("cluster_left", "the block may end before block (1, 0, 0), thread (31, 0, 0) has used its shared memory"),
    ),
)  # fmt: skip
def test_planted_error_between_blocks_of_a_cluster(name: str, what: str):
    x, y = torch.randn(32), torch.empty(32)
    with pytest.raises(RuntimeError) as caught:
        planted(name, x, y)
    assert what in str(caught.value) and "at planted.cu:" in str(caught.value)
    assert torch.equal(planted("cluster_stayed", x, y), x)


def test_after_an_error_all_is_well():
    x, y = torch.randn(64), torch.empty(64)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="barrier"):
            planted("read_after_write_race", x, y)
        assert torch.equal(planted("with_syncwarp", x[:32], y[:32]), x[:32].view(16, 2).flip(1).flatten())


@pytest.mark.parametrize(
    ("name", "why"),
    (
        ("too_many_threads", "2048 threads a block; 1 to 1024"),
        ("too_much_shared", "1048576 bytes of shared memory; the device has 232448"),
    ),
)
def test_impossible_launch(name: str, why: str):
    with pytest.raises(RuntimeError, match=why):
        planted(name, torch.randn(32), torch.empty(32))
