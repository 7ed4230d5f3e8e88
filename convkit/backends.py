"""Switches of the whole process, in the manner of `torch.backends`.

Winograd's method computes a convolution of stride 1 with a third of the multiplications if its filters are 2x2, with a
quarter if they are 3x3 and a sixth if they are 4x4 or 5x5 (Lavin and Gray 2016, arXiv:1509.09308), and a somewhat
larger rounding error. With a stride of 2 or 4, the pixels that a filter steps over become channels first: 11x11 filters
with stride 4 are 3x3 ones of 16 times the channels, 7x7 ones with stride 2 are 4x4. Groups, of 16 channels or more and
with stride 1, come one after the other. convkit takes it on the CPU where it is faster, in the forward pass and both
gradients, for float32, and for bfloat16 and float16, which are computed in float32; never for float64. What it changes:

- The error, as the norm of the difference from float64 over the norm of the result, stays below 1e-5. Measured on
  normal random data it is 8e-7 in the forward pass and the input gradient and 6e-7 to 8e-7 in the weight gradient, from
  64 to 512 channels alike. convkit's direct kernels have 2e-7, and 2e-7 to 6e-7; PyTorch's have 4e-7 with 64 channels
  and 1.2e-6 with 512, and 2e-7 to 8e-7. With filters of 4x4 and 5x5 taps it is 2e-6 to 4e-6, and up to 6e-6 in the
  weight gradient. Rounding a result to bfloat16 costs 1.7e-3, to float16 2.1e-4, whatever the method: theirs show
  nothing of it.
- A NaN or an infinity spoils, as NaN, all 4x4 or 5x5 outputs of the tiles that it touches, not only those under the
  filter (in the weight gradient: the pair of channel and filter, as ever). Values above 1e34 may overflow on the way.

Results are bitwise repeatable and independent of the number of threads either way.
"""

from __future__ import annotations

from types import TracebackType

from convkit import _C


def winograd_enabled() -> bool:
    """Whether convolutions on the CPU may use Winograd's method."""
    return _C.winograd() != 0


class set_winograd:  # noqa: N801 (reads like torch.set_grad_enabled)
    """Says whether they may, from now on or, as a context manager, for a while:

        convkit.set_winograd(False)

        with convkit.set_winograd(False):
            loss.backward()

    The environment variable CONVKIT_WINOGRAD=0 does the same from the start. The switch is one for the process and not
    one a thread, for a backward pass runs in threads of its own: it may be set from any thread, and convolutions that
    start afterwards follow it. A context manager puts back what it found, so two threads should not nest theirs.

    Raises TypeError unless `enabled` is a bool.
    """

    def __init__(self, enabled: bool):
        if not isinstance(enabled, bool):
            raise TypeError(f"convkit.set_winograd: enabled: got {enabled!r}; accepts True and False")
        self._before = _C.set_winograd(int(enabled))

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _C.set_winograd(self._before)
